"""A resumed run is the uninterrupted one: inside a generation block, between two log lines, after the last step."""

import logging
import random
import shutil
from pathlib import Path

import pandas
import pytest
import tiny
import torch
from peft import LoraConfig
from trl import GRPOTrainer

from entrocraft_trl import EntrocraftGRPOTrainer, EntrocraftRLOOTrainer
from entrocraft_trl.checkpoints.rank_file import read_rank_file
from entrocraft_trl.checkpoints.resume import plain


BAND = {"entropy_low": [0.9, 0.5], "entropy_high": [0.95, 0.6]}  # multiples of the first entropy; soon left
CLOCK = tiny.CLOCK
# Of this call to `train` alone, by transformers' definition.
OF_THE_CALL = ("train_loss",)
TWO_STEPS_A_BLOCK = {"per_device_train_batch_size": 4, "steps_per_generation": 2}
RANK_FILE = "entrocraft_rank_0.pt"


def run(
    output_dir, resume=None, *, trainer_class=EntrocraftGRPOTrainer, band=BAND, rows=64, arguments=None, **settings
):
    settings = {"max_steps": 6, "learning_rate": 0.02, "save_strategy": "steps", "save_steps": 3, **settings}
    if hasattr(trainer_class, "_config_class"):
        settings |= band
        args = tiny.build_config(trainer_class._config_class, output_dir=output_dir, **settings)
    else:
        args = tiny.build_config(tiny.GRPOConfig, output_dir=output_dir, **settings)
    dataset = tiny.build_dataset(rows)
    trainer = tiny.build_trainer(trainer_class, args=args, train_dataset=dataset, **(arguments or {}))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("run", **TWO_STEPS_A_BLOCK)
    return folder / "run"


def log_of(trainer) -> list[dict]:
    """The log, without what a clock says."""
    ignored = CLOCK + OF_THE_CALL
    return [{key: value for key, value in line.items() if key not in ignored} for line in trainer.state.log_history]


def assert_same_run(resumed, whole) -> None:
    tiny.assert_same_parameters(resumed.model, whole.model)
    assert log_of(resumed) == log_of(whole)
    assert resumed.control_memory == whole.control_memory
    assert resumed.state.global_step == whole.state.global_step


def saved(checkpoint) -> dict:
    return torch.load(Path(checkpoint) / RANK_FILE, weights_only=True)


# ------------------------------------------------------------------------------------------------------- the same run


@pytest.mark.parametrize(
    "settings",
    [
        TWO_STEPS_A_BLOCK,
        {"num_iterations": 2},
        {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
        | {"num_iterations": 2},
        # Blocks of three micro-steps over steps of two: steps straddle blocks, and an epoch ends in a half step.
        {"per_device_train_batch_size": 4, "steps_per_generation": 3, "gradient_accumulation_steps": 2, "rows": 5},
        {"num_iterations": 2, "optim": "adamw_torch", "rejection_rule": "entropy_change"},
        {"num_iterations": 2, "rejected_rollouts": "zero_advantage", "loss_type": "grpo", "max_grad_norm": 0.1},
        TWO_STEPS_A_BLOCK | {"shuffle_dataset": True, "rows": 4},  # several epochs, each in an order of its own
    ],
)
def test_inside_a_generation_block(settings):
    whole = run("whole", **settings)
    assert saved("whole/checkpoint-3")["buffered_inputs"] is not None  # otherwise nothing is put to the test
    resumed = run("resumed", "whole/checkpoint-3", **settings)
    assert_same_run(resumed, whole)


def test_rloo_inside_a_generation_block():
    settings = TWO_STEPS_A_BLOCK | {"trainer_class": EntrocraftRLOOTrainer, "beta": 0.0}
    whole = run("whole", **settings)
    assert saved("whole/checkpoint-3")["buffered_inputs"] is not None
    assert_same_run(run("resumed", "whole/checkpoint-3", **settings), whole)


def test_lora_with_dropout_inside_a_generation_block():
    """The reference of the KL term is the model without its adapter; dropout shows that random numbers go on."""
    settings = TWO_STEPS_A_BLOCK | {"beta": 0.1}

    def lora():
        return {"peft_config": LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], task_type="CAUSAL_LM")}

    whole = run("whole", arguments=lora(), **settings)
    resumed = run("resumed", "whole/checkpoint-3", arguments=lora(), **settings)
    assert_same_run(resumed, whole)


