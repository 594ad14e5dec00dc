"""
Trains all cases, one after the other, in one process or as one of several ranks.

Writes each case's parameters, in full on every rank, and its log.
"""

import contextlib
import os
from unittest.mock import patch

import cases
import numpy as np
import tiny
import torch
from launching import part_folder
from peft import LoraConfig
from trl.trainer import grpo_trainer

from entrocraft_trl import EntrocraftGRPOTrainer


WORLD = int(os.environ.get("WORLD_SIZE", "1"))


class RecordingTrainer(EntrocraftGRPOTrainer):
    """Also notes how many rollouts of this rank were kept in each generation batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept_here = []

    def _take_out(self, batch, keep, counts):
        self.kept_here.append(int(keep.sum()))
        return super()._take_out(batch, keep, counts)


class LocalCountsTrainer(RecordingTrainer):
    """Broken on purpose: each rank normalises by what it kept itself, as if the counts had not been added up."""

    def _take_out(self, batch, keep, counts):
        here = self.accelerator.num_processes * batch["completion_mask"][keep].sum().item()
        return super()._take_out(batch, keep, counts._replace(kept_tokens=here))


def train(case: str, reference: str, broken: bool = False) -> tuple[RecordingTrainer, dict[str, np.ndarray]]:
    """One run. Returns the trainer and its parameters in full."""
    settings = {**cases.CASES[case]}
    lora = settings.pop("lora", False)
    settings.pop("plan", None)
    accumulation = settings.get("gradient_accumulation_steps", 1)
    micro_batches = max(accumulation, settings.get("steps_per_generation", 1))
    rows = cases.ROWS // micro_batches // WORLD
    if settings.get("loss_type") == "bnpo" and WORLD == 1:
        # Its mean is over the tokens of a micro-batch, so one process must have the ranks' micro-batches.
        rows, settings["gradient_accumulation_steps"] = rows // cases.RANKS, accumulation * cases.RANKS
    args = tiny.build_config(
        output_dir=str(part_folder(__name__) / "run"),
        max_steps=cases.STEPS,
        num_generations=cases.ROWS,
        per_device_train_batch_size=rows,
        dataloader_pin_memory=False,
        entropy_unit="nats",
        **settings,
    )
    order = cases.order_of_rows(micro_batches, WORLD)
    model = tiny.build_model()
    model.config._name_or_path = reference  # where TRL loads the reference model from
    torch.manual_seed(0)  # LoRA draws its weights from the global generator
    # Weights of B other than zero: with zeros the first step would leave A as it is.
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None
    trainer = tiny.build_trainer(
        LocalCountsTrainer if broken else RecordingTrainer,
        model=model,
        args=args,
        reward_funcs=cases.reward_function(case),
        rollout_func=cases.rows_of_this_rank,
        entropy_band=cases.band_function(case),
        peft_config=adapter,
    )
    with patch.object(grpo_trainer, "shuffle_sequence_dict", lambda rows: reorder(rows, order)):
        trainer.train()
    return trainer, full_parameters(trainer)


def reorder(rows: dict, order: list[int]) -> dict:
    return {
        key: value[order] if isinstance(value, torch.Tensor) and value.ndim else value for key, value in rows.items()
    }


def full_parameters(trainer) -> dict[str, np.ndarray]:
    """Trained parameters by name, gathered where ZeRO-3 or FSDP spread them over ranks."""
    result = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if not parameter.requires_grad:
            continue
        with _whole(trainer, parameter):
            value = parameter.detach()
            result[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone().float().numpy()
    return result


def _whole(trainer, parameter):
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage < 3:
        return contextlib.nullcontext()
    import deepspeed

    assert parameter.numel() == 0, "ZeRO-3 left a parameter whole on each rank, so it was hardly exercised"
    return deepspeed.zero.GatheredParameters([parameter])


def refusal() -> str | None:
    """What a config of the rule that needs whole parameters says here."""
    try:
        tiny.build_config(**cases.INFLUENCE)
    except ValueError as error:
        return str(error)
    return None


def run(backend: str, reference: str):
    names = cases.cases_of(backend) + ([cases.LOCAL_COUNTS] if backend == "cpu_ddp" else [])
    folder = part_folder(__name__)
    logs = {"refused": refusal()}
    for name in names:
        case, _, broken = name.partition(":")
        trainer, parameters = train(case, reference, bool(broken))
        rank = trainer.accelerator.process_index
        np.savez(folder / f"{name.replace(':', '-')}-{rank}.npz", **parameters)
        logs[name] = {
            "direction": tiny.history(trainer, "entrocraft/direction"),
            "entropy": tiny.history(trainer, "entrocraft/entropy"),
            "accepted": tiny.history(trainer, "entrocraft/accepted_rollouts"),
            "empty_steps": tiny.history(trainer, "entrocraft/empty_steps"),
            "gradient_norm": tiny.history(trainer, "grad_norm"),
            "kept_here": trainer.kept_here,
        }
    return trainer.accelerator, logs
