"""
Trains with some of the rows and with all of them, one run after the other, in one process or as one of two ranks.

Writes each run's parameters, in full on every rank, and what it logged. Rollouts are those of `cases.py`.
"""

from unittest.mock import patch

import cases
import numpy as np
import tiny
import torch
from launching import part_folder
from trl import GRPOTrainer
from trl.trainer import grpo_trainer
from worker import WORLD, full_parameters, reorder

from entrocraft_trl import EntrocraftGRPOTrainer, Services
from entrocraft_trl.baselines.base import BaselineConfig, BaselineTrainer
from entrocraft_trl.checkpoints.rank_file import read_rank_file


# Rewards of a group of eight that crosses the ranks; step 3 has no gradient on any of them. Of advantages of one size,
# those that a band below leaves are all on one rank, so that the other has fillers alone.
DEAD = [0.5] * cases.ROWS
PLAN = [
    (cases.INSIDE, cases.MIXED),
    (cases.TOO_LOW, cases.FIRST_RIGHT),
    (cases.INSIDE, DEAD),
    (cases.TOO_HIGH, cases.FIRST_RIGHT),
    (cases.TOO_LOW, cases.MIXED),
    (cases.TOO_LOW, DEAD),
]
SPLIT = {"gradient_accumulation_steps": 4}
TWO_WINDOWS = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "learning_rate": 0.02}


class Plain(Services, GRPOTrainer):
    """Reads no entropy, so that the old policy's pass waits although rollouts are forced."""

    _config_class = BaselineConfig


RUNS = {
    "sgd": (EntrocraftGRPOTrainer, {}),
    "adamw": (
        EntrocraftGRPOTrainer,
        {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.1},
    ),
    "rows": (EntrocraftGRPOTrainer, {"loss_type": "grpo", "gradient_checkpointing": True}),
    "bnpo": (EntrocraftGRPOTrainer, {"loss_type": "bnpo"}),
    "two_windows": (EntrocraftGRPOTrainer, TWO_WINDOWS),
    "two_generations": (EntrocraftGRPOTrainer, {"steps_per_generation": 2}),
    "baseline": (BaselineTrainer, {}),
    "old_policy": (Plain, TWO_WINDOWS),
    "reference": (EntrocraftGRPOTrainer, {**TWO_WINDOWS, "beta": 0.1}),
}


def train(
    name: str, compute_all_rows: bool | None, reference: str, folder: str = "run", resume: str | None = None, **saving
):
    """One run; its optimizer steps or its generations are those of `PLAN`, eight rollouts each."""
    trainer_class, settings = RUNS[name]
    settings = {**SPLIT, "learning_rate": 0.05, **settings}
    band = {"entropy_unit": "nats"} if trainer_class is EntrocraftGRPOTrainer else {}
    args = tiny.build_config(
        trainer_class._config_class,
        output_dir=str(part_folder(__name__) / folder),
        max_steps=cases.STEPS,
        num_generations=cases.ROWS,
        per_device_train_batch_size=cases.ROWS // settings.get("steps_per_generation", 4) // WORLD,
        dataloader_pin_memory=False,
        compute_all_rows=compute_all_rows,
        **{**band, **settings, **saving},
    )
    plan = {"entropy_band": lambda progress: PLAN[min(int(progress * cases.STEPS + 0.5), cases.STEPS - 1)][0]}
    model = tiny.build_model()
    model.config._name_or_path = reference  # where TRL loads the reference model from
    trainer = tiny.build_trainer(
        trainer_class,
        model,
        args=args,
        reward_funcs=tiny.table_reward(cases.ROLLOUTS, [reward for _, rewards in PLAN for reward in rewards]),
        rollout_func=cases.rows_of_this_rank,
        **(plan if band else {}),
    )
    trainer.rows_of_passes = rows_of_passes(trainer)
    with patch.object(grpo_trainer, "shuffle_sequence_dict", lambda rows: reorder(rows, in_order())):
        trainer.train(resume_from_checkpoint=resume)
    return trainer, full_parameters(trainer)


def rows_of_passes(trainer) -> dict[str, int]:
    """Counts rows of this rank in forward passes without gradient over whole rollouts, by model."""
    counts = {"policy": 0, "reference": 0}
    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):

        def count(module, arguments, keywords, name=name):
            if keywords.get("fused_lm_head") and not torch.is_grad_enabled():
                counts[name] += len(keywords["input_ids"])

        if model is not None:
            trainer.accelerator.unwrap_model(model).register_forward_pre_hook(count, with_kwargs=True)
    return counts


def in_order() -> list[int]:
    return list(range(cases.ROWS // WORLD))


def run(backend: str, reference: str):
    folder, found = part_folder(__name__), {}
    for name in RUNS:
        for rows in (None, True):
            trainer, parameters = train(name, rows, reference)
            label = f"{name}-{'all' if rows else 'some'}"
            np.savez(folder / f"{label}-{trainer.accelerator.process_index}.npz", **parameters)
            found[label] = {
                key: tiny.history(trainer, key)
                for key in ("grad_norm", "loss", "num_tokens", "entrocraft/computed_rows", "clip_ratio/region_mean")
            } | {"rows_of_passes": trainer.rows_of_passes}
    # A checkpoint in the middle of a generation batch, with a spare among what is left of it.
    saving = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    whole, expected = train("two_windows", None, reference, "whole", **saving)
    rank = whole.accelerator.process_index
    left = read_rank_file(folder / "whole" / "checkpoint-3" / f"entrocraft_rank_{rank}.pt")["buffered_inputs"]
    checkpoint = str(folder / "whole" / "checkpoint-3")
    resumed, parameters = train("two_windows", None, reference, "resumed", checkpoint, **saving)
    found["resumed"] = {
        "spares": left.count({}),
        "difference": max(float(np.abs(parameters[name] - expected[name]).max()) for name in expected),
        "logs": [[line_of(line) for line in trainer.state.log_history] for trainer in (resumed, whole)],
    }
    return whole.accelerator, found


def line_of(line: dict) -> dict:
    return {key: value for key, value in line.items() if key not in (*tiny.CLOCK, "train_loss")}
