"""
After `drop`, the optimizer step is the step that plain GRPO takes on the accepted rollouts alone.

How it is checked: an Entrocraft trainer trains on forced rollouts, and its accumulated gradient is recorded before
each optimizer step. The reference never sees Entrocraft's code: a *plain* TRL trainer prepares the same rollouts, rows
are accepted by the literal rule, physically selected, and given to plain TRL's `_compute_loss` as one micro-batch.

What a step is normalised by, where one generation batch spans several optimizer steps (`steps_per_generation` above
`gradient_accumulation_steps`): each step counts an equal part of what the *generation batch* accepted, as TRL's own
dapo does with tokens. The step over a window is the sum over the window's accepted rows, divided by
`accepted * gradient_accumulation_steps / steps_per_generation`. With one window per generation batch this is the plain
mean over the accepted rows.

`bnpo` averages over the tokens of each micro-batch, so its step depends on the split even in plain TRL. Here each
micro-batch's token mean weighs as many rows as it accepted; one micro-batch gives plain bnpo on the accepted rows.
"""

import copy
import functools
from unittest.mock import patch

import tiny
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer import grpo_trainer, rloo_trainer
from trl.trainer.utils import create_model_from_path, split_tensor_dict

from entrocraft_trl import EntrocraftGRPOTrainer, EntrocraftRLOOTrainer


TOKEN_LOSSES = ["dapo", "cispo", "vespo"]
ROW_LOSSES = ["grpo", "dr_grpo", "sapo", "luspo"]
LOSSES = [*TOKEN_LOSSES, *ROW_LOSSES, "bnpo"]

SPLITS = {
    "1x8": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "2x4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "4x2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    # Two optimizer steps per generation batch: TRL also runs the old-policy pass, and the second step is off-policy.
    "2x4, two windows": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "max_steps": 2,
    },
    "1x4, two windows": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "max_steps": 2,
    },
}
# Rewards that give groups of 4 with unequal numbers of either sign, so that micro-batches accept unequal numbers.
REWARDS = [1.0, 0.0, 0.0, 0.2, 0.9, 0.8, 1.0, 0.0, 0.0, 0.1, 0.0, 0.7, 0.5, 0.6, 0.4, 0.5]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}


class Recorder(TrainerCallback):
    """Parameters and gradients right before each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        weights = {name: p.detach().clone() for name, p in named}
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}
        self.steps.append((weights, gradients))


loaded_reference = functools.cache(create_model_from_path)


def reference_model(path, **kwargs):
    """As TRL loads it; from the folder once, since that takes as long as a training."""
    return copy.deepcopy(loaded_reference(path, **kwargs))


def build(trainer_class, config_class, settings, rollouts, reference_folder, lora=False, env_mask=None, **band):
    settings = {"learning_rate": 0.05, **settings}  # the second step's ratios leave 1, few are clipped
    args = tiny.build_config(config_class, **settings, **band)
    model = tiny.build_model()
    model.config._name_or_path = str(reference_folder)  # where TRL loads the reference model from when beta > 0
    arguments = {}
    if lora:
        torch.manual_seed(5)  # random adapters, equal in both trainers
        arguments["peft_config"] = LoraConfig(**LORA)
    if env_mask is not None:
        arguments["rollout_func"] = tiny.rollout_function(rollouts, env_mask=env_mask)
    reward = tiny.table_reward(rollouts, REWARDS[: len(rollouts)])
    with patch.multiple(grpo_trainer, create_model_from_path=reference_model):
        with patch.multiple(rloo_trainer, create_model_from_path=reference_model):
            trainer = tiny.build_trainer(trainer_class, model, args, reward_funcs=reward, **arguments)
    if env_mask is None:
        tiny.force_rollouts(trainer, rollouts)
    return trainer


def row_key(batch, row):
    """What identifies a forced rollout whatever the padding: its completion, which masks do not change."""
    ids = batch["completion_ids"][row].tolist()
    return tuple(ids[: ids.index(tiny.EOS) + 1])


def select(batch, rows):
    return {
        key: value[rows] if isinstance(value, torch.Tensor) and value.ndim else value for key, value in batch.items()
    }


def loss_tokens(batch) -> torch.Tensor:
    mask = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).sum()


def plain_gradient(plain, weights, batch, rows, loss_tokens_counted=None):
    """Gradient of plain TRL's loss on the selected rows as one micro-batch and one accumulation step."""
    named = {name: p for name, p in plain.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
            parameter.grad = None
    if rows:
        inputs = select(batch, rows)
        if loss_tokens_counted is not None:
            inputs["num_items_in_batch"] = loss_tokens_counted
        plain.current_gradient_accumulation_steps = 1
        plain.args.steps_per_generation = 1
        plain._compute_loss(plain.model, inputs).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named.items()}


