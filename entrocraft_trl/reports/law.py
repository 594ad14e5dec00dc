"""
The law `R = -a exp(H) + b` (arXiv 2505.22617): held-out accuracy R as a function of the policy's entropy H in nats.

It says that a training trades entropy for accuracy at a fixed rate, and that its ceiling is `b - a`, where the entropy
is used up. The paper states it for trainings that do not control their entropy. Pure functions on numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import linear_regression, mean
from typing import NamedTuple

from ..metric_names import LOW
from .log import Record, entropy_key, series


FIRST_SHARE = 0.15  # of the points, from which the paper predicts the others
FEWEST = 3  # points to fit two numbers to and have an error
# A metric that only a method logs which steers the entropy, and what that is.
CONTROLLERS = {
    LOW: "a band",
    "entropy_coef": "TRL's adaptive entropy bonus",
    "aent/coef": "AEnt",
    "entropic/integral": "EntroPIC",
    "repo/zeta": "REPO-R",
    "stare/gate": "STARE",
    "dcpo/weight": "DCPO",
}


class Point(NamedTuple):
    """After `step` optimizer steps: the policy's entropy in nats on training prompts, and its held-out accuracy."""

    step: int
    entropy: float
    accuracy: float


class Law(NamedTuple):
    """`R = -a exp(H) + b`."""

    a: float
    b: float

    @property
    def ceiling(self) -> float:
        """Accuracy at an entropy of 0."""
        return self.b - self.a

    def accuracy(self, entropy: float) -> float:
        """At an entropy in nats."""
        return self.b - self.a * math.exp(entropy)


class Prediction(NamedTuple):
    """
    What the first `fitted` points say of the others: the law fitted to them, given each later entropy; their mean; and
    a straight line in the step. Errors are root mean squares, in accuracy.
    """

    fitted: int
    law: Law
    law_error: float
    constant: float
    constant_error: float
    slope: float
    intercept: float
    line_error: float


def law_points(log: Sequence[Record], metric: str | None = None) -> list[Point]:
    """
    Points of a run that evaluated during training.

    The entropy at an evaluation is the mean of the readings next to it, before and after: a reading is taken before
    the step whose number it is logged under. What is measured on the training batch itself, such as `reward`, has the
    entropy of that batch.

    Args:
        log (`Sequence[Mapping]`): Records as [`~log.read_log`] returns them.
        metric (`str`, *optional*): Name of the accuracy in the log. Defaults to `eval_mean@n`. The `reward` of a
            training that sees each prompt once is a held-out accuracy too, if rewards are 0 or 1.

    Raises:
        ValueError: If the log has no such metric or no entropy; the message names the evaluation metrics there are.
    """
    evaluations = sorted({key for record in log for key in record if key.startswith("eval_")})
    if metric is None:
        metric = next((key for key in evaluations if key.startswith("eval_mean@")), "eval_mean@n")
    steps, accuracies = series(log, metric)
    if not steps:
        raise ValueError(
            f"the log holds no {metric}; evaluate during training (eval_strategy). It has: "
            f"{', '.join(evaluations) or 'no evaluation'}"
        )
    read_at, readings = series([record for record in log if "reward" in record], entropy_key(log))
    if not readings:
        raise ValueError("the log holds no entropy")
    points = {}
    for step, accuracy in zip(steps, accuracies, strict=True):
        before = [entropy for at, entropy in zip(read_at, readings, strict=True) if at <= step][-1:]
        after = [entropy for at, entropy in zip(read_at, readings, strict=True) if at > step][:1]
        beside = before + after if metric.startswith("eval_") else before or after
        points.setdefault(step, Point(step, mean(beside), accuracy))  # a resumed run evaluates once more
    return list(points.values())


def controlled_by(log: Sequence[Record]) -> str | None:
    """What steered the entropy of a run, in a word or two; `None` if nothing did that left a metric."""
    return next((words for key, words in CONTROLLERS.items() if any(key in record for record in log)), None)


def fit_law(points: Sequence[Point]) -> Law:
    """
    Least squares of the accuracy on `exp(H)`.

    Raises:
        ValueError: For fewer than two points, or if all have one entropy.
    """
    slope, intercept = _line([math.exp(point.entropy) for point in points], [point.accuracy for point in points])
    return Law(-slope, intercept)


def fit_error(law: Law, points: Sequence[Point]) -> float:
    """Root mean square of the distances of the accuracies from the law."""
    return _rms([point.accuracy - law.accuracy(point.entropy) for point in points])


def predict_rest(points: Sequence[Point], share: float = FIRST_SHARE) -> Prediction:
    """
    Fit the first `share` of the points (at least [`FEWEST`]), and predict the accuracies of the others from their
    entropies.

    Raises:
        ValueError: If there are no others, or the first all have one entropy.
    """
    fitted = max(FEWEST, math.ceil(share * len(points)))
    first, rest = points[:fitted], points[fitted:]
    if not rest:
        raise ValueError(f"{len(points)} points are too few: {fitted} are fitted, and there is nothing to predict")
    law = fit_law(first)
    constant = mean(point.accuracy for point in first)
    slope, intercept = _line([point.step for point in first], [point.accuracy for point in first])
    return Prediction(
        fitted=fitted,
        law=law,
        law_error=fit_error(law, rest),
        constant=constant,
        constant_error=_rms([point.accuracy - constant for point in rest]),
        slope=slope,
        intercept=intercept,
        line_error=_rms([point.accuracy - slope * point.step - intercept for point in rest]),
    )


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of the least-squares line."""
    if len(xs) < 2 or min(xs) == max(xs):
        raise ValueError(f"a line through {len(xs)} points at {len(set(xs))} places is not determined")
    return linear_regression(xs, ys)


def _rms(distances: Sequence[float]) -> float:
    return math.sqrt(mean(distance * distance for distance in distances))
