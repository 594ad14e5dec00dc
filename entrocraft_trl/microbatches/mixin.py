"""Computing only rows that carry gradient, in a trainer of TRL's. Wiring only: `plan` and `packing` do the work."""

import math
import time
from collections import defaultdict
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger

from .. import metric_names
from ..normalisation import WEIGHT, loss_normaliser
from ..policy.eval_mode import active_dropout
from .deferred_passes import DeferredPassMixin
from .exactness import kl_in_loss, passes_can_wait, what_can_be_cropped, why_all_rows
from .metrics import RESTORED, restored
from .packing import SHARE, UNSLICEABLE, packed, row_facts, rows_from_facts
from .plan import Share, padded_tokens, plan_window, shares


logger = get_logger(__name__)


class _NothingToCompute(Exception):
    """The micro-batch is a spare; caught in `training_step`."""


class MicroBatchMixin(DeferredPassMixin):
    """
    For TRL's GRPO and RLOO trainers: put it before the trainer among the bases. Rows without gradient are not
    computed, and the others in micro-batches of similar lengths, where the gradient is the same up to the rounding,
    of float32 or bf16, of other shapes and of another order of sums. See `exactness` for where it is not the same, and
    `compute_all_rows` of [`MicroBatchConfig`] for the switch.

    TRL generates, shuffles and splits as ever. Then the rows of each *window*, those of one generation batch that one
    optimizer step takes, are put into as few micro-batches as hold them, which come last in the window; the first are
    spares, empty dicts. A spare's `training_step` counts, and returns a loss of 0 without a backward pass: DeepSpeed
    refuses the backward pass of a loss without parameters, or follows it with wrong gradients. Spares cannot be last:
    the last one makes ranks exchange their gradients, and the optimizer of DeepSpeed step.

    TRL's passes of the old policy and of the reference go over these micro-batches too, where nothing needs their
    log-probs before: see [`DeferredPassMixin`] and `passes_can_wait`.

    Five methods of the parent are overridden: `_prepare_inputs` and `training_step` for the above, `compute_loss` to
    weigh the loss and to restore the meaning of TRL's metrics, `_generate` and `_calculate_rewards` to time them.
    """

    _told_all_rows: str | None = None
    _dropout: tuple[torch.nn.Module, str | None] | None = None  # of which model, and which
    _seconds_preparing = 0.0  # seconds of the micro-step under way
    _seconds_updating = 0.0  # seconds of the optimizer step under way

    def __init__(self, *args, **kwargs):
        self._window_metrics: list[tuple[dict[str, list[float]], Share]] = []  # metrics of the window under way
        self._preparing_seconds: dict[str, float] = defaultdict(float)  # of the preparation under way
        super().__init__(*args, **kwargs)

    # --------------------------------------------------------------------------------------------------- micro-batches

    def _prepare_inputs(self, generation_batch):
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        before, start = self._buffered_inputs, time.perf_counter()
        self._preparing_seconds.clear()  # of evaluations in between
        with self.deferring_passes(lambda: not self._leaves_batch_alone() and passes_can_wait(self)):
            inputs = super()._prepare_inputs(generation_batch)
            is_new = self._buffered_inputs is not before  # one that a checkpoint held is as it was made up then
            if is_new:
                self._buffered_inputs = self.with_deferred_passes(self._repacked(self._buffered_inputs))
                inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        self._seconds_preparing = time.perf_counter() - start
        if is_new:
            self._log_preparation()
        if not inputs:
            raise _NothingToCompute
        return inputs

    def computes_all_rows(self) -> bool:
        """Whether every row is computed because of the class, the settings or the model, whatever it holds."""
        if self._asked_for_all_rows is True:
            return True
        why = why_all_rows(self) or self._why_dropout()
        if why:
            self._tell_all_rows(why)
        return why is not None

    def _leaves_batch_alone(self) -> bool:
        """Whether the next generation batch stays as TRL splits it, whatever its rows are; the same on all ranks."""
        # In a step that an epoch cuts short, who knows which micro-batch is the last.
        cut_short = self.current_gradient_accumulation_steps != self.args.gradient_accumulation_steps
        return self.computes_all_rows() or cut_short

    def _repacked(self, buffer: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches of a generation batch, made up anew if that is exact."""
        self._window_metrics = []  # of a training that an error has ended
        if self._leaves_batch_alone():
            self._log_shares(1.0, 1.0)
            return buffer
        facts = torch.cat([row_facts(inputs, kl_in_loss=kl_in_loss(self, inputs)) for inputs in buffer])
        everyone = self.accelerator.gather(facts).tolist()
        if any(row[0] == UNSLICEABLE for row in everyone):
            self._tell_all_rows("rows with images cannot be taken out of a batch one by one")
            self._log_shares(1.0, 1.0)
            return buffer
        ranks = [everyone[start : start + len(facts)] for start in range(0, len(everyone), len(facts))]
        return self._by_window(buffer, *zip(*map(rows_from_facts, ranks), strict=True))

    def _by_window(self, buffer, ranks, widths) -> list[dict[str, Any]]:
        prompts, completions = what_can_be_cropped(self.model.config)
        size = min(len(buffer), self.args.gradient_accumulation_steps)  # micro-batches of a window
        most = len(buffer[0]["advantages"])  # rows of a micro-batch
        normaliser = loss_normaliser(type(self), self.args)
        result, rows, tokens = [], 0, 0
        for first in range(0, len(buffer), size):
            window = buffer[first : first + size]
            span = slice(first * most, (first + size) * most)
            in_window = [of_rank[span] for of_rank in ranks]
            plans = plan_window(
                in_window,
                widths,
                most,
                multiple=getattr(self, "pad_to_multiple_of", None),
                crop_prompts=prompts,
                crop_completions=completions,
            )
            mine = packed(window, plans[self.accelerator.process_index], shares(in_window, plans), normaliser)
            result += [{} for _ in range(size - len(mine))] + mine
            rows += sum(len(batch.rows) for plan in plans for batch in plan)
            tokens += padded_tokens(plans)
        everything = sum(len(of_rank) * sum(width) for of_rank, width in zip(ranks, widths, strict=True))
        self._log_shares(rows / sum(map(len, ranks)), tokens / everything)
        return result

    @property
    def _asked_for_all_rows(self) -> bool | None:
        return getattr(self.args, "compute_all_rows", None)  # a config of one's own may lack the field

    def _why_dropout(self) -> str | None:
        """The dropout that acts, unless other draws than those of a run over all rows were asked for."""
        if self._asked_for_all_rows is False:
            return None
        if self._dropout is None or self._dropout[0] is not self.model:  # the search goes through all modules
            self._dropout = self.model, active_dropout(self.model)
        found = self._dropout[1]
        return found and f"dropout ({found}) would draw other numbers; compute_all_rows=False accepts that"

    def _tell_all_rows(self, why: str) -> None:
        if why != self._told_all_rows:
            self._told_all_rows = why
            logger.warning(f"Rows without gradient are computed too: {why}.")

    # -------------------------------------------------------------------------------------------------------- the step

    def training_step(self, *args, **kwargs):
        start, self._seconds_preparing = time.perf_counter(), 0.0
        try:
            loss = super().training_step(*args, **kwargs)
        except _NothingToCompute:
            if self.accelerator.sync_gradients:
                raise RuntimeError(
                    "the last micro-step of an optimizer step has nothing to compute, and ranks would drift apart; "
                    "set compute_all_rows=True, and report this with your batch sizes."
                ) from None
            loss = torch.zeros((), device=self.args.device)
            self._step += 1
            # TRL's own measure of a step; it may be this one that has generated.
            self._current_train_step_time += time.perf_counter() - start
        self._seconds_updating += time.perf_counter() - start - self._seconds_preparing
        if self.accelerator.sync_gradients:
            self._metrics["train"][metric_names.SECONDS_UPDATE].append(self._seconds_updating)
            self._seconds_updating = 0.0
        return loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if WEIGHT not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        inputs = dict(inputs)
        weight, share = inputs.pop(WEIGHT), Share(*inputs.pop(SHARE).tolist())
        metrics = self._metrics["train"]
        before = {name: len(metrics[name]) for name in RESTORED if name in metrics}
        loss = weight * super().compute_loss(model, inputs, *args, **kwargs)
        fresh = {}
        for name in RESTORED:
            if name in metrics:
                fresh[name] = metrics[name][before.get(name, 0) :]
                del metrics[name][before.get(name, 0) :]
        self._window_metrics.append((fresh, share))
        if share.last:
            self._log_restored(inputs)
        return loss

    def _log_restored(self, inputs: dict[str, Any]) -> None:
        """One number for the window in place of one for each of its micro-batches."""
        of_sequences = "old_logps" in inputs or self.args.importance_sampling_level == "sequence"
        window, self._window_metrics = self._window_metrics, []
        for name in window[0][0]:
            values = [(value, share) for fresh, share in window for value in fresh[name]]
            if not values:
                continue
            value = restored(name, *zip(*values, strict=True), of_sequences=of_sequences)
            self._metrics["train"][name].append(self.metric_of_all_rows(name, inputs) if math.isnan(value) else value)

    def metric_of_all_rows(self, name: str, inputs: dict[str, Any]) -> float:
        """
        What to log as TRL's metric `name` where it would have to count rows that were not computed; NaN: nothing.

        Args:
            name (`str`): One of [`metrics.RESTORED`].
            inputs (`dict`): Loss inputs of the window's last micro-batch.
        """
        return math.nan

    # ---------------------------------------------------------------------------------------------------------- clocks

    @contextmanager
    def _timed(self, what: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self._preparing_seconds[what] += time.perf_counter() - start

    def _generate(self, *args, **kwargs):
        with self._timed("generation"):
            return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, *args, **kwargs):
        with self._timed("rewards"):
            return super()._calculate_rewards(*args, **kwargs)

    def _log_preparation(self) -> None:
        generation, rewards = self._preparing_seconds["generation"], self._preparing_seconds["rewards"]
        self._metrics["train"][metric_names.SECONDS_GENERATION].append(generation)
        self._metrics["train"][metric_names.SECONDS_READING].append(self._seconds_preparing - generation - rewards)

    def _log_shares(self, rows: float, tokens: float) -> None:
        self._metrics["train"][metric_names.COMPUTED_ROWS].append(rows)
        self._metrics["train"][metric_names.COMPUTED_TOKENS].append(tokens)
