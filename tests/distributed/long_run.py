"""Worker of `test_long_run`: trains a micro model for many steps under the filter and notes what must not drift."""

import random

import psutil
import tiny
from launching import part_folder
from soak import SOAK
from transformers import PrinterCallback, TrainerCallback

from entrocraft_trl import EntrocraftGRPOTrainer


STEPS = 5000 if SOAK else 150
SAMPLES = 50  # notes a run


class Notes(TrainerCallback):
    """Memory of this process (MB) and the sum of its parameters, `SAMPLES` times a run."""

    def __init__(self):
        self.memory, self.checksums = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % (state.max_steps // SAMPLES) == 0:
            self.memory.append(psutil.Process().memory_info().rss / 2**20)
            self.checksums.append(sum(parameter.double().sum().item() for parameter in model.parameters()))


def noisy_judge(completions, **kwargs) -> list[float]:
    """Share of digits, judged with noise: without it all rewards are 1 soon, and all advantages 0."""
    return [share + random.uniform(-0.5, 0.5) for share in tiny.share_of_digits(completions)]


def run(backend: str, reference: str):
    config = tiny.build_config(
        output_dir=str(part_folder(__name__) / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=16,
        num_generations=8,
        optim="adamw_torch",
        learning_rate=1e-3,  # moves the entropy by some 0.01 nats a step, far less than the band is wide
        rejection_rule="entropy_change",
        entropy_low=[0.9, 0.5],
        entropy_high=[1.0, 0.6],
    )
    notes = Notes()
    trainer = tiny.build_trainer(
        EntrocraftGRPOTrainer,
        args=config,
        reward_funcs=noisy_judge,
        train_dataset=tiny.build_dataset(64),
        callbacks=[notes],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = [record for record in trainer.state.log_history if "reward" in record]
    return trainer.accelerator, {
        "memory": notes.memory,
        "checksums": notes.checksums,
        "steps": [record["step"] for record in log],
        "entropies": [record["entrocraft/entropy"] for record in log],
        "directions": [record["entrocraft/direction"] for record in log],
        "accepted": [record["entrocraft/accepted_rollouts"] for record in log],
    }
