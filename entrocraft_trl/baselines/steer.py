"""STEER: tokens weigh the less, the more they are predicted to change the entropy (arXiv 2510.10150)."""

import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch

from ..policy.tokens import TokenReading, loss_mask
from .base import CLIPPED_LOSSES, BaselineConfig, BaselineTrainer
from .loss_pass import LossPassMixin, old_logps
from .sampled_policy import SampledPolicyMixin, largest_of_all_ranks


OLD_ENTROPIES = "steer_old_entropies"  # rides with the loss inputs
LEAST_LOGP = math.log(1e-8)  # a probability is taken as at least this, as in the official code
LEAST_LARGEST = 0.02  # the exponential form measures by the largest change, but not by less than this


@dataclass
class STEERConfig(BaselineConfig):
    """
    Configuration of [`STEERTrainer`]: [`~trl.GRPOConfig`], of which `epsilon_high` and `delta` have other defaults,
    and the fields below.

    Parameters:
        steer_form (`str`, defaults to `"exp"`):
            How a weight falls with the predicted change: `"exp"` or `"linear"`.
        steer_min (`float`, defaults to `0.8`), steer_max (`float`, defaults to `1.0`):
            Bounds of the weights. Those of the official scripts: 0.8 to 1 for `"exp"`, whose upper bound is always 1,
            and 0.8 to 1.2 for `"linear"`. Both 1: GRPO.
        epsilon_high (`float`, *optional*, defaults to `0.28`), delta (`float`, *optional*, defaults to `10.0`):
            Clipping of the ratio, with TRL's `delta` as the dual clip, as in the official scripts.
    """

    steer_form: str = field(
        default="exp",
        metadata={
            "help": "How a weight falls with the predicted change of the entropy: 'exp' or 'linear'.",
            "choices": ("exp", "linear"),
        },
    )
    steer_min: float = field(default=0.8, metadata={"help": "Weight of the tokens that change the entropy most."})
    steer_max: float = field(
        default=1.0,
        metadata={"help": "Weight of those that change it least: 1 for 'exp'; officially 1.2 for 'linear'."},
    )
    epsilon_high: float | None = field(
        default=0.28, metadata={"help": "Upper clip of the ratio: that of the official scripts."}
    )
    delta: float | None = field(
        default=10.0, metadata={"help": "Upper clip of the ratio for negative advantages: the official dual clip."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_number("steer_min", 0.0)
        self.check_number("steer_max", 0.0)
        if not 0 < self.steer_min <= self.steer_max:
            raise ValueError(
                f"steer_min must be above 0 and not exceed steer_max, got {self.steer_min} and {self.steer_max}."
            )
        if self.steer_form == "exp":
            self.refuse_other_than("weights of steer_form='exp' end at 1", steer_max=1.0)
        self.refuse_other_than("it needs a loss that clips the ratios of tokens", loss_type=CLIPPED_LOSSES)
        self.refuse_other_than("it weighs single tokens", importance_sampling_level="token")
        self.refuse_other_than("the predicted changes are those of all loss tokens", top_entropy_quantile=1.0)


class STEERTrainer(SampledPolicyMixin, LossPassMixin, BaselineTrainer):
    """
    [`~trl.GRPOTrainer`] that weighs each token by how much it is predicted to change the entropy (STEER, arXiv
    2510.10150): large changes of either sign are damped. It has no target and no band.

    What is different: the policy loss of a token is multiplied by a weight, without gradient, that falls from
    `steer_max` to `steer_min` with `|Omega|`, where `Omega = r A (1 - p) (log p + H_old)`: r is the importance ratio,
    p the current probability of the sampled token and H_old the entropy of the old policy there. See `token_weights`.
    Weights are not normalised to a mean of 1, and the method is silent on KL terms: they keep their weight.

    Variant: the official code's, except that the extremes of `|Omega|` are those of the micro-batches of all ranks
    (there: of each rank's). The exact first-order change of the entropy, `-r A (S - N)` with `S = p (log p + H)`, has
    a further p, and N, so that Omega mostly measures what a rare token does. Not verified: the paper's theorem, and
    its bounds, which may be 0.7 to 1 where the scripts have 0.8.

    One forward pass; the entropies come from the generation or from TRL's pass of the old policy. Acts on-policy too,
    where H_old is the current entropy. Four methods of TRL's are overridden, by [`LossPassMixin`] and
    [`PolicyReadingMixin`].
    """

    _tag_names = ["trl", "grpo", "steer"]
    _config_class = STEERConfig
    _name = "STEER"
    _paper = {
        "title": "Rethinking Entropy Interventions in RLVR: An Entropy Change Perspective",
        "id": "2510.10150",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{hao2025rethinking,
                title  = {{Rethinking Entropy Interventions in RLVR: An Entropy Change Perspective}},
                author = {Zhezheng Hao and Hong Wang and Haoyang Liu and Jian Luo and Jiarui Yu and Hande Dong and Qiang Lin and Can Wang and Jiawei Chen},
                year   = 2025,
                eprint = {arXiv:2510.10150},
            }"""),  # noqa: E501
    }

    def needs_reading(self, batch: dict[str, Any]) -> bool:
        return "old_per_token_logps" in batch  # else the old policy is the one of the loss's own pass

    def with_reading(self, batch: dict[str, Any], reading: TokenReading) -> dict[str, Any]:
        return {**batch, OLD_ENTROPIES: reading.entropies}

    def token_advantages(self, logps: torch.Tensor, entropies: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Advantages `(B, T)`, weighed: every weight is above 0, so that this weighs the clipped loss too."""
        logps, mask = logps.detach(), loss_mask(inputs).bool()
        advantages = inputs["advantages"].unsqueeze(1).expand_as(logps)
        old_entropies = inputs.get(OLD_ENTROPIES, entropies.detach())
        changes = predicted_changes(advantages, logps, old_logps(logps, inputs), old_entropies).abs()
        smallest = changes.masked_fill(~mask, torch.inf).amin()
        largest = changes.masked_fill(~mask, -torch.inf).amax()
        negative, largest = largest_of_all_ranks(torch.stack([-smallest, largest]), self.accelerator).tolist()
        weights = token_weights(changes, -negative, largest, self.args).masked_fill(~mask, 1.0)
        sums = torch.stack([weights[mask].sum(), mask.sum()])
        weight_sum, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        if tokens:
            self.log_training("steer/mean_weight", weight_sum / tokens)
            self.log_training("steer/largest_change", largest)
        return advantages * weights

    def card_section(self) -> list[str]:
        return [
            "## STEER",
            "",
            f"Each token had a weight between {self.args.steer_min:g} and {self.args.steer_max:g} in the loss, the "
            f"less ({self.args.steer_form}), the more it was predicted to change the entropy, in either direction.",
        ]


def predicted_changes(
    advantages: torch.Tensor, logps: torch.Tensor, old: torch.Tensor, old_entropies: torch.Tensor
) -> torch.Tensor:
    """`Omega = r A (1 - p) (log p + H_old)` of each token, `(B, T)`; all arguments are `(B, T)`, without gradient."""
    logps = logps.clamp(min=LEAST_LOGP)
    return torch.exp(logps - old) * advantages * (1 - logps.exp()) * (logps + old_entropies)


def token_weights(changes: torch.Tensor, smallest: float, largest: float, args: STEERConfig) -> torch.Tensor:
    """
    Weights of tokens, of the shape of `changes`.

    `"exp"`: `clip(exp(-k |Omega|), min, 1)` with `k = -ln(min) / max(largest, 0.02)`: a token of the largest change
    has the least weight, unless all changes are small. `"linear"`: `max` at the smallest change and `min` at the
    largest, the middle if both are the same.

    Args:
        changes (`torch.Tensor`): `|Omega|`.
        smallest, largest (`float`): Their extremes over the loss tokens of all ranks.
    """
    low, high = args.steer_min, args.steer_max
    if args.steer_form == "exp":
        return torch.exp(changes * (math.log(low) / max(largest, LEAST_LARGEST))).clamp(low, 1.0)
    if not smallest < largest:
        return torch.full_like(changes, (low + high) / 2)
    return high - (changes - smallest) * ((high - low) / (largest - smallest))
