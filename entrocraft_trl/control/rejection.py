"""
Which rollouts a training step accepts. Pure functions on tensors and floats.

Algorithm 1 of Entrocraft (arXiv 2604.26326) is `schedule.Band.direction` followed by `accept_by_advantage_sign`.
"""

import torch


# Values of `rejection_rule`, and what the model card says that a rule did.
RULES = {
    "advantage_sign": "rollouts with a positive advantage were rejected while the entropy was below the band, and "
    "those with a negative advantage while it was above (Algorithm 1 of the paper)",
    "entropy_change": "rollouts whose predicted entropy change pointed the wrong way were rejected, as many as the "
    "position of the entropy in its band called for",
    "influence": "rollouts that would have moved it the wrong way, in their own contexts and through the parameters "
    "that all contexts share, were rejected, as many as its position in its band called for",
}


def accept_by_advantage_sign(advantages: torch.Tensor, direction: int) -> torch.Tensor:
    """
    Algorithm 1: accept rollout i when `m * A_i >= 0`. Too little entropy keeps `A <= 0`, too much keeps `A >= 0`.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`): One advantage per rollout, from any estimator.
        direction (`int`): `m`, the same for the whole batch and on all ranks.

    Returns:
        `torch.Tensor` of shape `(B,)`: Boolean keep mask.
    """
    return direction * advantages >= 0


