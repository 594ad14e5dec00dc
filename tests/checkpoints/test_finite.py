"""NaN and infinity end the run before they are in the weights, or at the latest before they are in a checkpoint."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from entrocraft_trl import EntrocraftGRPOTrainer
from entrocraft_trl.checkpoints.finite import FiniteTrainingMixin, is_finite
from entrocraft_trl.checkpoints.manifest import list_checkpoints


class LossIsNan(EntrocraftGRPOTrainer):
    """The loss of step `broken_step`, whose gradient stays what it is."""

    broken_step = 3
    loss_normaliser = "loss_type"

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        return loss + math.nan if self.state.global_step + 1 == self.broken_step else loss


class LossIsNanAtTwo(LossIsNan):
    broken_step = 2


class At(TrainerCallback):
    """Calls `action(model)` in one event of one step."""

    def __init__(self, event, step, action):
        def act(args, state, control, model, **kwargs):
            if state.global_step + 1 == step:
                action(model)

        setattr(self, event, act)


def break_gradient(model):
    """Of every later backward pass: one element of one weight."""
    weight = next(model.parameters())
    weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(0), math.inf))


def break_weight(model):
    next(model.parameters()).data.view(-1)[-1] = -math.inf


def build(trainer_class=EntrocraftGRPOTrainer, *callbacks, **settings):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.01, **settings}
    return tiny.build_trainer(trainer_class, args=tiny.build_config(**settings), callbacks=list(callbacks))


def test_a_loss_of_nan_at_the_last_step_is_no_success():
    trainer = build(LossIsNan)
    with pytest.raises(FloatingPointError, match="The loss of step 3 is NaN or infinite on 1 of 1 processes") as error:
        trainer.train()
    assert "The last complete checkpoint is 'run/checkpoint-2'" in str(error.value)
    assert list_checkpoints(Path("run")) == {2: None, 1: None}
    saved = load_file("run/checkpoint-2/model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.named_parameters())


def test_the_good_checkpoint_survives_its_rotation_and_is_resumed():
    with pytest.raises(FloatingPointError, match="step 2 .*'run/checkpoint-1'"):
        build(LossIsNanAtTwo, save_total_limit=1).train()
    assert list_checkpoints(Path("run")) == {1: None}
    resumed = build(save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_without_a_checkpoint_that_is_said():
    with pytest.raises(FloatingPointError, match="step 2 .* There is no complete checkpoint in 'run'"):
        build(LossIsNanAtTwo, save_strategy="no").train()


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])  # the norm is computed by two ways
def test_an_infinite_gradient_does_not_reach_the_weights(max_grad_norm):
    trainer = build(EntrocraftGRPOTrainer, At("on_step_begin", 2, break_gradient), max_grad_norm=max_grad_norm)
    with pytest.raises(FloatingPointError, match="The gradient norm of step 2 .*'run/checkpoint-1'"):
        trainer.train()
    saved = load_file("run/checkpoint-1/model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.named_parameters())


def test_a_micro_step_counts():
    """Of the two losses of a step, the first is NaN; transformers puts the mean of earlier ones in its place."""

    class FirstOfTwo(LossIsNanAtTwo):
        loss_normaliser = "loss_type"

        def _compute_loss(self, model, inputs):
            broken = super()._compute_loss(model, inputs)
            return broken if self._step % 2 == 0 else EntrocraftGRPOTrainer._compute_loss(self, model, inputs)

    with pytest.raises(FloatingPointError, match="The loss of step 2"):
        build(FirstOfTwo, gradient_accumulation_steps=2, per_device_train_batch_size=4).train()


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_broken_weights_are_neither_saved_nor_a_result(save_strategy):
    trainer = build(
        EntrocraftGRPOTrainer, At("on_optimizer_step", 3, break_weight), save_strategy=save_strategy, save_steps=2
    )
    when = "Before the save of" if save_strategy == "steps" else "At the end, after"
    with pytest.raises(FloatingPointError, match=f"{when} step 3 a parameter is NaN or infinite"):
        trainer.train()
    assert list_checkpoints(Path("run")) == ({2: None} if save_strategy == "steps" else {})


def test_frozen_weights_are_not_looked_at():
    """Quantized ones have no NaN to look for, and training does not change any."""
    trainer = build(max_steps=1)
    next(trainer.model.parameters()).requires_grad = False
    assert trainer._ranks_with_unfinite_parameters() == 0
    break_weight(trainer.model)
    assert trainer._ranks_with_unfinite_parameters() == 0


def test_an_old_checkpoint_of_nan_is_named():
    build(max_steps=2).train()
    path = "run/checkpoint-2/model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"][0, 0] = math.nan
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="cannot resume from 'run/checkpoint-2': a parameter in it is NaN"):
        build().train(resume_from_checkpoint=True)


def test_an_error_of_one_training_is_not_held_against_the_next():
    trainer = build(save_strategy="no")
    trainer._step_loss = torch.tensor(math.nan)
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize(
    ("value", "finite"),
    [
        (None, True),  # DeepSpeed can be told to compute no norm
        (1.5, True),
        (math.inf, False),
        (torch.tensor(math.nan), False),
        (torch.tensor([1.0, -math.inf]), False),
        (torch.tensor([[1.0, math.nan], [2.0, 3.0]]), False),
        (torch.tensor([3e38, 3e38]), True),  # although their sum overflows
        (torch.empty(0), True),  # the shard of a rank, where there are more ranks than rows
        (torch.tensor([65504.0], dtype=torch.float16), True),
        (torch.tensor([math.nan], dtype=torch.bfloat16), False),
    ],
)
def test_is_finite(value, finite):
    assert is_finite(value) is finite


def test_what_a_rank_holds_of_a_sharded_parameter():
    whole = torch.empty(0)  # as ZeRO-3 leaves it
    whole.ds_tensor = torch.tensor([math.nan])
    assert not is_finite(whole)


def test_a_loss_scaler_may_overflow_gradients_but_not_the_loss():
    class Half(FiniteTrainingMixin):
        accelerator = SimpleNamespace(mixed_precision="fp16", device="cpu", num_processes=1, reduce=lambda x, **_: x)
        state = SimpleNamespace(global_step=0)
        args = SimpleNamespace(output_dir="run")

    trainer = Half()
    trainer._step_grad_norm = torch.tensor(math.inf)
    assert trainer._agree_on_step() is False
    trainer._step_loss = torch.tensor(math.inf)
    with pytest.raises(FloatingPointError, match="loss of step 1"):
        trainer._agree_on_step()
