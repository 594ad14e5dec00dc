"""One run a folder: a second one at the same time, or after it without resuming, is refused and mixes nothing."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from entrocraft_trl.checkpoints import run_lock
from entrocraft_trl.checkpoints.choice import resolve_checkpoint
from entrocraft_trl.checkpoints.manifest import list_checkpoints, run_of
from entrocraft_trl.checkpoints.run_lock import EVALUATION, TRAINING, only_process
from entrocraft_trl.cli import main


# Holds the lock until it is told to go on; then says whether it could be had by another.
HOLDER = """
import os, sys, time
from pathlib import Path
from entrocraft_trl.checkpoints.run_lock import only_process
with only_process(Path(sys.argv[1]), sys.argv[3]):
    child = os.fork() if sys.argv[2] == "forks" else os.getpid()
    if child:
        print(child, flush=True)
        sys.stdin.read()
    else:
        time.sleep(600)
"""


def build(output_dir="run", **settings):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **settings}
    return tiny.build_trainer(args=tiny.build_config(output_dir=output_dir, **settings))


@pytest.fixture
def holder(tmp_path):
    """Starts another process that is in `run`; returns it, and the process id that it printed."""
    started = []

    def start(kind="holds", name=TRAINING):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "run"), kind, name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.communicate()


# --------------------------------------------------------------------------------------------------- at the same time


def test_a_second_process_in_the_folder_is_refused_before_it_touches_anything(tmp_path, holder):
    first, pid = holder()
    half = tmp_path / "run" / "checkpoint-9"
    half.mkdir()
    trainer = build()
    for resume in (None, True):
        with pytest.raises(ValueError, match=f"'run' is in use by process {pid} on ") as error:
            trainer.train(resume_from_checkpoint=resume)
        assert "choose another output_dir" in str(error.value)
    assert trainer.state.global_step == 0 and half.is_dir()
    first.communicate("")
    build("elsewhere").train()
    trainer.train()  # once the other one has ended
    assert list_checkpoints(tmp_path / "run") == {9: "trainer_state.json is missing", 2: None, 1: None}


def test_a_killed_process_does_not_block_its_restart(holder, tmp_path):
    """Nor do children that it forked, such as data loader workers, which may live on."""
    first, child = holder("forks")
    try:
        first.kill()
        first.wait()
        os.kill(child, 0)  # it is still there
        with only_process(tmp_path / "run", TRAINING):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.subprocess
def test_the_folder_is_free_after_training_and_after_an_error(tmp_path):
    def others_can():
        code = f"import fcntl; fcntl.lockf(open('run/{TRAINING}', 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0

    trainer = build(save_strategy="no")
    with trainer.running():
        trainer.train()
        assert not others_can()  # the command still has to save the model
    assert others_can()
    trainer.reward_funcs = [None]
    with pytest.raises(Exception):  # noqa: B017  whatever it is, the lock is the point
        trainer.train()
    assert others_can()


def test_a_disk_without_locks_is_a_warning(monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)
    trainer = build()
    trainer.train()
    assert trainer.state.global_step == 2
    assert "No lock on 'run' (No locks available): do not start a second run there." in caplog.text


def test_a_second_evaluation_is_refused_and_deletes_nothing(tmp_path, holder, capsys):
    _, pid = holder(name=EVALUATION)
    samples = tmp_path / "run" / "samples.jsonl"
    samples.write_text("of the first")
    for more in ([], ["--overwrite"]):
        assert main(["eval", "--model", "m", "--dataset", "d", "--output_dir", "run", *more]) == 2
        assert f"error: 'run' is in use by process {pid} on " in capsys.readouterr().err
    assert samples.read_text() == "of the first"
    build(save_strategy="no").train()  # another matter


# ------------------------------------------------------------------------------------------------ one after the other


def test_a_run_that_starts_where_another_has_checkpoints_is_refused(tmp_path):
    build().train()
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.name != TRAINING}
    message = "'run' holds checkpoint-2 of an earlier run, and a new one would mix with it"
    with pytest.raises(ValueError, match=message) as error:
        build(max_steps=1, save_total_limit=1).train()
    with pytest.raises(ValueError, match=message):
        resolve_checkpoint(None, "run")  # the command, before a model loads
    assert "go on with that run (resume_from_checkpoint=auto)" in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.name != TRAINING} == before
    longer = build(max_steps=3)
    longer.train(resume_from_checkpoint="auto")
    assert longer.state.global_step == 3


def test_half_written_checkpoints_do_not_keep_a_run_from_starting():
    """Killed in its first save, a run starts anew with the same command line."""
    build(max_steps=1).train()
    Path("run/checkpoint-1/trainer_state.json").unlink()
    build(max_steps=1).train(resume_from_checkpoint="auto")
    assert list_checkpoints(Path("run")) == {1: None}


def test_a_run_keeps_its_name_over_restarts_and_two_runs_have_two():
    build("first", max_steps=1).train()
    build("first", max_steps=2).train(resume_from_checkpoint=True)
    build("second", max_steps=1).train()
    names = [run_of(Path(folder)) for folder in ("first/checkpoint-1", "first/checkpoint-2", "second/checkpoint-1")]
    assert names[0] == names[1] != names[2]
    assert all(names)


@pytest.mark.parametrize("resume", [True, "auto", "run/checkpoint-2"])
def test_checkpoints_of_two_runs_in_one_folder_are_not_chosen_from(resume):
    """However they came there; the further one would be resumed, and the older one deleted by rotation."""
    build("run").train()
    build("other", max_steps=1).train()
    shutil.rmtree("run/checkpoint-1")
    shutil.copytree("other/checkpoint-1", "run/checkpoint-1")
    message = "'run' holds checkpoint-1 of another run than 'run/checkpoint-2' is of"
    with pytest.raises(ValueError, match=message):
        build(max_steps=3, save_total_limit=1).train(resume_from_checkpoint=resume)
    assert list_checkpoints(Path("run")) == {2: None, 1: None}


def test_a_checkpoint_from_elsewhere_goes_on_in_an_empty_folder_under_its_name():
    build("first", max_steps=1).train()
    build("second").train(resume_from_checkpoint="first/checkpoint-1")
    assert run_of(Path("second/checkpoint-2")) == run_of(Path("first/checkpoint-1"))


@pytest.mark.parametrize("manifest", ["old", "none"])
def test_checkpoints_without_a_name_are_resumed_and_get_one(manifest):
    """Those of earlier versions, whose list holds the files only, and those of plain TRL, which have none."""
    build().train()
    for step in (1, 2):
        path = Path(f"run/checkpoint-{step}/entrocraft_files.json")
        files = json.loads(path.read_text())["files"]
        path.unlink() if manifest == "none" else path.write_text(json.dumps(files))
    assert list_checkpoints(Path("run")) == {2: None, 1: None}
    for steps in (3, 4):
        trainer = build(max_steps=steps)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == steps
    names = [run_of(Path(f"run/checkpoint-{step}")) for step in (1, 2, 3, 4)]
    assert names[:2] == [None, None] and names[2] == names[3] is not None


@pytest.mark.parametrize("content", [{"run": 5, "files": {}}, {"run": "a", "files": ["model.safetensors"]}])
def test_a_foreign_list_is_named(content):
    build(max_steps=1).train()
    Path("run/checkpoint-1/entrocraft_files.json").write_text(json.dumps(content))
    assert list_checkpoints(Path("run")) == {1: "entrocraft_files.json is no list of files"}


def test_a_system_without_posix_locks_gets_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_lock, "fcntl", None)
    with only_process(tmp_path, TRAINING), only_process(tmp_path, TRAINING):
        assert caplog.text.count("No lock on") == 2
