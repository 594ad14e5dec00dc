"""Records of finished runs: kept on disk, so that a comparison goes on where it stopped, and averaged over seeds."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..atomic import write_atomically


def kept_record(file: Path, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """
    The record of a finished run: read from `file` if it was made with `settings`, otherwise made and written there.

    Args:
        file (`Path`): JSON file; its name tells runs of one comparison apart.
        settings (`dict`): What the run depends on, as JSON values. A record made with other settings is made anew.
        make (`Callable`): The run; returns the record.
    """
    if file.exists():
        record = json.loads(file.read_text())
        if record.get("settings") == settings:
            return record
    record = {"settings": settings, **make()}
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
