"""SIGTERM, which schedulers send some time before SIGKILL: save a checkpoint, stop, exit with 143."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import TrainerCallback


EXIT_CODE = 128 + signal.SIGTERM  # not 0, which tells Kubernetes and Slurm that the training is done


class StopOnSigterm(TrainerCallback):
    """
    After the optimizer step during which any rank received SIGTERM, all ranks save a checkpoint and stop.

    The ranks agree once per optimizer step, through `agree`: the signal may reach one rank only, or two ranks in
    different steps, and a rank that saves alone waits for the others forever.
    """

    def __init__(self, agree: Callable[[bool], bool]):
        self.agree = agree
        self.received = False
        self.agreed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM within, unless someone else does (a launcher or a notebook)."""
        # Python allows handlers in the main thread only.
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _receive(self, signum, frame) -> None:
        self.received = True

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.agreed = self.agree(self.received)

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed:
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if self.agreed:
            # With a best checkpoint and save_total_limit=1, transformers ends by deleting the newest one.
            state.best_model_checkpoint = None
