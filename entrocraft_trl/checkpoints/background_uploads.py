"""Uploads to the Hub beside a run, which hold neither the run nor the exit of its process."""

import atexit
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from huggingface_hub import HfApi, get_session


SILENCE_LIMIT = 60.0  # seconds; a large commit may keep the Hub busy for a while


class UploadQueue:
    """
    Runs uploads one after another, in order, each in a thread.

    The threads are daemons. huggingface_hub's own, of a `ThreadPoolExecutor`, is joined when Python exits, and before
    anything else: one request without an answer holds a process that is done. `os._exit` would end it too, but would
    skip what runs at exit: trackers send their last metrics then. What is cut off leaves no trace on the Hub, where an
    upload becomes visible with its commit.
    """

    def __init__(self):
        self._jobs: list[Future] = []

    def pending(self) -> list[Future]:
        """Uploads that are not done, in order."""
        self._jobs = [job for job in self._jobs if not job.done()]
        return self._jobs

    def submit(self, upload: Callable, *args, **kwargs) -> Future:
        job, before = Future(), self.pending()
        self._jobs = [*before, job]

        def run():
            wait(before)
            if not job.set_running_or_notify_cancel():
                return
            try:
                result = upload(*args, **kwargs)
            except BaseException as error:
                job.set_exception(error)
            else:
                job.set_result(result)

        threading.Thread(target=run, name="entrocraft-upload", daemon=True).start()
        return job


@contextmanager
def background_by(submit: Callable[..., Future]) -> Iterator[list[Future]]:
    """Within, what is asked of huggingface_hub with `run_as_future=True` goes to `submit`. Yields the jobs."""
    original, jobs = HfApi.run_as_future, []

    def run_as_future(api, function, *args, **kwargs):
        jobs.append(submit(function, *args, **kwargs))
        return jobs[-1]

    HfApi.run_as_future = run_as_future
    try:
        yield jobs
    finally:
        HfApi.run_as_future = original


def call_at_exit(method: Callable[[], None]) -> None:
    """Call a bound method when Python exits, without keeping its object alive until then: a trainer with its model."""
    reference = weakref.WeakMethod(method)
    atexit.register(lambda: (alive := reference()) and alive())


# Set when a run has waited for the Hub as long as it would.
patience_is_over = threading.Event()


def limit_silence(seconds: float) -> None:
    """
    Let a request of huggingface_hub fail after `seconds` without a byte; it sets no limit itself. One that is set
    stays. To be called before each use: huggingface_hub makes a new session after a failed connection.
    """
    session = get_session()
    if session.timeout.read is None:
        session.timeout = seconds
    if _refuse_when_leaving not in session.event_hooks["request"]:
        session.event_hooks["request"].append(_refuse_when_leaving)


def _refuse_when_leaving(request) -> None:
    # Without Xet, large files go by threads of a pool, which Python joins at exit: a server that stays silent would
    # hold it through all six tries, each as long as the limit.
    if patience_is_over.is_set():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(bool)  # raises RuntimeError once Python has begun to exit
