"""
Broken and foreign checkpoints: what is wrong is said with file and field, before a step is taken; the numbers of
`ControlMemory` are taken over exactly or not at all.
"""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
from hypothesis import assume, example, given
from hypothesis import strategies as st
from soak import profile

from entrocraft_trl.checkpoints import hub_download
from entrocraft_trl.checkpoints.choice import resolve_checkpoint
from entrocraft_trl.checkpoints.manifest import list_checkpoints, read_step, set_aside, uncommit, why_incomplete
from entrocraft_trl.control.state import ControlMemory, EntropyControlState, read_memory


FILE = "trainer_state.json"


def build(steps, output_dir):
    args = tiny.build_config(
        max_steps=steps, output_dir=output_dir, save_strategy="steps", save_steps=2, learning_rate=0.01
    )
    return tiny.build_trainer(args=args)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A checkpoint after two of two steps, left as it is."""
    run = tmp_path_factory.mktemp("run")
    build(2, str(run)).train()
    return run / "checkpoint-2"


@pytest.fixture
def checkpoint(written, tmp_path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(written, tmp_path / "run" / "checkpoint-2"))


def change(checkpoint: Path, edit) -> None:
    state = json.loads((checkpoint / FILE).read_text())
    edit(state)
    (checkpoint / FILE).write_text(json.dumps(state))


def memory_of(state: dict) -> dict:
    return state["stateful_callbacks"]["EntropyControlState"]["args"]["memory"]


# ------------------------------------------------------------------------------------------------- the control memory

GOOD = asdict(ControlMemory(initial_entropy=1.5, horizon=100, last_entropy=1.25, last_direction=-1, steps_outside=3))
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.floats(-3, 3),
    st.sampled_from([math.nan, math.inf, -math.inf, -1e-6, 10**30, 10**400, "1.5", "", [], [1.0], {}, {"value": 1}]),
)


def is_right(name: str, value) -> bool:
    """What this package writes, in plain words. Rounding may put an entropy a hair below 0."""
    whole = type(value) is int and value < 1e308  # which is as far as floats go
    number = whole or (type(value) is float and math.isfinite(value))
    if name in ("initial_entropy", "last_entropy"):
        return value is None or (number and value > -1e-3)
    if name == "horizon":
        return value is None or (whole and value >= 1)
    if name in ("empty_steps", "steps_outside"):
        return whole and value >= 0
    if name == "change_offset":
        return number and -1 <= value <= 1
    if name == "last_direction":
        return whole and value in (-1, 0, 1)
    if name == "distance_at_exit":
        return number and value >= 0
    if name == "reading_scatter":
        return value is None or (number and value >= 0)
    assert name == "failure_reported", "describe the new field here"
    return type(value) is bool


@profile(100)
@given(changes=st.dictionaries(st.sampled_from(sorted(GOOD)), VALUES, max_size=3))
@example(changes={"horizon": True})
@example(changes={"initial_entropy": math.nan})
def test_each_number_is_taken_over_or_named(changes):
    numbers = {**GOOD, **changes}
    wrong = [name for name, value in numbers.items() if not is_right(name, value)]
    if not wrong:
        assert asdict(read_memory(json.loads(json.dumps(numbers)))) == numbers
        return
    with pytest.raises(ValueError, match=f"{FILE} holds ") as error:
        read_memory(numbers)
    assert any(f"{name}={numbers[name]!r} in the entropy-control state" in str(error.value) for name in wrong)


# Checkpoints of 0.1.0 lack the scatter.
@pytest.mark.parametrize("name", [name for name in GOOD if name != "reading_scatter"])
def test_a_missing_number_is_named(name):
    numbers = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(ValueError, match=f"{FILE} holds no {name} in the entropy-control state; another version"):
        read_memory(numbers)


def test_an_unknown_number_is_named():
    with pytest.raises(ValueError, match="holds the unknown field target_entropy=0.5 in the entropy-control state"):
        read_memory({**GOOD, "target_entropy": 0.5})


@pytest.mark.parametrize("numbers", [None, 5, "text", [1.5], [["initial_entropy", 1.5]]])
def test_something_else_is_quoted(numbers):
    with pytest.raises(ValueError, match=f"{FILE} holds an unreadable entropy-control state: ") as error:
        read_memory(numbers)
    assert repr(numbers) in str(error.value)


def test_a_fresh_memory_reads_back():
    """What the first checkpoint of a run without a reading holds."""
    assert read_memory(asdict(ControlMemory())) == ControlMemory() == EntropyControlState().memory


# -------------------------------------------------------------------------------------------- transformers' own fields


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("global_step", "2", "holds global_step='2'"),
        ("global_step", 2.0, "holds global_step=2.0"),
        ("global_step", None, "holds global_step=None"),
        ("global_step", True, "holds global_step=True"),
        ("global_step", 3, "is of step 3"),
        ("max_steps", "9", "holds max_steps='9'"),
        ("epoch", "1.0", "holds epoch='1.0'"),
        ("log_history", None, "holds log_history=None"),
        ("log_history", {"loss": 1}, "holds log_history={'loss': 1}"),
        ("global_step", -2, "holds global_step=-2"),
        ("log_history", [{"loss": 1}, "loss"], "holds 'loss' in its log_history"),
        ("stateful_callbacks", None, "holds stateful_callbacks=None"),
        ("stateful_callbacks", [], "holds stateful_callbacks=[]"),
        ("stateful_callbacks", {}, "has no 'TrainerControl' among its callbacks"),
        ("written_by", "a later version", "holds the unknown field 'written_by'"),
    ],
)
def test_a_foreign_field_is_named(checkpoint, name, value, said):
    change(checkpoint, lambda state: state.update({name: value}))
    assert why_incomplete(checkpoint).startswith(f"{FILE} {said}")
    expected = f"resume_from_checkpoint={str(checkpoint)!r} is no complete checkpoint: {FILE} {said}"
    with pytest.raises(ValueError) as error:
        build(4, "resumed").train(resume_from_checkpoint=str(checkpoint))
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize("name", ["global_step", "max_steps", "epoch", "log_history", "stateful_callbacks"])
def test_a_missing_field_is_named(checkpoint, name):
    change(checkpoint, lambda state: state.pop(name))
    assert why_incomplete(checkpoint) == f"{FILE} has no field {name!r}"


@profile(50)
@given(share=st.floats(0, 0.999), tail=st.sampled_from([b"", b"\x00" * 64, b"\xff", b"}", b"]}", b'"']))
def test_a_truncated_file_is_never_read(written, tmp_path_factory, share, tail):
    """As a full disk or a crash leaves it: cut anywhere, with or without rubbish behind."""
    content = (written / FILE).read_bytes().rstrip()
    folder = tmp_path_factory.mktemp("cut") / "checkpoint-2"
    folder.mkdir()
    cut = content[: int(share * len(content))] + tail
    assume(cut.replace(b"\n", b"") != content.replace(b"\n", b""))  # the tail may be what was cut off
    (folder / FILE).write_bytes(cut)
    assert why_incomplete(folder).startswith(FILE)


@profile(75)
@given(place=st.floats(0, 0.999), byte=st.integers(0, 255))
def test_a_changed_byte_never_ends_in_a_crash(written, tmp_path_factory, place, byte):
    content = bytearray((written / FILE).read_bytes())
    content[int(place * len(content))] = byte
    folder = tmp_path_factory.mktemp("flipped") / "checkpoint-2"
    folder.mkdir()
    (folder / FILE).write_bytes(bytes(content))
    reason = why_incomplete(folder)
    assert reason == "no weights are there" or reason.startswith(FILE)
    if reason != "no weights are there":
        return
    saved = json.loads(content)["stateful_callbacks"].get("EntropyControlState")
    if saved is None:  # the changed byte was in that name: a checkpoint of plain TRL, from our point of view
        return
    try:
        memory = read_memory(saved.get("args", {}).get("memory"))
    except ValueError as error:
        assert FILE in str(error)
    else:
        assert all(is_right(name, value) for name, value in asdict(memory).items())


# ---------------------------------------------------------------------------------------- not even a file of JSON text

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@profile(75)
@given(name=st.sampled_from(["global_step", "max_steps", "epoch", "log_history", "stateful_callbacks"]), value=JSON)
@example(name="global_step", value=math.inf)  # which int() turns into an OverflowError
@example(name="global_step", value=None)
@example(name="global_step", value=[])
def test_any_value_is_read_or_named(written, tmp_path_factory, name, value):
    state = {**json.loads((written / FILE).read_text()), name: value}
    path = tmp_path_factory.mktemp("state") / FILE
    path.write_text(json.dumps(state))
    step = read_step(path)
    if isinstance(step, str):
        assert step.startswith(FILE) and name.split("_")[-1].rstrip("s") in step
    else:
        assert type(step) is int and step >= 0 and step == state["global_step"]


@pytest.mark.parametrize("name", [FILE, "entrocraft_files.json"])
def test_json_that_is_nested_too_deeply_is_not_read(checkpoint, name):
    (checkpoint / name).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    assert why_incomplete(checkpoint) == f"{name} cannot be read"


@pytest.mark.parametrize("name", [FILE, "entrocraft_files.json", "model.safetensors"])
def test_a_folder_where_a_file_should_be(checkpoint, name):
    (checkpoint / name).unlink()
    (checkpoint / name).mkdir()
    expected = f"{name} is missing" if name == "model.safetensors" else f"{name} cannot be read: Is a directory"
    assert why_incomplete(checkpoint) == expected
    uncommit(checkpoint)  # the next save does not stumble over it
    assert why_incomplete(checkpoint) == f"{FILE} is missing"


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "checkpoint-2").touch()
    assert why_incomplete(tmp_path / "checkpoint-2") == f"{FILE} cannot be read: Not a directory"
    assert list_checkpoints(tmp_path) == {} and list_checkpoints(tmp_path / "checkpoint-2") == {}


@pytest.mark.parametrize("files", [{"model.safetensors": "5"}, {"model.safetensors": None}, {"a" * 300: 1, "\0": 2}])
def test_a_foreign_list_of_files_is_no_crash(checkpoint, files):
    (checkpoint / "entrocraft_files.json").write_text(json.dumps(files))
    assert why_incomplete(checkpoint).startswith(next(iter(files)))


@pytest.mark.parametrize("name", ["checkpoint-010", "checkpoint-00", "checkpoint-٣", "checkpoint-+1"])
def test_a_folder_that_transformers_does_not_name_so_is_no_checkpoint(checkpoint, name):
    """Step 10 was looked for in `checkpoint-10`, which is not there."""
    shutil.copytree(checkpoint, checkpoint.with_name(name))
    assert list_checkpoints(checkpoint.parent) == {2: None}
    assert resolve_checkpoint("last", str(checkpoint.parent)) == str(checkpoint)


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_what_lies_where_a_half_written_checkpoint_goes_is_replaced(checkpoint, tmp_path, kind):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    aside = checkpoint.with_name("_incomplete-checkpoint-2")
    if kind == "file":
        aside.touch()
    else:
        aside.symlink_to(elsewhere if kind == "link" else tmp_path / "nothing")
    assert set_aside(checkpoint) == aside
    assert (aside / FILE).is_file() and not aside.is_symlink()
    assert (elsewhere / "kept").exists()


@pytest.mark.parametrize("content", ["{}", "[]", "", '{"global_step": null}', '{"global_step": Infinity}'])
def test_a_last_checkpoint_of_the_hub_without_a_step_is_left_out(content, tmp_path, monkeypatch, caplog):
    (tmp_path / FILE).write_text(content)
    monkeypatch.setattr(hub_download.Commit, "download", lambda self, name, folder, token: tmp_path / FILE)
    commit = hub_download.Commit("someone/model", "0" * 40, (f"last-checkpoint/{FILE}", "model.safetensors"))
    assert hub_download.fetch_newest_checkpoint(commit, str(tmp_path / "run")) is None
    assert f"last-checkpoint of someone/model is not complete ({FILE}" in caplog.text


# --------------------------------------------------------------------------------------------------------- in training


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda memory: memory.update(initial_entropy=-1.0), "initial_entropy=-1.0 in the entropy-control state"),
        (lambda memory: memory.update(horizon="2"), "horizon='2' in the entropy-control state"),
        (lambda memory: memory.pop("change_offset"), "holds no change_offset"),
        (lambda memory: memory.update(target=1), "unknown field target=1"),
    ],
)
@pytest.mark.parametrize("restore", [False, True], ids=["read", "restored"])
def test_a_bad_number_ends_the_resume_before_a_step(checkpoint, edit, said, restore):
    change(checkpoint, lambda state: edit(memory_of(state)))
    trainer = build(4, "resumed")
    trainer.args.restore_callback_states_from_checkpoint = restore  # transformers then builds the callback itself
    with pytest.raises(ValueError, match=FILE) as error:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert said in str(error.value)
    assert trainer.state.global_step <= 2  # nothing trained on top of the checkpoint's two steps


def test_callbacks_of_another_project_are_left_alone(checkpoint):
    def add(state):
        state["stateful_callbacks"]["SomeoneElses"] = {"args": {"patience": 3}, "attributes": {}}

    plain = build(4, "plain")
    plain.train(resume_from_checkpoint=str(checkpoint))
    change(checkpoint, add)
    resumed = build(4, "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    assert resumed.control_memory == plain.control_memory
    tiny.assert_same_parameters(resumed.model, plain.model)
