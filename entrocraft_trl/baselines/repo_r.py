"""REPO-R: rare tokens weigh more where they were right and less where they were wrong (arXiv 2603.11682)."""

import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch

from ..policy.tokens import TokenReading
from .base import CLIPPED_LOSSES, BaselineConfig, BaselineTrainer
from .loss_pass import LossPassMixin
from .sampled_policy import SampledPolicyMixin
from .state import StatefulMethodMixin


UNKNOWN = -1.0  # in place of a target that the first generation batch has yet to give


@dataclass
class REPORConfig(BaselineConfig):
    """
    Configuration of [`REPORTrainer`]: [`~trl.GRPOConfig`] and the fields below.

    Parameters:
        repo_zeta (`float`, defaults to `1e-3`):
            Coefficient at the start; negative ones lower the entropy. 0: GRPO.
        repo_zeta_min (`float`, defaults to `1e-4`), repo_zeta_max (`float`, defaults to `0.05`):
            Bounds of its absolute value, said to be the paper's. At the lower one its sign changes.
        repo_factor (`float`, defaults to `2.0`):
            What it is multiplied with or divided by for each generation batch. 1: it is constant.
        repo_target_entropy (`float`, *optional*):
            Entropy in nats that is steered to. By default that of the first generation batch.
    """

    repo_zeta: float = field(
        default=1e-3, metadata={"help": "Coefficient at the start; negative: lowers the entropy; 0: GRPO."}
    )
    repo_zeta_min: float = field(
        default=1e-4, metadata={"help": "Least absolute value of the coefficient, at which its sign changes."}
    )
    repo_zeta_max: float = field(default=0.05, metadata={"help": "Largest absolute value of the coefficient."})
    repo_factor: float = field(
        default=2.0, metadata={"help": "Change of the coefficient for each generation batch; 1: constant."}
    )
    repo_target_entropy: float | None = field(
        default=None, metadata={"help": "Entropy in nats that is steered to; default: that of the first batch."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_number("repo_zeta", -math.inf)
        self.check_number("repo_zeta_min", 0.0)
        self.check_number("repo_zeta_max", 0.0)
        self.check_number("repo_factor", 1.0)
        if self.repo_target_entropy is not None:
            self.check_number("repo_target_entropy", 0.0)
        if self.repo_zeta and not 0 < self.repo_zeta_min <= abs(self.repo_zeta) <= self.repo_zeta_max:
            raise ValueError(
                f"the absolute value of repo_zeta={self.repo_zeta} must lie between repo_zeta_min="
                f"{self.repo_zeta_min}, above 0, and repo_zeta_max={self.repo_zeta_max}."
            )
        self.refuse_other_than("it is stated for a loss that clips the ratios of tokens", loss_type=CLIPPED_LOSSES)
        self.refuse_other_than("it weighs single tokens", importance_sampling_level="token")
        self.refuse_other_than("all loss tokens are weighed", top_entropy_quantile=1.0)


class REPORTrainer(StatefulMethodMixin, SampledPolicyMixin, LossPassMixin, BaselineTrainer):
    """
    [`~trl.GRPOTrainer`] that steers the entropy to a target, from both sides, by weighing tokens by their log-prob
    (REPO-R, arXiv 2603.11682, with a coefficient that changes its sign).

    What is different: the advantage of a token is `A max(0, 1 - zeta log p)` where A > 0 and `A max(0, 1 + zeta log
    p)` where A < 0; p is its current probability, without gradient. So while zeta > 0, rare tokens are learned more
    if they were right and unlearned less if they were wrong, and while zeta < 0 the reverse. For each generation
    batch, before its use, zeta moves by a factor towards the target, see `next_zeta`; the entropy is the mean over the
    tokens of all ranks, of the policy that sampled them.

    Variant: that of an implementation for SkyRL, whose log p stands for the paper's `log p - E log p`, that is `log p
    + H`, and whose sign change makes it two-sided; its zeta follows the entropy of the batch before. The paper has no
    public code. Not verified: its camera-ready form, which others describe for A > 0 alone; zeta at the start.

    One forward pass: the entropy comes from the generation. Four methods of TRL's are overridden, by
    [`LossPassMixin`] and [`PolicyReadingMixin`]. Acts on-policy too.
    """

    _tag_names = ["trl", "grpo", "repo-r"]
    _config_class = REPORConfig
    _name = "REPO-R"
    _paper = {
        "title": "Entropy-Preserving Reinforcement Learning",
        "id": "2603.11682",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{petrenko2026entropy,
                title     = {{Entropy-Preserving Reinforcement Learning}},
                author    = {Aleksei Petrenko and Ben Lipkin and Kevin Chen and Erik Wijmans and Marco Cusumano-Towner and Raja Giryes and Philipp Kr{\\"a}henb{\\"u}hl},
                booktitle = {International Conference on Learning Representations},
                year      = 2026,
                eprint    = {arXiv:2603.11682},
            }"""),  # noqa: E501
    }

    loss_normaliser = "loss_type"
    zero_advantage_is_inert = True  # a token's advantage is multiplied with what depends on that token alone

    def starting_numbers(self) -> dict[str, float]:
        target = self.args.repo_target_entropy
        return {"zeta": self.args.repo_zeta, "target": UNKNOWN if target is None else target}

    def needs_reading(self, batch: dict[str, Any]) -> bool:
        return self.args.repo_zeta != 0

    def with_reading(self, batch: dict[str, Any], reading: TokenReading) -> dict[str, Any]:
        """The batch as it is; moves the coefficient."""
        entropy = self.batch_entropy(batch, reading)
        if not math.isnan(entropy):
            if self.numbers["target"] == UNKNOWN:
                self.numbers["target"] = entropy
            self.numbers["zeta"] = next_zeta(self.numbers["zeta"], entropy, self.numbers["target"], self.args)
            self.log_training("repo/entropy", entropy)
        self.log_training("repo/zeta", self.numbers["zeta"])
        return batch

    def token_advantages(self, logps: torch.Tensor, entropies: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Advantages `(B, T)`, of the sign that they had."""
        advantages = inputs["advantages"].unsqueeze(1)
        return advantages * (1 - advantages.sign() * self.numbers["zeta"] * logps.detach()).clamp(min=0)

    def card_section(self) -> list[str]:
        args, target = self.args, self.numbers["target"]
        moved = (
            f"was multiplied with or divided by {args.repo_factor:g} for each generation batch, between "
            f"{args.repo_zeta_min:g} and {args.repo_zeta_max:g} of either sign, to keep the entropy at {target:.3g} "
            f"nats, and was {self.numbers['zeta']:.3g} last"
            if args.repo_factor > 1
            else f"was {args.repo_zeta:g}"
        )
        return [
            "## REPO-R",
            "",
            "Advantages A of tokens of probability p were multiplied with 1 - zeta log p where A > 0, and with 1 + "
            f"zeta log p where A < 0, but never with less than 0. The coefficient zeta {moved}.",
        ]


def next_zeta(zeta: float, entropy: float, target: float, args: REPORConfig) -> float:
    """
    The coefficient after an entropy in nats: multiplied with the factor, up to the upper bound, if it pushes towards
    the target, else divided by it; where that falls below the lower bound, the lower bound with the other sign.
    """
    if entropy == target:
        return zeta
    size, sign = abs(zeta), math.copysign(1.0, zeta)
    if (zeta > 0) == (entropy < target):
        return sign * min(size * args.repo_factor, args.repo_zeta_max)
    smaller = size / args.repo_factor
    return sign * smaller if smaller >= args.repo_zeta_min else -sign * args.repo_zeta_min
