"""What the benchmarks share: the results' folder, one quiet thread, and what a process of its own prints."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path


RESULTS = Path(__file__).parent / "results"


def one_quiet_thread() -> None:
    """One thread, so that two runs side by side take the two cores, and no progress bars among the printed figures."""
    import torch

    from entrocraft_trl.compare.workers import be_quiet

    be_quiet()
    torch.set_num_threads(1)


def printed_by(line: Sequence[str], title: str) -> dict:
    """The last JSON object that a command prints, a line of its own; what it complains of ends this process."""
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{title}: {done.stderr[-3000:]}")
    return next(json.loads(text) for text in reversed(done.stdout.splitlines()) if text.startswith("{"))
