"""What the benchmarks share: the results' folder, and one quiet thread."""

from pathlib import Path


RESULTS = Path(__file__).parent / "results"


def one_quiet_thread() -> None:
    """One thread, so that two runs side by side take the two cores, and no progress bars among the printed figures."""
    import torch

    from entrocraft_trl.compare.workers import be_quiet

    be_quiet()
    torch.set_num_threads(1)
