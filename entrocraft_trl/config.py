"""Configuration of entropy control, on top of TRL's trainer configs. Holds fields, help texts and checks only."""

import math
import warnings
from dataclasses import dataclass, field

from trl import GRPOConfig, RLOOConfig

from . import checks, schedule
from .credentials import CredentialsMixin


ENTROPY_UNITS = ("initial", "nats")
REJECTION_RULES = ("advantage_sign", "entropy_change")
REJECTION_STRENGTHS = ("graded", "full")
ENTROPY_CHANGE_BASELINES = ("exact", "batch_mean")
REJECTED_ROLLOUTS = ("drop", "zero_advantage")
OUT_OF_BAND_ADVANTAGES = ("estimator", "reward")
REWARD_CODINGS = ("plus_minus_one", "zero_one")
ENTROPY_AGGREGATIONS = ("token", "sequence")
ENTROPY_SOURCES = ("policy", "sampling")


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
        entropy_schedule (`str`, defaults to `"linear"`):
            `"linear"`, `"cosine"` or `"constant"` between start and end, or `"piecewise"` (straight lines between
            knots) or `"step"` (each knot holds until the next).
        entropy_knots (`list[str]`, *optional*):
            Points of a `"piecewise"` or `"step"` band, each `progress:low:high` with progress in 0..1. They replace
            `entropy_low` and `entropy_high`.
        entropy_schedule_steps (`int`, *optional*):
            Optimizer steps until the end values, which hold afterwards. Defaults to the run's `max_steps`.

        > Parameters that control the rejection

        rejection_rule (`str`, defaults to `"advantage_sign"`):
            `"advantage_sign"`: Algorithm 1 of the paper. `"entropy_change"`: test the predicted entropy change of each
            rollout instead of the sign of its advantage.
        rejection_strength (`str`, defaults to `"graded"`):
            For `"entropy_change"`: `"graded"` rejects as much of the wrong-way entropy change as the distance from
            the band's centre calls for; `"full"` rejects all of it out of band and nothing inside, as Algorithm 1.
        entropy_change_baseline (`str`, defaults to `"exact"`):
            For `"entropy_change"`: the expected term N per token, `"exact"` at the price of one more no-grad pass, or
            `"batch_mean"`, estimated from log-probs and entropies alone.
        rejected_rollouts (`str`, defaults to `"drop"`):
            `"drop"`: rejected rollouts leave the loss, its denominator and its KL term (Eq. 5). `"zero_advantage"`:
            they stay with advantage 0 (official code).
        min_accepted_share (`float`, defaults to `0.0`):
            With `"drop"`: the normaliser never counts less than this share of the batch, so that a step that rests on
            a handful of rollouts is not blown up to full size. 0 is Eq. 5 to the letter.
        out_of_band_advantages (`str`, defaults to `"estimator"`):
            `"estimator"`: the trainer's own advantages. `"reward"`: out of band, the raw +1/-1 reward replaces them
            (official code).
        reward_coding (`str`, defaults to `"plus_minus_one"`):
            How `out_of_band_advantages="reward"` reads rewards: they are +1/-1, or `"zero_one"`, where 0 means -1.

        > Parameters that control the measurement

        entropy_aggregation (`str`, defaults to `"token"`):
            `"token"`: mean over all loss tokens of the batch; `"sequence"`: mean of the rollouts' means.
        entropy_source (`str`, defaults to `"policy"`):
            `"policy"`: exact, from the learner; `"sampling"`: Monte-Carlo mean of -log p from the rollout engine's
            log-probs (vLLM or a `rollout_func`), without a pass of the learner.
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
            "choices": ENTROPY_UNITS,
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
        default="advantage_sign",
        metadata={
            "help": "'advantage_sign' (Algorithm 1 of the paper) or 'entropy_change' (reject rollouts whose predicted "
            "entropy change points the wrong way).",
            "choices": REJECTION_RULES,
        },
    )
    rejection_strength: str = field(
        default="graded",
        metadata={
            "help": "For rejection_rule='entropy_change': 'graded' rejects as much as the distance from the band's "
            "centre calls for, 'full' rejects every wrong-way rollout out of band and none inside.",
            "choices": REJECTION_STRENGTHS,
        },
    )
    entropy_change_baseline: str = field(
        default="exact",
        metadata={
            "help": "For rejection_rule='entropy_change': expected term N per token, 'exact' (one more no-grad pass) "
            "or 'batch_mean' (estimated, no pass).",
            "choices": ENTROPY_CHANGE_BASELINES,
        },
    )
    rejected_rollouts: str = field(
        default="drop",
        metadata={
            "help": "'drop': rejected rollouts leave the loss, its denominator and its KL term (Eq. 5). "
            "'zero_advantage': they stay with advantage 0 (official code).",
            "choices": REJECTED_ROLLOUTS,
        },
    )
    min_accepted_share: float = field(
        default=0.0,
        metadata={
            "help": "With rejected_rollouts='drop': the loss normaliser never counts less than this share of the "
            "batch. 0 is Eq. 5 to the letter."
        },
    )
    out_of_band_advantages: str = field(
        default="estimator",
        metadata={
            "help": "'estimator': the trainer's own advantages; 'reward': out of band the raw +1/-1 reward replaces "
            "them (official code).",
            "choices": OUT_OF_BAND_ADVANTAGES,
        },
    )
    reward_coding: str = field(
        default="plus_minus_one",
        metadata={
            "help": "How out_of_band_advantages='reward' reads rewards: 'plus_minus_one', or 'zero_one' (0 means -1).",
            "choices": REWARD_CODINGS,
        },
    )
    entropy_aggregation: str = field(
        default="token",
        metadata={
            "help": "Batch entropy: 'token' (mean over all loss tokens) or 'sequence' (mean of the rollouts' means).",
            "choices": ENTROPY_AGGREGATIONS,
        },
    )
    entropy_source: str = field(
        default="policy",
        metadata={
            "help": "'policy': exact entropy from the learner; 'sampling': Monte-Carlo mean of -log p from the "
            "rollout engine's log-probs.",
            "choices": ENTROPY_SOURCES,
        },
    )

    def __post_init__(self):
        self._check_choices()
        self._check_band_fields()
        self._check_rejection_fields()
        self._check_conflicts()
        super().__post_init__()

    def _check_choices(self):
        for name, allowed in (
            ("entropy_unit", ENTROPY_UNITS),
            ("entropy_schedule", schedule.SHAPES),
            ("rejection_rule", REJECTION_RULES),
            ("rejection_strength", REJECTION_STRENGTHS),
            ("entropy_change_baseline", ENTROPY_CHANGE_BASELINES),
            ("rejected_rollouts", REJECTED_ROLLOUTS),
            ("out_of_band_advantages", OUT_OF_BAND_ADVANTAGES),
            ("reward_coding", REWARD_CODINGS),
            ("entropy_aggregation", ENTROPY_AGGREGATIONS),
            ("entropy_source", ENTROPY_SOURCES),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")

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
            steps = self.entropy_schedule_steps = checks.whole_number(
                "entropy_schedule_steps", self.entropy_schedule_steps
            )
            if steps < 1:
                raise ValueError(f"entropy_schedule_steps must be at least 1, got {steps}.")

    def _check_rejection_fields(self):
        weights = self.reward_weights
        if weights is not None and not all(math.isfinite(weight) for weight in weights):
            # TRL's sum over functions leaves NaN out: a NaN weight would silently train on rewards of 0.
            raise ValueError(f"reward_weights must be finite, got {weights}.")
        self.min_accepted_share = checks.number("min_accepted_share", self.min_accepted_share)
        if not 0.0 <= self.min_accepted_share <= 1.0:
            raise ValueError(f"min_accepted_share must lie in 0..1, got {self.min_accepted_share}.")
        if self.rejection_rule == "entropy_change" and self.entropy_source == "sampling":
            raise ValueError(
                "rejection_rule='entropy_change' needs each token's entropy, which entropy_source='sampling' does not "
                "measure; use entropy_source='policy'."
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


@dataclass
class EntrocraftGRPOConfig(EntropyControlConfig, GRPOConfig):
    __doc__ = (
        "Configuration of [`EntrocraftGRPOTrainer`]: [`~trl.GRPOConfig`] and the fields below.\n"
        + EntropyControlConfig.__doc__
    )


@dataclass
class EntrocraftRLOOConfig(EntropyControlConfig, RLOOConfig):
    __doc__ = (
        "Configuration of [`EntrocraftRLOOTrainer`]: [`~trl.RLOOConfig`] and the fields below.\n"
        + EntropyControlConfig.__doc__
    )
