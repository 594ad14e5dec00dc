"""What Slurm and Kubernetes do to a run: SIGTERM to the launcher, then the same command line once more."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny
from launching import ENVIRONMENT, ROOT, _kill_tree, launch_line
from soak import SOAK

from entrocraft_trl.checkpoints.manifest import list_checkpoints


# The signal comes in step 3, whatever the machine's speed: generation waits there until it is told to go on.
REWARD = """
import time
from pathlib import Path

FOLDER = Path({folder!r})

def length(completions, trainer_state, **kwargs):
    if trainer_state.global_step == 2 and not (FOLDER / "signalled").exists():
        (FOLDER / "waiting").touch()
        while not (FOLDER / "signalled").exists():
            time.sleep(0.01)
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def line(tmp_path):
    tiny.build_model().save_pretrained(tmp_path / "model")
    tiny.build_tokenizer().save_pretrained(tmp_path / "model")
    prompts = tiny.build_dataset(16)["prompt"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (tmp_path / "waiting_reward.py").write_text(REWARD.format(folder=str(tmp_path)))
    options = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "data.jsonl",
        "reward_funcs": "waiting_reward:length",
        "output_dir": tmp_path / "run",
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "resume_from_checkpoint": "auto",
    }
    return [
        "-m",
        "entrocraft_trl",
        "train",
        *(str(word) for key, value in options.items() for word in (f"--{key}", value)),
    ]


# One process without a launcher costs as much time again.
@pytest.mark.parametrize("config", ["cpu_ddp", *([None] if SOAK else [])])
def test_sigterm_to_the_launcher(config, line, tmp_path):
    environment = {**os.environ, **ENVIRONMENT}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])

    def start(output: Path) -> subprocess.Popen:
        with output.open("w") as stream:
            words = launch_line(config, *line)
            return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)

    first = start(tmp_path / "first.txt")
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "waiting").exists():
            assert time.monotonic() < deadline and first.poll() is None, (tmp_path / "first.txt").read_text()[-3000:]
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # for the launcher to pass it on
        (tmp_path / "signalled").touch()
        code = first.wait(timeout=120)
    finally:
        _kill_tree(first)
    text = (tmp_path / "first.txt").read_text()
    assert "stopped after step 3 of 4" in text, text[-3000:]
    assert code == 143 if config is None else code != 0, code  # several processes: torch's launcher has its own codes
    assert list_checkpoints(tmp_path / "run") == {3: None}

    second = start(tmp_path / "second.txt")
    try:
        assert second.wait(timeout=240) == 0, (tmp_path / "second.txt").read_text()[-3000:]
    finally:
        _kill_tree(second)
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "reward" in entry] == [1, 2, 3, 4]
