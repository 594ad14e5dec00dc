"""KL-Cov: the tokens of highest covariance are held near the old policy (arXiv 2505.22617)."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import GRPOConfig

from ..policy.tokens import loss_mask
from .base import CLIPPED_LOSSES, BaselineConfig, BaselineTrainer
from .covariance import PAPER, highest_of_all_ranks, share_as_count, token_covariances
from .loss_pass import LossPassMixin, old_logps


@dataclass
class KLCovConfig(BaselineConfig):
    """
    Configuration of [`KLCovTrainer`]: [`~trl.GRPOConfig`], whose `epsilon`, `epsilon_high` and `delta` are not read,
    and the fields below.

    Parameters:
        kl_cov_ratio (`float`, defaults to `2e-3`):
            Share of the loss tokens that are penalised, at least one; a fraction, where the official code has percent.
            The paper's for a model of 7B; for 32B it is 2e-4. 0: none.
        kl_cov_coef (`float`, defaults to `1.0`):
            Weight of the penalty: the paper's. (verl's default of 0.1 is not.)
    """

    kl_cov_ratio: float = field(
        default=2e-3, metadata={"help": "Share of the loss tokens that are penalised (a fraction, not percent)."}
    )
    kl_cov_coef: float = field(default=1.0, metadata={"help": "Weight of the penalty |log p - log p_old|."})

    def __post_init__(self):
        super().__post_init__()
        self.check_number("kl_cov_ratio", 0.0, 1.0)
        self.check_number("kl_cov_coef", 0.0)
        self.refuse_other_than("ratios are not clipped", epsilon=GRPOConfig.epsilon, epsilon_high=None, delta=None)
        # TRL's mask looks at the sign of the advantages, which the penalty is part of.
        self.refuse_other_than("it would mask by advantages and penalty", off_policy_mask_threshold=None)
        self.refuse_other_than("it needs a loss of ratios of tokens", loss_type=CLIPPED_LOSSES)
        self.refuse_other_than("it chooses single tokens", importance_sampling_level="token")
        self.refuse_other_than("covariances are those of all loss tokens", top_entropy_quantile=1.0)
        if self.on_policy:
            warnings.warn(
                "KL-Cov does nothing here: each generation serves one optimizer step, so that the policy is the old "
                "one and the penalty has no gradient. Set steps_per_generation to a multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} (the paper takes 8 optimizer steps).",
                stacklevel=3,
            )


class KLCovTrainer(LossPassMixin, BaselineTrainer):
    """
    [`~trl.GRPOTrainer`] that penalises moving the tokens of highest covariance (KL-Cov, arXiv 2505.22617).

    What is different: the policy loss of a token is `-A r` without a clip of the ratio r, and on the
    `max(1, floor(kl_cov_ratio * N))` tokens of highest `Cov` it is `-A r + kl_cov_coef |log p - log p_old|`.
    `Cov = (log p - mean log p) (A - mean A)`, see `covariance.py`.

    Variant: the official code's, whose absolute difference of log-probs stands for the paper's KL divergence of old
    from new, except that the highest are those of all ranks (there: of each micro-batch of each rank). Where the
    rollout engine's log-probs are corrected for, the correction weighs the penalty too.

    It does nothing while the policy is the old one: see the warning of the config. In the first optimizer step after a
    generation the two differ by rounding alone, and the penalty's gradient has the sign of that, as officially.

    Two methods of TRL's are overridden, both by [`LossPassMixin`].
    """

    _tag_names = ["trl", "grpo", "kl-cov"]
    _config_class = KLCovConfig
    _name = "KL-Cov"
    _paper = PAPER

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.epsilon_low = self.epsilon_high = math.inf

    def token_advantages(self, logps: torch.Tensor, entropies: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """
        Advantages `(B, T)` with the penalty in them: TRL's loss is `-A' r`, so `A' = A - coef |d| / r` makes it
        `-A r + coef |d|`, in value and in gradient, under every normaliser.
        """
        if "old_per_token_logps" not in inputs or not self.args.kl_cov_ratio:
            return inputs["advantages"]
        advantages = inputs["advantages"].unsqueeze(1).expand_as(logps)
        covariances, tokens = token_covariances(logps.detach(), advantages, loss_mask(inputs), self.accelerator)
        count = share_as_count(self.args.kl_cov_ratio, tokens)
        chosen = highest_of_all_ranks(covariances, count, self.accelerator)
        # 0 elsewhere, before the exponential: an infinity there would make its gradient NaN.
        moved = torch.where(chosen, logps - old_logps(logps, inputs), 0.0)
        penalised = torch.stack([moved.detach().abs().sum(), chosen.sum()])
        moved_sum, chosen_sum = self.accelerator.reduce(penalised, reduction="sum").tolist()
        self.log_training("kl_cov/penalised_tokens", chosen_sum / max(tokens, 1))
        self.log_training("kl_cov/penalty", moved_sum / max(chosen_sum, 1))
        return advantages - self.args.kl_cov_coef * moved.abs() * torch.exp(-moved)

    def card_section(self) -> list[str]:
        return [
            "## KL-Cov",
            "",
            f"Ratios were not clipped. In each micro-batch, on the share of {self.args.kl_cov_ratio:g} of the tokens "
            "whose log-prob and advantage have the highest covariance, the distance of the log-prob from the old "
            f"policy's was added to the loss with weight {self.args.kl_cov_coef:g}.",
        ]
