"""What the benchmarks share: results folder, one quiet thread, and finished runs that are kept on disk."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

from entrocraft_trl.atomic import write_atomically


RESULTS = Path(__file__).parent / "results"


def one_quiet_thread() -> None:
    """One thread, so that two runs side by side take the two cores, and no progress bars among the printed figures."""
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def kept_record(file: Path, settings: dict, make: Callable[[], dict]) -> dict:
    """
    The record of a finished run: read from `file` if it was made with `settings`, otherwise made and written there.

    Args:
        file (`Path`): JSON file; its name tells runs of one benchmark apart.
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


def policy_folder(root: Path, initial_entropy: float) -> Path:
    """Folder of the runs from one starting policy: those from another one must not overwrite them."""
    return root / f"start-{initial_entropy:.4f}"
