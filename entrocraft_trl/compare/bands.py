"""
Bands of a comparison: written around the starting policy's entropy, and handed to each method in its own words.

Entrocraft takes the band itself. A method with settings such as a target entropy follows it: see [`FollowsBand`].
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import TrainerCallback

from ..control.schedule import Band, Knot, band_at, check_band


COSINE_PIECES = 20  # straight ones: they differ from the cosine by less than 0.3% of its height
EDGES = {
    "low": lambda band: band.low,
    "centre": lambda band: (band.low + band.high) / 2,
    "high": lambda band: band.high,
}


class Point(NamedTuple):
    """The band's centre at `progress` in 0..1: `multiple` times the initial entropy, plus `nats`."""

    progress: float
    multiple: float
    nats: float = 0.0

    def centre(self, initial: float) -> float:
        """In nats, from the starting policy's entropy in nats."""
        return self.multiple * initial + self.nats


class BandPlan(NamedTuple):
    """A band of the file: its centre's points, joined by straight lines or a cosine, and its width in nats."""

    points: tuple[Point, ...]
    width: float
    shape: str = "linear"

    def knots(self, initial: float) -> list[Knot]:
        """
        The band in nats.

        Raises:
            ValueError: If an edge is negative at this initial entropy.
        """
        centres = [(point.progress, point.centre(initial)) for point in self.points]
        if len(centres) == 1:
            centres = [(0.0, centres[0][1]), (1.0, centres[0][1])]
        if self.shape == "cosine":
            (_, start), (_, end) = centres
            pieces = [piece / COSINE_PIECES for piece in range(COSINE_PIECES + 1)]
            centres = [(p, start + (end - start) * (1 - math.cos(math.pi * p)) / 2) for p in pieces]
        half = self.width / 2
        return [
            Knot(p, *check_band(centre - half, centre + half, f"progress {p:g}, initial entropy {initial:.4g} nats"))
            for p, centre in centres
        ]

    @property
    def jump(self) -> float | None:
        """Progress at which the band jumps: that of two points; `None` if it does not."""
        places = [point.progress for point in self.points]
        return next((place for place in places if places.count(place) > 1), None)


def read_band(value: Any, width: float | None) -> BandPlan:
    """
    A band of a YAML file.

    Args:
        value: A number, the constant centre in multiples of the initial entropy; a list of points `[progress,
            multiple]` or `[progress, multiple, nats]`; or a mapping with such `points`, a `shape` (`"linear"` or, for
            two points, `"cosine"`) and a `width` in nats.
        width (`float`, *optional*): In nats, where the band has none of its own.

    Raises:
        ValueError: In words that follow "the band ...".
    """
    content = dict(value) if isinstance(value, Mapping) else {"points": value}
    points, shape, width = content.pop("points", None), content.pop("shape", "linear"), content.pop("width", width)
    if content:
        raise ValueError(f"has unknown keys: {', '.join(map(str, content))}; it takes points, shape and width")
    if is_number(points):
        points = [[0.0, points]]
    if not isinstance(points, Sequence) or isinstance(points, str) or not points:
        raise ValueError(f"must be a number or a list of points [progress, multiple, nats], got {value!r}")
    for point in points:
        if not isinstance(point, Sequence) or len(point) not in (2, 3) or not all(map(is_number, point)):
            raise ValueError(
                f"has the point {point!r}, which is not [progress, multiple] or [progress, multiple, nats]"
            )
    parsed = tuple(Point(*map(float, point)) for point in points)
    places = [point.progress for point in parsed]
    if places != sorted(places) or not 0.0 <= places[0] <= places[-1] <= 1.0:
        raise ValueError(f"needs points in order of progress within 0..1, got {places}")
    if not is_number(width) or not width >= 0:
        raise ValueError(f"needs a width in nats, of its own or in band_width, got {width!r}")
    if shape not in ("linear", "cosine") or (shape == "cosine" and places != [0.0, 1.0]):
        raise ValueError(f"has shape {shape!r}; it is 'linear', or 'cosine' between points at 0 and 1, got {places}")
    return BandPlan(parsed, float(width), shape)


def is_number(value: Any) -> bool:
    """Whether a value of a YAML file is a finite number. `1e-3` without a point is text in YAML."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def band_of(knots: Sequence[Knot], progress: float) -> Band:
    """The band in nats at `progress`."""
    return band_at(progress, shape="piecewise", knots=knots)


def band_fields(knots: Sequence[Knot]) -> dict[str, Any]:
    """The band as fields of a config with entropy control."""
    return {
        "entropy_unit": "nats",
        "entropy_schedule": "piecewise",
        "entropy_knots": [f"{knot.progress}:{knot.low}:{knot.high}" for knot in knots],
    }


def followed(follow: Mapping[str, str], band: Band) -> dict[str, float]:
    """Settings in nats that follow a band, by the edge that each follows: `"low"`, `"centre"` or `"high"`."""
    return {name: EDGES[edge](band) for name, edge in follow.items()}


class FollowsBand(TrainerCallback):
    """
    Moves settings of a trainer with a band, step by step: a rival's target entropy is one number, and this gives the
    method its best case. For methods that read their config anew at each step.
    """

    def __init__(self, follow: Mapping[str, str], knots: Sequence[Knot]):
        self.follow, self.knots = dict(follow), list(knots)

    def on_step_begin(self, args, state, control, **kwargs):
        for name, value in followed(self.follow, band_of(self.knots, state.global_step / state.max_steps)).items():
            setattr(args, name, value)
