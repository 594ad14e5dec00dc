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


def test_killed_it_goes_on_and_repeats_nothing(tmp_path):
    """The second run takes long enough to be killed in the middle, and its workers are gone with their parent."""
    whole = {**WHOLE, "workers": 1, "checkpoint_steps": 2, "training": {**WHOLE["training"], "max_steps": 60}}
    environment = {**os.environ, **ENVIRONMENT, "ENTROCRAFT_CACHE": str(tmp_path / "cache")}
    line = [sys.executable, *command(tmp_path, whole)]
    process = subprocess.Popen(
        line, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    limit = time.monotonic() + 120
    while not list((tmp_path / "out" / "mine").glob("rule-*/checkpoint-*")):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    first = records(tmp_path)
    assert list(first) == ["grpo"]
    output = run_line([sys.executable, *command(tmp_path, whole)], folder=tmp_path, environment=environment)
    assert "1 of 2 runs are kept from earlier calls" in output and "[2/2] rule, band linear, seed 0: " in output
    second = records(tmp_path)
    assert second["grpo"] == first["grpo"] and list(second) != list(first)
    assert second["rule"]["series"]["step"] == list(range(60))
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
