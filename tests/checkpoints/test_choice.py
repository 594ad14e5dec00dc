"""`resume_from_checkpoint` means the same in Python, on the command line, before a model loads and on all ranks."""

import shutil
from pathlib import Path

import pytest
import tiny
import transformers

from entrocraft_trl.checkpoints import choice, hub_download, resume
from entrocraft_trl.checkpoints.choice import found_by_all_ranks, resolve_checkpoint, word_of
from entrocraft_trl.checkpoints.manifest import list_checkpoints
from entrocraft_trl.cli.train import _check_resuming


def build(output_dir="run", **settings):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **settings}
    return tiny.build_trainer(args=tiny.build_config(output_dir=output_dir, **settings))


def write_checkpoint(folder: Path, step: int) -> Path:
    """As plain TRL's, and as small as one can be that passes for complete."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    callbacks = [transformers.TrainerControl()]
    state = transformers.TrainerState(global_step=step, max_steps=9, stateful_callbacks=callbacks)
    state.save_to_json(folder / "trainer_state.json")
    return folder


# ------------------------------------------------------------------------------------------------------ one reading


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (None, "none"),
        (False, "none"),
        ("", "none"),
        ("none", "none"),
        ("False", "none"),
        (True, "last"),
        ("true", "last"),
        ("last", "last"),
        ("auto", "auto"),
        (" Auto ", "auto"),
        ("hub", "hub"),
        ("./auto", None),
        (Path("auto"), None),  # a path is a path
        ("run/checkpoint-1", None),
        ("hub/checkpoint-1", None),
    ],
)
def test_words_and_folders(value, word):
    assert word_of(value) == word


def test_what_is_chosen(tmp_path):
    run, half = str(tmp_path), tmp_path / "checkpoint-10"
    assert resolve_checkpoint("auto", run) is None  # nothing there yet: the run starts
    half.mkdir()
    (half / "model.safetensors").touch()
    assert resolve_checkpoint("auto", run) is None
    for value in ("true", "last", True):
        with pytest.raises(ValueError) as error:
            resolve_checkpoint(value, run)
        assert str(error.value) == (
            f"resume_from_checkpoint={value}: there is no complete checkpoint in {run!r}; "
            "checkpoint-10: trainer_state.json is missing"
        )
    whole = write_checkpoint(tmp_path / "checkpoint-9", 9)
    for value in ("true", "last", True, "auto", "hub", str(whole), whole):
        assert resolve_checkpoint(value, run) == str(whole)
    for value in (None, "false", False, ""):
        assert resolve_checkpoint(value, "elsewhere") is None
        with pytest.raises(ValueError, match=r"holds checkpoint-9 of an earlier run.*resume_from_checkpoint=auto"):
            resolve_checkpoint(value, run)
    assert resolve_checkpoint(str(whole), "elsewhere") == str(whole)
    with pytest.raises(ValueError, match="checkpoint-10' is no complete checkpoint: trainer_state.json is missing"):
        resolve_checkpoint(str(half), "elsewhere")
    assert half.is_dir()  # choosing changes nothing


def test_a_folder_that_bears_the_name_of_a_word():
    write_checkpoint(Path("auto"), 9)
    assert resolve_checkpoint("auto", "run") is None
    assert resolve_checkpoint("./auto", "run") == "./auto"
    assert resolve_checkpoint(Path("auto"), "run") == "auto"


# ------------------------------------------------------------------------------------------------------- in training


def test_auto_starts_a_run_and_restarts_it():
    whole = build("whole", max_steps=3)
    whole.train(resume_from_checkpoint="auto")
    build(max_steps=3, save_steps=2).train(resume_from_checkpoint="auto")
    shutil.rmtree("run/checkpoint-3")
    again = build(max_steps=3, save_steps=2)
    again.train(resume_from_checkpoint="auto")
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2, 3]
    tiny.assert_same_parameters(again.model, whole.model)


def test_a_checkpoint_by_the_name_of_a_word_is_resumed_from_its_path():
    build().train()
    Path("run/checkpoint-1").rename("auto")
    resumed = build("other")
    resumed.train(resume_from_checkpoint="./auto")
    assert list_checkpoints(Path("other")) == {2: None}  # of step 2 alone


def test_the_hub_is_asked_first(monkeypatch):
    """What it brings is resumed; when it brings nothing, the run starts."""
    build("first").train()
    asked = []

    def fetch(args):
        asked.append(args.hub_model_id)
        assert args.output_dir == "run" and Path("run/_training.lock").exists()  # no other process is in the folder
        if len(asked) == 2:
            shutil.copytree("first/checkpoint-2", "run/checkpoint-2")

    monkeypatch.setattr(resume, "fetch_for_all", fetch)
    start = build(hub_model_id="someone/model", save_strategy="no")
    start.train(resume_from_checkpoint="hub")
    assert start.state.global_step == 2 and list_checkpoints(Path("run")) == {}
    resumed = build(hub_model_id="someone/model", max_steps=3)
    resumed.train(resume_from_checkpoint="hub")
    assert list_checkpoints(Path("run")) == {3: None, 2: None}
    assert asked == ["someone/model", "someone/model"]


def test_the_hub_needs_a_repository():
    with pytest.raises(ValueError, match="resume_from_checkpoint=hub needs hub_model_id"):
        build().train(resume_from_checkpoint="hub")


# ------------------------------------------------------------------------------------------------------- on all ranks


def on_nodes(monkeypatch, *others):
    """As if each of `others` were what another node, with a disk of its own, sees."""
    monkeypatch.setattr(choice, "gather_object", lambda mine: [*mine, *others])


def test_only_what_is_complete_everywhere_is_chosen(monkeypatch, tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / f"checkpoint-{step}", step)
    on_nodes(monkeypatch, {4: "trainer_state.json is missing", 3: "optimizer.pt is missing", 1: None})
    found = found_by_all_ranks(tmp_path)
    assert list(found.items()) == [  # newest first
        (4, "not on every node"),
        (3, "optimizer.pt is missing"),
        (2, "not on every node"),
        (1, None),
    ]
    for value in ("auto", True):
        assert resolve_checkpoint(value, str(tmp_path), found) == str(tmp_path / "checkpoint-1")


def test_what_is_newer_is_set_aside_where_it_is(monkeypatch):
    build().train()
    on_nodes(monkeypatch, {4: "trainer_state.json is missing", 1: None})
    assert build()._choose_checkpoint("auto") == "run/checkpoint-1"
    assert list_checkpoints(Path("run")) == {1: None} and Path("run/_incomplete-checkpoint-2").is_dir()


@pytest.mark.parametrize("value", ["auto", "hub"])
def test_no_start_from_zero_beside_a_node_that_could_go_on(monkeypatch, tmp_path, value):
    write_checkpoint(tmp_path / "checkpoint-2", 2)
    on_nodes(monkeypatch, {})
    with pytest.raises(ValueError, match="there is no complete checkpoint in .*; checkpoint-2: not on every node"):
        resolve_checkpoint(value, str(tmp_path), found_by_all_ranks(tmp_path))


# --------------------------------------------------------------------------------------------------- from the command


def options(**settings):
    return tiny.build_config(output_dir="run", **settings)


@pytest.mark.parametrize("value", [None, "auto"])
def test_the_command_passes_the_value_on(value):
    assert _check_resuming(options(resume_from_checkpoint=value), dry_run=False) == value


@pytest.mark.parametrize("value", ["last", "run/checkpoint-1", "hub"])
def test_the_command_refuses_before_a_model_loads(value):
    for dry_run in (False, True):
        with pytest.raises(ValueError, match="^resume_from_checkpoint="):
            _check_resuming(options(resume_from_checkpoint=value), dry_run)


def test_the_command_asks_the_hub_before_a_model_loads_and_once(monkeypatch):
    asked = []
    monkeypatch.setattr(hub_download, "fetch_for_all", asked.append)
    args = options(resume_from_checkpoint="hub", hub_model_id="someone/model")
    assert _check_resuming(args, dry_run=True) == "hub" and asked == []
    assert _check_resuming(args, dry_run=False) == "auto" and asked == [args]
