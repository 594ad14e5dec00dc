"""Records of finished runs: kept on disk, so that a comparison goes on where it stopped, and averaged over seeds."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..atomic import write_atomically


def read_record(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The record in `file`; `None` if there is none that was made with `settings`."""
    record = json.loads(file.read_text()) if file.exists() else {}
    return record if record.get("settings") == settings else None


def write_record(file: Path, settings: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Write a run's record with its settings, making the folder; returns both as [`read_record`] will."""
    record = {"settings": settings, **record}
    file.parent.mkdir(parents=True, exist_ok=True)
    # In one piece: a run that is killed while writing must not leave a file that stops the next call.
    write_atomically(file, lambda stream: stream.write(json.dumps(record).encode()))
    return record


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """
    Mean and sample standard deviation (`n - 1`) over seeds, 0 for a single one; `None` where some seed has no value.
    """
    if any(value is None for value in values):
        return {"mean": None, "std": None}
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0}
