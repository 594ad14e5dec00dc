"""Checkpoints: a resumed run continues the same band, from the same memory."""

import json
import logging
from pathlib import Path

import pytest
import tiny
from trl import GRPOConfig, GRPOTrainer

from entrocraft_trl import EntrocraftGRPOTrainer
from entrocraft_trl.control.state import ControlMemory, EntropyControlState


BAND = {"entropy_low": [0.9, 0.5], "entropy_high": [0.95, 0.6]}  # multiples of the first entropy; soon left
STATE = "EntropyControlState"


def run(max_steps, resume=None, trainer_class=EntrocraftGRPOTrainer, **settings):
    config_class = getattr(trainer_class, "_config_class", GRPOConfig)
    if trainer_class is EntrocraftGRPOTrainer:
        settings = {**BAND, **settings}
    settings = {"learning_rate": 0.02, "save_strategy": "steps", "save_steps": 3, **settings}
    args = tiny.build_config(config_class, max_steps=max_steps, **settings)
    trainer = tiny.build_trainer(trainer_class, args=args, train_dataset=tiny.build_dataset(64))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def saved_state(folder) -> dict:
    return json.loads((Path(folder) / "trainer_state.json").read_text())


KEYS = ["entropy", "entropy_low", "entropy_high", "direction", "accepted_rollouts", "empty_steps"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rejection_rule": "entropy_change"},
        {"rejection_rule": "influence"},
        {"optim": "adamw_torch", "beta": 0.0, "rejected_rollouts": "zero_advantage"},
        {"entropy_schedule_steps": 5},
        {"entropy_schedule": "piecewise", "entropy_knots": ["0:0.9:0.95", "1:0.5:0.6"]},
    ],
)
def test_resumed_run_is_the_uninterrupted_run(settings):
    whole = run(6, output_dir="whole", **settings)
    resumed = run(6, resume="whole/checkpoint-3", output_dir="resumed", **settings)
    assert resumed.state.global_step == 6
    for key in KEYS:
        name = f"entrocraft/{key}"
        assert tiny.history(resumed, name) == tiny.history(whole, name), key
    assert resumed.control_memory == whole.control_memory
    tiny.assert_same_parameters(resumed.model, whole.model)  # HF also restores the generation's random numbers


def test_memory_is_in_the_checkpoint_of_its_own_step():
    whole = run(6, output_dir="whole")
    for step in (3, 6):
        state = saved_state(f"whole/checkpoint-{step}")
        memory = state["stateful_callbacks"][STATE]["args"]["memory"]
        assert state["global_step"] == step
        assert memory["initial_entropy"] == pytest.approx(tiny.history(whole, "entrocraft/entropy")[0])
        assert memory["horizon"] == 6


def test_longer_run_keeps_the_first_runs_horizon():
    """`max_steps` grows on resume; the schedule must not stretch under a run that is half through it."""
    first = run(3, output_dir="first")
    longer = run(6, resume="first/checkpoint-3", output_dir="longer")
    lows = tiny.history(longer, "entrocraft/entropy_low")
    initial = first.control_memory.initial_entropy
    assert longer.control_memory.horizon == 3
    assert longer.control_memory.initial_entropy == initial
    assert lows[:3] == tiny.history(first, "entrocraft/entropy_low")
    assert lows[3:] == pytest.approx([0.5 * initial] * 3)  # the end value holds


def test_progress_is_monotone_over_a_resume():
    run(3, output_dir="first", entropy_schedule_steps=8)
    longer = run(6, resume="first/checkpoint-3", output_dir="longer", entropy_schedule_steps=8)
    initial = longer.control_memory.initial_entropy
    expected = [initial * (0.9 - 0.4 * step / 8) for step in range(6)]
    assert tiny.history(longer, "entrocraft/entropy_low") == pytest.approx(expected)


