"""Which checkpoint folders are complete, and what becomes of the others."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import tiny
from trl import GRPOTrainer

from entrocraft_trl.atomic import write_atomically
from entrocraft_trl.checkpoints.manifest import list_checkpoints, set_aside, uncommit, why_incomplete


def build(output_dir="run", trainer_class=tiny.EntrocraftGRPOTrainer, **settings):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, **settings}
    config_class = getattr(trainer_class, "_config_class", tiny.GRPOConfig)
    args = tiny.build_config(config_class, output_dir=output_dir, **settings)
    return tiny.build_trainer(trainer_class, args=args)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    build(str(folder / "run")).train()
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


SPOILED = [
    (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    (
        lambda folder: shorten(folder / "trainer_state.json") or shorten(folder / "trainer_state.json"),
        "cannot be read",
    ),
    (lambda folder: (folder / "trainer_state.json").write_bytes(b""), "trainer_state.json cannot be read"),
    (lambda folder: (folder / "trainer_state.json").write_bytes(b"\xff\xfe{"), "trainer_state.json cannot be read"),
    (lambda folder: (folder / "trainer_state.json").write_text("[]"), "trainer_state.json holds no object"),
    (lambda folder: (folder / "trainer_state.json").write_text("{}"), "trainer_state.json has no field 'global_step'"),
    (lambda folder: shutil.copy(folder.with_name("checkpoint-2") / "trainer_state.json", folder), "is of step 2"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda folder: shorten(folder / "optimizer.pt"), "optimizer.pt has"),
    (lambda folder: shorten(folder / "entrocraft_files.json"), "entrocraft_files.json cannot be read"),
]


@pytest.mark.parametrize(("spoil", "reason"), SPOILED)
def test_incomplete_folder_is_named_passed_over_and_set_aside(run, spoil, reason, caplog):
    assert list_checkpoints(run) == {3: None, 2: None, 1: None}
    spoil(run / "checkpoint-3")
    assert reason in why_incomplete(run / "checkpoint-3")
    trainer = build(str(run))
    with caplog.at_level(logging.WARNING, logger="entrocraft_trl.checkpoints.resume"):
        assert trainer._choose_checkpoint(True) == str(run / "checkpoint-2")
    assert "checkpoint-3 is not complete" in caplog.text and reason in caplog.text
    assert not (run / "checkpoint-3").exists() and (run / "_incomplete-checkpoint-3").exists()
    assert list_checkpoints(run) == {2: None, 1: None}


@pytest.mark.parametrize(("spoil", "reason"), SPOILED)
def test_incomplete_folder_is_refused_by_name(run, spoil, reason):
    spoil(run / "checkpoint-3")
    with pytest.raises(ValueError, match="checkpoint-3. is no complete checkpoint: ") as error:
        build("other").train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert reason in str(error.value)


def test_older_incomplete_folders_stay_where_they_are(run):
    """Rotation leaves such folders when it is killed, and deletes them the next time."""
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    assert build(str(run))._choose_checkpoint(True) == str(run / "checkpoint-3")
    assert (run / "checkpoint-2").is_dir()


def test_nothing_complete(run):
    for step in (1, 2, 3):
        (run / f"checkpoint-{step}" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="no complete checkpoint in .*checkpoint-3: trainer_state.json is missing"):
        build(str(run)).train(resume_from_checkpoint=True)
    assert len(list_checkpoints(run)) == 3  # all still there, to be looked at
    with pytest.raises(ValueError, match="no complete checkpoint"):
        build("never-started").train(resume_from_checkpoint=True)


def test_checkpoints_of_plain_trl_count(tmp_path):
    build("plain", GRPOTrainer).train()
    folder = Path("plain/checkpoint-3")
    assert list_checkpoints(Path("plain")) == {3: None, 2: None, 1: None}
    for path in folder.glob("*"):
        if path.suffix in (".safetensors", ".pt", ".pth"):
            path.unlink()
    assert why_incomplete(folder) == "no weights are there"


def test_a_folder_written_again_is_incomplete_until_it_is_whole(run, monkeypatch):
    """Otherwise the old commit record would vouch for a mixture of old and new files."""
    trainer = build(str(run))

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert list_checkpoints(run) == {3: "trainer_state.json is missing", 2: None, 1: None}


def test_manifest_lists_what_resuming_needs(run):
    manifest = json.loads((run / "checkpoint-3" / "entrocraft_files.json").read_text())
    assert sorted(manifest["files"]) == ["model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"]


def test_other_folders_are_no_checkpoints(run):
    for name in ("checkpoint-x", "checkpoint-4.bak", "my-checkpoint-5"):
        (run / name).mkdir()
    (run / "checkpoint-6").touch()
    assert list(list_checkpoints(run)) == [3, 2, 1]


def test_only_the_incomplete_folder_set_aside_last_is_kept(run, tmp_path):
    (run / "checkpoint-3" / "marker").touch()
    assert set_aside(run / "checkpoint-3") == run / "_incomplete-checkpoint-3"
    (run / "checkpoint-2").rename(run / "checkpoint-3")
    set_aside(run / "checkpoint-3")
    assert not (run / "_incomplete-checkpoint-3" / "marker").exists()
    set_aside(run / "checkpoint-1")
    assert [path.name for path in run.glob("*incomplete*")] == ["_incomplete-checkpoint-1"]


def test_of_several_incomplete_folders_the_newest_is_kept(run):
    for step in (2, 3):
        (run / f"checkpoint-{step}" / "trainer_state.json").unlink()
    assert build(str(run))._choose_checkpoint(True) == str(run / "checkpoint-1")
    assert [path.name for path in run.glob("*incomplete*")] == ["_incomplete-checkpoint-3"]


def test_setting_aside_follows_no_link(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (run / "_incomplete-checkpoint-3").symlink_to(tmp_path / "elsewhere")
    (run / "_incomplete-checkpoint-2").touch()
    set_aside(run / "checkpoint-3")
    assert (run / "_incomplete-checkpoint-3" / "model.safetensors").exists()
    assert (tmp_path / "elsewhere" / "file").exists() and not (run / "_incomplete-checkpoint-2").exists()


def test_atomic_writing_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "state"
    write_atomically(path, lambda stream: stream.write(b"old"))

    def half(stream):
        stream.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]  # the half of the new one would fill the disk for good


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    """The second writes all of its own while the first is in the middle; with one name for both, theirs was mixed."""
    path = tmp_path / "state"

    def slow(stream):
        stream.write(b"first, ")
        stream.flush()
        write_atomically(path, lambda stream: stream.write(b"second"))
        stream.write(b"whole")

    write_atomically(path, slow)
    assert path.read_bytes() == b"first, whole"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_goes_when_the_folder_is_written_again(run):
    (run / "checkpoint-3" / "_entrocraft_rank_0.pt.0123abcd.partial").touch()
    uncommit(run / "checkpoint-3")
    assert not list((run / "checkpoint-3").glob("_*"))