@pytest.mark.parametrize("logging_steps", [2, 4, 10])
def test_between_two_log_lines(logging_steps):
    """Metrics and loss of the steps before the checkpoint belong to the line after it."""
    settings = TWO_STEPS_A_BLOCK | {"logging_steps": logging_steps}
    whole = run("whole", **settings)
    assert_same_run(run("resumed", "whole/checkpoint-3", **settings), whole)


def test_train_loss_is_that_of_the_resumed_steps():
    """transformers reports `train_loss` per call; a restored sum of earlier steps must not slip into it."""
    losses = tiny.history(run("whole"), "loss")[3:]  # one a line
    run("coarse", logging_steps=2)
    assert saved("coarse/checkpoint-3")["loss_sum"] != 0  # of step 3
    resumed = run("resumed", "coarse/checkpoint-3", logging_steps=2)
    assert resumed.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses) / 3)


def test_evaluation_in_between():
    settings = {**TWO_STEPS_A_BLOCK, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 4}
    settings |= {"per_device_eval_batch_size": 4, "arguments": {"eval_dataset": tiny.build_dataset(4)}}

    def without_clock(trainer):
        ends = ("_runtime", "_per_second")
        return [{k: v for k, v in line.items() if not k.endswith(ends)} for line in log_of(trainer)]

    whole = run("whole", **settings)
    resumed = run("resumed", "whole/checkpoint-3", **settings)
    tiny.assert_same_parameters(resumed.model, whole.model)
    assert without_clock(resumed) == without_clock(whole)


def test_completions_table():
    settings = TWO_STEPS_A_BLOCK | {"log_completions": True}
    run("whole", **settings)
    run("resumed", "whole/checkpoint-3", **settings)
    for step in (4, 5, 6):
        name = f"completions/completions_{step:05d}.parquet"
        whole, resumed = pandas.read_parquet(f"whole/{name}"), pandas.read_parquet(f"resumed/{name}")
        assert len(whole) == 8
        pandas.testing.assert_frame_equal(resumed, whole)


def test_table_keeps_text_and_numbers():
    picture = object()
    assert plain({"a": [1, 2.5, None, "x"], 3: (picture, True)}) == {
        "a": [1, 2.5, None, "x"],
        "3": [str(picture), True],
    }


def test_after_the_last_step_there_is_none():
    """transformers looks at max_steps only after a step, and would take a seventh."""
    whole = run("whole", save_steps=6)
    resumed = run("resumed", "whole/checkpoint-6", save_steps=6)
    assert_same_run(resumed, whole)


def test_twice_resumed():
    settings = {"num_iterations": 2, "logging_steps": 4, "save_steps": 1}
    whole = run("whole", **settings)
    run("once", "whole/checkpoint-1", **settings, max_steps=6)
    assert_same_run(run("twice", "once/checkpoint-3", **settings), whole)


# ----------------------------------------------------------------------------------------- what cannot be the same


def test_without_the_file_resuming_is_trls(caplog):
    settings = TWO_STEPS_A_BLOCK | {"band": {**tiny.WIDE_OPEN, "compute_all_rows": True}}
    run("whole", **settings)
    theirs = run(
        "theirs", "whole/checkpoint-3", trainer_class=GRPOTrainer, **settings
    )  # plain TRL reads our checkpoint
    Path("whole/checkpoint-3", RANK_FILE).unlink()
    with caplog.at_level(logging.WARNING, logger="entrocraft_trl.checkpoints.resume"):
        ours = run("ours", "whole/checkpoint-3", **settings)
    tiny.assert_same_parameters(ours.model, theirs.model)
    assert f"not exactly: {RANK_FILE} is not in the checkpoint" in caplog.text
    assert "generated anew" in caplog.text