def entropy_change_scores(
    advantages: torch.Tensor,
    sampled: torch.Tensor,
    expected: torch.Tensor | float,
    mask: torch.Tensor,
    weights: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """
    `c_i = w_i A_i sum_t (S_it - N_it)` over the loss tokens: rollout i changes entropy by about `-eta c_i`.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`).
        sampled, mask (`torch.Tensor` of shape `(B, T)`): S and the loss mask.
        expected (`torch.Tensor` of shape `(B, T)` or `float`): N, or the batch mean of S, which estimates N's mean
            because N is the expectation of S under the policy.
        weights (`torch.Tensor` of shape `(B,)`, *optional*): What a token of the rollout weighs in the loss.

    Returns:
        `torch.Tensor` of shape `(B,)`, in nats per unit of step size.
    """
    return weights * advantages * torch.where(mask.bool(), sampled - expected, 0.0).sum(dim=1)


def influence_scores(
    advantages: torch.Tensor, derivatives: torch.Tensor, weights: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """
    `c_i = -w_i A_i D_i`, which takes the place of `entropy_change_scores`: rollout i changes entropy by about
    `-eta |G| c_i`, in its own contexts and in all others.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`).
        derivatives (`torch.Tensor` of shape `(B,)`): D_i, of each rollout's log-prob along the entropy's gradient G.
        weights (`torch.Tensor` of shape `(B,)`, *optional*): What a token of the rollout weighs in the loss.

    Returns:
        `torch.Tensor` of shape `(B,)`, up to a factor of the whole batch, which no decision depends on.
    """
    return -weights * advantages * derivatives


def both_scores(own: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """
    What a rollout does to the entropy of its own contexts, and what it does through the parameters that all share.

    Each counts in units of its mean size, since their steps differ. Influence alone steers, and learns little: it
    rejects the right answers that the batch agrees on, rare or not. S - N spares the rare ones.

    Args:
        own, shared (`torch.Tensor` of shape `(N,)`): `entropy_change_scores` and `influence_scores` of all ranks'
            rollouts.
    """
    smallest = torch.finfo(own.dtype).tiny
    return own / own.abs().mean().clamp(min=smallest) + shared / shared.abs().mean().clamp(min=smallest)


# Edges push from one cushion inside the band on. Thinner, readings jump across it; thicker, the middle of a wide band,
# where nothing is rejected, is lost. The gains are those of benchmarks/control.
_CUSHION_SCATTERS, _GAIN, _INTEGRAL_GAIN = 2.5, 1.0, 0.05
# Keeps the slope finite in a band of no width; far below what a batch's entropy reading resolves (nats).
_SMALLEST_CUSHION = 1e-3


def cushion_width(scatter: float) -> float:
    """How far inside the band its edges begin to push, in nats, if one reading scatters by `scatter` nats."""
    return _CUSHION_SCATTERS * scatter


def allowed_change(
    entropy: float, low: float, high: float, *, cushion: float, gain: float = _GAIN, offset: float = 0.0
) -> tuple[float, float]:
    """
    Range of predicted entropy change that the position in the band allows, each end in [-1, 1].

    +1 stands for the largest rise that the batch's rollouts can bring, -1 for the largest fall (between them see
    `accept_by_entropy_change`). One cushion inside the low edge the least allowed change is 0, and it grows by `gain`
    per cushion towards and beyond the edge; the high edge mirrors it. In a band two cushions wide both meet at the
    centre, where rises and falls must balance; the middle of a wide band allows everything.

    Args:
        entropy, low, high, cushion (`float`): In nats. A band narrower than two cushions shrinks them.
        gain (`float`): Demanded change per cushion of distance.
        offset (`float`): Added to the demand for a rise (see `integrate_offset`).

    Returns:
        `tuple[float, float]`: Least and most allowed change.
    """
    cushion = max(min(cushion, (high - low) / 2), _SMALLEST_CUSHION)
    least = gain * (low + cushion - entropy) / cushion + offset
    most = gain * (high - cushion - entropy) / cushion + offset
    return min(max(least, -1.0), 1.0), min(max(most, -1.0), 1.0)


def integrate_offset(
    offset: float,
    entropy: float,
    low: float,
    high: float,
    *,
    cushion: float,
    gain: float = _GAIN,
    integral_gain: float = _INTEGRAL_GAIN,
) -> float:
    """
    The next `offset` of `allowed_change`: a slow integral of the distance from the inner edge of the cushions.

    First-order predictions miss part of each step (momentum, curvature). Proportional control would settle where that
    part balances it, off the band's centre; the integral removes the rest. It stands still while the demand is
    saturated, so that a long way back to the band does not wind it up, and the middle of a wide band leaves it alone.
    """
    cushion = max(min(cushion, (high - low) / 2), _SMALLEST_CUSHION)
    short = max(low + cushion - entropy, 0.0) / cushion
    over = max(entropy - (high - cushion), 0.0) / cushion
    error = short - over
    if abs(gain * error + offset) >= 1.0 and error * offset >= 0.0:
        return offset
    return min(max(offset + integral_gain * min(max(error, -1.0), 1.0), -1.0), 1.0)


def accept_by_entropy_change(scores: torch.Tensor, least: float, most: float) -> torch.Tensor:
    """
    Entropy-change rule and influence: accept so many rollouts that their predicted change lies between `least` and
    `most`.

    A bound `d` stands for the change `d u + d |d| (r - u)`: `r` is the largest rise of the batch if `d > 0`, else its
    largest fall, and `u` the smaller of both. If all rollouts together already meet both bounds, all are accepted.
    Otherwise the most wrong-way ones go first, since fewest have to be rejected that way, until the rest meets the
    bound to within half a rollout. Among equal scores the earlier rollout goes first. At the extremes, `least=1` keeps
    `c_i <= 0` and `most=-1` keeps `c_i >= 0`: Algorithm 1 with `c_i` in place of the advantage.

    Args:
        scores (`torch.Tensor` of shape `(N,)`): `c_i` of all ranks' rollouts; accepting one changes entropy by `-c_i`.
        least, most (`float`): From `allowed_change`.

    Returns:
        `torch.Tensor` of shape `(N,)`: Boolean keep mask.
    """
    # On the CPU: not every device sums in float64, and all ranks must come to the same decision.
    changes = -scores.cpu().double()
    rise, fall = changes.clamp(min=0).sum(), -changes.clamp(max=0).sum()
    net = rise - fall
    # A language model falls more easily than it rises. Were half a demand half of the fall, a reading that scatters
    # evenly around the middle would sink the entropy: small demands are equal on both sides, and full ones are all.
    smaller = torch.minimum(rise, fall)
    least, most = (
        bound * (smaller + abs(bound) * ((rise if bound > 0 else fall) - smaller)) for bound in (least, most)
    )
    keep = torch.ones_like(changes, dtype=torch.bool)
    if net < least:
        keep[_most_negative(changes, least - net)] = False
    elif net > most:
        keep[_most_negative(-changes, net - most)] = False
    return keep.to(scores.device)


def _most_negative(changes: torch.Tensor, excess: torch.Tensor) -> torch.Tensor:
    """Indices of the most negative of `changes`, so many that they sum to `-excess`, to within half of the last."""
    sizes, order = (-changes).clamp(min=0).sort(descending=True, stable=True)
    before = sizes.cumsum(0) - sizes
    return order[(sizes > 0) & (before + sizes / 2 <= excess)]
