"""
Two ranks: a whole run, then runs that stop, are stopped by a signal to one rank, find files missing or broken, find
their folder taken, and meet NaN on one rank.

Checkpoints after steps 3 and 6; a generation batch serves two steps and a log line covers four, so that the one after
step 3 is in the middle of both. Weights are compared as saved in `checkpoint-6`.
"""

import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext

import tiny
import torch
from launching import part_folder
from safetensors.torch import load_file
from transformers import TrainerCallback

from entrocraft_trl.checkpoints.manifest import list_checkpoints


folder = part_folder(__name__)
RANK = int(os.environ["RANK"])
CLOCK = (*tiny.CLOCK, "train_loss")
REFUSED = ("broken-resumed", "half", "in-use")  # "half" starts once more, without resuming
HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""
messages: list[str] = []


class Keep(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())


class SignalAt(TrainerCallback):
    """SIGTERM to one rank only, in the middle of step 3."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2 and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class SignalLate(TrainerCallback):
    """SIGTERM to one rank only, when the last step is made and saved."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class BreakWeight(TrainerCallback):
    """One element of what rank 1 holds of the last parameter becomes NaN with the optimizer step before the save."""

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 2 and RANK == 1:
            *_, parameter = model.parameters()
            held = getattr(parameter, "ds_tensor", parameter)
            held = held.to_local() if hasattr(held, "to_local") else held
            held.data.view(-1)[0] = math.nan


class LossIsNan(tiny.EntrocraftGRPOTrainer):
    """On rank 1, in step 3; the gradient stays what it is."""

    loss_normaliser = "loss_type"

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        return loss + math.nan if self.state.global_step == 2 and RANK == 1 else loss


def build(name, *callbacks, trainer_class=tiny.EntrocraftGRPOTrainer, **settings):
    defaults = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "logging_steps": 4, "max_steps": 6}
    args = tiny.build_config(
        output_dir=str(folder / name),
        **{**defaults, "optim": "adamw_torch", "learning_rate": 0.02, "dataloader_pin_memory": False, **settings},
        **{"save_strategy": "steps", "save_steps": 3, "rejection_rule": "entropy_change"},
        **{"entropy_low": [0.9, 0.5], "entropy_high": [0.95, 0.6]},
    )
    data = tiny.build_dataset(64)
    return tiny.build_trainer(trainer_class, args=args, train_dataset=data, callbacks=list(callbacks))


def train(name, resume=None, *callbacks, **settings) -> dict:
    """One run, from a folder under the common one; what it logged and remembers, how it ended, what it warned of."""
    if resume not in (None, True, "auto"):
        resume = str(folder / resume)
    messages.clear()
    trainer = build(name, *callbacks, **settings)
    ended = "whole"
    try:
        trainer.train(resume_from_checkpoint=resume)
    except SystemExit as stop:
        ended = f"exit {stop.code}"
    except ValueError as error:
        if name not in REFUSED:
            raise
        ended = f"ValueError: {error}"
    except FloatingPointError as error:
        ended = f"FloatingPointError: {error}"
    log = [{key: value for key, value in line.items() if key not in CLOCK} for line in trainer.state.log_history]
    return {
        "ended": ended,
        "log": log,
        "memory": vars(trainer.control_memory),
        "warnings": [message for message in messages if "Resuming as TRL" in message or "not complete" in message],
        "handler_is_back": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
    }


def difference(name, other="whole") -> float:
    """Largest difference of the weights in `checkpoint-6` of two runs."""
    first, second = (load_file(folder / run / "checkpoint-6" / "model.safetensors") for run in (name, other))
    assert first.keys() == second.keys() and first
    return max((first[key] - second[key]).abs().max().item() for key in first)


def on_main(action) -> None:
    """Change files on one rank, between two barriers."""
    torch.distributed.barrier()
    if RANK == 0:
        action()
    torch.distributed.barrier()


def copy(name) -> None:
    on_main(lambda: shutil.copytree(folder / "whole" / "checkpoint-3", folder / name / "checkpoint-3"))


@contextmanager
def taken(name):
    """Another process is in the folder."""
    path = folder / name / "_training.lock"
    path.parent.mkdir(exist_ok=True)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    yield
    holder.communicate()


def run(backend: str, reference: str):
    logging.getLogger("entrocraft_trl.checkpoints.resume").addHandler(Keep())
    outcomes = {"whole": train("whole"), "resumed": train("resumed", "whole/checkpoint-3")}
    differences = {"resumed": difference("resumed")}

    outcomes["signalled"] = train("signalled", "auto", SignalAt())
    checkpoints = list_checkpoints(folder / "signalled")
    outcomes["signalled, resumed"] = train("signalled", "auto")
    differences["signalled"] = difference("signalled")

    outcomes["signalled late"] = train("signalled-late", None, SignalLate())
    differences["signalled late"] = difference("signalled-late")

    # Rank 1's file is lost: both ranks go on as TRL does.
    copy("lost")
    on_main((folder / "lost" / "checkpoint-3" / "entrocraft_rank_1.pt").unlink)
    outcomes["lost"] = train("lost-resumed", "lost/checkpoint-3")
    # Rank 1's file is broken: both ranks say so.
    on_main(lambda: (folder / "lost" / "checkpoint-3" / "entrocraft_rank_1.pt").write_bytes(b"broken"))
    outcomes["broken"] = train("broken-resumed", "lost/checkpoint-3")
    # A file of rank 1 is cut off in the newest checkpoint: both ranks take the one before.
    copy("half")
    on_main(lambda: shutil.copytree(folder / "whole" / "checkpoint-6", folder / "half" / "checkpoint-6"))
    last_file = sorted((folder / "half" / "checkpoint-6").rglob("*rank_1*.pt"))  # of the optimizer, under ZeRO
    half = last_file[-1]
    if half.name == "entrocraft_rank_1.pt":
        half = folder / "half" / "checkpoint-6" / "rng_state_1.pth"
    on_main(lambda: half.write_bytes(half.read_bytes()[:-1]))
    outcomes["half"] = train("half", True)
    differences["half"] = difference("half")

    outcomes["started where another has been"] = train("half")

    with taken("in-use") if RANK == 0 else nullcontext():
        torch.distributed.barrier()
        outcomes["in use"] = train("in-use")

    outcomes["nan loss"] = train("nan-loss", None, trainer_class=LossIsNan)
    outcomes["nan weight"] = train("nan-weight", None, BreakWeight())
    saved = [str(path) for name in ("nan-loss", "nan-weight") for path in (folder / name).glob("checkpoint-*")]

    return build("last").accelerator, {
        "outcomes": outcomes,
        "differences": differences,
        "checkpoints": [f"{step}: {reason}" for step, reason in checkpoints.items()],
        "half": half.name,
        "saved": saved,
        "files": sorted(path.name for path in (folder / "whole" / "checkpoint-3").iterdir()),
    }
