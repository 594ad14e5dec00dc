"""
The step over some of the rows is the step over all of them: gradient, norm and logged loss, for every loss and split.

Two trainers of one class train on the same forced rollouts, one with `compute_all_rows`. Every other group is dead, so
that half of the rows carry no gradient before anything is rejected.
"""

from unittest.mock import patch

import equality
import pytest
import tiny
import torch
from equality import LOSSES
from peft import LoraConfig
from trl.trainer import grpo_trainer

from entrocraft_trl import EntrocraftGRPOTrainer, EntrocraftRLOOTrainer
from entrocraft_trl.baselines.base import BaselineTrainer
from entrocraft_trl.baselines.clip_b import ClipBTrainer
from entrocraft_trl.baselines.repo_r import REPORTrainer


DEAD, ALIVE = [0.5] * 4, [[1.0, 0.0, 0.0, 0.2], [0.9, 0.8, 1.0, 0.0], [0.0, 0.1, 0.0, 0.7], [0.5, 0.6, 0.4, 0.5]]
REWARDS = [*ALIVE[0], *DEAD, *ALIVE[1], *DEAD, *ALIVE[2], *DEAD, *DEAD, *ALIVE[3]]
ROLLOUTS = tiny.random_rollouts(len(REWARDS), longest=8)

# Sixteen rollouts a generation, of which eight carry a gradient.
SPLITS = {
    "1x16": {"per_device_train_batch_size": 16, "max_steps": 2},
    "4x4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 2},
    "two windows": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "max_steps": 4,
    },
    "two iterations": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "num_iterations": 2,
        "max_steps": 4,
    },
    "two generations a step": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 2,
        "max_steps": 2,
    },
}
BANDS = {"in band": tiny.WIDE_OPEN, "too low": tiny.TOO_LOW, "too high": tiny.TOO_HIGH}


def train(trainer_class, reference_folder=None, *, compute_all_rows=None, rewards=REWARDS, lora=False, **settings):
    torch.manual_seed(0)
    settings = {"learning_rate": 0.02, "compute_all_rows": compute_all_rows, **settings}
    args = tiny.build_config(trainer_class._config_class, **settings)
    model = tiny.build_model()
    model.config._name_or_path = str(reference_folder)  # where TRL loads the reference model from when beta > 0
    arguments = {"peft_config": LoraConfig(**equality.LORA)} if lora else {}
    reward = tiny.table_reward(ROLLOUTS, rewards)
    with patch.object(grpo_trainer, "create_model_from_path", equality.reference_model):
        trainer = tiny.build_trainer(trainer_class, model, args, reward_funcs=reward, **arguments)
    tiny.force_rollouts(trainer, ROLLOUTS)
    recorder = equality.Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    return trainer, recorder.steps


def assert_same_steps(some, every, tolerance=1e-5) -> None:
    """Each step's gradient within `tolerance` of the largest entry; norms, losses, counts of tokens logged alike."""
    (trainer, steps), (reference, expected) = some, every
    assert len(steps) == len(expected)
    for (_, gradients), (_, all_of_them) in zip(steps, expected, strict=True):
        largest = max(gradient.abs().max().item() for gradient in all_of_them.values())
        for name, gradient in gradients.items():
            apart = (gradient - all_of_them[name]).abs().max().item()
            assert apart <= tolerance * max(largest, 1.0), f"{name}: {apart} of {largest}"
    for key in ("grad_norm", "loss", "num_tokens", "completions/mean_length"):
        values = tiny.history(reference, key)
        assert tiny.history(trainer, key) == pytest.approx(values, rel=1e-4, abs=2e-6), key
    assert any(norm > 1e-3 for norm in tiny.history(reference, "grad_norm")), "nothing to compare"


def compare(trainer_class, *arguments, **settings):
    some = train(trainer_class, *arguments, **settings)
    assert_same_steps(some, train(trainer_class, *arguments, **settings, compute_all_rows=True))
    return some[0]