def test_checkpoint_of_plain_trl():
    settings = TWO_STEPS_A_BLOCK | {"band": {**tiny.WIDE_OPEN, "compute_all_rows": True}}
    run("plain", trainer_class=GRPOTrainer, **settings)
    theirs = run("theirs", "plain/checkpoint-3", trainer_class=GRPOTrainer, **settings)
    ours = run("ours", "plain/checkpoint-3", **settings)
    tiny.assert_same_parameters(ours.model, theirs.model)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"per_device_train_batch_size": 8}, "per_device_train_batch_size was 4 and is 8"),
        ({"steps_per_generation": 4}, "steps_per_generation was 2 and is 4"),
        ({"num_iterations": 2}, "num_iterations was 1 and is 2"),
        ({"num_generations": 2}, "num_generations was 4 and is 2"),
        (
            {"gradient_accumulation_steps": 2, "num_iterations": 3},
            "gradient_accumulation_steps was 1 and is 2, num_iterations was 1 and is 3",
        ),
    ],
)
def test_another_batch_geometry_is_named_and_starts_a_block(finished_run, changed, named, caplog):
    shutil.copytree(finished_run / "checkpoint-3", "whole/checkpoint-3")
    shutil.copytree(finished_run / "checkpoint-3", "bare/checkpoint-3", ignore=shutil.ignore_patterns(RANK_FILE))
    settings = TWO_STEPS_A_BLOCK | changed
    with caplog.at_level(logging.WARNING, logger="entrocraft_trl.checkpoints.resume"):
        resumed = run("resumed", "whole/checkpoint-3", **settings)
    assert named in caplog.text
    assert_same_run(resumed, run("without", "bare/checkpoint-3", **settings))


def test_another_world_size_is_named(finished_run, caplog):
    shutil.copytree(finished_run / "checkpoint-3", "whole/checkpoint-3")
    path = Path("whole/checkpoint-3", RANK_FILE)
    state = saved("whole/checkpoint-3")
    state["geometry"]["processes"] = 2
    torch.save(state, path)
    with caplog.at_level(logging.WARNING, logger="entrocraft_trl.checkpoints.resume"):
        resumed = run("resumed", "whole/checkpoint-3", **TWO_STEPS_A_BLOCK)
    assert "processes was 2 and is 1" in caplog.text
    assert resumed.state.global_step == 6


# ------------------------------------------------------------------------------------------- broken and foreign files


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_text("no pickle"), "cannot be read"),
        (lambda path: path.write_bytes(b"broken"), "cannot be read"),  # IndexError from the unpickler
        (lambda path: torch.save([1, 2], path), "not a file of this package: it holds a list"),
        (lambda path: torch.save({"weight": 1}, path), "not a file of this package: it holds a dict of ['weight']"),
        (lambda path: torch.save({**torch.load(path), "micro_step": "3"}, path), "holds micro_step=a str"),
        (
            lambda path: torch.save({**torch.load(path), "buffered_inputs": {}}, path),
            "holds buffered_inputs=a dict of []",
        ),
        # Code that unpickling would run is refused.
        (lambda path: torch.save(Path("/"), path), "cannot be read"),
    ],
)
def test_broken_rank_file_is_refused_clearly(finished_run, tmp_path, spoil, named):
    checkpoint = shutil.copytree(finished_run / "checkpoint-3", tmp_path / "checkpoint-3")
    spoil(checkpoint / RANK_FILE)
    with pytest.raises(ValueError, match=RANK_FILE) as error:
        run("resumed", str(checkpoint), **TWO_STEPS_A_BLOCK)
    assert named in str(error.value)


def test_rank_file_of_another_step_is_not_mixed_in(finished_run, tmp_path, caplog):
    checkpoint = shutil.copytree(finished_run / "checkpoint-3", tmp_path / "checkpoint-3")
    shutil.copy(finished_run / "checkpoint-6" / RANK_FILE, checkpoint / RANK_FILE)
    with caplog.at_level(logging.WARNING, logger="entrocraft_trl.checkpoints.resume"):
        run("resumed", str(checkpoint), **TWO_STEPS_A_BLOCK)
    assert f"{RANK_FILE} is of step 6, trainer_state.json of 3" in caplog.text


def test_cut_off_anywhere_and_flipped_anywhere(finished_run, tmp_path):
    """Never another exception than ours, on which all ranks agree; data may be read if the flip hits a number."""
    content = (finished_run / "checkpoint-3" / RANK_FILE).read_bytes()
    path = tmp_path / RANK_FILE
    source = random.Random(0)
    refused = 0
    for _ in range(100):
        position = source.randrange(len(content))
        path.write_bytes(content[:position])
        with pytest.raises(ValueError, match=RANK_FILE):
            read_rank_file(path)
        flipped = bytes([content[position] ^ (1 << source.randrange(8))])
        path.write_bytes(content[:position] + flipped + content[position + 1 :])
        try:
            read_rank_file(path)
        except ValueError as error:
            refused += RANK_FILE in str(error)
    assert refused > 0
