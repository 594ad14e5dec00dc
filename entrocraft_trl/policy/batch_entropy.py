"""From token numbers to the entropy of a batch over all ranks, or to the reason why it cannot be read."""

import math
from typing import NamedTuple

import torch

from .tokens import TokenReading, sampled_entropy_term


# An engine leaves out a token now and then. With more than a tenth missing, the mean is that of a selection of tokens
# which nobody made, and with nearly all missing it would be the entropy of a handful.
LARGEST_UNSCORED_SHARE = 0.1


class BatchTotals(NamedTuple):
    """Sums over the rollouts of a batch, in nats and counts, to be added up over ranks."""

    entropy_sum: float  # over `entropy_count` tokens, or rollouts
    entropy_count: float
    sampled_sum: float  # of S, over all loss tokens
    unreadable: float  # rollouts with a number on a loss token that is not finite
    rollouts: float
    tokens: float
    unscored: float  # loss tokens without a log-prob of the rollout engine

    @property
    def entropy(self) -> float:
        """In nats; NaN without a loss token."""
        return self.entropy_sum / self.entropy_count if self.entropy_count else math.nan

    @property
    def mean_sampled_term(self) -> float:
        """Mean of S over the loss tokens, which estimates the mean of N."""
        return self.sampled_sum / self.tokens if self.tokens else 0.0

    @property
    def unscored_share(self) -> float:
        return self.unscored / self.tokens if self.tokens else 0.0


def policy_totals(reading: TokenReading, mask: torch.Tensor, aggregation: str) -> torch.Tensor:
    """
    This rank's [`BatchTotals`] from the policy's own numbers, as one tensor `(7,)`, so that one reduction carries all.

    Args:
        reading ([`TokenReading`]): Numbers of the tokens.
        mask (`torch.Tensor` of shape `(B, T)`): 1 on loss tokens.
        aggregation (`str`): See `entropy_sums`.
    """
    sampled = sampled_entropy_term(reading.logps, reading.entropies)
    terms = entropy_sums(sampled, mask, "token")[:1]
    counts = unreadable_counts(reading.entropies + sampled, mask)
    return torch.cat([entropy_sums(reading.entropies, mask, aggregation), terms, counts, torch.zeros_like(terms)])


def sampling_totals(logps: torch.Tensor, mask: torch.Tensor, aggregation: str) -> torch.Tensor:
    """
    `policy_totals` of the Monte-Carlo estimate -log p from the rollout engine's log-probs `(B, T)`.

    Tokens that the engine could not score (NaN) are left out, from the count too.
    """
    scored = scored_tokens(logps, mask)
    counts = unreadable_counts(logps.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf), mask)
    unscored = (mask.sum() - scored.sum()).float().view(1)
    return torch.cat([entropy_sums(-logps, scored, aggregation), torch.zeros_like(unscored), counts, unscored])


