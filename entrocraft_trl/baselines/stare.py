"""STARE: while the entropy is below a target, the least likely tokens weigh more or less (arXiv 2606.19236)."""

import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch

from ..policy.tokens import TokenReading, loss_mask
from .base import CLIPPED_LOSSES, BaselineConfig, BaselineTrainer
from .covariance import highest_of_all_ranks
from .loss_pass import LossPassMixin
from .sampled_policy import SampledPolicyMixin
from .state import StatefulMethodMixin


@dataclass
class STAREConfig(BaselineConfig):
    """
    Configuration of [`STARETrainer`]: [`~trl.GRPOConfig`], of which only `delta` has another default, and the fields
    below, with the defaults of the official recipe for 7B.

    Parameters:
        stare_target_entropy (`float`, defaults to `0.3`):
            Entropy in nats below which tokens are weighed; at 0, never, which is GRPO.
        stare_share (`float`, defaults to `0.1`):
            Share of the tokens of positive advantage, and of those of negative advantage, that are weighed: the least
            likely ones, rounded up. 0: none, which is GRPO.
        stare_positive_weight (`float`, defaults to `1.1`):
            Weight of those of positive advantage. The recipe's for 14B and 32B is 1.05.
        stare_negative_weight (`float`, defaults to `1.0`):
            Weight of those of negative advantage: 1 is the official variant O1; 0.9 (for 14B and 32B, 0.95) is C2.
        delta (`float`, *optional*, defaults to `3.0`):
            TRL's upper clip of the ratio for negative advantages: the official dual clip.
    """

    stare_target_entropy: float = field(
        default=0.3, metadata={"help": "Entropy in nats below which tokens are weighed; 0: never, which is GRPO."}
    )
    stare_share: float = field(
        default=0.1, metadata={"help": "Share of the tokens of each sign that are weighed; 0: none, which is GRPO."}
    )
    stare_positive_weight: float = field(
        default=1.1, metadata={"help": "Weight of the least likely tokens of positive advantage."}
    )
    stare_negative_weight: float = field(
        default=1.0, metadata={"help": "Weight of the least likely tokens of negative advantage; variant C2: 0.9."}
    )
    delta: float | None = field(
        default=3.0, metadata={"help": "Upper clip of the ratio for negative advantages: the official dual clip."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_number("stare_target_entropy", 0.0)
        self.check_number("stare_share", 0.0, 1.0)
        self.check_number("stare_positive_weight", 1.0)
        self.check_number("stare_negative_weight", 0.0, 1.0)
        self.refuse_other_than("it needs a loss that clips the ratios of tokens", loss_type=CLIPPED_LOSSES)
        self.refuse_other_than("it weighs single tokens", importance_sampling_level="token")
        self.refuse_other_than("the least likely are those of all loss tokens", top_entropy_quantile=1.0)


class STARETrainer(StatefulMethodMixin, SampledPolicyMixin, LossPassMixin, BaselineTrainer):
    """
    [`~trl.GRPOTrainer`] that weighs the least likely tokens while the entropy is below a target (STARE, arXiv
    2606.19236). It raises the entropy only: above the target it is GRPO.

    What is different: for a generation batch whose entropy, the mean over the tokens of all ranks of the policy that
    sampled them, is below `stare_target_entropy`, the policy loss of the `ceil(stare_share * n)` least likely of the n
    tokens of positive advantage is multiplied by `stare_positive_weight`, and that of as large a share of the tokens
    of negative advantage by `stare_negative_weight`.

    Variant: the official code's with constant weights, O1 or C2, except that the least likely are those of one
    micro-batch of all ranks (there: of each rank), by their current log-probs as there. Its optional schedule of the
    weights is left out. Not verified: the paper's text.

    One forward pass: the entropy comes from the generation. Four methods of TRL's are overridden, by
    [`LossPassMixin`] and [`PolicyReadingMixin`]. Acts on-policy too.
    """

    _tag_names = ["trl", "grpo", "stare"]
    _config_class = STAREConfig
    _name = "STARE"
    _paper = {
        "title": "STARE: Surprisal-Guided Token-Level Advantage Reweighting for Policy Entropy Stability",
        "id": "2606.19236",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{luo2026stare,
                title  = {{STARE: Surprisal-Guided Token-Level Advantage Reweighting for Policy Entropy Stability}},
                author = {Haipeng Luo and Qingfeng Sun and Songli Wu and others},
                year   = 2026,
                eprint = {arXiv:2606.19236},
            }"""),
    }

    def starting_numbers(self) -> dict[str, float]:
        return {"gate": 0.0, "batches": 0.0, "weighed_batches": 0.0}  # 1: the batch under way is weighed

    def with_reading(self, batch: dict[str, Any], reading: TokenReading) -> dict[str, Any]:
        """The batch as it is; opens the gate for it, or closes it."""
        entropy = self.batch_entropy(batch, reading)
        self.numbers["gate"] = float(entropy < self.args.stare_target_entropy)  # closed for NaN: nothing to weigh
        self.numbers["batches"] += 1.0
        self.numbers["weighed_batches"] += self.numbers["gate"]
        self.log_training("stare/entropy", entropy)
        self.log_training("stare/gate", self.numbers["gate"])
        return batch

    def token_advantages(self, logps: torch.Tensor, entropies: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Advantages `(B, T)` of the sign that they had; as they are while the gate is closed."""
        if not self.numbers["gate"]:
            return inputs["advantages"]
        mask = loss_mask(inputs).bool()
        advantages = inputs["advantages"].unsqueeze(1).expand_as(logps)
        args, surprisals = self.args, -logps.detach()
        weights = torch.ones_like(surprisals)
        for tokens, weight in (
            (mask & (advantages > 0), args.stare_positive_weight),
            (mask & (advantages < 0), args.stare_negative_weight),
        ):
            count = self.accelerator.reduce(tokens.sum(), reduction="sum").item()
            scores = surprisals.masked_fill(~tokens, -torch.inf)
            chosen = highest_of_all_ranks(scores, share_rounded_up(args.stare_share, count), self.accelerator)
            weights = weights.masked_fill(chosen, weight)
        return advantages * weights

    def card_section(self) -> list[str]:
        args, numbers = self.args, self.numbers
        return [
            "## STARE",
            "",
            f"While the entropy was below {args.stare_target_entropy:g} nats, in {numbers['weighed_batches']:g} of "
            f"{numbers['batches']:g} generation batches, the least likely {args.stare_share:.0%} of the tokens had "
            f"another weight in the loss: {args.stare_positive_weight:g} where the advantage was positive, and "
            f"{args.stare_negative_weight:g} where it was negative.",
        ]


def share_rounded_up(share: float, tokens: int) -> int:
    """`share` of the tokens, rounded up, as officially; the slack is for products like 0.1 * 30, just above 3."""
    return math.ceil(share * tokens - 1e-6)
