"""AEnt: a bonus on the clamped entropy, with a coefficient that keeps it between two bounds (arXiv 2509.03493)."""

import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config_values import whole_number
from ..policy.tokens import loss_mask
from .base import BaselineConfig, BaselineTrainer
from .clamped_entropy import LogitsHead
from .loss_pass import LossPassMixin
from .state import StatefulMethodMixin


@dataclass
class AEntConfig(BaselineConfig):
    """
    Configuration of [`AEntTrainer`]: [`~trl.GRPOConfig`] and the fields below, whose defaults are those of the
    author's AReaL recipe, with its adaptation switched on.

    Parameters:
        aent_clamp (`float`, defaults to `0.2`):
            Share of the vocabulary, the tokens of lowest probability, that the entropy leaves out. 0: none.
        aent_coef (`float`, defaults to `1e-3`):
            Coefficient of the bonus at the start.
        aent_entropy_low (`float`, defaults to `0.1`), aent_entropy_high (`float`, defaults to `0.5`):
            Bounds of the clamped entropy in nats: below, the coefficient rises, above, it falls. The results are said
            to depend mainly on these two.
        aent_coef_lr (`float`, defaults to `1e-3`):
            Change of the coefficient per optimizer step and nat of distance from the bounds. 0: it is constant.
        aent_coef_min (`float`, defaults to `1e-5`), aent_coef_max (`float`, defaults to `1e-2`):
            Bounds of the coefficient.
        aent_warmup_steps (`int`, defaults to `0`):
            Optimizer steps before the coefficient moves.
    """

    aent_clamp: float = field(
        default=0.2, metadata={"help": "Share of the vocabulary, the least likely, that the entropy leaves out."}
    )
    aent_coef: float = field(default=1e-3, metadata={"help": "Coefficient of the bonus at the start."})
    aent_entropy_low: float = field(
        default=0.1, metadata={"help": "Clamped entropy in nats below which the coefficient rises."}
    )
    aent_entropy_high: float = field(
        default=0.5, metadata={"help": "Clamped entropy in nats above which the coefficient falls."}
    )
    aent_coef_lr: float = field(
        default=1e-3, metadata={"help": "Change of the coefficient per step and nat of distance; 0: constant."}
    )
    aent_coef_min: float = field(default=1e-5, metadata={"help": "Least coefficient."})
    aent_coef_max: float = field(default=1e-2, metadata={"help": "Largest coefficient."})
    aent_warmup_steps: int = field(default=0, metadata={"help": "Optimizer steps before the coefficient moves."})

    def __post_init__(self):
        super().__post_init__()
        self.check_number("aent_clamp", 0.0, 1.0)
        if self.aent_clamp == 1.0:
            raise ValueError("aent_clamp must be below 1, got 1.0: no token would be left.")
        names = (
            "aent_coef",
            "aent_entropy_low",
            "aent_entropy_high",
            "aent_coef_lr",
            "aent_coef_min",
            "aent_coef_max",
        )
        for name in names:
            self.check_number(name, 0.0)
        self.aent_warmup_steps = whole_number("aent_warmup_steps", self.aent_warmup_steps)
        if not self.aent_entropy_low <= self.aent_entropy_high:
            raise ValueError(
                f"aent_entropy_low must not exceed aent_entropy_high, got {self.aent_entropy_low} and "
                f"{self.aent_entropy_high}."
            )
        if self.aent_coef_lr and not self.aent_coef_min <= self.aent_coef <= self.aent_coef_max:
            raise ValueError(
                f"aent_coef={self.aent_coef} must lie between aent_coef_min={self.aent_coef_min} and "
                f"aent_coef_max={self.aent_coef_max}."
            )
        self.refuse_other_than("the bonus is that of all loss tokens", top_entropy_quantile=1.0)


