"""EntroPIC: confident tokens are weighed by a PI controller of the entropy (arXiv 2511.15248)."""

import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch

from ..policy.tokens import loss_mask
from .base import CLIPPED_LOSSES, BaselineConfig, BaselineTrainer
from .loss_pass import LossPassMixin, old_logps
from .state import StatefulMethodMixin


PAPER = {
    "title": "EntroPIC: Towards Stable Long-Term Training of LLMs via Entropy Stabilization with "
    "Proportional-Integral Control",
    "id": "2511.15248",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{yang2025entropic,
            title  = {{EntroPIC: Towards Stable Long-Term Training of LLMs via Entropy Stabilization with Proportional-Integral Control}},
            author = {Kai Yang and Xin Xu and Yangkun Chen and Weijie Liu and Jiafei Lyu and Zichuan Lin and Deheng Ye and Saiyong Yang},
            year   = 2025,
            eprint = {arXiv:2511.15248},
        }"""),  # noqa: E501
}


@dataclass
class EntroPICConfig(BaselineConfig):
    """
    Configuration of [`EntroPICTrainer`]: [`~trl.GRPOConfig`], of which only `delta` has another default, and the
    fields below.

    Parameters:
        entropic_target (`float`, defaults to `0.1`):
            Entropy in nats that is steered to; the official script's, for Qwen3-8B-Base at temperature 0.6. Choose it
            near the entropy that the policy starts with: the method reacts in nats.
        entropic_kp (`float`, defaults to `1.0`), entropic_ki (`float`, defaults to `0.01`):
            Weight of the distance from the target, and of its sum over the optimizer steps so far. Both 0: GRPO.
        entropic_threshold (`float`, defaults to `0.95`):
            Probability above which a sampled token is weighed.
        delta (`float`, *optional*, defaults to `3.0`):
            TRL's upper clip of the ratio for negative advantages: the official dual clip.
    """

    entropic_target: float = field(default=0.1, metadata={"help": "Entropy in nats that is steered to."})
    entropic_kp: float = field(default=1.0, metadata={"help": "Weight of the entropy's distance from the target."})
    entropic_ki: float = field(
        default=0.01, metadata={"help": "Weight of that distance, summed over optimizer steps; both 0: GRPO."}
    )
    entropic_threshold: float = field(
        default=0.95, metadata={"help": "Probability above which a sampled token is weighed."}
    )
    delta: float | None = field(
        default=3.0, metadata={"help": "Upper clip of the ratio for negative advantages: the official dual clip."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("entropic_target", "entropic_kp", "entropic_ki"):
            self.check_number(name, 0.0)
        self.check_number("entropic_threshold", 0.0, 1.0)
        self.refuse_other_than("it needs a loss that clips the ratios of tokens", loss_type=CLIPPED_LOSSES)
        self.refuse_other_than("its own term is not masked", off_policy_mask_threshold=None)
        self.refuse_other_than("it weighs single tokens", importance_sampling_level="token")
        self.refuse_other_than("the entropy is that of all loss tokens", top_entropy_quantile=1.0)


class EntroPICTrainer(StatefulMethodMixin, LossPassMixin, BaselineTrainer):
    """
    [`~trl.GRPOTrainer`] that makes confident tokens likelier while the entropy is above a target, and less likely
    below it (EntroPIC, arXiv 2511.15248, the official code's token-level form).

    What is different: to TRL's loss is added `-alpha` times the mean of `r |A|` over the sampled tokens of probability
    above `entropic_threshold`; r, the importance ratio, is not clipped there. In each micro-batch
    `alpha = clip(kp e + ki S, -1, 1)`, e is its mean token entropy minus the target, and S grows by e after use; in an
    optimizer step, by the mean of its micro-batches.

    Variant: the official code's, except that entropy, mean and S are those of all ranks (there: each rank has its
    own). The clip of alpha is the only limit: S itself has none. Not verified: the paper's constants. Where the
    rollout engine's log-probs are corrected for, the added tokens are too. The form that Entrocraft's authors compare
    with is another: see `entropic_sequence.py`.

    Two methods of TRL's are overridden, both by [`LossPassMixin`]. Acts on-policy too.
    """

    _tag_names = ["trl", "grpo", "entropic"]
    _config_class = EntroPICConfig
    _name = "EntroPIC"
    _paper = PAPER

    def starting_numbers(self) -> dict[str, float]:
        return {"integral": 0.0}

    def loss_term(self, logps: torch.Tensor, entropies: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """`-alpha` times the mean of `r |A|` over the confident tokens; also moves the integral."""
        mask = loss_mask(inputs).bool()
        confident = mask & (logps.detach().exp() > self.args.entropic_threshold)
        sums = torch.stack([entropies.detach()[mask].sum(), mask.sum(), confident.sum()]).float()
        entropy_sum, tokens, confident_tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        error = entropy_sum / tokens - self.args.entropic_target if tokens else 0.0
        alpha = min(max(pi_output(error, self.numbers["integral"], self.args), -1.0), 1.0)
        self.numbers["integral"] += error / self.current_gradient_accumulation_steps
        self.log_training("entropic/alpha", alpha)
        self.log_training("entropic/integral", self.numbers["integral"])
        pushed = torch.exp(logps - old_logps(logps, inputs)) * inputs["advantages"].abs().unsqueeze(1)
        pushed = pushed * inputs.get("importance_sampling_ratio", 1.0)
        # Gradients are averaged over ranks: so this is the mean over the tokens of all of them.
        mean = pushed[confident].sum() * self.accelerator.num_processes / max(confident_tokens, 1.0)
        return -alpha * mean / self.current_gradient_accumulation_steps

    def card_section(self) -> list[str]:
        return [
            "## EntroPIC",
            "",
            f"The entropy was steered to {self.args.entropic_target:g} nats: tokens of a probability above "
            f"{self.args.entropic_threshold:g} were made likelier while it was higher and less likely while it was "
            f"lower, by a PI controller (kp {self.args.entropic_kp:g}, ki {self.args.entropic_ki:g}).",
        ]


def pi_output(error: float, integral: float, args: Any) -> float:
    """`kp e + ki S`, from the entropy's distance from the target and the sum of the earlier ones, in nats."""
    return args.entropic_kp * error + args.entropic_ki * integral