def computed_rows(trainer):
    return tiny.history(trainer, "entrocraft/computed_rows")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_and_split(loss_type, split):
    trainer = compare(BaselineTrainer, loss_type=loss_type, **SPLITS[split])
    assert max(computed_rows(trainer)) < 1


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_under_control(loss_type, band):
    trainer = compare(EntrocraftGRPOTrainer, loss_type=loss_type, **SPLITS["two windows"], **BANDS[band])
    shares = computed_rows(trainer)
    assert max(shares) < (0.6 if band == "in band" else 0.5)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_kl_term_stays_on_rows_without_advantage(loss_type, reference_folder):
    settings = {"loss_type": loss_type, "beta": 0.1, **SPLITS["4x4"]}
    assert computed_rows(compare(BaselineTrainer, reference_folder, **settings)) == [1.0, 1.0]
    rejecting = compare(EntrocraftGRPOTrainer, reference_folder, **settings, **tiny.TOO_LOW)
    assert all(0.5 < share < 0.9 for share in computed_rows(rejecting))


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("split", ["1x16", "4x4", "two windows"])
def test_rloo(split, band):
    # A ratio of whole sequences leaves the clip range soon, and then nothing is left.
    settings = {**SPLITS[split], "learning_rate": 0.002, "beta": 0.0, **BANDS[band]}
    assert max(computed_rows(compare(EntrocraftRLOOTrainer, **settings))) < 0.6


@pytest.mark.parametrize(
    "settings",
    [
        {"importance_sampling_level": "sequence", "loss_type": "luspo"},
        {"delta": 1.5, "off_policy_mask_threshold": 0.01},
        {"mask_truncated_completions": True, "max_completion_length": 6},
        {"pad_to_multiple_of": 4},
        {"gradient_checkpointing": True},
        {"scale_rewards": "none", "loss_type": "dr_grpo"},
        {"max_grad_norm": 0.1, "optim": "adamw_torch"},
        {"rejected_rollouts": "zero_advantage", **tiny.TOO_LOW},
        {"min_accepted_share": 0.9, "loss_type": "grpo", **tiny.TOO_LOW},
        {"rejection_rule": "entropy_change", "entropy_unit": "nats", "entropy_low": [2.7], "entropy_high": [2.8]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings(settings):
    trainer_class = EntrocraftGRPOTrainer if "entropy_low" in settings else BaselineTrainer
    assert max(computed_rows(compare(trainer_class, **SPLITS["two windows"], **settings))) < 1


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo"])
def test_lora(loss_type):
    assert max(computed_rows(compare(BaselineTrainer, lora=True, loss_type=loss_type, **SPLITS["4x4"]))) < 1


@pytest.mark.parametrize(
    ("trainer_class", "settings"),
    [
        (REPORTrainer, {"repo_zeta": 0.1, "repo_zeta_max": 0.5, "repo_target_entropy": 3.1}),
        (ClipBTrainer, {"clip_b_mu": 0.5}),
    ],
)
def test_rival_methods(trainer_class, settings):
    assert max(computed_rows(compare(trainer_class, **SPLITS["two windows"], **settings))) < 1


def test_a_window_without_any_gradient():
    """AdamW moves by its momentum then: a gradient of None would leave that out."""
    rewards = [*ALIVE[0], *ALIVE[1], *ALIVE[2], *ALIVE[3], *DEAD, *DEAD, *DEAD, *DEAD]
    settings = {**SPLITS["4x4"], "optim": "adamw_torch", "weight_decay": 0.1, "max_steps": 3, "rewards": rewards}
    some, every = (train(BaselineTrainer, **settings, compute_all_rows=rows) for rows in (None, True))
    assert_same_steps(some, every)
    assert tiny.history(some[0], "grad_norm")[1] == 0.0
    assert computed_rows(some[0])[1] == 1 / 16
    for (name, value), other in zip(some[0].model.named_parameters(), every[0].model.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=name)
    before, after = (weights for weights, _ in some[1][1:])
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_sorted_and_cropped_when_nothing_leaves():
    rewards = [reward + 0.01 * index for index, reward in enumerate(REWARDS)]  # no group is dead
    trainer = compare(BaselineTrainer, rewards=rewards, **SPLITS["4x4"])
    assert computed_rows(trainer) == [1.0, 1.0]
    assert all(share < 0.95 for share in tiny.history(trainer, "entrocraft/computed_tokens"))
