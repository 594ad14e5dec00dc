"""
TRL's passes of the old policy and of the reference model over the rows that are computed, and no others.

TRL runs them while it prepares a generation batch, before it has rewards: nobody can know then which rows will leave.
Where nothing reads their log-probs before the loss does, they are run after micro-batches were made up, over these.
Meanwhile NaN stands for the log-probs, so that whoever reads them too early ends the run, whose losses have to be
finite, in place of training on numbers without a meaning.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ..policy.passes import pass_of_rows
from ..policy.tokens import TokenReading


class DeferredPass(NamedTuple):
    """A pass that TRL asked for: what stands for its log-probs `(B, T)`, and by what they are computed."""

    placeholder: torch.Tensor
    model: torch.nn.Module
    adapter: str | None  # `None`: without one


class DeferredPassMixin:
    """
    For TRL's GRPO and RLOO trainers. Inside of `deferring_passes` TRL's passes wait for `with_deferred_passes`.

    Deferred are those that TRL itself asks for, in its own preparation and for log-probs alone: who asks for entropies
    too reads them at once. They are run by TRL's method, before any optimizer step on the batch, with the model, the
    adapter and the mode that TRL ran them with, and on every rank over as many micro-batches.

    Two methods of the parent are overridden, `_generate_and_score_completions` to know which calls are TRL's own, and
    `_get_per_token_logps_and_entropies`; nothing changes for their other callers.
    """

    _passes_wait: Callable[[], bool] | None = None
    _policy_adapter: str | None = None  # in use while TRL prepares a batch, but for the reference's pass
    _asked_for: list[DeferredPass] | None = None  # by TRL, in the preparation under way
    _deferred: dict[str, DeferredPass] = {}  # by the key among the loss inputs

    @contextmanager
    def deferring_passes(self, wait: Callable[[], bool]) -> Iterator[None]:
        """
        Inside, passes of TRL's preparation wait if `wait()`, which has to be the same on all ranks. It is asked once
        TRL prepares a generation batch: most micro-steps take what an earlier one has left.
        """
        self._passes_wait = wait
        try:
            yield
        finally:
            self._passes_wait, self._deferred = None, {}

    def with_deferred_passes(self, buffer: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches in `buffer`, which may be empty dicts, with the log-probs of the passes that wait."""
        for key, deferred in self._deferred.items():
            unwrapped = self.accelerator.unwrap_model(deferred.model)
            checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
            with torch.no_grad(), checkpointing, computing_with(unwrapped, deferred.adapter):
                buffer = [inputs and self._with_log_probs(inputs, key, deferred.model) for inputs in buffer]
        return buffer

    def _with_log_probs(self, inputs: dict[str, Any], key: str, model: torch.nn.Module) -> dict[str, Any]:
        def read(*args, **kwargs):
            logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(*args, **kwargs)
            return TokenReading(logps, entropies), aux_loss

        logps = pass_of_rows(read, model, inputs, self.args.per_device_train_batch_size).logps
        return {**inputs, key: filled(inputs[key], logps, inputs["completion_mask"])}

    def _generate_and_score_completions(self, inputs):
        if self._passes_wait is None or not self._passes_wait():
            return super()._generate_and_score_completions(inputs)
        self._policy_adapter = adapter_in_use(self.accelerator.unwrap_model(self.model))
        self._asked_for = []
        try:
            batch = super()._generate_and_score_completions(inputs)
            self._deferred = {key_of(batch, deferred.placeholder): deferred for deferred in self._asked_for}
        finally:
            self._asked_for = None
        return batch

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, *args, compute_entropy=False, **kwargs
    ):
        if self._asked_for is not None and not compute_entropy:
            adapter = adapter_in_use(self.accelerator.unwrap_model(model))
            of_policy = model is self.model and adapter == self._policy_adapter
            if not (of_policy and corrects_for_engine(self)):
                placeholder = torch.full((len(input_ids), logits_to_keep), torch.nan, device=input_ids.device)
                self._asked_for.append(DeferredPass(placeholder, model, adapter))
                return placeholder, None, None
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, compute_entropy=compute_entropy, **kwargs
        )


def corrects_for_engine(trainer: Any) -> bool:
    """Whether the old policy's log-probs are compared with those of an engine before there are rewards."""
    return trainer.use_vllm and getattr(trainer, "vllm_importance_sampling_correction", False)  # RLOO has none


def adapter_in_use(model: torch.nn.Module) -> str | None:
    """The adapter that `model`, without wrappers of ranks, computes with; `None` if it has none or it is disabled."""
    if not isinstance(model, PeftModel) or not model.has_active_enabled_adapter:
        return None
    return model.active_adapter


@contextmanager
def computing_with(model: torch.nn.Module, adapter: str | None) -> Iterator[None]:
    """Inside, `model` computes with `adapter`; nothing is touched if it does so anyway."""
    if adapter_in_use(model) == adapter:
        yield
    else:
        with use_adapter(model, adapter):
            yield


def key_of(batch: dict[str, Any], placeholder: torch.Tensor) -> str:
    """
    Under which key `placeholder` lies in loss inputs as TRL returns them. RLOO keeps the sums of its rows alone.

    Raises:
        RuntimeError: If it lies nowhere, so that nobody knows what was made of it.
    """
    for key, value in batch.items():
        if value is placeholder or (key == "old_logps" and value.isnan().all()):
            return key
    raise RuntimeError(
        f"TRL no longer hands on the log-probs that it asked for; among its loss inputs are {sorted(batch)}. "
        "compute_all_rows=True does without."
    )


def filled(column: torch.Tensor, logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    `column` with log-probs in place of NaN. Rows that a rejection or a lack of rows has given other values keep them.

    Args:
        column (`torch.Tensor` of shape `(B, T)` or `(B,)`): Log-probs, or their sums over each row.
        logps (`torch.Tensor` of shape `(B, T)`): What the pass says.
        mask (`torch.Tensor` of shape `(B, T)`): 1 on completion tokens.
    """
    values = logps if column.ndim > 1 else (logps * mask).sum(dim=1)
    return torch.where(column.isnan(), values, column.to(values.dtype))
