"""Trains plain GRPO and Entrocraft under each rule, and notes every collective call that Python makes meanwhile."""

from contextlib import ExitStack
from unittest.mock import patch

import cases
import tiny
import torch
from launching import part_folder
from trl import GRPOConfig, GRPOTrainer

from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftGRPOTrainer


COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
)
calls: list[str] = []


def note_calls(name: str):
    """A context in which calls of this collective are noted."""
    original = getattr(torch.distributed, name)

    def noting(*args, **kwargs):
        # Of gathers, the last tensor is this rank's input; the others are room for the outputs.
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        calls.append(f"{name} {tensors[-1].numel()}" if tensors else name)
        return original(*args, **kwargs)

    return patch.object(torch.distributed, name, noting)


class StepByStep:
    """Makes each generation batch an entry of its own in `self.steps`; what the loss adds belongs to its batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps: list[list[str]] = []

    def training_step(self, *args, **kwargs):
        calls.clear()
        loss = super().training_step(*args, **kwargs)
        self.steps.append([*calls])
        return loss


class Plain(StepByStep, GRPOTrainer):
    pass


class Entrocraft(StepByStep, EntrocraftGRPOTrainer):
    pass


RULES = {
    "advantage_sign": {},
    "advantage_sign_zero_advantage": {"rejected_rollouts": "zero_advantage"},
    "advantage_sign_reward": {"out_of_band_advantages": "reward", "reward_coding": "zero_one"},
    "entropy_change": {"rejection_rule": "entropy_change"},
    "influence": {"rejection_rule": "influence"},
    "some_rows": {"compute_all_rows": None},
}
# With some of the rows, TRL's own gathers are of as many.
ALL_ROWS = {"entropy_unit": "nats", "compute_all_rows": True}


def train(trainer_class, config_class, case: str, sampled: bool = False, **settings):
    arguments = {"entropy_band": cases.band_function(case)} if trainer_class is Entrocraft else {}
    if not sampled:
        arguments |= {"reward_funcs": cases.reward_function(case), "rollout_func": cases.rows_of_this_rank}
    args = tiny.build_config(
        config_class,
        output_dir=str(part_folder(__name__) / "run"),
        max_steps=cases.STEPS,
        num_generations=cases.ROWS,
        per_device_train_batch_size=cases.ROWS // cases.RANKS,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = tiny.build_trainer(
        trainer_class,
        args=args,
        **arguments,
    )
    trainer.train()
    return trainer


def run(backend: str, reference: str):
    with ExitStack() as noting:
        for collective in COLLECTIVES:
            noting.enter_context(note_calls(collective))
        plain = train(Plain, GRPOConfig, "drop")
        steps, accepted = {"plain": plain.steps}, {}
        for rule, settings in RULES.items():
            case = "nothing_accepted" if rule == "advantage_sign_reward" else "drop"
            trainer = train(Entrocraft, EntrocraftGRPOConfig, case, **{**ALL_ROWS, **settings})
            steps[rule] = trainer.steps
            accepted[rule] = tiny.history(trainer, "entrocraft/accepted_rollouts")
        sampled = {
            "plain": train(Plain, GRPOConfig, "drop", sampled=True).steps,
            "recorded": train(Entrocraft, EntrocraftGRPOConfig, "drop", sampled=True, **ALL_ROWS).steps,
        }
    return trainer.accelerator, {"steps": steps, "accepted": accepted, "sampled": sampled}
