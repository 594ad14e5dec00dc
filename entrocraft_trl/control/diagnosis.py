"""
What a step's rejection looked like, and whether it works. Pure functions; the trainer logs what they return.

Logged as `entrocraft/...`, once per generation batch (`empty_steps`: per optimizer step), over all ranks, and averaged
over `logging_steps`:

- `entropy`, `entropy_low`, `entropy_high`: measured before anything is rejected, and the band (nats)
- `reading_scatter`: how far one such reading scatters (nats), by the groups of the batches so far
- `recorded`, `own_pass`: whether the policy was read while it sampled, or in a pass of its own; neither: from TRL's
  pass for the old policy, or from the engine's log-probs
- `direction`: -1 too low, 0 inside, +1 too high; `distance_outside_band` (nats)
- `accepted_rollouts`, `accepted_tokens`: shares; `effective_batch_size`: accepted rollouts
- `rejected_positive`, `rejected_negative`: rejected rollouts by sign of the advantage
- `empty_steps`: optimizer steps so far in which no rollout had an advantage and a loss token
- `rules_agree`: share of the rollouts with an advantage for which both rules test the same sign
- `margin_positive`, `margin_negative`: mean sum of S - N by sign of the advantage (nats); the sign rule relies on both
  being positive
- `realised_effect`: nats towards the band since the batch before, if that one was outside
- `least_change`, `most_change`: entropy-change rule and influence: the allowed range, in shares of what the batch can
  do
- `influence_agrees`: influence, where something might have to go: share of the rollouts with an advantage for which it
  and the sign rule test the same sign
- `unscored_tokens`: with `entropy_source="sampling"`: share of loss tokens without a log-prob of the engine

What a batch does not have is left out: a margin where no rollout has that sign, margins and `rules_agree` where token
entropies are not measured or only a part of the tokens trains.

TRL's own `entropy` counts the tokens that are left after `drop`, and is left out where rollouts without an advantage
are not computed: read `entrocraft/entropy`. What the update computed is explained in `microbatches.metrics`. With
`log_completions` the table of completions has a `kept` column, and its advantages are those that were used.
"""

from typing import NamedTuple

import torch

from .state import ControlMemory


class Counts(NamedTuple):
    """
    Sums over rollouts, to be added up over ranks. Margins are sums of S - N over a rollout's tokens (nats), and NaN
    where they were not measured.
    """

    rows: float
    kept_rows: float
    tokens: float
    kept_tokens: float
    rejected_positive: float
    rejected_negative: float
    positive: float
    negative: float
    margin_positive: float
    margin_negative: float
    agreeing: float


def count_batch(
    keep: torch.Tensor, advantages: torch.Tensor, tokens: torch.Tensor, margins: torch.Tensor | None
) -> torch.Tensor:
    """
    This rank's [`Counts`] as one tensor, so that one reduction carries them all.

    Args:
        keep (`torch.Tensor` of shape `(B,)`): Boolean keep mask.
        advantages (`torch.Tensor` of shape `(B,)`): Before rejected ones are zeroed.
        tokens (`torch.Tensor` of shape `(B,)`): Loss tokens of each rollout.
        margins (`torch.Tensor` of shape `(B,)`, *optional*): Sum of S - N of each rollout; positive if confident.
    """
    positive, negative = advantages > 0, advantages < 0
    unmeasured = margins is None
    margins = torch.full_like(tokens, torch.nan, dtype=torch.float32) if unmeasured else margins.float()
    # For a rollout with an advantage, c_i and A_i have one sign exactly when its margin is positive.
    agreeing = ((margins > 0) & (positive | negative)).float().sum()
    return torch.stack(
        [
            torch.ones_like(tokens).sum(),
            keep.float().sum(),
            tokens.float().sum(),
            (tokens * keep).float().sum(),
            (~keep & positive).float().sum(),
            (~keep & negative).float().sum(),
            positive.float().sum(),
            negative.float().sum(),
            (margins * positive).sum(),
            (margins * negative).sum(),
            agreeing + torch.nan if unmeasured else agreeing,
        ]
    )


def share_of_one_sign(scores: torch.Tensor, advantages: torch.Tensor) -> float:
    """Share of the rollouts with an advantage, at least one of `(N,)`, whose score has the advantage's sign."""
    return ((scores * advantages > 0).sum() / (advantages != 0).sum()).item()


def rejection_metrics(counts: Counts) -> dict[str, float]:
    """Metrics of one step. NaN where a share has no members (TRL leaves NaN out of its averages)."""
    metrics = {
        "accepted_rollouts": counts.kept_rows / counts.rows,
        "accepted_tokens": _share(counts.kept_tokens, counts.tokens),
        "effective_batch_size": counts.kept_rows,
        "rejected_positive": counts.rejected_positive,
        "rejected_negative": counts.rejected_negative,
        "rules_agree": _share(counts.agreeing, counts.positive + counts.negative),
        "margin_positive": _share(counts.margin_positive, counts.positive),
        "margin_negative": _share(counts.margin_negative, counts.negative),
    }
    return {name: value for name, value in metrics.items() if value == value}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def watch(memory: ControlMemory, entropy: float, distance: float, direction: int) -> float | None:
    """
    Follow a stretch of generation batches outside the band on one side, in `memory`.

    Returns:
        `float` or `None`: How far (nats) the entropy came towards the band since the batch before, if that one had
        rejections.
    """
    effect = None
    if memory.last_direction and memory.last_entropy is not None:
        effect = (memory.last_entropy - entropy) * memory.last_direction
    if direction != memory.last_direction:
        memory.steps_outside = 0
        memory.distance_at_exit = distance
    memory.steps_outside += abs(direction)
    memory.last_direction, memory.last_entropy = direction, entropy
    return effect


PATIENCE_BATCHES = 30
# In scatters of one reading: what is no larger may be noise.
CLEAR_DRIFT = 2.5


def failure_message(
    memory: ControlMemory, entropy: float, distance: float, rule: str, agree: float | None
) -> str | None:
    """
    Plain words if the band was left for at least `PATIENCE_BATCHES` generation batches in a row and the entropy is
    further from it than when it left, by at least `CLEAR_DRIFT` scatters; `None` otherwise. At most once in a run.
    """
    away = distance - memory.distance_at_exit
    if (
        memory.failure_reported
        or memory.steps_outside < PATIENCE_BATCHES
        or away < CLEAR_DRIFT * memory.reading_scatter
    ):
        return None
    memory.failure_reported = True
    side = "above" if memory.last_direction > 0 else "below"
    message = (
        f"The entropy ({entropy:.3f} nats) has been {side} its band for {memory.steps_outside} generation batches and "
        f"is now {distance:.3f} nats away from it, {away:.3f} more than at first, although rejection_rule={rule!r} "
        "acted in each of them. "
    )
    if rule == "advantage_sign":
        if agree is not None:
            message += (
                f"Only {agree:.0%} of the rollouts with an advantage are confident enough for its sign to tell how "
                "they move entropy. "
            )
        return message + "Set rejection_rule='entropy_change', which tests that movement itself."
    if rule == "entropy_change":
        message += "Set rejection_rule='influence', which also counts what a rollout does to all other contexts. "
    return (
        message + "Lower the learning rate, give the band a gentler slope, or raise the number of rollouts per step."
    )
