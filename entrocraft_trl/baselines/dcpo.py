"""DCPO: right rollouts are also learned as if sampled at a temperature that steers the entropy (arXiv 2601.12730)."""

import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch

from ..policy.passes import run_policy_pass
from ..policy.tokens import TokenReading, loss_mask
from .base import CLIPPED_LOSSES, BaselineConfig, BaselineTrainer
from .clamped_entropy import LogitsHead
from .sampled_policy import SampledPolicyMixin
from .signed_rewards import SignedRewardsMixin


@dataclass
class DCPOConfig(BaselineConfig):
    """
    Configuration of [`DCPOTrainer`]: [`~trl.GRPOConfig`] and the fields below, with the official defaults.

    Parameters:
        dcpo_target_entropy (`float`, defaults to `0.5`):
            Entropy in nats that is steered to.
        dcpo_temperature_high (`float`, defaults to `1.2`), dcpo_temperature_low (`float`, defaults to `0.8`):
            Temperature that right rollouts are learned at while the entropy is not above the target, and while it is;
            as a multiple of the sampling temperature.
        dcpo_limit (`float`, defaults to `0.1`):
            The distance from the target, in nats, counts up to this. 0: GRPO.
        dcpo_right (`float`, defaults to `0.05`):
            A rollout is right if its reward is above this.
    """

    dcpo_target_entropy: float = field(default=0.5, metadata={"help": "Entropy in nats that is steered to."})
    dcpo_temperature_high: float = field(
        default=1.2, metadata={"help": "Temperature below the target, as a multiple of the sampling temperature."}
    )
    dcpo_temperature_low: float = field(
        default=0.8, metadata={"help": "Temperature above the target, as a multiple of the sampling temperature."}
    )
    dcpo_limit: float = field(
        default=0.1, metadata={"help": "The distance from the target counts up to this, in nats; 0: GRPO."}
    )
    dcpo_right: float = field(default=0.05, metadata={"help": "A rollout is right if its reward is above this."})

    def __post_init__(self):
        super().__post_init__()
        self.check_number("dcpo_target_entropy", 0.0)
        self.check_number("dcpo_temperature_high", 1.0)
        self.check_number("dcpo_temperature_low", 0.0, 1.0)
        if self.dcpo_temperature_low == 0.0:
            raise ValueError("dcpo_temperature_low must be above 0, got 0.0: log-probs are divided by it.")
        self.check_number("dcpo_limit", 0.0)
        self.check_number("dcpo_right", -math.inf)
        self.refuse_other_than("the weighted sum of rewards is read", multi_objective_aggregation="sum_then_normalize")
        self.refuse_other_than("it is stated for a loss that clips the ratios of tokens", loss_type=CLIPPED_LOSSES)
        self.refuse_other_than("it weighs single tokens", importance_sampling_level="token")
        # TRL's mask looks at the sign of the advantages, which the term is part of.
        self.refuse_other_than("it would mask by advantages and term", off_policy_mask_threshold=None)
        self.refuse_other_than("the entropy is that of all loss tokens", top_entropy_quantile=1.0)


