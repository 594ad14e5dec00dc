"""Groups of rollouts whose rewards are all equal. They teach nothing, whatever rounding makes of their advantages."""

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
