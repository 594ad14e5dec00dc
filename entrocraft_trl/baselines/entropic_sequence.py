"""EntroPIC over whole rollouts, as Entrocraft's authors compare with it (after arXiv 2511.15248)."""

import math
from dataclasses import dataclass, field
from typing import Any

from ..policy.tokens import TokenReading
from .base import BaselineTrainer
from .entropic import PAPER, pi_output
from .sampled_policy import SampledPolicyMixin
from .signed_rewards import SignedRewardsConfig, SignedRewardsMixin
from .state import StatefulMethodMixin


@dataclass
class EntroPICSequenceConfig(SignedRewardsConfig):
    """
    Configuration of [`EntroPICSequenceTrainer`]: [`~trl.GRPOConfig`], the fields of [`SignedRewardsConfig`], and those
    below, with the defaults of Entrocraft's script.

    Parameters:
        entropic_target (`float`, defaults to `0.5`):
            Entropy in nats that is steered to.
        entropic_kp (`float`, defaults to `1.0`), entropic_ki (`float`, defaults to `0.01`):
            Weight of the distance from the target, and of its sum over the generation batches so far.
    """

    entropic_target: float = field(default=0.5, metadata={"help": "Entropy in nats that is steered to."})
    entropic_kp: float = field(default=1.0, metadata={"help": "Weight of the entropy's distance from the target."})
    entropic_ki: float = field(
        default=0.01, metadata={"help": "Weight of that distance, summed over generation batches."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("entropic_target", "entropic_kp", "entropic_ki"):
            self.check_number(name, 0.0)


class EntroPICSequenceTrainer(StatefulMethodMixin, SampledPolicyMixin, SignedRewardsMixin, BaselineTrainer):
    """
    [`~trl.GRPOTrainer`] that weighs right rollouts by `1 + alpha` and wrong ones by `1 - alpha`, alpha from EntroPIC's
    controller (arXiv 2511.15248), in the sequence-level form of Entrocraft's authors.

    What is different: the advantage of every token of a rollout of reward r, +1 or -1, is `r + alpha |r|`, without a
    group mean or deviation. For each generation batch `alpha = kp e + ki S`, e is its entropy before the update (mean
    over the tokens of all ranks) minus the target, and S grows by e after use.

    Variant: Entrocraft's code, which does not limit alpha: beyond 1 right and wrong are pushed the same way. Not
    verified: whether the paper has a sequence-level form; its official code is token-level, see `entropic.py`.

    Four methods of TRL's are overridden: `_generate_and_score_completions`, `_calculate_rewards` to keep the rewards,
    and two to read the entropy while the rollouts are sampled, see [`SampledPolicyMixin`].
    """

    _tag_names = ["trl", "grpo", "entropic"]
    _config_class = EntroPICSequenceConfig
    _name = "EntroPIC (sequence level)"
    _paper = PAPER

    def starting_numbers(self) -> dict[str, float]:
        return {"integral": 0.0}

    def with_reading(self, batch: dict[str, Any], reading: TokenReading) -> dict[str, Any]:
        entropy = self.batch_entropy(batch, reading)
        error = 0.0 if math.isnan(entropy) else entropy - self.args.entropic_target
        alpha = pi_output(error, self.numbers["integral"], self.args)
        self.numbers["integral"] += error
        self.log_training("entropic/entropy", entropy)
        self.log_training("entropic/alpha", alpha)
        self.log_training("entropic/integral", self.numbers["integral"])
        signs = self.signs_of_all_ranks()
        return self.with_advantages(batch, signs + alpha * signs.abs())

    def card_section(self) -> list[str]:
        return [
            f"## {self._name}",
            "",
            f"The entropy was steered to {self.args.entropic_target:g} nats: right rollouts weighed 1 + alpha and "
            "wrong ones 1 - alpha, with alpha from a PI controller "
            f"(kp {self.args.entropic_kp:g}, ki {self.args.entropic_ki:g}) that is positive above the target.",
        ]
