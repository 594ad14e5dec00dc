"""
A training run to be killed. Runs in a process that forks from a server with all imports done, and tells the test where
it is, so that the test can choose the moment.
"""

import io
import os
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import tiny
import torch
import transformers.modeling_utils
from safetensors.torch import save
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState


STEPS = 12
LINGER = 60.0  # seconds in which the test kills, once the file is half there that it wants half there


class Reports(TrainerCallback):
    def __init__(self, report):
        self.report = report

    def on_step_begin(self, *args, **kwargs):
        self.report("generation")  # the first thing of a step, and most of it

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.report("update")


def train(folder: Path, connection, phase: str | None = None, count: int = 0, kept: int | None = 1) -> None:
    """
    Resume what is in `folder`, or start; write `parameters.pt` and `log.json` at the end. Checkpoints after every
    second step land inside a generation block (of three) and between two log lines (of five steps); `kept` stay.
    In the `count`-th report of a `phase` of writing or deleting, it stays there.
    """
    seen = Counter()

    def report(where: str) -> None:
        connection.send(where)
        seen[where] += 1
        if where == phase and seen[where] == count and where in ("writing", "committing", "deleting"):
            time.sleep(LINGER)

    report("start")
    torch.set_num_threads(1)
    os.chdir(folder)
    report_writing(report)
    args = tiny.build_config(
        tiny.EntrocraftGRPOConfig,
        output_dir="run",
        max_steps=STEPS,
        per_device_train_batch_size=4,
        steps_per_generation=3,
        optim="adamw_torch",
        learning_rate=0.02,
        logging_steps=5,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=kept,  # at one, the old checkpoint must outlive the new one's writing
        rejection_rule="entropy_change",
        entropy_low=[0.9, 0.5],
        entropy_high=[0.95, 0.6],
    )
    trainer = tiny.build_trainer(args=args, callbacks=[Reports(report)])
    trainer.train(resume_from_checkpoint="auto")
    torch.save(trainer.model.state_dict(), "parameters.pt")
    trainer.state.save_to_json("log.json")
    connection.close()


def report_writing(report) -> None:
    """Tensor files and `trainer_state.json` are written in two halves with a report in between, as are deletions."""
    real_torch_save, real_to_json, real_unlink = torch.save, TrainerState.save_to_json, os.unlink

    def write(content: bytes, stream, where: str) -> None:
        half = len(content) // 2
        stream.write(content[:half])
        stream.flush()
        report(where)
        stream.write(content[half:])

    def save_in_halves(value, target) -> None:
        buffer = io.BytesIO()
        real_torch_save(value, buffer)
        with open(target, "wb") if isinstance(target, str) else nullcontext(target) as stream:
            write(buffer.getvalue(), stream, "writing")

    def save_safetensors_in_halves(tensors, path, metadata=None) -> None:
        with open(path, "wb") as stream:
            write(save(tensors, metadata), stream, "writing")

    def to_json_in_halves(state, path) -> None:
        real_to_json(state, f"{path}.whole")
        content = Path(f"{path}.whole").read_bytes()
        real_unlink(f"{path}.whole")
        with open(path, "wb") as stream:
            write(content, stream, "committing")

    def unlink(*args, **kwargs) -> None:
        real_unlink(*args, **kwargs)
        report("deleting")

    torch.save = save_in_halves
    transformers.modeling_utils.safe_save_file = save_safetensors_in_halves
    TrainerState.save_to_json = to_json_in_halves
    os.unlink = unlink
