"""Reading the policy inside a trainer of TRL's. Knows no method: what the numbers are for is the caller's matter."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from . import influence
from .hidden_states import expected_terms
from .passes import find_policy_pass, run_policy_pass
from .tokens import TokenReading


class PolicyReadingMixin:
    """
    For trainers that prepare loss inputs in `_generate_and_score_completions`, as TRL's GRPO and RLOO trainers do: put
    it before the trainer among the bases, and wrap the parent's preparation in `listening_to_policy`.

    One method of the parent is listened to, `_get_per_token_logps_and_entropies`, and nothing changes for its caller.
    """

    # Whether N is read along. It takes one more projection of the hidden states onto the vocabulary.
    reads_expected_term = False
    _heard: list[TokenReading] | None = None

    @contextmanager
    def listening_to_policy(self) -> Iterator[list[TokenReading]]:
        """Inside, what TRL's own passes of the policy say is added to the list that this yields."""
        self._heard = []
        try:
            yield self._heard
        finally:
            self._heard = None

    def read_policy(self, batch: dict[str, Any], heard: Sequence[TokenReading]) -> TokenReading:
        """
        What the policy says of the tokens of `batch`: from TRL's old-policy pass if it ran one, else from a pass of
        our own in eval mode, which draws no random number.

        Args:
            batch (`dict`): Loss inputs as TRL returns them.
            heard (`Sequence[TokenReading]`): From `listening_to_policy` around their preparation.
        """
        found = find_policy_pass(heard, batch, batch["completion_mask"])
        if found is not None:
            return found
        return run_policy_pass(self._read_pass, self.model, batch, self.args.per_device_train_batch_size)

    def log_prob_derivatives(
        self,
        batch: dict[str, Any],
        mask: torch.Tensor,
        rows: torch.Tensor,
        *,
        entropy: float,
        aggregation: str,
        logps: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        `D_i` of [`policy.influence`], `(B,)`: how the log-prob of each rollout of this rank moves along the gradient
        of the entropy over all ranks' rollouts, in nats per unit of parameter norm. 0 where that gradient vanishes.

        Args:
            batch (`dict`): Loss inputs as TRL returns them.
            mask (`torch.Tensor` of shape `(B, T)`): 1 on loss tokens.
            rows (`torch.Tensor` of shape `(B,)`): Whose derivative is asked for; that of others may be 0.
            entropy (`float`): Of the batch over all ranks, in nats.
            aggregation (`str`): What it is the mean of, see `entropy_sums`.
            logps (`torch.Tensor` of shape `(B, T)`, *optional*): Log-probs, if they were read without dropout.

        Raises:
            FloatingPointError: If the gradient is not finite, on all ranks alike.
        """
        ranks, size, count = self.accelerator.num_processes, self.args.per_device_train_batch_size, len(mask)
        first = self.accelerator.process_index * count
        chosen = influence.rows_for_gradient(first, count, ranks * count)
        gradient, weight = influence.entropy_gradient(
            self._read_pass, self.model, batch, mask, chosen, aggregation=aggregation, batch_size=size
        )
        # Tensor by tensor: a reduction of all at once would need room for the parameters twice more.
        for index, part in enumerate(gradient):
            gradient[index] = self.accelerator.reduce(part, reduction="sum")
        weight = self.accelerator.reduce(torch.tensor(weight, device=mask.device), reduction="sum").item()
        norm = influence.total_norm(gradient)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient of the policy's entropy at step {self.state.global_step} is not finite (norm {norm}). "
                "The step was refused; lower the learning rate or resume from an earlier checkpoint."
            )
        if norm == 0 or entropy <= 0:
            return torch.zeros(count, device=mask.device)
        for part in gradient:
            part.div_(norm)
        rounds = self.accelerator.mixed_precision != "no" or self.args.tf32
        if rounds or not influence.resolves_small_steps(self.model):
            asked = rows.nonzero().flatten().tolist()
            return influence.derivatives_by_gradients(self._read_pass, self.model, batch, mask, asked, gradient)
        step = influence.difference_step(entropy, norm / weight)
        return influence.derivatives_by_difference(
            self._read_pass, self.model, batch, mask, gradient, step=step, logps=logps, batch_size=size
        )

    def _get_per_token_logps_and_entropies(self, model, *args, compute_entropy=False, **kwargs):
        if self._heard is None or model is not self.model:
            return super()._get_per_token_logps_and_entropies(model, *args, compute_entropy=compute_entropy, **kwargs)
        # TRL asks for log-probs alone here, although its fused head returns the entropy with them.
        reading, aux_loss = self._read_pass(model, *args, **kwargs)
        self._heard.append(reading)
        return reading.logps, reading.entropies if compute_entropy else None, aux_loss

    def _read_pass(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """One of TRL's passes, with all that a [`TokenReading`] holds, and its router loss."""
        arguments = (input_ids, attention_mask, logits_to_keep, *args)
        kwargs["compute_entropy"] = True
        if not self.reads_expected_term:
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(model, *arguments, **kwargs)
            return TokenReading(logps, entropies), aux_loss
        cast = getattr(self.args, "cast_lm_head_to_fp32", False)
        with expected_terms(self._causal_lm(), self.temperature, cast) as terms:
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(model, *arguments, **kwargs)
        return TokenReading(logps, entropies, torch.cat(terms)[:, -logits_to_keep:]), aux_loss

    def _causal_lm(self) -> torch.nn.Module:
        """The module whose `forward` has TRL's fused head: without wrappers of ranks and adapters."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model
