"""Two ranks that sample for themselves: what they recorded against a pass over the same rollouts."""

import os
from dataclasses import replace

import tiny
import torch
from launching import part_folder

from entrocraft_trl import EntrocraftGRPOTrainer, EntrocraftRLOOTrainer


RANK = int(os.environ.get("RANK", "0"))


class Notes:
    """Keeps the source of each reading and its loss tokens."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sources, self.differences, self.loss_tokens = [], [], []

    def read_policy(self, batch, mask, heard):
        tokens, source = super().read_policy(batch, mask, heard)
        self.sources.append(source)
        self.loss_tokens.append(mask.sum().item())
        return tokens, source


class Compares(Notes):
    """Also how far log p, H and N are from those of a pass, on loss tokens."""

    def read_policy(self, batch, mask, heard):
        tokens, source = super().read_policy(batch, mask, heard)
        passed, _ = super(Notes, self).read_policy(batch, mask, replace(heard, not_recorded="to compare", passes=[]))
        apart = [(a - b)[mask.bool()].abs().max().item() for a, b in zip(tokens, passed, strict=True)]
        self.differences.append(max(apart))
        return tokens, source


class Noted(Notes, EntrocraftGRPOTrainer):
    pass


class Grpo(Compares, EntrocraftGRPOTrainer):
    pass


class Rloo(Compares, EntrocraftRLOOTrainer):
    pass


class LostOnRankOne(Grpo):
    """Other tokens come out of the generation there than were seen."""

    def _generate_single_turn(self, *args, **kwargs):
        ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        if RANK == 1:
            ids[2][-1] = 5 if ids[2][-1] != 5 else 6
        return ids, logprobs


def train(trainer_class, name: str, **settings) -> tuple[Notes, dict]:
    torch.manual_seed(RANK)
    args = tiny.build_config(
        trainer_class._config_class,
        output_dir=str(part_folder(__name__) / name),
        per_device_train_batch_size=4,
        max_steps=2,
        rejection_rule="entropy_change",
        dataloader_pin_memory=False,
        beta=0.0,
        **settings,
        **tiny.TOO_LOW,
    )
    trainer = tiny.build_trainer(trainer_class, args=args)
    trainer.train()
    return trainer, {
        "sources": trainer.sources,
        "differences": trainer.differences,
        "loss_tokens": trainer.loss_tokens,
        "entropies": tiny.history(trainer, "entrocraft/entropy"),
    }


def run(backend: str, reference: str):
    outcomes = {}
    _, outcomes["grpo"] = train(Grpo, "grpo")
    _, outcomes["rloo"] = train(Rloo, "rloo")
    _, outcomes["lost"] = train(LostOnRankOne, "lost")
    if backend == "cpu_zero3":
        # Weights are gathered layer by layer, and a rank that is done runs along with the others. Nothing is compared
        # here: DeepSpeed does not train after such a generation and another pass without gradient.
        _, outcomes["layer by layer"] = train(Noted, "layers", ds3_gather_for_generation=False)
    trainer, outcomes["several steps a generation"] = train(Grpo, "steps", num_iterations=2)
    return trainer.accelerator, outcomes
