"""Clip_V: of wrong rollouts, tokens whose discriminator is far below the policy's own mean leave (2602.03392)."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..policy.tokens import TokenReading, loss_mask, sampled_entropy_term
from .base import CLIPPED_LOSSES, BaselineConfig, BaselineTrainer
from .covariance import highest_of_all_ranks, share_as_count
from .discriminator import PAPER, mean_and_deviation, without_tokens
from .sampled_policy import SampledPolicyMixin


@dataclass
class ClipVConfig(BaselineConfig):
    """
    Configuration of [`ClipVTrainer`]: [`~trl.GRPOConfig`] and the fields below.

    Parameters:
        clip_v_mu (`float`, defaults to `8.5`):
            How many standard deviations the discriminator of a token has to be below its expectation, for the token to
            leave the loss: the official recipe's. A large one: GRPO.
        clip_v_max_share (`float`, defaults to `1e-4`):
            Largest share of the loss tokens that may leave, but at least one of them. 0: GRPO.
    """

    clip_v_mu: float = field(
        default=8.5, metadata={"help": "Standard deviations below the expectation from which a token leaves the loss."}
    )
    clip_v_max_share: float = field(
        default=1e-4, metadata={"help": "Largest share of the loss tokens that may leave, at least one; 0: GRPO."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_number("clip_v_mu", 0.0)
        self.check_number("clip_v_max_share", 0.0, 1.0)
        self.refuse_other_than("it is stated for a loss that clips the ratios of tokens", loss_type=CLIPPED_LOSSES)
        self.refuse_other_than("it chooses single tokens", importance_sampling_level="token")
        self.refuse_other_than("the deviation is that of all loss tokens", top_entropy_quantile=1.0)


class ClipVTrainer(SampledPolicyMixin, BaselineTrainer):
    """
    [`~trl.GRPOTrainer`] without those tokens of rollouts of negative advantage whose discriminator lies far below what
    the policy expects at their place (Clip_V, arXiv 2602.03392).

    What is different: with `S = p (log p + H)` of the sampled token and `N = sum_v p_v^2 (log p_v + H)`, the mean of S
    over the vocabulary, `-A (S - N)` is the first-order change of the entropy by a token. Of the tokens of a negative
    advantage with `D = N - S > clip_v_mu * std D` those of highest D leave the loss and its denominator, a KL term
    too: `max(1, floor(clip_v_max_share * tokens))` at most. The population deviation is that of all loss tokens of the
    generation batch, on all ranks; the bound is on D itself, not on its distance from a mean.

    Variant: the released code's, whose batch is that of one optimizer step: the same if each generation serves one.
    There tokens of advantage 0 leave too, without a limit, which acts on denominators alone; here they stay. Not
    verified: whether the paper clips positive advantages too, and its constants. At the default share at most one
    token leaves a batch of less than 20,000.

    p, H and N are those of the policy that sampled, at no cost while the generation can be recorded. The logged
    `entropy` is that of the tokens that stay. Three methods of TRL's are overridden: `_generate_and_score_completions`
    and two by [`PolicyReadingMixin`]. Acts on-policy too.
    """

    _tag_names = ["trl", "grpo", "clip-v"]
    _config_class = ClipVConfig
    _name = "Clip_V"
    _paper = PAPER

    reads_expected_term = True

    def needs_reading(self, batch: dict[str, Any]) -> bool:
        return self.args.clip_v_max_share > 0

    def with_reading(self, batch: dict[str, Any], reading: TokenReading) -> dict[str, Any]:
        mask = loss_mask(batch).bool()
        below = reading.expected - sampled_entropy_term(reading.logps, reading.entropies)
        _, deviation, tokens = mean_and_deviation(below, mask, self.accelerator)
        candidates = mask & (batch["advantages"] < 0).unsqueeze(1) & (below > self.args.clip_v_mu * deviation)
        scores = below.masked_fill(~candidates, -torch.inf)
        most = share_as_count(self.args.clip_v_max_share, tokens)
        leaving = highest_of_all_ranks(scores, most, self.accelerator)
        batch, total = without_tokens(batch, leaving, self.accelerator)
        self.log_training("clip_v/clipped_tokens", total / max(tokens, 1))
        return batch

    def card_section(self) -> list[str]:
        return [
            "## Clip_V",
            "",
            "Tokens of a negative advantage whose entropy discriminator lay more than "
            f"{self.args.clip_v_mu:g} standard deviations below its expectation left the loss, at most a share of "
            f"{self.args.clip_v_max_share:g} of the tokens of a batch, or one.",
        ]