def scored_tokens(logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mask `(B, T)` of the loss tokens that the rollout engine has a log-prob of; NaN says that it has none."""
    return mask.bool() & ~torch.isnan(logps)


def entropy_sums(entropies: torch.Tensor, mask: torch.Tensor, aggregation: str) -> torch.Tensor:
    """
    Sum and count whose ratio is the batch entropy, `(2,)`; add them up over ranks before dividing.

    Takes what `rollout_sums` takes.
    """
    return rollout_sums(entropies, mask, aggregation).sum(dim=0)


def rollout_sums(entropies: torch.Tensor, mask: torch.Tensor, aggregation: str) -> torch.Tensor:
    """
    What each rollout adds to the sum and to the count whose ratio is the batch entropy.

    Args:
        entropies (`torch.Tensor` of shape `(B, T)`): Token entropies in nats.
        mask (`torch.Tensor` of shape `(B, T)`): 1 on loss tokens.
        aggregation (`str`): `"token"`: mean over tokens; `"sequence"`: mean of the rollouts' means, over the rollouts
            that hold a loss token.

    Returns:
        `torch.Tensor` of shape `(B, 2)`, float32.
    """
    mask = mask.bool()
    # Padding may hold NaN (an engine's unscored tokens); multiplying by a zero mask would keep it.
    sums = torch.where(mask, entropies.float(), 0.0).sum(dim=1)
    tokens = mask.sum(dim=1).float()
    if aggregation == "token":
        return torch.stack([sums, tokens], dim=1)
    return torch.stack([sums / tokens.clamp(min=1), (tokens > 0).float()], dim=1)


def cluster_sums(sums: torch.Tensor, first: int, total: int, num_generations: int) -> torch.Tensor:
    """
    What was drawn independently of each other, to be added up over ranks: groups, since rollouts of one prompt are
    alike. With a single group, what its rollouts tell of each other has to do.

    Args:
        sums (`torch.Tensor` of shape `(B, 2)`): `rollout_sums` of this rank's rollouts.
        first (`int`): Place of the first of them among those of all ranks, which stand group by group.
        total (`int`): Rollouts of all ranks.
        num_generations (`int`): Rollouts of a group, which may lie on several ranks.

    Returns:
        `torch.Tensor` of shape `(C, 2)`: Sums of this rank's rollouts in each cluster, 0 in those of other ranks.
    """
    size = num_generations if total > num_generations else 1
    clusters = torch.arange(first, first + len(sums), device=sums.device) // size
    return sums.new_zeros(total // size, 2).index_add(0, clusters, sums)


def reading_scatter(clusters: torch.Tensor) -> float:
    """
    Standard error of a batch's entropy in nats: how far the readings of fresh batches would lie apart. It is the
    linearised error of a ratio of sums over clusters.

    Args:
        clusters (`torch.Tensor` of shape `(C, 2)`): `cluster_sums`, added up over all ranks.

    Returns:
        `float`: 0.0 for a single cluster, or without a loss token.
    """
    clusters = clusters.cpu().double()  # not every device has float64, and all ranks must come to the same number
    total, count = clusters.sum(dim=0)
    if len(clusters) < 2 or not count:
        return 0.0
    residuals = clusters[:, 0] - total / count * clusters[:, 1]
    return (residuals.square().sum() * len(clusters) / (len(clusters) - 1)).sqrt().item() / count.item()


def unreadable_counts(readings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    How much of a batch cannot be read: rollouts with NaN or an infinity on a loss token, all rollouts, loss tokens.

    Args:
        readings, mask (`torch.Tensor` of shape `(B, T)`): What is read of each token, and 1 on loss tokens.

    Returns:
        `torch.Tensor` of shape `(3,)`, float32; add them up over ranks.
    """
    mask = mask.bool()
    broken = (mask & ~torch.isfinite(readings)).any(dim=1)
    return torch.stack([broken.sum(), torch.tensor(len(mask), device=mask.device), mask.sum()]).float()


def check_readable(totals: BatchTotals, source: str, step: int) -> None:
    """
    Refuse a batch whose entropy is not finite, or that of too few tokens.

    Args:
        totals ([`BatchTotals`]): Over all ranks, so that all refuse or none does.
        source (`str`): `"policy"` or `"sampling"`.
        step (`int`): Optimizer step, for the message.

    Raises:
        FloatingPointError: What was found in how many rollouts, and what to do.
    """
    nothing_read = totals.tokens and not totals.entropy_count
    if totals.unreadable or nothing_read or totals.unscored_share > LARGEST_UNSCORED_SHARE:
        raise FloatingPointError(_refusal(totals, source, step))


def _refusal(totals: BatchTotals, source: str, step: int) -> str:
    _, _, _, unreadable, rollouts, tokens, unscored = totals
    if source == "sampling" and not unreadable and unscored < tokens:
        return (
            f"The rollout engine returned no log-prob (NaN) for {unscored:.0f} of {tokens:.0f} loss tokens of the "
            f"generation batch at step {step}; entropy_source='sampling' reads from at least "
            f"{1 - LARGEST_UNSCORED_SHARE:.0%} of them. The step was refused; mend the engine's log-probs, or use "
            "entropy_source='policy'."
        )
    start = f"The policy's entropy over the generation batch at step {step} is not finite: "
    if source == "sampling":
        found = (
            f"the rollout engine returned infinite log-probs in {unreadable:.0f} of {rollouts:.0f} rollouts"
            if unreadable
            else f"the rollout engine returned NaN as the log-prob of all {tokens:.0f} loss tokens"
        )
    else:
        found = (
            f"the model returns NaN or infinite logits in {unreadable:.0f} of {rollouts:.0f} rollouts (a vocabulary "
            "masked with -inf counts too)"
        )
    return f"{start}{found}. The step was refused; lower the learning rate or resume from an earlier checkpoint."
