"""Raw rewards as +1 (right) and -1 (wrong), for methods that make their advantages of them."""

from dataclasses import dataclass, field
from typing import Any

import torch

from .base import CLIPPED_LOSSES, BaselineConfig


@dataclass
class SignedRewardsConfig(BaselineConfig):
    """
    Fields of methods whose advantages are made of raw rewards.

    Parameters:
        reward_coding (`str`, defaults to `"plus_minus_one"`):
            How rewards are read: they are +1/-1, or `"zero_one"`, where 0 means -1.
        scale_rewards (`str`, defaults to `"none"`):
            No group mean or deviation is taken, so that nothing else is accepted.
    """

    reward_coding: str = field(
        default="plus_minus_one",
        metadata={
            "help": "How rewards are read: 'plus_minus_one', or 'zero_one' (0 means -1).",
            "choices": ("plus_minus_one", "zero_one"),
        },
    )
    scale_rewards: str = field(default="none", metadata={"help": "Only 'none': raw rewards are not scaled."})

    def __post_init__(self):
        super().__post_init__()
        self.refuse_other_than("raw rewards are neither centred nor scaled", scale_rewards="none")
        self.refuse_other_than("the weighted sum of rewards is read", multi_objective_aggregation="sum_then_normalize")
        self.refuse_other_than("it is stated for a loss that clips ratios", loss_type=CLIPPED_LOSSES)


class SignedRewardsMixin:
    """
    For GRPO trainers with a [`SignedRewardsConfig`]: put it before the trainer among the bases. Keeps the rewards of
    the last batch, and puts advantages in the place of TRL's.
    """

    _rewards: torch.Tensor | None = None

    def _calculate_rewards(self, *args, **kwargs):
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def rewards_of_all_ranks(self) -> torch.Tensor:
        """Weighted sum of the rewards of each rollout of the last batch, of all ranks, `(N,)`; NaN if unscored."""
        weighted = (self._rewards * self.reward_weights.to(self._rewards)).nansum(dim=1)
        weighted[torch.isnan(self._rewards).all(dim=1)] = torch.nan
        return weighted

    def signs_of_all_ranks(self) -> torch.Tensor:
        """+1, -1 or 0 for each rollout of the last batch, of all ranks, `(N,)`: see `signs_of`, also for errors."""
        return signs_of(self.rewards_of_all_ranks(), self.args.reward_coding)

    def with_advantages(self, batch: dict[str, Any], everyones: torch.Tensor) -> dict[str, Any]:
        """This rank's loss inputs with its part of the advantages `(N,)` of all ranks, which the table shows too."""
        self._logs["advantages"].extend(everyones.tolist())  # as long as this batch: TRL's own fall out
        first = self.accelerator.process_index * len(batch["advantages"])
        own = everyones[first : first + len(batch["advantages"])]
        return {**batch, "advantages": own.to(batch["advantages"])}


def signs_of(rewards: torch.Tensor, coding: str) -> torch.Tensor:
    """
    +1 for a right rollout, -1 for a wrong one, 0 for one without a reward, `(N,)`.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`): Weighted sum of the reward functions; NaN marks what is unscored.
        coding (`str`): `"plus_minus_one"` or `"zero_one"`.

    Raises:
        ValueError: If a reward is none of the two values. A 0 read as +1/-1 would silently teach nothing.
    """
    wrong = 0.0 if coding == "zero_one" else -1.0
    scored = ~torch.isnan(rewards)
    foreign = rewards[scored & (rewards != 1.0) & (rewards != wrong)]
    if foreign.numel():
        raise ValueError(
            f"reward_coding={coding!r} needs rewards of exactly 1 or {wrong:g}, got {foreign[0].item():g}. Use "
            "reward_coding='zero_one' for rewards of 0 and 1, and one reward function with weight 1."
        )
    return torch.where(rewards == 1.0, 1.0, -1.0).masked_fill(~scored, 0.0)
