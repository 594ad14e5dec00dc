"""
Which rollouts a training step accepts. Pure functions on tensors and floats.

Algorithm 1 of Entrocraft (arXiv 2604.26326) is `band_direction` followed by `accept_by_advantage_sign`.
"""

import torch


def band_direction(entropy: float, low: float, high: float) -> int:
    """
    Direction `m = 1[H > h_high] - 1[H < h_low]` (Algorithm 1): -1 entropy is too low, 0 inside the band, +1 too high.

    All three arguments are in the same unit (nats).
    """
    return int(entropy > high) - int(entropy < low)


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


def distance_outside(entropy: float, low: float, high: float) -> float:
    """Distance of `entropy` from the band, 0 inside it. Same unit as the arguments (nats)."""
    return max(low - entropy, entropy - high, 0.0)


def unit_rewards(rewards: torch.Tensor, coding: str) -> torch.Tensor:
    """
    Rewards as +1 (right) and -1 (wrong), which replace the advantages out of band in the official code.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`): Weighted sum of the reward functions; NaN marks an unscored rollout.
        coding (`str`): `"plus_minus_one"`: they must be +1/-1 already; `"zero_one"`: 0 is read as -1.

    Returns:
        `torch.Tensor` of shape `(B,)`: +1, -1, or 0 for an unscored rollout.

    Raises:
        ValueError: If a reward is none of the two values that `coding` allows.
    """
    scored = ~torch.isnan(rewards)
    wrong = 0.0 if coding == "zero_one" else -1.0
    foreign = rewards[scored & (rewards != 1.0) & (rewards != wrong)]
    if foreign.numel():
        raise ValueError(
            f"out_of_band_advantages='reward' with reward_coding={coding!r} needs rewards of exactly 1 or {wrong:g}, "
            f"got {foreign[0].item():g}. Use reward_coding='zero_one' for 0/1 rewards, one reward function with "
            "weight 1, or out_of_band_advantages='estimator'."
        )
    signs = torch.where(rewards == 1.0, 1.0, -1.0).to(rewards.dtype)
    return torch.where(scored, signs, torch.zeros_like(signs))


def sampled_entropy_term(logps: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
    """
    `S = p (log p + H)` of each sampled token, `(B, T)`. Large for confident tokens, negative for unlikely ones.

    Under a softmax whose logits follow the policy gradient, one token changes its distribution's entropy by
    `-eta * A * (S - N)` at first order (arXiv 2602.03392), where N is the policy's own mean of S.

    Args:
        logps (`torch.Tensor` of shape `(B, T)`): Log-probs of the sampled tokens.
        entropies (`torch.Tensor` of shape `(B, T)`): Token entropies in nats.
    """
    return logps.exp() * (logps + entropies)


def expected_entropy_term(
    logps: torch.Tensor, entropies: torch.Tensor, half_logps: torch.Tensor, half_entropies: torch.Tensor
) -> torch.Tensor:
    """
    `N = sum_v p_v^2 (log p_v + H)` of each token, exact, from two temperatures and without any logits.

    At half the temperature the distribution is `q = p^2 / Z` with `Z = sum_v p_v^2`. So `log Z = 2 log p_k - log q_k`
    for any token k, and q's entropy `H_q = log Z - 2 sum_v q_v log p_v` yields the second moment:
    `N = Z (H + (log Z - H_q) / 2)`.

    Args:
        logps, entropies (`torch.Tensor` of shape `(B, T)`): At the sampling temperature, as in `sampled_entropy_term`.
        half_logps, half_entropies (`torch.Tensor` of shape `(B, T)`): The same tokens at half that temperature.
    """
    log_z = 2 * logps - half_logps
    return log_z.exp() * (entropies + (log_z - half_entropies) / 2)


def entropy_change_scores(
    advantages: torch.Tensor, sampled: torch.Tensor, expected: torch.Tensor | float, mask: torch.Tensor
) -> torch.Tensor:
    """
    `c_i = A_i * sum_t (S_it - N_it)` over the loss tokens: reinforcing rollout i changes entropy by about `-eta c_i`.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`).
        sampled, mask (`torch.Tensor` of shape `(B, T)`): S and the loss mask.
        expected (`torch.Tensor` of shape `(B, T)` or `float`): N, or the batch mean of S, which estimates N's mean
            because N is the expectation of S under the policy.

    Returns:
        `torch.Tensor` of shape `(B,)`, in nats per unit of step size.
    """
    return advantages * torch.where(mask.bool(), sampled - expected, 0.0).sum(dim=1)


def accept_by_entropy_change(scores: torch.Tensor, direction: int) -> torch.Tensor:
    """
    Entropy-change rule: accept rollout i when `m * c_i >= 0`; `c_i` from `entropy_change_scores`, else as Algorithm 1.

    Returns:
        `torch.Tensor` of shape `(B,)`: Boolean keep mask.
    """
    return direction * scores >= 0


def rejection_cutoff(scores: torch.Tensor, strength: float) -> float:
    """
    Score beyond which rollouts are rejected, so that a share `|strength|` of the wrong-way entropy change goes.

    The most wrong-way rollouts go first, since fewest have to be rejected that way.

    Args:
        scores (`torch.Tensor` of shape `(N,)`): `c_i` of all ranks' rollouts.
        strength (`float`): In [-1, 1]. Negative: entropy shall rise, scores `c_i > 0` are the wrong way; positive: it
            shall fall, scores `c_i < 0` are. 0 rejects none, ±1 all of that side.

    Returns:
        `float`: Accept when `sign(strength) * c_i >= cutoff`; `-inf` accepts all.
    """
    if strength == 0.0:
        return -float("inf")
    toward = (scores if strength > 0 else -scores).double()
    wrong = toward[toward < 0].sort().values
    if not wrong.numel():
        return -float("inf")
    mass = wrong.cumsum(0)
    # A rollout is rejected when at least half of its own mass is needed, so the error is at most half a rollout.
    rejected = int((mass - wrong / 2 >= abs(strength) * mass[-1]).sum())
    return float(wrong[rejected]) if rejected < wrong.numel() else 0.0


def accept_above_cutoff(scores: torch.Tensor, strength: float, cutoff: float) -> torch.Tensor:
    """Keep mask `(B,)` of this rank's rollouts for a cutoff from `rejection_cutoff`."""
    toward = scores if strength > 0 else -scores
    return toward.double() >= cutoff


def band_error(entropy: float, low: float, high: float, cushion: float) -> float:
    """
    How hard the band's edges push, in units of the cushion: positive too high, negative too low, 0 well inside.

    Within `cushion` nats of an edge the push grows linearly and reaches ±1 at the edge. In a band narrower than two
    cushions both meet at its centre; in a wide one the middle is left alone.
    """
    cushion = min(cushion, (high - low) / 2)
    if cushion <= 0.0:
        return float(band_direction(entropy, low, high))
    above = max(entropy - (high - cushion), 0.0)
    below = max((low + cushion) - entropy, 0.0)
    return (above - below) / cushion


def graded_strength(error: float, integral: float, gain: float, integral_gain: float) -> tuple[float, float]:
    """
    Strength of rejection in [-1, 1] from a proportional-integral rule, and the new integral.

    The proportional part alone would settle where the policy's own drift balances it, off the band's centre; the
    integral removes that offset. It stands still while the strength is saturated in its direction, so that a long
    way back to the band does not wind it up.
    """
    wanted = gain * error + integral
    strength = min(max(wanted, -1.0), 1.0)
    if wanted == strength or wanted * error < 0:
        integral = min(max(integral + integral_gain * error, -1.0), 1.0)
    return strength, integral
