"""What a rank's file holds is taken over or named: the wrong value would fail steps later, or be trained on."""

import copy
import math
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from soak import profile

from entrocraft_trl.checkpoints.rank_file import read_rank_file


NAME = "entrocraft_rank_0.pt"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict:
    """The content of a file that lies in the middle of a generation batch, with a table and a metric without value."""

    def nothing_to_say(completions, **kwargs):
        return [None] * len(completions)

    run = tmp_path_factory.mktemp("run")
    args = tiny.build_config(
        output_dir=str(run), max_steps=1, save_strategy="steps", save_steps=1, per_device_train_batch_size=4,
        steps_per_generation=2, logging_steps=3, log_completions=True,
    )  # fmt: skip
    tiny.build_trainer(args=args, reward_funcs=[tiny.share_of_digits, nothing_to_say]).train()
    return torch.load(run / "checkpoint-1" / NAME, weights_only=True)


def read(content: dict, folder: Path) -> dict:
    torch.save(content, folder / NAME)
    return read_rank_file(folder / NAME)


def test_what_is_written_is_read(written, tmp_path):
    state = read(written, tmp_path)
    assert any(math.isnan(value) for values in state["metrics"].values() for value in values)  # which is no defect
    assert len(state["buffered_inputs"]) == 2 and state["table"] is not None
    assert state["micro_step"] == state["global_step"] == 1


def change(path: list, value):
    def edit(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (change(["global_step"], -1), "holds global_step=-1, where a whole number of at least 0 is needed"),
        (change(["micro_step"], True), "holds micro_step=True"),
        (change(["micro_step"], 1.0), "holds micro_step=1.0"),
        (change(["last_logged_step"], None), "holds last_logged_step=a NoneType"),
        (change(["loss_sum"], torch.tensor(math.nan)), "holds loss_sum=tensor(nan), where a finite number"),
        (change(["loss_sum"], torch.zeros(2)), "holds loss_sum=a tensor of shape (2,)"),
        (change(["geometry", "num_iterations"], "1"), "where a dict of whole numbers is needed"),
        (change(["metrics", "entropy"], ["2.5"]), "where a dict of lists of numbers is needed"),
        (change(["metrics", "entropy"], 2.5), "where a dict of lists of numbers is needed"),
        (change(["buffered_inputs", 1, "advantages"], torch.full((4,), math.nan)), "finite advantages"),
        (change(["buffered_inputs", 1, "advantages"], [0.0] * 4), "finite advantages"),
        (change(["buffered_inputs", 1, "completion_ids"], torch.zeros(3, 8)), "finite advantages"),  # of 4 rollouts
        (change(["buffered_inputs", 1, "prompt_mask"], torch.tensor(1)), "finite advantages"),
        (change(["buffered_inputs", 1], None), "finite advantages"),
        (lambda content: content["buffered_inputs"].pop(), "holds 1 micro-batches of a generation batch of 2"),
        (lambda content: content["buffered_inputs"][0].pop("advantages"), "finite advantages"),
        (change(["table", "prompt"], "1+1"), "where nothing or the columns of the completions table is needed"),
        (change(["table", "rewards"], []), "columns of the completions table"),
        (change(["table", "extra"], {"kept": 1}), "columns of the completions table"),
        (lambda content: content["table"].pop("extra"), "columns of the completions table"),
    ],
)
def test_a_wrong_value_is_named(written, tmp_path, edit, named):
    content = copy.deepcopy(written)
    edit(content)
    with pytest.raises(ValueError, match=NAME) as error:
        read(content, tmp_path)
    assert named in str(error.value)


VALUES = st.recursive(
    st.sampled_from(
        [None, True, -1, 0, 2, 1.5, math.nan, "x", torch.tensor(1.0), torch.tensor(math.inf), torch.ones(2)]
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["advantages", "kept", 1]), inner),
    max_leaves=4,
)


@profile(75)
@given(data=st.data())
def test_any_value_anywhere_ends_in_no_other_error(written, tmp_path_factory, data):
    content = copy.deepcopy(written)
    place = content
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        deeper = isinstance(place[key], (dict, list)) and len(place[key]) > 0
        if not deeper or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(VALUES)
    try:
        state = read(content, tmp_path_factory.mktemp("file"))
    except ValueError as error:
        assert NAME in str(error)
    else:
        assert math.isfinite(state["loss_sum"]) and state["micro_step"] >= 0
        assert all(torch.isfinite(batch["advantages"]).all() for batch in state["buffered_inputs"] or [])


def test_a_folder_in_its_place_is_named(tmp_path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(ValueError, match=f"{NAME} cannot be read .*without this file, resuming is only less exact"):
        read_rank_file(tmp_path / NAME)
