"""
A run's log as numbers, each computed once: what figures, the card, tables and benchmarks say of a run is said here.

A log is a trainer's `log_history`, one record per logging step. Entropies, edges of bands and distances are in nats.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ..metric_names import ACCEPTED, ENTROPY, HIGH, LOW


Record = Mapping[str, Any]
Edges = tuple[float, float]  # low and high edge of a band


def read_log(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Log records of a run.

    Args:
        run_dir (`str` or `PathLike`):
            Folder with a `trainer_state.json`, or with `checkpoint-*` folders that have one; the one that got furthest
            counts. Also the file itself.

    Returns:
        `list[dict]`: `log_history` of the state, one record per logging step.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if the file is not a trainer's state, or holds no record.
    """
    path = Path(run_dir)
    files = [path] if path.is_file() else [*path.glob("trainer_state.json"), *path.glob("*/trainer_state.json")]
    if not files:
        raise FileNotFoundError(f"no trainer_state.json in {str(run_dir)!r} or in its checkpoint folders")
    states = [_read_state(file) for file in files]
    log = max(states, key=lambda state: state["global_step"])["log_history"]
    if not log:
        raise ValueError(f"the run in {str(run_dir)!r} has logged nothing yet")
    return log


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        return {"global_step": int(state["global_step"]), "log_history": list(state["log_history"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is not a trainer's state: {type(error).__name__}: {error}") from error


# ------------------------------------------------------------------------------------------------- what the log holds


def values(log: Sequence[Record], key: str) -> list[Any]:
    """What the records that have `key` hold there, in order; TRL writes `None` where nothing was measured."""
    return [record[key] for record in log if record.get(key) is not None]


def series(log: Sequence[Record], key: str) -> tuple[list[int], list[Any]]:
    """Optimizer steps and values of the records that have `key`, both `(N,)`; empty if none has."""
    found = [record for record in log if record.get(key) is not None]
    return [record["step"] for record in found], values(found, key)


def entropy_key(log: Sequence[Record]) -> str:
    """Where the entropy before any filter stands in this log: in our metric, or, of a plain TRL run, in TRL's."""
    # TRL's `entropy` counts only what the filter left, so it never fills in for a step without a reading of ours.
    return ENTROPY if any(ENTROPY in record for record in log) else "entropy"


def entropies(log: Sequence[Record]) -> list[float]:
    """Batch entropies in nats, measured before any filter, in order; of a plain TRL run, TRL's own."""
    return values(log, entropy_key(log))


def bands(log: Sequence[Record]) -> list[Edges]:
    """Low and high edge in nats at each reading, in order; empty for a run without a band."""
    return [(record[LOW], record[HIGH]) for record in log if LOW in record]


def newest_reading(log: Sequence[Record]) -> Record | None:
    """The last record that holds an entropy measured before the filter; `None` before the first one."""
    return next((record for record in reversed(log) if ENTROPY in record), None)


def accepted_shares(log: Sequence[Record]) -> list[float]:
    """Share of its rollouts, in 0..1, that each filtered batch accepted; empty for a run without a filter."""
    return values(log, ACCEPTED)


def rewards(log: Sequence[Record]) -> list[float]:
    """Mean reward of each step's rollouts, rejected ones included, in the unit of the reward functions."""
    return values(log, "reward")


# ------------------------------------------------------------------------------------------- readings and their bands


def distances_outside(readings: Sequence[float], edges: Sequence[Edges]) -> list[float]:
    """
    Distance of each reading from its band in nats, `(N,)`: 0 inside, and on the edges, which belong to the band.

    Args:
        readings (`Sequence[float]`): Entropies in nats, `(N,)`.
        edges (`Sequence[tuple[float, float]]`): Low and high edge at each of them, `(N, 2)`.
    """
    return [max(low - entropy, entropy - high, 0.0) for entropy, (low, high) in zip(readings, edges, strict=True)]


def share_inside(readings: Sequence[float], edges: Sequence[Edges]) -> float:
    """Share of the readings, in 0..1, that lie in their band. `ValueError` without a reading."""
    return float(mean(distance == 0.0 for distance in distances_outside(readings, edges)))


def rms_outside(readings: Sequence[float], edges: Sequence[Edges]) -> float:
    """Root mean square over all readings of the distance from the band, in nats. `ValueError` without a reading."""
    return math.sqrt(mean(distance * distance for distance in distances_outside(readings, edges)))


def reentry_steps(readings: Sequence[float], edges: Sequence[Edges], jump: int, window: int = 5) -> int | None:
    """
    Readings from a jump of the band until the entropy is in it again; `None` if that never happens.

    It is when the mean of the next `window` readings lies between the means of their edges: one reading scatters, and
    may lie inside by chance.

    Args:
        readings (`Sequence[float]`): Entropies in nats, `(N,)`.
        edges (`Sequence[tuple[float, float]]`): Low and high edge at each of them, `(N, 2)`.
        jump (`int`): Index of the first reading after the jump.
        window (`int`, *optional*, defaults to `5`): Readings that are averaged.
    """
    for first in range(jump, len(readings) - window + 1):
        low, high = map(mean, zip(*edges[first : first + window], strict=True))
        if low <= mean(readings[first : first + window]) <= high:
            return first - jump
    return None


def reading_scatter(readings: Sequence[float]) -> float:
    """
    Standard deviation of one reading about the curve in nats, from second differences, which a smooth curve hardly
    has. `ValueError` with fewer than three readings.
    """
    second = [a - 2 * b + c for a, b, c in zip(readings, readings[1:], readings[2:], strict=False)]
    return math.sqrt(mean(d * d for d in second) / 6)


def final_entropy(readings: Sequence[float], last: int = 10) -> float:
    """Mean of the `last` readings in nats, since one alone scatters. `ValueError` without a reading."""
    return mean(readings[-last:])