class AEntTrainer(StatefulMethodMixin, LossPassMixin, BaselineTrainer):
    """
    [`~trl.GRPOTrainer`] with a bonus on the clamped entropy of the policy (AEnt, arXiv 2509.03493).

    What is different: the loss is TRL's minus `coef` times the mean clamped entropy of the micro-batch's tokens, see
    `clamped_entropy.py`. After each optimizer step, with h the mean over the tokens of the step and of all ranks,
    `coef <- clip(coef - lr (min(0, h - low) + max(0, h - high)), coef_min, coef_max)`.

    Variant: the code of the author's AReaL recipe. The paper states sums over a rollout in place of the mean. Not
    verified: the bounds and the learning rate of the paper's tables. With a clamp of 0.2 to 0.4 of a vocabulary of
    150,000 the clamped entropy is nearly the ordinary one. In that recipe rewards are scaled by 10, which divides the
    effective coefficient by as much; here they are not.

    One forward pass; but the logits `(B, T, V)` of the completions exist, which TRL's fused head avoids, so that log-
    probs also differ from TRL's by rounding. Two methods of TRL's are overridden, `_compute_loss` and
    `_get_per_token_logps_and_entropies`. Acts on-policy too.
    """

    _tag_names = ["trl", "grpo", "aent"]
    _config_class = AEntConfig
    _name = "AEnt"
    _paper = {
        "title": "On Entropy Control in LLM-RL Algorithms",
        "id": "2509.03493",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{shen2025entropy,
                title  = {{On Entropy Control in LLM-RL Algorithms}},
                author = {Han Shen},
                year   = 2025,
                eprint = {arXiv:2509.03493},
            }"""),
    }

    _head: LogitsHead | None = None
    _window: torch.Tensor | float = 0.0  # sum and count of the clamped entropies of the optimizer step under way

    def starting_numbers(self) -> dict[str, float]:
        return {"coef": self.args.aent_coef}

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if self._loss_inputs is not None:  # the loss's own pass
            model = self._head = LogitsHead(model, logits_to_keep, self.temperature, self.args.aent_clamp)
        arguments = (input_ids, attention_mask, logits_to_keep, *args)
        return super()._get_per_token_logps_and_entropies(model, *arguments, **kwargs)

    def loss_term(self, logps: torch.Tensor, entropies: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """The bonus with its sign; at the end of an optimizer step also moves the coefficient, for the next one."""
        mask = loss_mask(inputs)
        clamped, self._head = torch.cat(self._head.clamped), None
        sums = torch.stack([(clamped * mask).sum(), mask.sum()])
        bonus = self.numbers["coef"] * sums[0] / sums[1].clamp(min=1)
        self._window = self._window + sums.detach()
        if self.accelerator.sync_gradients:
            total, tokens = self.accelerator.reduce(self._window, reduction="sum").tolist()
            self._window = 0.0
            self.log_training("aent/coef", self.numbers["coef"])
            if tokens:
                self.log_training("aent/clamped_entropy", total / tokens)
                self._move_coefficient(total / tokens)
        return -bonus / self.current_gradient_accumulation_steps

    def _move_coefficient(self, entropy: float) -> None:
        if self.state.global_step >= self.args.aent_warmup_steps and self.args.aent_coef_lr:
            self.numbers["coef"] = next_coefficient(self.numbers["coef"], entropy, self.args)

    def card_section(self) -> list[str]:
        args = self.args
        moved = (
            f"moved between {args.aent_coef_min:g} and {args.aent_coef_max:g} to keep it within "
            f"{args.aent_entropy_low:g} to {args.aent_entropy_high:g} nats, and was {self.numbers['coef']:.3g} last"
            if args.aent_coef_lr
            else f"was {args.aent_coef:g}"
        )
        return [
            "## AEnt",
            "",
            f"A bonus on the entropy without the least likely {args.aent_clamp:.0%} of the vocabulary was added to "
            f"the loss. Its coefficient {moved}.",
        ]


def next_coefficient(coef: float, entropy: float, args: AEntConfig) -> float:
    """The coefficient of the next optimizer step, from the clamped entropy of this one in nats."""
    outside = min(0.0, entropy - args.aent_entropy_low) + max(0.0, entropy - args.aent_entropy_high)
    return min(max(coef - args.aent_coef_lr * outside, args.aent_coef_min), args.aent_coef_max)
