"""What the launched tests rely on: a hang, a crash and a launch that silently started one process are failures."""

import sys

import launching
import psutil
import pytest


# Two ranks without torch, so that these tests take seconds.
HANGS = """
import subprocess, sys, time
from launching import start_worker

def waits_for_ever():
    time.sleep(1000)

if len(sys.argv) == 1:
    import os
    children = [subprocess.Popen([sys.executable, __file__, rank], env={**os.environ, "RANK": rank}) for rank in "01"]
    [child.wait() for child in children]
start_worker()
waits_for_ever()
"""
FINISHES = """
from types import SimpleNamespace
from launching import start_worker, write_result

start_worker()
state = SimpleNamespace(deepspeed_plugin=None, distributed_type="NO")
nothing = lambda: None
write_result(
    SimpleNamespace(process_index=0, num_processes=1, state=state, wait_for_everyone=nothing, end_training=nothing)
)
"""


def script(tmp_path, text: str) -> str:
    path = tmp_path / "worker.py"
    path.write_text(text)
    return str(path)


def test_a_hang_shows_the_stacks_of_all_ranks_and_leaves_no_process(tmp_path):
    path = script(tmp_path, HANGS)
    with pytest.raises(AssertionError, match="hung: not done after 10 s") as caught:
        # 10 s: long enough for three interpreters to start on a busy machine.
        launching.run_line([sys.executable, path], folder=tmp_path / "run", limit=10)
    message = str(caught.value)
    for rank in (0, 1):
        _, _, stack = message.partition(f"===== stacks-rank{rank}-")
        assert "in waits_for_ever" in stack.partition("=====")[0]
    assert not [process for process in psutil.process_iter(["cmdline"]) if path in (process.info["cmdline"] or ())]


def test_a_crash_shows_what_the_process_said(tmp_path):
    path = script(tmp_path, "raise RuntimeError('out of luck')")
    with pytest.raises(AssertionError, match="return code 1") as caught:
        launching.run_line([sys.executable, path], folder=tmp_path / "run", limit=60)
    assert "RuntimeError: out of luck" in str(caught.value)


def test_a_yaml_that_starts_one_process_instead_of_two_is_found_out(tmp_path, monkeypatch):
    """`MULTI_CPU` without a host file: Accelerate starts one process and ends with return code 0."""
    monkeypatch.setattr(launching, "CONFIGS", tmp_path)
    settings = ["compute_environment: LOCAL_MACHINE", "distributed_type: MULTI_CPU", "mixed_precision: 'no'"]
    settings += ["num_machines: 1", "num_processes: 2", "use_cpu: true"]
    (tmp_path / "cpu_wrong.yaml").write_text("\n".join(settings))
    with pytest.raises(AssertionError, match="'processes': 1.* the YAML says .*'processes': 2"):
        launching.launch("cpu_wrong", script(tmp_path, FINISHES), folder=tmp_path / "run", limit=120)
