"""PSR, NSR and W-REINFORCE: learning from right rollouts, from wrong ones, or mostly from wrong ones (2506.01347)."""

import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch

from ..policy.tokens import loss_mask
from .base import BaselineTrainer
from .signed_rewards import SignedRewardsConfig, SignedRewardsMixin


PAPER = {
    "title": "The Surprising Effectiveness of Negative Reinforcement in LLM Reasoning",
    "id": "2506.01347",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{zhu2025surprising,
            title  = {{The Surprising Effectiveness of Negative Reinforcement in LLM Reasoning}},
            author = {Xinyu Zhu and Mengzhou Xia and Zhepei Wei and Wei-Lin Chen and Danqi Chen and Yu Meng},
            year   = 2025,
            eprint = {arXiv:2506.01347},
        }"""),
}


@dataclass
class WReinforceConfig(SignedRewardsConfig):
    """
    Configuration of [`WReinforceTrainer`]: [`~trl.GRPOConfig`] and the fields below.

    Parameters:
        positive_weight (`float`, defaults to `0.1`):
            Advantage of a right rollout. The paper's; the official code's default of 1 is plain REINFORCE.
        negative_weight (`float`, defaults to `1.0`):
            Minus the advantage of a wrong rollout.
        rejected_rollouts (`str`, defaults to `"drop"`):
            Where one of the weights is 0: its rollouts leave the denominator of the loss (official code, which removes
            their rows), or `"zero_advantage"`: they stay in it (Entrocraft's code).
    """

    positive_weight: float = field(default=0.1, metadata={"help": "Advantage of a right rollout."})
    negative_weight: float = field(default=1.0, metadata={"help": "Minus the advantage of a wrong rollout."})
    rejected_rollouts: str = field(
        default="drop",
        metadata={
            "help": "Rollouts of weight 0: 'drop' (they leave the denominator of the loss) or 'zero_advantage'.",
            "choices": ("drop", "zero_advantage"),
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_number("positive_weight", 0.0)
        self.check_number("negative_weight", 0.0)
        if not self.positive_weight and not self.negative_weight:
            raise ValueError("positive_weight and negative_weight are both 0: nothing would be learned.")
        if self.drops:
            reason = "rejected_rollouts='drop' recounts the tokens of the loss"
            self.refuse_other_than(f"{reason}, which only this one divides by", loss_type="dapo")
            self.refuse_other_than(f"{reason} and not those of its KL term", beta=0.0)

    @property
    def drops(self) -> bool:
        """Whether rollouts leave the loss: one of the weights is 0."""
        return self.rejected_rollouts == "drop" and 0.0 in (self.positive_weight, self.negative_weight)


@dataclass
class PSRConfig(WReinforceConfig):
    """[`WReinforceConfig`] of positive sample reinforcement: right rollouts have weight 1, wrong ones 0."""

    positive_weight: float = field(default=1.0, metadata={"help": "Advantage of a right rollout."})
    negative_weight: float = field(default=0.0, metadata={"help": "Minus the advantage of a wrong rollout."})


@dataclass
class NSRConfig(WReinforceConfig):
    """[`WReinforceConfig`] of negative sample reinforcement: wrong rollouts have weight 1, right ones 0."""

    positive_weight: float = field(default=0.0, metadata={"help": "Advantage of a right rollout."})
    negative_weight: float = field(default=1.0, metadata={"help": "Minus the advantage of a wrong rollout."})


class WReinforceTrainer(SignedRewardsMixin, BaselineTrainer):
    """
    [`~trl.GRPOTrainer`] whose advantage is `positive_weight` for a right rollout and `-negative_weight` for a wrong
    one (W-REINFORCE, arXiv 2506.01347).

    What is different: the advantages, and, where rollouts are dropped, the tokens that the loss divides by: those of
    the rollouts that are left, of all ranks. No group mean, no deviation: also a group that is all wrong teaches. The
    clip of the ratio is TRL's, and does nothing while each generation serves one optimizer step.

    Variant: the official code's, for a loss that is a mean over tokens (`loss_type="dapo"`); rewards have to be right
    or wrong. Not verified: whether the paper's tables divide as the official code does.

    Two methods of TRL's are overridden, `_generate_and_score_completions` and, to keep the rewards,
    `_calculate_rewards`.
    """

    _tag_names = ["trl", "grpo", "w-reinforce"]
    _config_class = WReinforceConfig
    _name = "W-REINFORCE"
    _paper = PAPER

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return batch
        signs = self.signs_of_all_ranks()
        weighted = signs.clamp(min=0) * self.args.positive_weight + signs.clamp(max=0) * self.args.negative_weight
        batch = self.with_advantages(batch, weighted)
        return self._recounted(batch) if self.args.drops else batch

    def _recounted(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Loss inputs whose loss divides by the tokens of the rollouts that have a weight."""
        kept = batch["advantages"] != 0
        counts = torch.stack([loss_mask(batch)[kept].sum(), kept.sum()])
        tokens, rollouts = self.accelerator.reduce(counts, reduction="sum")
        everyone = len(kept) * self.accelerator.num_processes
        self.log_training("reinforce/kept_rollouts", rollouts.item() / everyone)
        # Not the rows themselves, nor their mask: TRL's entropy stays that of all rollouts.
        return {**batch, "num_items_in_batch": tokens.to(batch["num_items_in_batch"])}

    def card_section(self) -> list[str]:
        left = "; those of weight 0 left the denominator of the loss" if self.args.drops else ""
        return [
            f"## {self._name}",
            "",
            f"The advantage of a right rollout was {self.args.positive_weight:g}, that of a wrong one "
            f"{0.0 - self.args.negative_weight:g}, whatever the rest of its group was{left}.",
        ]


class PSRTrainer(WReinforceTrainer):
    """[`WReinforceTrainer`] that learns from right rollouts alone (PSR, arXiv 2506.01347)."""

    _tag_names = ["trl", "grpo", "psr"]
    _config_class = PSRConfig
    _name = "PSR"


class NSRTrainer(WReinforceTrainer):
    """[`WReinforceTrainer`] that learns from wrong rollouts alone (NSR, arXiv 2506.01347)."""

    _tag_names = ["trl", "grpo", "nsr"]
    _config_class = NSRConfig
    _name = "NSR"
