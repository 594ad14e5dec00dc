"""The figures of one run, from its record: numbers for tables, each a small function. Entropies are in nats."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, NamedTuple

from ..control.schedule import Knot
from ..metric_names import (
    ACCEPTED_TOKENS,
    DIRECTION,
    EFFECTIVE_BATCH_SIZE,
    REJECTED_NEGATIVE,
    REJECTED_POSITIVE,
)
from ..reports.log import (
    Edges,
    final_entropy,
    reading_scatter,
    reentry_steps,
    rms_outside,
    share_inside,
    values,
)
from .bands import band_of


WINDOW = 10  # readings of a running mean
PLATEAU = 0.95  # of the largest running mean of the reward


@dataclass(frozen=True)
class Measured:
    """
    A run's record beside a band, which need not be one that it was trained with.

    Args:
        record (`Mapping`): As `jobs.run_job` makes it.
        knots (`Sequence[Knot]`, *optional*): The band in nats.
        jump (`float`, *optional*): Progress at which the band jumps.
        skip (`float`): Share of the steps that is the way into the band.
    """

    record: Mapping[str, Any]
    knots: Sequence[Knot] | None = None
    jump: float | None = None
    skip: float = 0.0

    def series(self, name: str) -> list[Any]:
        return self.record["series"][name]

    @property
    def edges(self) -> list[Edges] | None:
        """The band at each reading, by the steps that were made before it; `None` without a band."""
        if self.knots is None:
            return None
        return [band_of(self.knots, step / self.record["max_steps"]) for step in self.series("step")]

    def counted(self, items: Sequence[Any] | None) -> list[Any] | None:
        """Those of the readings after the way into the band."""
        if items is None:
            return None
        first = int(self.skip * self.record["max_steps"])
        return [item for item, step in zip(items, self.series("step"), strict=True) if step >= first]

    def logged(self, key: str) -> list[float]:
        """What the log holds under `key`."""
        return values(self.record["log"], key)


class Figure(NamedTuple):
    """
    Heading of the column, how a number is written there, and where it comes from. In the heading, and in the name of
    the figure where it ends so, n is the number of samples of a prompt.
    """

    title: str
    form: str
    of: Callable[[Measured], float | None]


# ------------------------------------------------------------------------------------------------------ small formulas


def running_mean(series: Sequence[float], window: int = WINDOW) -> list[float]:
    """Means of each `window` values in a row, or of all where there are fewer."""
    window = min(window, len(series))
    return [mean(series[start : start + window]) for start in range(len(series) - window + 1)] if series else []


def largest_fall(series: Sequence[float]) -> float:
    """Largest amount by which a value lies below an earlier one."""
    best, fall = -math.inf, 0.0
    for value in series:
        best = max(best, value)
        fall = max(fall, best - value)
    return fall


def plateau_step(steps: Sequence[int], rewards: Sequence[float]) -> int | None:
    """First step by which the running mean of the reward has come to [`PLATEAU`] of its largest value."""
    means = running_mean(rewards)
    if not means or max(means) <= 0:
        return None
    first = next(index for index, value in enumerate(means) if value >= PLATEAU * max(means))
    return steps[min(first + WINDOW, len(steps)) - 1]


def jumps(readings: Sequence[float]) -> list[float]:
    """Distances of consecutive readings."""
    return [abs(later - earlier) for earlier, later in zip(readings, readings[1:], strict=False)]


def carrying_rollouts(entry: Mapping[str, Any], rollouts: int, by_reward: bool) -> float:
    """
    Accepted rollouts with an advantage other than 0, those that a step rests on, of a log record of entropy control.

    Args:
        rollouts (`int`): Of a generation batch.
        by_reward (`bool`): Whether rewards of +1/-1 take the place of the advantages out of band.
    """
    if by_reward and entry[DIRECTION]:
        return entry[EFFECTIVE_BATCH_SIZE]
    return rollouts * (1.0 - entry["frac_reward_zero_std"]) - entry[REJECTED_POSITIVE] - entry[REJECTED_NEGATIVE]


def _evaluated(name: str) -> Callable[[Measured], float | None]:
    return lambda run: run.record["evaluation"].get(name.format(n=run.record["samples"]))


def _beside_band(measure: Callable[[list[float], list[Edges]], float]) -> Callable[[Measured], float | None]:
    """A measure of the counted readings beside their band."""

    def of(run: Measured) -> float | None:
        readings, edges = run.counted(run.series("entropy")), run.counted(run.edges)
        return measure(readings, edges) if readings and edges else None

    return of


def _reentry(run: Measured) -> int | None:
    if run.edges is None or run.jump is None:
        return None
    after = sum(step < run.jump * run.record["max_steps"] for step in run.series("step"))
    return reentry_steps(run.series("entropy"), run.edges, jump=after)


def _smallest_carrying(run: Measured) -> float | None:
    by_reward = run.record["settings"]["arm"].get("out_of_band_advantages") == "reward"
    controlled = [entry for entry in run.record["log"] if REJECTED_POSITIVE in entry]
    found = [carrying_rollouts(entry, run.record["rollouts"], by_reward) for entry in controlled]
    return round(min(found)) if found else None


def _floor_binds(run: Measured) -> float | None:
    floor, shares = run.record["settings"]["arm"].get("min_accepted_share", 0.0), run.logged(ACCEPTED_TOKENS)
    return mean(share < floor for share in shares) if shares else None


def _mean_minus_centre(readings: Sequence[float], edges: Sequence[Edges]) -> float:
    return mean(readings) - mean((low + high) / 2 for low, high in edges)


def _scatter(run: Measured) -> float | None:
    return reading_scatter(run.series("entropy")) if len(run.series("entropy")) > 2 else None


def _jump_rms(run: Measured) -> float:
    return math.sqrt(mean(jump * jump for jump in jumps(run.series("entropy")) or [0.0]))


def _of(key: str, fold: Callable[[list[float]], float]) -> Callable[[Measured], float | None]:
    """A fold of what the log holds under `key`; `None` where it holds nothing."""
    return lambda run: fold(run.logged(key)) if run.logged(key) else None


def _tenth(rewards: Sequence[float], last: bool) -> float:
    part = max(1, len(rewards) // 10)
    return mean(rewards[-part:] if last else rewards[:part])


FIGURES: dict[str, Figure] = {
    # What the policy can do in the end.
    "mean_at_n": Figure("mean@{n}", "{:.3f}", _evaluated("mean@{n}")),
    "pass_at_n": Figure("pass@{n}", "{:.3f}", _evaluated("pass@{n}")),
    "distinct_correct": Figure("distinct right", "{:.1f}", _evaluated("distinct_correct")),
    "self_similarity": Figure("self-similarity", "{:.2f}", _evaluated("self_similarity")),
    # Its entropy on the way there.
    "final_entropy": Figure("final entropy (nats)", "{:.3f}", lambda run: final_entropy(run.series("entropy"))),
    "rms_outside": Figure("RMS outside (nats)", "{:.4f}", _beside_band(rms_outside)),
    "in_band_share": Figure("steps inside", "{:.0%}", _beside_band(share_inside)),
    "mean_minus_centre": Figure("mean minus centre (nats)", "{:+.3f}", _beside_band(_mean_minus_centre)),
    "reentry_steps": Figure("re-entry (steps)", "{:.0f}", _reentry),
    "scatter": Figure("scatter (nats)", "{:.4f}", _scatter),
    "jump_rms": Figure("entropy jump, RMS (nats)", "{:.3f}", _jump_rms),
    "jump_max": Figure("largest (nats)", "{:.3f}", lambda run: max(jumps(run.series("entropy")), default=0.0)),
    # Its training.
    "accepted_share": Figure("accepted", "{:.0%}", lambda run: mean(run.series("accepted"))),
    "rejecting_steps": Figure(
        "steps that reject", "{:.0%}", lambda run: mean(a < 1.0 for a in run.series("accepted"))
    ),
    "smallest_accepted": Figure(
        "fewest accepted", "{:.0f}", lambda run: round(run.record["rollouts"] * min(run.series("accepted")))
    ),
    "smallest_carrying": Figure("fewest with an advantage", "{:.0f}", _smallest_carrying),
    "floor_binds": Figure("floor binds", "{:.0%}", _floor_binds),
    "grad_norm_median": Figure("grad norm, median", "{:.2f}", _of("grad_norm", median)),
    "grad_norm_max": Figure("largest grad norm", "{:.2f}", _of("grad_norm", max)),
    "reward_start": Figure("reward, first tenth", "{:.3f}", lambda run: _tenth(run.series("reward"), last=False)),
    "reward_end": Figure("reward, last tenth", "{:.3f}", lambda run: _tenth(run.series("reward"), last=True)),
    "reward_best": Figure("best reward", "{:.3f}", lambda run: max(running_mean(run.series("reward")))),
    "reward_dip": Figure("reward dip", "{:.3f}", lambda run: largest_fall(running_mean(run.series("reward")))),
    "plateau_step": Figure(
        "plateau (step)", "{:.0f}", lambda run: plateau_step(run.series("step"), run.series("reward"))
    ),
    "seconds": Figure("seconds", "{:.0f}", lambda run: run.record["seconds"]),
    "step_seconds": Figure("seconds a step", "{:.2f}", lambda run: run.record["seconds"] / run.record["max_steps"]),
}


def measure(run: Measured) -> dict[str, float | None]:
    """All figures of a run; `None` for what it does not have."""
    return {name: figure.of(run) for name, figure in FIGURES.items()}
