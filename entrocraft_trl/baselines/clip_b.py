"""Clip_B: of wrong rollouts, tokens whose discriminator is far below the batch's mean leave the loss (2602.03392)."""

from dataclasses import dataclass, field
from typing import Any

from ..policy.tokens import TokenReading, loss_mask, sampled_entropy_term
from .base import CLIPPED_LOSSES, BaselineConfig, BaselineTrainer
from .discriminator import PAPER, mean_and_deviation, without_tokens
from .sampled_policy import SampledPolicyMixin


@dataclass
class ClipBConfig(BaselineConfig):
    """
    Configuration of [`ClipBTrainer`]: [`~trl.GRPOConfig`] and the field below.

    Parameters:
        clip_b_mu (`float`, defaults to `2.5`):
            How many standard deviations below the mean the discriminator of a token has to be, for the token to leave
            the loss. A large one: GRPO.
    """

    clip_b_mu: float = field(
        default=2.5, metadata={"help": "Standard deviations below the mean from which a token leaves the loss."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_number("clip_b_mu", 0.0)
        self.refuse_other_than("it is stated for a loss that clips the ratios of tokens", loss_type=CLIPPED_LOSSES)
        self.refuse_other_than("it chooses single tokens", importance_sampling_level="token")
        self.refuse_other_than("the mean is that of all loss tokens", top_entropy_quantile=1.0)


class ClipBTrainer(SampledPolicyMixin, BaselineTrainer):
    """
    [`~trl.GRPOTrainer`] without those tokens of rollouts of negative advantage whose discriminator lies far below the
    mean of the batch (Clip_B, arXiv 2602.03392).

    What is different: with `S = p (log p + H)` of each sampled token, tokens of a negative advantage with
    `S - mean S < -clip_b_mu * std S` leave the loss and its denominator, a KL term too. Pushing down such a token,
    which is unlikely where the policy is confident, would lower the entropy. Mean and population deviation are those
    of all loss tokens of the generation batch, on all ranks.

    Variant: the released code's, whose batch is that of one optimizer step: the same if each generation serves one.
    Tokens of a positive advantage always stay. Not verified: whether the paper clips those too, and its constants.

    p and H are those of the policy that sampled, at no cost while the generation can be recorded. The logged `entropy`
    is that of the tokens that stay. Three methods of TRL's are overridden: `_generate_and_score_completions` and two
    by [`PolicyReadingMixin`]. Acts on-policy too.
    """

    _tag_names = ["trl", "grpo", "clip-b"]
    _config_class = ClipBConfig
    _name = "Clip_B"
    _paper = PAPER

    def with_reading(self, batch: dict[str, Any], reading: TokenReading) -> dict[str, Any]:
        mask = loss_mask(batch).bool()
        terms = sampled_entropy_term(reading.logps, reading.entropies)
        mean, deviation, tokens = mean_and_deviation(terms, mask, self.accelerator)
        leaving = mask & (batch["advantages"] < 0).unsqueeze(1) & (terms - mean < -self.args.clip_b_mu * deviation)
        batch, total = without_tokens(batch, leaving, self.accelerator)
        self.log_training("clip_b/clipped_tokens", total / max(tokens, 1))
        return batch

    def card_section(self) -> list[str]:
        return [
            "## Clip_B",
            "",
            "Tokens of a negative advantage whose entropy discriminator lay more than "
            f"{self.args.clip_b_mu:g} standard deviations below the mean of their batch left the loss.",
        ]
