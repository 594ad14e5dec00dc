"""Fields of entropy control, to be mixed into a trainer's config. Holds fields, help texts and checks only."""

import math
import warnings
from dataclasses import dataclass, field, fields

from accelerate.utils import parse_flag_from_env

from ..config_values import number, whole_number
from ..credentials import CredentialsMixin
from . import checks, loss_inputs, rejection, schedule


@dataclass
class EntropyControlConfig(CredentialsMixin):
    """
    Fields that [`EntropyControlMixin`] reads. Mixed into TRL's trainer configs; only what they add is documented here.

    Parameters:
        > Parameters that control the entropy band

        entropy_low (`list[float]`, defaults to `[0.9, 0.15]`):
            Low edge of the band: one value, or its start and end.
        entropy_high (`list[float]`, defaults to `[1.05, 0.3]`):
            High edge of the band: one value, or its start and end.
        entropy_unit (`str`, defaults to `"initial"`):
            `"initial"`: edges are multiples of the first entropy that this run measures; `"nats"`: edges are nats.
        entropy_width (`str`, defaults to `"given"`):
            `"given"`: as wide as the edges say. `"auto"`: around the middle between them, four times as wide as one
            reading of the entropy scatters, so that noise alone seldom leaves the band; it follows the scatter that
            the run shows.
        entropy_schedule (`str`, defaults to `"linear"`):
            `"linear"`, `"cosine"` or `"constant"` between start and end, or `"piecewise"` (straight lines between
            knots) or `"step"` (each knot holds until the next).
        entropy_knots (`list[str]`, *optional*):
            Points of a `"piecewise"` or `"step"` band, each `progress:low:high` with progress in 0..1. They replace
            `entropy_low` and `entropy_high`.
        entropy_schedule_steps (`int`, *optional*):
            Optimizer steps until the end values, which hold afterwards. Defaults to the run's `max_steps`.

        > Parameters that control the rejection

        rejection_rule (`str`, defaults to `"entropy_change"`):
            `"advantage_sign"`: Algorithm 1 of the paper. `"entropy_change"`: test the predicted entropy change of each
            rollout instead of the sign of its advantage, and reject as much of what goes the wrong way as the position
            of the entropy in its band calls for. `"influence"`: the same, by that change and by the one in all
            contexts together, which share the parameters, half and half. In steps where something may have to go, it
            costs a backward pass over an eighth of the rollouts (at least 16) and a forward pass over all; under bf16,
            in place of the latter, a forward and a backward pass of each rollout with an advantage. It needs memory
            for two more copies of the trainable parameters meanwhile, and parameters that are whole on each rank: DDP,
            ZeRO-1 or ZeRO-2.
        rejected_rollouts (`str`, defaults to `"drop"`):
            `"drop"`: rejected rollouts leave the loss, its denominator and its KL term (as in Eq. 5, whose denominator
            is each question's; here it is the generation batch's). `"zero_advantage"`: they stay with advantage 0
            (official code).
        min_accepted_share (`float`, defaults to `0.0`):
            With `"drop"`: the normaliser never counts less than this share of the batch, so that a step that rests on
            a handful of rollouts is not blown up to full size. 0: it counts the accepted rollouts of the generation
            batch and no more.
        out_of_band_advantages (`str`, defaults to `"estimator"`):
            `"estimator"`: the trainer's own advantages. `"reward"`: out of band, the raw +1/-1 reward replaces them
            (official code).
        reward_coding (`str`, defaults to `"plus_minus_one"`):
            How `out_of_band_advantages="reward"` reads rewards: they are +1/-1, or `"zero_one"`, where 0 means -1.

        > Parameters that control the measurement

        entropy_aggregation (`str`, defaults to `"token"`):
            `"token"`: mean over all loss tokens of the batch; `"sequence"`: mean of the rollouts' means.
        entropy_source (`str`, defaults to `"policy"`):
            `"policy"`: exact, from the learner, and from the cheapest of its computations: recorded while it samples;
            or, where an engine samples or dropout is active, from TRL's pass for the old policy's log-probs, or from
            one pass of its own. `"sampling"`: Monte-Carlo mean of -log p from the rollout engine's log-probs (vLLM or
            a `rollout_func`), without a pass of the learner.
    """

    entropy_low: list[float] = field(
        default_factory=lambda: [0.9, 0.15],
        metadata={"help": "Low edge of the entropy band: one value, or its start and end (unit: entropy_unit)."},
    )
    entropy_high: list[float] = field(
        default_factory=lambda: [1.05, 0.3],
        metadata={"help": "High edge of the entropy band: one value, or its start and end (unit: entropy_unit)."},
    )
    entropy_unit: str = field(
        default="initial",
        metadata={
            "help": "Unit of the band: 'initial' (multiples of the first entropy this run measures) or 'nats'.",
            "choices": ("initial", "nats"),
        },
    )
    entropy_width: str = field(
        default="given",
        metadata={
            "help": "Width of the band: 'given' (by its edges) or 'auto' (around the middle between them, four times "
            "as wide as one reading of the entropy scatters).",
            "choices": ("given", "auto"),
        },
    )
    entropy_schedule: str = field(
        default="linear",
        metadata={
            "help": "Shape of the band between start and end: 'linear', 'cosine' or 'constant'; or 'piecewise' "
            "(straight lines between entropy_knots) or 'step' (each knot holds until the next).",
            "choices": schedule.SHAPES,
        },
    )
    entropy_knots: list[str] | None = field(
        default=None,
        metadata={"help": "Points 'progress:low:high' of a piecewise or step band, progress in 0..1, in order."},
    )
    entropy_schedule_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps until the end values, which hold afterwards. Default: max_steps."},
    )
    rejection_rule: str = field(
        default="entropy_change",
        metadata={
            "help": "'entropy_change' (reject rollouts whose predicted entropy change points the wrong way), "
            "'advantage_sign' (Algorithm 1 of the paper) or 'influence' (by that change and that in all contexts, "
            "which share the parameters: a backward pass over an eighth of the rollouts, and more passes, where "
            "something may go).",
            "choices": tuple(rejection.RULES),
        },
    )
    rejected_rollouts: str = field(
        default="drop",
        metadata={
            "help": "'drop': rejected rollouts leave the loss, its denominator and its KL term (Eq. 5, over the "
            "batch). 'zero_advantage': they stay with advantage 0 (official code).",
            "choices": tuple(loss_inputs.REJECTED),
        },
    )
    min_accepted_share: float = field(
        default=0.0,
        metadata={
            "help": "With rejected_rollouts='drop': the loss normaliser never counts less than this share of the "
            "batch. 0: it counts the accepted rollouts of the generation batch and no more."
        },
    )
    out_of_band_advantages: str = field(
        default="estimator",
        metadata={
            "help": "'estimator': the trainer's own advantages; 'reward': out of band the raw +1/-1 reward replaces "
            "them (official code).",
            "choices": ("estimator", "reward"),
        },
    )
    reward_coding: str = field(
        default="plus_minus_one",
        metadata={
            "help": "How out_of_band_advantages='reward' reads rewards: 'plus_minus_one', or 'zero_one' (0 means -1).",
            "choices": ("plus_minus_one", "zero_one"),
        },
    )
    entropy_aggregation: str = field(
        default="token",
        metadata={
            "help": "Batch entropy: 'token' (mean over all loss tokens) or 'sequence' (mean of the rollouts' means).",
            "choices": ("token", "sequence"),
        },
    )
    entropy_source: str = field(
        default="policy",
        metadata={
            "help": "'policy': exact entropy from the learner, recorded while it samples where that can be; "
            "'sampling': Monte-Carlo mean of -log p from the rollout engine's log-probs.",
            "choices": ("policy", "sampling"),
        },
    )

    def __post_init__(self):
        self._check_choices()
        self._check_band_fields()
        self._check_rejection_fields()
        self._check_conflicts()
        super().__post_init__()
        self._check_gradients_can_be_taken()  # by then, precision and launcher are known

    def _check_choices(self):
        # argparse looks at them on the command line only, not in a YAML file or in Python.
        for item in fields(EntropyControlConfig):
            allowed, value = item.metadata.get("choices"), getattr(self, item.name)
            if allowed and (not isinstance(value, str) or value not in allowed):
                raise ValueError(f"{item.name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")

    def _check_band_fields(self):
        self.entropy_low = checks.edge_values("entropy_low", self.entropy_low)
        self.entropy_high = checks.edge_values("entropy_high", self.entropy_high)
        self.entropy_knots = checks.knot_texts("entropy_knots", self.entropy_knots)
        if self.entropy_schedule in schedule.KNOT_SHAPES:
            if not self.entropy_knots:
                raise ValueError(
                    f"entropy_schedule={self.entropy_schedule!r} needs entropy_knots, for instance "
                    f"['0:0.9:1.05', '1:0.2:0.3'], got {self.entropy_knots!r}."
                )
            try:
                schedule.parse_knots(self.entropy_knots)
            except ValueError as error:
                raise ValueError(f"entropy_knots={self.entropy_knots!r}: {error}") from None
        elif self.entropy_knots:
            raise ValueError(
                f"entropy_knots={self.entropy_knots!r} are read only by entropy_schedule='piecewise' or 'step', got "
                f"entropy_schedule={self.entropy_schedule!r}."
            )
        else:
            # Both edges share one monotone weight, so a band that is ordered at both ends is ordered in between.
            for low, high, end in (
                (self.entropy_low[0], self.entropy_high[0], "the start"),
                (self.entropy_low[-1], self.entropy_high[-1], "the end"),
            ):
                try:
                    schedule.check_band(low, high, f"{end} of the schedule")
                except ValueError as error:
                    raise ValueError(
                        f"entropy_low={self.entropy_low}, entropy_high={self.entropy_high}: {error}"
                    ) from None
            if self.entropy_schedule == "constant":
                for name in ("entropy_low", "entropy_high"):
                    values = getattr(self, name)
                    if values[0] != values[-1]:
                        raise ValueError(
                            f"entropy_schedule='constant' takes one value per edge, got {name}={values}; give one "
                            "value, or choose 'linear' or 'cosine'."
                        )
        if self.entropy_schedule_steps is not None:
            steps = self.entropy_schedule_steps = whole_number("entropy_schedule_steps", self.entropy_schedule_steps)
            if steps < 1:
                raise ValueError(f"entropy_schedule_steps must be at least 1, got {steps}.")

    def _check_rejection_fields(self):
        weights = self.reward_weights
        if weights is not None and not all(math.isfinite(weight) for weight in weights):
            # TRL's sum over functions leaves NaN out: a NaN weight would silently train on rewards of 0.
            raise ValueError(f"reward_weights must be finite, got {weights}.")
        self.min_accepted_share = number("min_accepted_share", self.min_accepted_share)
        if not 0.0 <= self.min_accepted_share <= 1.0:
            raise ValueError(f"min_accepted_share must lie in 0..1, got {self.min_accepted_share}.")
        if self.rejection_rule == "advantage_sign":
            return
        if getattr(self, "top_entropy_quantile", 1.0) < 1.0:
            # TRL chooses the tokens anew in each micro-batch of the loss, after the rollouts were judged.
            raise ValueError(
                f"rejection_rule={self.rejection_rule!r} judges a rollout by all of its tokens, but "
                f"top_entropy_quantile={self.top_entropy_quantile} trains on a part of them; set "
                "top_entropy_quantile=1.0, or use rejection_rule='advantage_sign'."
            )
        if self.entropy_source == "sampling":
            raise ValueError(
                f"rejection_rule={self.rejection_rule!r} needs each token's entropy, which entropy_source='sampling' "
                "does not measure; use entropy_source='policy', or rejection_rule='advantage_sign'."
            )

    def _check_gradients_can_be_taken(self):
        if self.rejection_rule != "influence":
            return
        if self.fp16:
            raise ValueError(
                "rejection_rule='influence' takes gradients without the loss scaling that fp16=True needs; use "
                "bf16=True, or rejection_rule='entropy_change'."
            )
        sharded = None
        if self.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
            sharded = "FSDP"
        elif self.deepspeed_plugin is not None and self.deepspeed_plugin.zero_stage == 3:
            sharded = "ZeRO-3"
        if sharded:
            # Their gradients exist only in a backward pass of the engine's, which adds them to the training's own.
            raise ValueError(
                "rejection_rule='influence' takes gradients outside the training step, for which each rank needs the "
                f"parameters whole, and {sharded} spreads them; use ZeRO-2 or DDP, or rejection_rule='entropy_change'."
            )

    def _check_conflicts(self):
        coefficient = getattr(self, "entropy_coef", 0.0)
        if coefficient:
            raise ValueError(
                f"entropy_coef={coefficient} and the entropy band would steer the same entropy twice; set "
                "entropy_coef=0, or train with TRL's own trainer."
            )
        if getattr(self, "use_adaptive_entropy", False):
            raise ValueError(
                "use_adaptive_entropy=True and the entropy band would steer the same entropy twice; set "
                "use_adaptive_entropy=False, or train with TRL's own trainer."
            )
        narrowed = [
            f"{name}={value}"
            for name, value, off in (
                ("top_p", self.top_p, (None, 1.0)),
                ("top_k", self.top_k, (None, 0, -1)),
                ("min_p", self.min_p, (None, 0.0)),
            )
            if value not in off
        ]
        if narrowed:
            warnings.warn(
                f"{', '.join(narrowed)}: rollouts are sampled from a narrower distribution than the one whose entropy "
                "is measured and steered (the full vocabulary). Prefer top_p=1, top_k=0 and no min_p.",
                stacklevel=4,
            )

    def band_at(self, progress: float) -> schedule.Band:
        """The band at `progress` in 0..1, in `entropy_unit`."""
        return schedule.band_at(
            progress,
            shape=self.entropy_schedule,
            low=self.entropy_low,
            high=self.entropy_high,
            knots=schedule.parse_knots(self.entropy_knots or ()),
        )
