"""The command in worker processes and under a launcher: killed, it goes on, and repeats nothing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import psutil
import pytest
import yaml
from launching import ENVIRONMENT, launch_line, run_line


pytestmark = pytest.mark.subprocess
WHOLE = {
    "task": {"name": "expressions", "steps": 2, "habit_steps": 1, "batch_size": 8},
    "training": {"max_steps": 4, "per_device_train_batch_size": 16},
    "seeds": [0],
    "evaluation": {"samples": 4},
    "band_width": 0.1,
    "bands": {"linear": [[0, 1.0], [1, 0.5]]},
    "methods": {"grpo": {}, "rule": {"method": "entrocraft", "rejection_rule": "entropy_change"}},
    "report": {"figures": ["entropy", "reward", "pass_at_k"], "summary": True},
}


def command(folder: Path, whole: dict, *more: str) -> list[str]:
    (folder / "mine.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    words = ["compare", "--config", str(folder / "mine.yaml"), "--output_dir", str(folder / "out"), *more]
    return ["-m", "entrocraft_trl", *words]


def records(folder: Path) -> dict[str, dict]:
    found = [json.loads(path.read_text()) for path in (folder / "out" / "mine").glob("*.json")]
    return {record["arm"]: record for record in found if "arm" in record}


def live(line: list[str], folder: Path, checkpoints: str, kill) -> tuple[int, str, list[psutil.Process]]:
    """One life of a command, ended by `kill(process, its workers)` once a checkpoint of a name is there."""
    environment = {**os.environ, **ENVIRONMENT, "ENTROCRAFT_CACHE": str(folder / "cache")}
    process = subprocess.Popen(line, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    limit = time.monotonic() + 240
    while not list((folder / "out" / "mine").glob(checkpoints)):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "spawn_main" in "".join(child.cmdline())]  # and not Python's own helper
    kill(process, workers)
    _, error = process.communicate(timeout=120)
    return process.returncode, error.decode(), workers


def test_killed_it_goes_on_and_repeats_nothing(tmp_path):
    """First a worker of it is killed, as for memory, then the command itself, whose workers go with it."""
    whole = {**WHOLE, "workers": 1, "checkpoint_steps": 6, "training": {**WHOLE["training"], "max_steps": 24}}
    line = [sys.executable, *command(tmp_path, whole)]

    def kill_workers(process, workers):
        for worker in workers:
            worker.kill()

    code, error, _ = live(line, tmp_path, "grpo-*/checkpoint-*", kill_workers)
    assert code == 2
    assert error.splitlines()[-1] == (
        "entrocraft: error: a worker process was killed, perhaps for memory: start again to go on, with fewer workers"
    )
    assert not records(tmp_path)
    _, _, workers = live(line, tmp_path, "rule-*/checkpoint-*", lambda process, workers: process.kill())
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    first = records(tmp_path)
    assert list(first) == ["grpo"]
    output = run_line(line, folder=tmp_path, environment={"ENTROCRAFT_CACHE": str(tmp_path / "cache")})
    assert "1 of 2 runs are kept from earlier calls" in output and "[2/2] rule, band linear, seed 0: " in output
    second = records(tmp_path)
    assert second["grpo"] == first["grpo"] and list(second) != list(first)
    assert second["rule"]["series"]["step"] == list(range(24))
    table = (tmp_path / "out" / "mine.md").read_text()
    assert table in output and "| linear | rule | " in table
    rows = json.loads((tmp_path / "out" / "mine.json").read_text())["rows"]
    assert [(row["method"], row["schedule"], row["regime"]) for row in rows] == [
        ("grpo", "linear", "mine"),
        ("rule", "linear", "mine"),
    ]
    for name in ("mine", "mine_reward", "mine_pass_at_k", "mine_summary"):
        assert matplotlib.image.imread(tmp_path / "out" / f"{name}.png").std() > 0


def test_the_same_file_runs_on_all_ranks_of_a_launcher(tmp_path):
    line = launch_line("cpu_ddp", *command(tmp_path, WHOLE))
    output = run_line(line, folder=tmp_path, environment={"ENTROCRAFT_CACHE": str(tmp_path / "cache")})
    found = records(tmp_path)
    assert set(found) == {"grpo", "rule"}
    assert found["rule"]["rollouts"] == 32  # of two processes
    assert (tmp_path / "out" / "mine.md").read_text() in output
    assert output.count("| linear | rule | ") == 1  # said once