class DCPOTrainer(SampledPolicyMixin, SignedRewardsMixin, BaselineTrainer):
    """
    [`~trl.GRPOTrainer`] that also learns right rollouts with the weights that they would have, had they been sampled
    at another temperature (DCPO, arXiv 2601.12730, the successor of AEPO): a higher one while the entropy is below a
    target, a lower one above it.

    What is different: the advantage of a token is `(1 - alpha) A + alpha q / p` in a right rollout and `(1 - alpha) A`
    in another. p is the probability of the token under the policy that sampled it, q that of the same policy at the
    other temperature; their ratio is not limited. `alpha = a / (a + s)`, where a is the distance of the batch's
    entropy from the target, `dcpo_limit` at most, and s the share of right rollouts; 0 if there is none.

    Variant: the official code's, which has not the entropy of the batch itself, but a Monte-Carlo one of the batch
    before, and 0 at the start; there a batch without a right rollout makes the loss NaN. Mean and share are those of
    all ranks. Not verified: the paper's text.

    One forward pass more for each generation batch, without gradient, in which the logits `(B, T, V)` of a micro-batch
    exist. Four methods of TRL's are overridden: `_generate_and_score_completions`, `_calculate_rewards` to keep the
    rewards, and two by [`PolicyReadingMixin`]. Acts on-policy too.
    """

    _tag_names = ["trl", "grpo", "dcpo"]
    _config_class = DCPOConfig
    _name = "DCPO"
    _paper = {
        "title": "Distribution-Centric Policy Optimization Dominates Exploration-Exploitation Trade-off",
        "id": "2601.12730",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{li2026distribution,
                title  = {{Distribution-Centric Policy Optimization Dominates Exploration-Exploitation Trade-off}},
                author = {Zhaochun Li and Chen Wang and Jionghao Bai and Shisheng Cui and Ge Lan and Zhou Zhao and Yue Wang},
                year   = 2026,
                eprint = {arXiv:2601.12730},
            }"""),  # noqa: E501
    }

    def needs_reading(self, batch: dict[str, Any]) -> bool:
        return self.args.dcpo_limit > 0

    def with_reading(self, batch: dict[str, Any], reading: TokenReading) -> dict[str, Any]:
        """The batch with advantages of tokens, `(B, T)`."""
        args, entropy = self.args, self.batch_entropy(batch, reading)
        everyones = self.rewards_of_all_ranks() > args.dcpo_right
        first = self.accelerator.process_index * len(batch["advantages"])
        right = everyones[first : first + len(batch["advantages"])]
        weight = term_weight(entropy, everyones.float().mean().item(), args)
        high = entropy <= args.dcpo_target_entropy
        self.log_training("dcpo/entropy", entropy)
        self.log_training("dcpo/weight", weight)
        if not weight:  # the same on all ranks
            return batch
        tempered = self._log_probs_at(args.dcpo_temperature_high if high else args.dcpo_temperature_low, batch)
        # 0 on padding, where the reading holds nothing.
        ratios = torch.exp((tempered - reading.logps).masked_fill(~loss_mask(batch).bool(), 0.0))
        advantages = (1 - weight) * batch["advantages"].unsqueeze(1) + weight * right.unsqueeze(1) * ratios
        return {**batch, "advantages": advantages.to(batch["advantages"])}

    def _log_probs_at(self, factor: float, batch: dict[str, Any]) -> torch.Tensor:
        """Log-probs `(B, T)` of the policy at `factor` times the sampling temperature, in a pass of its own."""

        def read(model, input_ids, attention_mask, width, **kwargs):
            head = LogitsHead(model, width, self.temperature * factor, 0.0)
            logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
                head, input_ids, attention_mask, width, compute_entropy=True, **kwargs
            )
            return TokenReading(logps, entropies), aux_loss

        return run_policy_pass(read, self.model, batch, self.args.per_device_train_batch_size).logps

    def card_section(self) -> list[str]:
        args = self.args
        return [
            "## DCPO",
            "",
            f"The entropy was steered to {args.dcpo_target_entropy:g} nats: rollouts of a reward above "
            f"{args.dcpo_right:g} were also learned as if sampled at {args.dcpo_temperature_high:g} times the "
            f"temperature below it and at {args.dcpo_temperature_low:g} times above it, the more, the farther it was.",
        ]


def term_weight(entropy: float, right: float, args: DCPOConfig) -> float:
    """alpha of [`DCPOTrainer`], from the entropy in nats and the share of right rollouts; 0 where one is unknown."""
    distance = min(abs(args.dcpo_target_entropy - entropy), args.dcpo_limit)
    return distance / (distance + right) if right > 0 and not math.isnan(entropy) else 0.0
