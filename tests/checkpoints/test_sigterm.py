"""SIGTERM, which schedulers send before SIGKILL: the current step is finished and saved, and nothing is lost."""

import os
import signal
import threading
from pathlib import Path

import pytest
import tiny
from transformers import TrainerCallback

from entrocraft_trl.checkpoints.manifest import list_checkpoints


BAND = {"entropy_low": [0.9, 0.5], "entropy_high": [0.95, 0.6]}  # multiples of the first entropy; soon left
CLOCK = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")


class SignalAt(TrainerCallback):
    """Sends this process SIGTERM in the middle of step `step`: before the optimizer moves."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class WorseEveryStep(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_score"] = -state.global_step


def build(output_dir, *callbacks, **settings):
    # Blocks of two steps and log lines of four: a checkpoint after step 3 is in the middle of both.
    defaults = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "logging_steps": 4, "max_steps": 6}
    settings = {**defaults, "learning_rate": 0.02, "save_strategy": "no", **BAND, **settings}
    args = tiny.build_config(tiny.EntrocraftGRPOConfig, output_dir=output_dir, **settings)
    data = {"train_dataset": tiny.build_dataset(64), "eval_dataset": tiny.build_dataset(4)}
    return tiny.build_trainer(args=args, callbacks=list(callbacks), **data)


def log_of(trainer) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in trainer.state.log_history]


@pytest.mark.parametrize("settings", [{}, {"save_strategy": "steps", "save_steps": 3}, {"num_iterations": 2}])
def test_stops_after_the_step_and_resumes_exactly(settings, caplog):
    whole = build("whole", **settings)
    whole.train()
    stopped = build("run", SignalAt(3), **settings)
    with pytest.raises(SystemExit) as exit:
        stopped.train()
    assert exit.value.code == 143  # 128 + SIGTERM: to a scheduler, not done
    assert list_checkpoints(Path("run")) == {3: None}
    assert "stopped after step 3 of 6" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed = build("run", **settings)
    resumed.train(resume_from_checkpoint=True)
    tiny.assert_same_parameters(resumed.model, whole.model)
    assert log_of(resumed) == log_of(whole)
    assert resumed.control_memory == whole.control_memory


def test_after_the_last_step_nothing_is_left_to_do():
    whole = build("whole")
    whole.train()
    with pytest.raises(SystemExit):
        build("run", SignalAt(6)).train()
    resumed = build("run")
    resumed.train(resume_from_checkpoint=True)
    tiny.assert_same_parameters(resumed.model, whole.model)
    assert log_of(resumed) == log_of(whole)


def test_the_checkpoint_outlives_a_better_one():
    """With `save_total_limit=1` and a best checkpoint, transformers' `train` ends by deleting the newest."""
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    settings |= {"metric_for_best_model": "score", "greater_is_better": True}
    with pytest.raises(SystemExit):
        build("run", SignalAt(3), WorseEveryStep(), **settings).train()
    assert list_checkpoints(Path("run")) == {3: None, 1: None}


def test_the_next_signal_after_training_ends_the_process_as_usual():
    build("run").train()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_error_gives_the_signal_back():
    trainer = build("run")
    trainer.reward_funcs = [None]
    with pytest.raises(Exception):  # noqa: B017  whatever it is, the handler is the point
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_somebody_elses_handler_stays():
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *args: received.append(args))
    try:
        trainer = build("run", SignalAt(3))
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert len(received) == 1
    assert trainer.state.global_step == 6


def test_trains_in_a_thread_where_no_handler_can_be_set():
    trainer = build("run", max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1


def test_transformers_own_handler_is_refused():
    """It saves before the optimizer moves, when the micro-step counter is a step ahead of the weights."""
    args = tiny.build_config(tiny.EntrocraftGRPOConfig, enable_jit_checkpoint=True)
    previous = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(ValueError, match="enable_jit_checkpoint=True saves in the middle of an optimizer step"):
            tiny.build_trainer(args=args).train()
    finally:
        signal.signal(signal.SIGTERM, previous)  # transformers takes it when the trainer is built
