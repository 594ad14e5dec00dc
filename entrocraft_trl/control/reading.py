"""How high the entropy of a batch is, and where the band lies now."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .. import metric_names
from ..policy.batch_entropy import (
    BatchTotals,
    check_readable,
    cluster_sums,
    policy_totals,
    reading_scatter,
    rollout_sums,
    sampling_totals,
    scored_tokens,
)
from ..policy.mixin import Heard, PolicyReadingMixin
from ..policy.tokens import TokenReading
from . import schedule
from .state import ControlMemory, EntropyControlState


class EntropyInBandMixin(PolicyReadingMixin):
    """
    The half of [`~mixin.EntropyControlMixin`] that looks and decides nothing: the reading of a batch over all ranks,
    and the band in nats. It needs an [`EntropyControlState`] among the callbacks.
    """

    _band_in_unit: Callable[[float], tuple[float, float]]  # from progress in 0..1, in `args.entropy_unit`

    @staticmethod
    def _check_engine(config: Any, rollout_func: Any) -> None:
        if config.entropy_source == "sampling" and not config.use_vllm and rollout_func is None:
            raise ValueError(
                "entropy_source='sampling' needs a rollout engine that returns log-probs, got use_vllm=False and no "
                "rollout_func; use entropy_source='policy'."
            )

    @property
    def control_memory(self) -> ControlMemory:
        """What entropy control carries from step to step and through checkpoints."""
        # Looked up, because transformers may replace callbacks when it restores them from a checkpoint.
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, EntropyControlState)).memory

    def band_at(self, progress: float) -> schedule.Band:
        """
        The band in nats at `progress` in 0..1. With `entropy_width="auto"` it is as wide as readings scatter now.

        Raises:
            RuntimeError: If the band is relative to the initial entropy, or as wide as readings scatter, and no batch
                was measured yet.
        """
        band, memory = schedule.Band(*self._band_in_unit(progress)), self.control_memory
        if not self._band_is_known:
            raise RuntimeError("the band follows from the first batch, which this run has not measured yet.")
        if self.args.entropy_unit == "initial":
            band = band.scaled(memory.initial_entropy)
        if self.args.entropy_width == "auto":
            band = band.of_width(schedule.AUTO_WIDTH_SCATTERS * memory.reading_scatter)
        return band

    @property
    def _band_is_known(self) -> bool:
        """In nats: no batch has to be measured first, or one was."""
        from_first_batch = self.args.entropy_unit == "initial" or self.args.entropy_width == "auto"
        return not from_first_batch or self.control_memory.initial_entropy is not None

    def _measure(
        self, batch: dict[str, Any], mask: torch.Tensor, heard: Heard
    ) -> tuple[TokenReading | None, BatchTotals]:
        """This rank's numbers of each token, where they are the policy's own, and the sums over all ranks."""
        source, aggregation = self.args.entropy_source, self.args.entropy_aggregation
        if source == "policy":
            tokens, read_from = self.read_policy(batch, mask, heard)
            sums = policy_totals(tokens, mask, aggregation)
            of_rollouts = rollout_sums(tokens.entropies, mask, aggregation)
        else:
            if "sampling_per_token_logps" not in batch:
                raise ValueError("entropy_source='sampling', but the rollout engine returned no 'logprobs'.")
            tokens, read_from, logps = None, "engine", batch["sampling_per_token_logps"]
            sums = sampling_totals(logps, mask, aggregation)
            of_rollouts = rollout_sums(-logps, scored_tokens(logps, mask), aggregation)
        rank, ranks, rows = self.accelerator.process_index, self.accelerator.num_processes, len(mask)
        clusters = cluster_sums(of_rollouts, rank * rows, ranks * rows, self.num_generations)
        # One reduction for both: on many ranks each costs as much as all that control computes.
        both = self.accelerator.reduce(torch.cat([sums, clusters.flatten()]), reduction="sum")
        totals = BatchTotals(*both[: len(sums)].tolist())
        check_readable(totals, source, self.state.global_step)
        if totals.tokens:
            memory, scatter = self.control_memory, reading_scatter(both[len(sums) :].view(-1, 2))
            memory.reading_scatter = schedule.running_scatter(memory.reading_scatter, scatter)
            self._log_metrics({"recorded": read_from == "record", "own_pass": read_from == "own_pass"})
        return tokens, totals

    def _band_now(self, entropy: float) -> schedule.Band:
        if math.isnan(entropy):
            # No rollout has a loss token (all truncated, say): nothing to measure, nothing to learn from.
            return schedule.Band(0.0, math.inf)
        memory = self.control_memory
        first = memory.initial_entropy is None
        if first:
            memory.initial_entropy = entropy
        memory.horizon = self.args.entropy_schedule_steps or memory.horizon or self.state.max_steps
        band = self.band_at(schedule.progress_at(self.state.global_step, memory.horizon))
        if first and (entropy < band.low / 2 or entropy > band.high * 2):
            warnings.warn(
                f"The first measured entropy is {entropy:.3f} nats, far outside the band {band.low:.3f} to "
                f"{band.high:.3f} nats: one sign of advantage will be rejected for a long time. Start the band near "
                f"{entropy:.3f}, or give it in multiples of the initial entropy (entropy_unit='initial').",
                stacklevel=2,
            )
        return band

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics["train"][metric_names.key(name)].append(float(value))
