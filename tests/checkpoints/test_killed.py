"""
Killed at any moment, a run that is started again ends as if nothing had been.

`ENTROCRAFT_SOAK=1` kills 30 times instead of 6.
"""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import killed_worker
import pytest
import tiny
import torch
from safetensors.torch import load_file
from soak import SOAK

from entrocraft_trl.checkpoints.manifest import checkpoint_folder, list_checkpoints


PHASES = ("writing", "generation", "committing", "update", "deleting", "start")
KILLS = 30 if SOAK else len(PHASES)
CLOCK = (*tiny.CLOCK, "train_loss")


@pytest.fixture(scope="module")
def processes():
    """Processes forked from a server that has imported everything: 10 s of imports are paid once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_worker"])
    with pytest.MonkeyPatch.context() as patch:
        # The server starts with the first process, and preloads before it learns this process's path.
        patch.setenv(
            "PYTHONPATH", os.pathsep.join(map(str, [Path(killed_worker.__file__).parent, Path(__file__).parents[2]]))
        )
        multiprocessing.forkserver.ensure_running()
    return context


def live(processes, folder: Path, phase: str | None = None, count: int = 0, delay: float = 0.0, kept=1) -> bool:
    """
    One life of the run in `folder`, ended by SIGKILL `delay` seconds after its `count`-th report of `phase`, or by
    itself. Returns whether it was killed.
    """
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=killed_worker.train, args=(folder, sender, phase, count, kept))
    process.start()
    sender.close()
    seen = Counter()
    while True:
        assert receiver.poll(120), f"no sign of life for 120 s after {dict(seen)}"
        try:
            seen[receiver.recv()] += 1
        except EOFError:
            break
        if phase and seen[phase] == count:
            time.sleep(delay)
            process.kill()
            break
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"exit code {process.exitcode} after {dict(seen)}"
    return process.exitcode != 0


def without_clock(log: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in log]


def read_state(folder: Path) -> dict:
    state = json.loads((folder / "trainer_state.json").read_text())
    return {**state, "log_history": without_clock(state["log_history"])}


@pytest.fixture(scope="module")
def uninterrupted(processes, tmp_path_factory):
    """Log and parameters at the end, and state and weights at every checkpoint, of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert not live(processes, folder, kept=None)
    steps = list(range(2, killed_worker.STEPS + 1, 2))
    assert list_checkpoints(folder / "run") == dict.fromkeys(reversed(steps))
    checkpoints = [checkpoint_folder(folder / "run", step) for step in steps]
    saved = [(read_state(checkpoint), load_file(checkpoint / "model.safetensors")) for checkpoint in checkpoints]
    return folder, dict(zip(steps, saved, strict=True))


def assert_checkpoints_are_sound(folder: Path, kept) -> Counter:
    """
    The checkpoint that would be resumed from is that of the uninterrupted run: its state, with log and controller, at
    its step, and its weights. Returns what is wrong with the folders that would not.
    """
    found = list_checkpoints(folder / "run")
    complete = [step for step, reason in found.items() if reason is None]
    if complete:
        checkpoint = checkpoint_folder(folder / "run", complete[0])
        state, weights = kept[complete[0]]
        assert read_state(checkpoint) == state
        saved = load_file(checkpoint / "model.safetensors")
        assert all(torch.equal(saved[name], weights[name]) for name in weights)
    return Counter(reason for reason in found.values() if reason)


def assert_same_end(folder: Path, reference: Path) -> None:
    parameters = [torch.load(path / "parameters.pt") for path in (folder, reference)]
    assert all(torch.equal(parameters[0][name], value) for name, value in parameters[1].items())
    logs = [without_clock(json.loads((path / "log.json").read_text())["log_history"]) for path in (folder, reference)]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [5, 10, 12]  # every 5 steps, and the summary of the end


def test_killed_at_random_moments(processes, uninterrupted, tmp_path):
    reference, kept = uninterrupted
    source = random.Random(0)
    kills, runs, died_in, half_written = 0, 1, Counter(), Counter()
    folder = tmp_path / "run-1"
    folder.mkdir()
    while kills < KILLS:
        phase = PHASES[kills % len(PHASES)]
        # Each checkpoint reports 6 writings and, from the second on, about 14 deletions.
        count = {"writing": source.randint(1, 12), "deleting": source.randint(1, 30), "start": 1}.get(phase)
        delay = source.uniform(0, 0.3 if phase == "start" else 0.02)
        if live(processes, folder, phase, count or source.randint(1, 3), delay):
            kills += 1
            died_in[phase] += 1
            half_written += assert_checkpoints_are_sound(folder, kept)
        else:
            assert_same_end(folder, reference)
            runs += 1
            folder = tmp_path / f"run-{runs}"
            folder.mkdir()
    assert not live(processes, folder)
    assert_same_end(folder, reference)
    print(f"{kills} kills in {runs} runs: {dict(died_in)}; half-written: {dict(half_written)}")
    assert set(died_in) == set(PHASES)
    assert half_written["trainer_state.json cannot be read"] > 0  # or the killing did not do what it is for
