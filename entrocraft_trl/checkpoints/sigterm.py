"""SIGTERM, which schedulers send some time before SIGKILL: save a checkpoint, stop, exit with 143."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager

from transformers import TrainerCallback


EXIT_CODE = 128 + signal.SIGTERM  # not 0, which tells Kubernetes and Slurm that the training is done
PIECE = 0.5  # seconds


@contextmanager
def noting_sigterm(note: Callable[[], None]) -> Iterator[None]:
    """Within, SIGTERM calls `note` and ends nothing, unless someone else handles it (a launcher or a notebook)."""
    # Python allows handlers in the main thread only.
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda signum, frame: note())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class StopOnSigterm(TrainerCallback):
    """
    After the optimizer step during which any rank received SIGTERM, all ranks save a checkpoint and stop.

    The ranks agree once per optimizer step, through `agree`: the signal may reach one rank only, or two ranks in
    different steps, and a rank that saves alone waits for the others forever.
    """

    def __init__(self, agree: Callable[[], bool]):
        self.agree = agree
        self.agreed = False

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.agreed = self.agree()

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed:
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if self.agreed:
            # With a best checkpoint and save_total_limit=1, transformers ends by deleting the newest one.
            state.best_model_checkpoint = None


def wait_for_jobs(jobs: Sequence[futures.Future], seconds: float, stop: Callable[[], bool]) -> set[futures.Future]:
    """
    The jobs that are not done in `seconds`, or by the time that `stop()` is true: it is asked twice a second, since a
    signal's handler can note that the signal came but end no waiting.
    """
    while True:
        piece = min(seconds, PIECE)
        pending = futures.wait(jobs, timeout=piece).not_done
        seconds -= piece
        if not pending or seconds <= 0 or stop():
            return pending


def pause(seconds: float, stop: Callable[[], bool]) -> None:
    """Sleep, but no longer than until `stop()` is true."""
    while seconds > 0 and not stop():
        time.sleep(min(seconds, PIECE))
        seconds -= PIECE