def scaled(gradients, factor):
    return {name: gradient * factor for name, gradient in gradients.items()}


def added(first, second):
    return {name: gradient + second[name] for name, gradient in first.items()}


def expected_gradient(plain, loss_type, weights, batch, micro_batches, accepted, windows):
    """
    The step over one window.

    Args:
        micro_batches: Row indices of each micro-batch of the window.
        accepted: Set of the rows that the generation batch accepted.
        windows: Optimizer steps per generation batch.
    """
    rows = [row for micro_batch in micro_batches for row in micro_batch if row in accepted]
    share = len(accepted) / windows  # the window's part of what the generation batch accepted
    if loss_type in TOKEN_LOSSES:
        tokens = loss_tokens(select(batch, sorted(accepted))) / windows
        return plain_gradient(plain, weights, batch, rows, tokens)
    if loss_type == "bnpo":
        total = plain_gradient(plain, weights, batch, [])
        for micro_batch in micro_batches:
            kept = [row for row in micro_batch if row in accepted]
            total = added(total, scaled(plain_gradient(plain, weights, batch, kept), len(kept) / share))
        return total
    return scaled(plain_gradient(plain, weights, batch, rows), len(rows) / share)


GRPO = (GRPOTrainer, GRPOConfig, EntrocraftGRPOTrainer)
RLOO = (RLOOTrainer, RLOOConfig, EntrocraftRLOOTrainer)


def check(loss_type, settings, direction, reference_folder, *, lora=False, env_mask=None, classes=GRPO):
    """`loss_type` is `None` for classes whose loss is a mean over rows whatever the config says."""
    plain_class, plain_config, ours_class = classes
    if loss_type is not None:
        settings = {"loss_type": loss_type, **settings}
    per_step = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    windows = settings.get("steps_per_generation", settings["gradient_accumulation_steps"])
    windows = windows // settings["gradient_accumulation_steps"]
    rollouts = tiny.random_rollouts(per_step * windows)
    env_mask = [[env_mask(index) for index in range(len(ids))] for ids in rollouts] if env_mask else None

    ours = build(
        ours_class,
        ours_class._config_class,
        settings,
        rollouts,
        reference_folder,
        lora,
        env_mask,
        **(tiny.TOO_LOW if direction < 0 else tiny.TOO_HIGH),
    )
    recorder = Recorder()
    ours.add_callback(recorder)
    buffers = []  # of each generation, the rows of each micro-batch as TRL splits them

    def recording_split(batch, parts):
        split = split_tensor_dict(batch, parts)
        buffers.append([[row_key(part, row) for row in range(len(part["completion_ids"]))] for part in split])
        return split

    with patch.object(grpo_trainer, "split_tensor_dict", recording_split):
        with patch.object(rloo_trainer, "split_tensor_dict", recording_split):
            ours.train()
    iterations = settings.get("num_iterations", 1)
    micro_keys = [part for buffer in buffers for _ in range(iterations) for part in buffer]

    plain = build(plain_class, plain_config, settings, rollouts, reference_folder, lora, env_mask)
    plain.model.train()
    batch = plain._generate_and_score_completions(tiny.generation_inputs(plain))
    row_of = {row_key(batch, row): row for row in range(len(rollouts))}
    accepted = {row for row, advantage in enumerate(batch["advantages"].tolist()) if direction * advantage >= 0}
    assert 0 < len(accepted) < len(rollouts), "the case must reject some rollouts and not all"

    per_window = settings["gradient_accumulation_steps"]
    assert len(recorder.steps) == settings.get("max_steps", 1)
    assert len(micro_keys) == per_window * len(recorder.steps)
    for step, (weights, gradients) in enumerate(recorder.steps):
        keys = micro_keys[step * per_window : (step + 1) * per_window]
        micro_batches = [[row_of[key] for key in micro_batch] for micro_batch in keys]
        expected = expected_gradient(plain, loss_type, weights, copy.copy(batch), micro_batches, accepted, windows)
        assert any(gradient.abs().max() > 1e-4 for gradient in expected.values()), "nothing to compare"
        assert_same_gradients(gradients, expected)
    return ours, recorder, batch, accepted


def assert_same_gradients(gradients, expected):
    for name, gradient in gradients.items():
        size = max(expected[name].abs().max().item(), 1e-3)
        # float32 sums in another order: a few parts in 1e6 of the largest entry
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=2e-5 * size, msg=lambda text, name=name: f"{name}: {text}"
        )