def test_counters_go_on():
    settings = {"entropy_unit": "nats", "entropy_low": [50.0], "entropy_high": [60.0], "optim": "sgd"}
    whole = run(3, output_dir="whole", **settings)
    path = Path("whole/checkpoint-3/trainer_state.json")
    state = json.loads(path.read_text())
    state["stateful_callbacks"][STATE]["args"]["memory"]["empty_steps"] = 7
    path.write_text(json.dumps(state))
    resumed = run(4, resume="whole/checkpoint-3", output_dir="resumed", **settings)
    assert whole.control_memory.empty_steps == 0
    assert tiny.history(resumed, "entrocraft/empty_steps")[-1] == 7


def test_a_second_training_starts_afresh():
    trainer = run(2, save_strategy="no")
    first = trainer.control_memory.initial_entropy
    trainer.train()
    entropies = tiny.history(trainer, "entrocraft/entropy")
    assert len(entropies) == 2
    assert trainer.control_memory.initial_entropy == pytest.approx(entropies[0])
    assert trainer.control_memory.initial_entropy != first


def test_resuming_a_plain_grpo_checkpoint_warns_and_measures_now(caplog):
    run(3, trainer_class=GRPOTrainer, output_dir="plain")
    with caplog.at_level(logging.WARNING, logger="entrocraft_trl.control.state"):
        logger = logging.getLogger("entrocraft_trl.control.state")
        logger.addHandler(caplog.handler)
        resumed = run(6, resume="plain/checkpoint-3", output_dir="resumed")
        logger.removeHandler(caplog.handler)
    assert "checkpoint at step 3 holds no entropy-control state" in caplog.text
    entropies = tiny.history(resumed, "entrocraft/entropy")
    assert len(entropies) == 3
    assert resumed.control_memory.initial_entropy == pytest.approx(entropies[0])
    assert resumed.control_memory.horizon == 6
    assert STATE in saved_state("resumed/checkpoint-6")["stateful_callbacks"]


def test_plain_grpo_resumes_from_our_checkpoint():
    run(3, output_dir="ours")
    plain = run(6, resume="ours/checkpoint-3", trainer_class=GRPOTrainer, output_dir="plain")
    assert plain.state.global_step == 6


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({}, "unreadable entropy-control state: 'args'"),
        ({"args": {}, "attributes": {}}, "unreadable entropy-control state: 'memory'"),
        ({"args": {"memory": {"first_entropy": 1.0}}, "attributes": {}}, "first_entropy"),
        ({"args": {"memory": None}, "attributes": {}}, "unreadable entropy-control state"),
        ({"args": {"memory": {"initial_entropy": "1.2"}}, "attributes": {}}, "initial_entropy='1.2'"),
        ({"args": {"memory": {"initial_entropy": float("nan")}}, "attributes": {}}, "initial_entropy=nan"),
        ({"args": {"memory": {"horizon": float("inf")}}, "attributes": {}}, "horizon=inf"),
        ({"args": {"memory": {"empty_steps": None}}, "attributes": {}}, "empty_steps=None"),
        ({"args": {"memory": {"change_offset": None}}, "attributes": {}}, "change_offset=None"),
        ([], "unreadable entropy-control state"),
    ],
)
def test_corrupted_state_is_refused_clearly(entry, named):
    run(3, output_dir="whole")
    path = Path("whole/checkpoint-3/trainer_state.json")
    state = json.loads(path.read_text())
    state["stateful_callbacks"][STATE] = entry
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="trainer_state.json holds") as error:
        run(6, resume="whole/checkpoint-3", output_dir="resumed")
    assert named in str(error.value)


def test_state_round_trip():
    memory = ControlMemory(initial_entropy=1.5, horizon=100, empty_steps=3, change_offset=-0.25)
    callback = EntropyControlState()
    callback.memory = memory
    again = EntropyControlState(**json.loads(json.dumps(callback.state()))["args"])
    assert again.memory == memory


def test_restoring_callbacks_from_the_checkpoint_finds_the_memory():
    """With this flag transformers replaces callbacks by fresh ones built from the checkpoint."""
    whole = run(6, output_dir="whole")
    resumed = run(6, resume="whole/checkpoint-3", output_dir="resumed", restore_callback_states_from_checkpoint=True)
    for key in KEYS:
        assert tiny.history(resumed, f"entrocraft/{key}") == tiny.history(whole, f"entrocraft/{key}"), key
    assert resumed.control_memory == whole.control_memory
