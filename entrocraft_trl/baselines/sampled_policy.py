"""What the policy that sampled the rollouts says of each token: read once a generation batch, for methods to use."""

from typing import Any

import torch

from ..policy.batch_entropy import BatchTotals, check_readable, policy_totals
from ..policy.mixin import PolicyReadingMixin
from ..policy.tokens import TokenReading, loss_mask


class SampledPolicyMixin(PolicyReadingMixin):
    """
    For GRPO trainers whose method reads log-probs, entropies or N of the policy that sampled the rollouts: put it
    before the trainer among the bases, and override `with_reading`. In evaluation nothing is read.
    """

    def needs_reading(self, batch: dict[str, Any]) -> bool:
        """Whether `with_reading` is called for these loss inputs; the same on all ranks."""
        return True

    def with_reading(self, batch: dict[str, Any], reading: TokenReading) -> dict[str, Any]:
        """
        Loss inputs of this rank, with what the method makes of the reading.

        A tensor `(B, ...)` under a key of the method's own goes through TRL's shuffle and split with its rows, and
        is saved with what is left of a generation batch.
        """
        raise NotImplementedError

    def _generate_and_score_completions(self, inputs):
        training = self.model.training
        with self.listening_to_policy() as heard:
            batch = super()._generate_and_score_completions(inputs)
        if not training or not self.needs_reading(batch):
            return batch
        reading, _ = self.read_policy(batch, loss_mask(batch), heard)
        return self.with_reading(batch, reading)

    def batch_entropy(self, batch: dict[str, Any], reading: TokenReading) -> float:
        """
        Entropy in nats of the policy that sampled: mean over the loss tokens of all ranks; NaN without a loss token.

        Raises:
            FloatingPointError: If it is not finite, on all ranks alike.
        """
        sums = policy_totals(reading, loss_mask(batch), "token")
        totals = BatchTotals(*self.accelerator.reduce(sums, reduction="sum").tolist())
        check_readable(totals, "policy", self.state.global_step)
        return totals.entropy


def largest_of_all_ranks(values: torch.Tensor, accelerator) -> torch.Tensor:
    """The elementwise maximum of the ranks' `values` `(n,)`; each of them has to call this."""
    return accelerator.gather(values.unsqueeze(0)).amax(dim=0)
