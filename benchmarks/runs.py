"""What the benchmarks share: the results' folder, and one quiet thread."""

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
