"""Entropy bands over training progress. Pure functions on floats; nothing here knows of trainers or configs."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


# Wide enough that 95% of the readings of an entropy that stands still at the centre lie inside.
AUTO_WIDTH_SCATTERS = 4.0
# A batch of few groups tells the scatter of its reading to within a third; ten batches, to within a tenth.
_NEW_SHARE = 0.1

SHAPES = ("linear", "cosine", "constant", "piecewise", "step")
KNOT_SHAPES = ("piecewise", "step")


class Band(NamedTuple):
    """An entropy band: `low` and `high` in nats, or in multiples of the initial entropy."""

    low: float
    high: float

    def direction(self, entropy: float) -> int:
        """`m = 1[H > h_high] - 1[H < h_low]` (Algorithm 1): -1 entropy is too low, 0 inside the band, +1 too high."""
        return int(entropy > self.high) - int(entropy < self.low)

    def distance(self, entropy: float) -> float:
        """Distance of `entropy` from the band, 0 inside it."""
        return max(self.low - entropy, entropy - self.high, 0.0)

    def scaled(self, unit: float) -> "Band":
        """The band in nats, if its edges are multiples of `unit` nats."""
        return Band(self.low * unit, self.high * unit)

    def of_width(self, width: float) -> "Band":
        """The band of this width around the same centre; its low edge is 0 at least."""
        centre = (self.low + self.high) / 2
        return Band(max(centre - width / 2, 0.0), centre + width / 2)


class Knot(NamedTuple):
    """A point of a band given by knots: `progress` in [0, 1] and the band's `low` and `high` there."""

    progress: float
    low: float
    high: float


def running_scatter(before: float | None, now: float) -> float:
    """Scatter of readings in nats, after a batch that shows `now`: root of the running mean of squares."""
    return now if before is None else math.sqrt((1 - _NEW_SHARE) * before**2 + _NEW_SHARE * now**2)


def progress_at(step: int, total_steps: int) -> float:
    """Share of the schedule that is done at optimizer step `step`, in [0, 1]; 1 from `total_steps` on."""
    return min(max(step / total_steps, 0.0), 1.0)


def interpolation_weight(progress: float, shape: str) -> float:
    """
    Weight of the end value at `progress`: linear `s/S` or cosine `(1 - cos(pi s/S)) / 2` (arXiv 2604.26326, section on
    schedules); 0 throughout for a constant band.
    """
    if shape == "linear":
        return progress
    if shape == "cosine":
        return (1.0 - math.cos(math.pi * progress)) / 2.0
    if shape == "constant":
        return 0.0
    raise ValueError(f"shape must be one of 'linear', 'cosine', 'constant' here, got {shape!r}.")


def band_at(
    progress: float,
    *,
    shape: str,
    low: Sequence[float] = (),
    high: Sequence[float] = (),
    knots: Sequence[Knot] = (),
) -> Band:
    """
    The band at `progress`.

    Args:
        progress (`float`): Share of the schedule that is done, in [0, 1].
        shape (`str`): `"linear"`, `"cosine"`, `"constant"`, `"piecewise"` (straight lines between knots) or `"step"`
            (each knot's values hold until the next knot).
        low, high (`Sequence[float]`): One or two values, start and end. Not read by the knot shapes.
        knots (`Sequence[Knot]`): Knots in order of progress. The first and the last one's values hold outside them.

    Returns:
        `Band`: In the unit of the values given.
    """
    if shape in KNOT_SHAPES:
        return _band_from_knots(progress, knots, straight=shape == "piecewise")
    weight = interpolation_weight(progress, shape)
    return Band(*(ends[0] + (ends[-1] - ends[0]) * weight for ends in (low, high)))


def _band_from_knots(progress: float, knots: Sequence[Knot], straight: bool) -> Band:
    before = [knot for knot in knots if knot.progress <= progress]
    after = [knot for knot in knots if knot.progress > progress]
    if not before or not after or not straight:
        nearest = before[-1] if before else knots[0]
        return Band(nearest.low, nearest.high)
    left, right = before[-1], after[0]
    weight = (progress - left.progress) / (right.progress - left.progress)
    return Band(left.low + (right.low - left.low) * weight, left.high + (right.high - left.high) * weight)


def parse_knots(knots: Sequence[str]) -> list[Knot]:
    """
    Read knots written as `"progress:low:high"`, for instance `["0:0.9:1.05", "0.5:0.4:0.5", "1:0.1:0.2"]`.

    Raises:
        ValueError: If a knot is not three finite numbers, lies outside 0..1, is out of order, or breaks `check_band`.
            Two knots may share one progress: the band jumps there.
    """
    parsed = []
    for text in knots:
        parts = str(text).split(":")
        try:
            knot = Knot(*(float(part) for part in parts))
        except (TypeError, ValueError):
            raise ValueError(f"each knot must read 'progress:low:high' with three numbers, got {text!r}.") from None
        if not 0.0 <= knot.progress <= 1.0:
            raise ValueError(f"knot progress must lie in 0..1, got {knot.progress} in {text!r}.")
        if parsed and knot.progress < parsed[-1].progress:
            raise ValueError(f"knots must be in order of progress, got {parsed[-1].progress} before {knot.progress}.")
        check_band(knot.low, knot.high, f"knot {text!r}")
        parsed.append(knot)
    return parsed


def check_band(low: float, high: float, where: str) -> Band:
    """
    Return `Band(low, high)` if both are finite, not negative, and `low <= high`.

    Raises:
        ValueError: Otherwise; the message holds both values and `where`.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"the entropy band must be finite, got low={low}, high={high} at {where}.")
    if low < 0.0 or high < 0.0:
        raise ValueError(f"entropy cannot be negative, got low={low}, high={high} at {where}.")
    if low > high:
        raise ValueError(f"the band's low edge must not exceed its high edge, got low={low} > high={high} at {where}.")
    return Band(float(low), float(high))


def check_band_function(band: Callable[[float], tuple[float, float]], points: int = 101) -> None:
    """
    Check a user's `progress -> (low, high)` on an even grid of `points` progress values, before any model loads.

    Raises:
        ValueError: If the function does not return two numbers, or `check_band` refuses them.
    """
    for index in range(points):
        progress = index / (points - 1)
        value = band(progress)
        try:
            low, high = (float(edge) for edge in value)
        except (TypeError, ValueError):
            raise ValueError(
                f"the entropy band function must return two numbers (low, high), got {value!r} at progress {progress}."
            ) from None
        check_band(low, high, f"progress {progress} of the entropy band function")
