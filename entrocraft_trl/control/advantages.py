"""The advantages by which rollouts are judged: without what rounding adds, or the raw reward in their place."""

import torch


# The mean of equal float32 rewards r is off by up to about 1e-7 r, and TRL divides by a standard deviation of 0 plus
# 1e-4: rounding makes advantages of up to some 1e-3 r. An estimator's own signal is far above ten times that.
ROUNDING = 1e-2


def without_rounding(
    advantages: torch.Tensor,
    rewards: torch.Tensor,
    first: int,
    num_generations: int,
    *,
    scaled_over_batch: bool = False,
) -> torch.Tensor:
    """
    Advantages with 0 where they are a rounding error: all rewards of the group are equal, and the advantage is tiny.

    Eight rewards of 0.3 have a float32 mean of 0.30000001, and so advantages of 3e-4, whose sign would keep or reject
    the whole group by chance. The size counts because an estimator of one's own may see more than the rewards.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`): Of this rank's rollouts.
        rewards (`torch.Tensor` of shape `(N, F)`): Numbers that the estimator compares within a group, for the
            rollouts of all ranks, group by group; NaN marks what was not scored.
        first (`int`): Row of `rewards` where this rank's rollouts begin; a group may lie on several ranks.
        num_generations (`int`): Rollouts of a group.
        scaled_over_batch (`bool`): The estimator divides what is centred already by its standard deviation over the
            batch. Where no group has a signal that deviation is rounding too, and blows it up to advantages of 1.
    """
    groups = rewards.view(-1, num_generations, rewards.size(-1))
    unscored = torch.isnan(groups)
    lowest = groups.masked_fill(unscored, torch.inf).amin(dim=1)
    highest = groups.masked_fill(unscored, -torch.inf).amax(dim=1)
    equal = (highest <= lowest).all(dim=-1).repeat_interleave(num_generations)
    size = rewards.nan_to_num(nan=0.0).abs().sum(dim=-1)
    if scaled_over_batch and equal.all():
        size = torch.full_like(size, torch.inf)
    rows = slice(first, first + len(advantages))
    return advantages.masked_fill(equal[rows] & (advantages.abs() <= ROUNDING * size[rows]), 0.0)


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
