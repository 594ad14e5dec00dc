"""Clip-Cov: a few tokens of high covariance give no gradient (arXiv 2505.22617)."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..policy.tokens import loss_mask
from .base import CLIPPED_LOSSES, BaselineConfig, BaselineTrainer
from .covariance import PAPER, highest_of_all_ranks, share_as_count, token_covariances
from .loss_pass import LossPassMixin, old_logps


@dataclass
class ClipCovConfig(BaselineConfig):
    """
    Configuration of [`ClipCovTrainer`]: [`~trl.GRPOConfig`], of which only `epsilon` has another default, and the
    fields below.

    Parameters:
        clip_cov_ratio (`float`, defaults to `2e-4`):
            Share of the loss tokens that give no gradient: at least one where there is a candidate. 0: none, which is
            GRPO.
        clip_cov_low (`float`, defaults to `1.0`), clip_cov_high (`float`, defaults to `5.0`):
            Candidates are tokens whose covariance lies strictly between. Made for advantages of standard deviation 1
            (`scale_rewards="group"`): others may leave no candidate.
        epsilon (`float`, defaults to `1.0`):
            As in the scripts of the official code, which clip ratios to 0..2. The paper names 0.2.
    """

    clip_cov_ratio: float = field(
        default=2e-4, metadata={"help": "Share of the loss tokens that give no gradient; 0: none, which is GRPO."}
    )
    clip_cov_low: float = field(default=1.0, metadata={"help": "Candidates have a covariance above this."})
    clip_cov_high: float = field(default=5.0, metadata={"help": "Candidates have a covariance below this."})
    epsilon: float = field(
        default=1.0, metadata={"help": "Clipping of the ratio. 1: as the official scripts; the paper names 0.2."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_number("clip_cov_ratio", 0.0, 1.0)
        self.check_number("clip_cov_low", -1e9)
        self.check_number("clip_cov_high", -1e9)
        if not self.clip_cov_low < self.clip_cov_high:
            raise ValueError(
                f"clip_cov_low must be below clip_cov_high, got {self.clip_cov_low} and {self.clip_cov_high}."
            )
        self.refuse_other_than("it needs a loss that clips the ratios of tokens", loss_type=CLIPPED_LOSSES)
        self.refuse_other_than("it chooses single tokens", importance_sampling_level="token")
        self.refuse_other_than("covariances are those of all loss tokens", top_entropy_quantile=1.0)


class ClipCovTrainer(LossPassMixin, BaselineTrainer):
    """
    [`~trl.GRPOTrainer`] in whose policy loss a few tokens of high covariance get no gradient (Clip-Cov, arXiv
    2505.22617).

    What is different: of the tokens with `clip_cov_low < Cov < clip_cov_high` that the ratio's clip has left alone,
    `max(1, floor(clip_cov_ratio * N))` are drawn without replacement, and their advantage in the loss is 0.
    `Cov = (log p - mean log p) (A - mean A)`, see `covariance.py`. A KL term to a reference model stays.

    Variant: the official code's, except that tokens are drawn among all ranks' (there: in each micro-batch of each
    rank). TRL's `delta` is its dual clip. Not verified: which clipping range the paper's tables were made with.

    Two methods of TRL's are overridden, both by [`LossPassMixin`]. Acts on-policy too.
    """

    _tag_names = ["trl", "grpo", "clip-cov"]
    _config_class = ClipCovConfig
    _name = "Clip-Cov"
    _paper = PAPER

    def token_advantages(self, logps: torch.Tensor, entropies: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Advantages `(B, T)`, 0 on the tokens that were drawn."""
        if not self.args.clip_cov_ratio:
            return inputs["advantages"]
        logps, mask = logps.detach(), loss_mask(inputs)
        advantages = inputs["advantages"].unsqueeze(1).expand_as(logps)
        covariances, tokens = token_covariances(logps, advantages, mask, self.accelerator)
        ratios = torch.exp(logps - old_logps(logps, inputs))
        clipped = (ratios < 1 - self.epsilon_low) & (advantages < 0)
        clipped |= (ratios > 1 + self.epsilon_high) & (advantages > 0)
        inside = (covariances > self.args.clip_cov_low) & (covariances < self.args.clip_cov_high)
        lots = self._draw_lots(logps).masked_fill(~inside | clipped, -torch.inf)
        drawn = highest_of_all_ranks(lots, share_as_count(self.args.clip_cov_ratio, tokens), self.accelerator)
        total = self.accelerator.reduce(drawn.sum(), reduction="sum").item()
        self.log_training("clip_cov/clipped_tokens", total / max(tokens, 1))
        return advantages.masked_fill(drawn, 0.0)

    def _draw_lots(self, like: torch.Tensor) -> torch.Tensor:
        """A random number for each token: from a stream of its own, so that TRL's is the same with and without."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        # TRL's count of micro-steps is restored from checkpoints, and with it the lots.
        generator = torch.Generator().manual_seed((self.args.seed << 32) + self._step * ranks + rank)
        return torch.rand(like.shape, generator=generator).to(like.device)

    def card_section(self) -> list[str]:
        return [
            "## Clip-Cov",
            "",
            f"In each micro-batch a share of {self.args.clip_cov_ratio:g} of the tokens, drawn among those whose "
            "log-prob and advantage have a covariance between "
            f"{self.args.clip_cov_low:g} and {self.args.clip_cov_high:g}, gave no gradient.",
        ]
