"""SIGTERM, which schedulers send before SIGKILL: the current step is finished and saved, and nothing is lost."""

import os
import signal
import threading
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from entrocraft_trl.checkpoints import sigterm as termination
from entrocraft_trl.checkpoints.manifest import list_checkpoints
from entrocraft_trl.cli.train import _train


BAND = {"entropy_low": [0.9, 0.5], "entropy_high": [0.95, 0.6]}  # multiples of the first entropy; soon left
CLOCK = (*tiny.CLOCK, "train_loss")


class SignalAt(TrainerCallback):
    """Sends this process SIGTERM in the middle of step `step`: before the optimizer moves."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class SignalIn(TrainerCallback):
    """Sends this process SIGTERM in an event of the last step, or after it."""

    def __init__(self, event: str):
        def send(args, state, control, **kwargs):
            if state.global_step == state.max_steps:
                os.kill(os.getpid(), signal.SIGTERM)

        setattr(self, event, send)


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


LATE = [("on_optimizer_step", "no"), ("on_step_end", "no"), ("on_save", "steps"), ("on_epoch_end", "no")]


@pytest.mark.parametrize(("event", "save_strategy"), LATE)
def test_a_signal_after_the_last_step_began_still_stops_with_a_checkpoint(event, save_strategy, caplog):
    """It was noted and forgotten: the final save and up to 15 minutes of waiting for pushes followed, then exit 0."""
    whole = build("whole")
    whole.train()
    # transformers counts the step after `on_optimizer_step`.
    callback = SignalAt(6) if event == "on_optimizer_step" else SignalIn(event)
    if event == "on_optimizer_step":
        callback.on_optimizer_step, callback.on_pre_optimizer_step = callback.on_pre_optimizer_step, nothing
    stopped = build("run", callback, save_strategy=save_strategy, save_steps=6)
    with pytest.raises(SystemExit) as exit:
        stopped.train()
    assert exit.value.code == 143
    assert list_checkpoints(Path("run")) == {6: None}
    assert "stopped after step 6 of 6" in caplog.text
    resumed = build("run")
    resumed.train(resume_from_checkpoint=True)
    tiny.assert_same_parameters(resumed.model, whole.model)
    assert log_of(resumed) == log_of(whole)


def nothing(*args, **kwargs):
    pass


def test_a_late_signal_does_not_cost_the_newest_checkpoint():
    """With `save_total_limit=1` and a best checkpoint, transformers' `train` ends by deleting the newest."""
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    settings |= {"metric_for_best_model": "score", "greater_is_better": True}
    with pytest.raises(SystemExit):
        build("run", SignalIn("on_epoch_end"), WorseEveryStep(), **settings).train()
    assert list_checkpoints(Path("run")) == {6: None, 1: None}


def test_a_signal_at_the_very_end_of_training_exits_too():
    with pytest.raises(SystemExit) as exit:
        build("run", SignalIn("on_train_end")).train()
    assert exit.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("event", ["on_train_end", "save_model"])
def test_the_command_ends_its_save_and_neither_pushes_nor_reports_success(event, monkeypatch, capsys, caplog):
    trainer = build("run", *([SignalIn(event)] if event == "on_train_end" else []))
    pushes, save = [], trainer.save_model

    def save_and_be_told(output_dir):
        os.kill(os.getpid(), signal.SIGTERM)
        save(output_dir)

    if event == "save_model":
        monkeypatch.setattr(trainer, "save_model", save_and_be_told)
    monkeypatch.setattr(trainer, "push_to_hub", lambda **given: pushes.append(given.get("commit_message")))
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
    with pytest.raises(SystemExit) as exit, trainer.running():
        _train(trainer, SimpleNamespace(dataset_name=None), trainer.args, None)
    assert exit.value.code == 143
    assert pushes == ["Model save"]  # transformers' own, in `save_model`, which does not wait then
    assert "steps done" not in capsys.readouterr().out
    assert "the model is saved in 'run'; start again with resume_from_checkpoint=auto to push it" in caplog.text
    saved = load_file("run/model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.named_parameters())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_command_stops_waiting_for_its_push(monkeypatch):
    trainer = build("run", max_steps=1)

    def push(**kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        assert trainer.sigterm_received
        return None  # as when the waiting ends early

    monkeypatch.setattr(trainer, "push_to_hub", push)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
    with pytest.raises(SystemExit) as exit, trainer.running():
        _train(trainer, SimpleNamespace(dataset_name=None), trainer.args, None)
    assert exit.value.code == 143  # and not 2: "the model is not on the Hub"


def test_an_error_is_not_hidden_by_a_signal():
    trainer = build("run")
    with pytest.raises(KeyError), trainer.running():
        os.kill(os.getpid(), signal.SIGTERM)
        raise KeyError


def test_waiting_ends_when_the_signal_has_come(monkeypatch):
    never, pieces, slept = futures.Future(), [], []
    wait = futures.wait
    monkeypatch.setattr(futures, "wait", lambda jobs, timeout: pieces.append(timeout) or wait(jobs, timeout=0))
    monkeypatch.setattr(termination.time, "sleep", slept.append)
    assert termination.wait_for_jobs([never], 900.0, lambda: len(pieces) == 3) == {never}
    assert pieces == [0.5] * 3
    termination.pause(20.0, lambda: len(slept) == 2)
    assert slept == [0.5] * 2
    termination.pause(1.2, lambda: False)
    assert sum(slept[2:]) == pytest.approx(1.2)


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
