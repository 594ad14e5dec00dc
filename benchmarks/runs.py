"""What the benchmarks share: results folder, one quiet thread, and a folder of runs for each starting policy."""

import warnings
from pathlib import Path


RESULTS = Path(__file__).parent / "results"


def one_quiet_thread() -> None:
    """One thread, so that two runs side by side take the two cores, and no progress bars among the printed figures."""
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def policy_folder(root: Path, initial_entropy: float) -> Path:
    """Folder of the runs from one starting policy: those from another one must not overwrite them."""
    return root / f"start-{initial_entropy:.4f}"
