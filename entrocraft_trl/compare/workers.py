"""Runs of a comparison, side by side in worker processes, or one after another on all ranks of a launcher."""

import ctypes
import gc
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_handle
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from .experiment import Experiment
from .jobs import Job, RunError, Start, from_main_process, measured_start, run_job


LOOK = 1.0  # seconds between two looks at what the workers have done
ENVIRONMENT = {
    # One thread a worker: on two cores two runs side by side beat one run on two threads.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Without these, glibc returns each step's activations to the system, which clears them anew in the next.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "MALLOC_TOP_PAD_": str(2**30),
}
_steps: Any = None  # in a worker: the steps that each job of this call has made, shared with the parent


def under_launcher() -> bool:
    """Whether `accelerate launch` or `torchrun` has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def default_workers() -> int:
    """As many as there are cores, or one where they would share an accelerator."""
    return 1 if torch.accelerator.is_available() else os.cpu_count() or 1


def run_jobs(
    jobs: Sequence[Job], folder: Path, workers: int, progress: bool = True
) -> tuple[list[dict[str, Any] | None], dict[str, str]]:
    """
    The records of `jobs`, in their order, `None` for one that failed; and what failed, by title. What has a record in
    `folder` already is not run.

    Raises:
        RunError: If a worker was killed.
    """
    records = from_main_process([job.record(folder) for job in jobs])
    todo = [(index, jobs[index]) for index, record in enumerate(records) if record is None]
    ended = kept = len(jobs) - len(todo)
    steps_to_do = sum(job.experiment.max_steps for _, job in todo)
    failures: dict[str, str] = {}
    if progress and kept:
        print(f"{kept} of {len(jobs)} runs are kept from earlier calls", flush=True)
    run, begun = _one_after_another if under_launcher() else _side_by_side, time.monotonic()
    # Without a terminal there is no bar; the lines say how long it takes.
    with tqdm(total=steps_to_do, unit="step", smoothing=0.05, disable=None if progress else True) as bar:
        for index, result, steps in run(todo, folder, workers):
            bar.update(steps - bar.n)
            if index is None:
                continue
            ended += 1
            if isinstance(result, BaseException):
                told = failures[jobs[index].title] = f"{type(result).__name__}: {result}"
                line = f"failed: {jobs[index].title}: {told}"
            else:
                records[index] = result
                left = (time.monotonic() - begun) / steps * (steps_to_do - steps)
                line = f"{jobs[index].title}: {result['seconds']:.0f} s; about {left / 60:.0f} minutes left"
            if progress:
                bar.write(f"[{ended}/{len(jobs)}] {line}")
    return records, failures


def measure_start(experiment: Experiment, folder: Path) -> Start:
    """[`measured_start`] in a process of its own, so that this one holds no model; on all ranks under a launcher."""
    if under_launcher():
        return measured_start(experiment, folder)
    if (start := measured_start(experiment, folder, only_read=True)) is not None:
        return start
    with _pool(1, 1) as (pool, _):
        return pool.submit(measured_start, experiment, folder).result()


def _one_after_another(jobs, folder: Path, workers: int) -> Iterator[tuple[int, Any, int]]:
    made = 0
    for index, job in jobs:
        # An error ends the comparison: a rank that caught its own would leave the others waiting.
        record = run_job(job, folder)
        made += job.experiment.max_steps
        yield index, record, made


def _side_by_side(jobs, folder: Path, workers: int) -> Iterator[tuple[int | None, Any, int]]:
    """Yields the index and the record, or the error, of each job as it ends, with all steps made; and on each look."""
    if not jobs:
        return
    with _pool(min(workers or default_workers(), len(jobs)), len(jobs)) as (pool, steps):
        pending: dict[Future, tuple[int, int]] = {}
        for place, (index, job) in enumerate(jobs):
            pending[pool.submit(_run_in_worker, place, job, folder)] = (index, place)
        while pending:
            ended, _ = wait(pending, timeout=LOOK, return_when=FIRST_COMPLETED)
            for future in ended:
                index, place = pending.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise RunError(
                        "a worker process was killed, perhaps for memory: start again to go on, with fewer workers"
                    ) from error
                steps[place] = jobs[place][1].experiment.max_steps
                yield index, error or future.result(), sum(steps)
            yield None, None, sum(steps)


@contextmanager
def _pool(workers: int, jobs: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """Spawned workers, which end with this process however it ends, and the steps made of each job."""
    context = multiprocessing.get_context("spawn")
    steps = context.Array("q", jobs, lock=False)  # each number has one writer
    before, others = {name: os.environ.get(name) for name in ENVIRONMENT}, set(multiprocessing.active_children())
    os.environ.update(ENVIRONMENT)  # read by the workers while they import
    pool = ProcessPoolExecutor(workers, context, initializer=_prepare_worker, initargs=(steps,))
    try:
        yield pool, steps
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.kill()  # SIGTERM would have it finish its step and save; what it saved last is enough
        raise
    finally:
        pool.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# --------------------------------------------------------------------------------------------------------- in a worker


def _prepare_worker(steps: Any) -> None:
    global _steps
    _steps = steps
    threading.Thread(target=_end_with_parent, daemon=True).start()
    be_quiet()
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)


def be_quiet() -> None:
    """No progress bars and repeated warnings among the lines of a comparison; its parent warned of what is unfit."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _end_with_parent() -> None:
    # A worker that outlived a killed parent would go on training in a folder that the next call wants.
    wait_for_handle([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _run_in_worker(place: int, job: Job, folder: Path) -> dict[str, Any]:
    def report(step: int) -> None:
        _steps[place] = step

    try:
        return run_job(job, folder, report)
    finally:
        return_memory()


def return_memory() -> None:
    """
    Free memory goes back to the system, which `ENVIRONMENT` keeps for the next step: a worker without a job that held
    on to that of its last, some gigabytes with a real model, would make the others swap.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)
