"""
Exact resume: what TRL and transformers do not save, in one file per rank beside theirs.

TRL's trainers count micro-steps, and serve several of them from one generation batch. Neither is in TRL's checkpoints:
a resumed run generates anew in the middle of the block and counts from 0, and what it had measured but not logged is
gone.
"""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device
from transformers import TrainerCallback

from .atomic import write_atomically
from .checkpoint import (
    RANK_FILE,
    checkpoint_folder,
    list_checkpoints,
    set_aside,
    uncommit,
    why_incomplete,
    write_manifest,
)
from .termination import EXIT_CODE, StopOnSigterm


logger = get_logger(__name__)

# Of the tables that TRL prints and stores with `log_completions`; the fifth, images, are no plain data.
TABLE_COLUMNS = ("prompt", "completion", "advantages", "rewards", "extra")


class AtTrainBegin(TrainerCallback):
    """Calls `action` when transformers has set its own counters and has not taken a step."""

    def __init__(self, action: Callable[[], None]):
        self.action = action

    def on_train_begin(self, args, state, control, **kwargs):
        self.action()


class ExactResumeMixin:
    """
    Makes TRL's GRPO and RLOO trainers continue a checkpoint exactly, choose a complete one, and stop on SIGTERM.

    Saved and restored are each rank's place in the generation block and what is left of its rollouts, the metrics and
    the loss that were not logged yet, and the completions table.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Train, as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint folder; or `True` for the newest complete one in `args.output_dir`. Newer folders in which
                something is missing are renamed to `_incomplete-checkpoint-...`.

        Raises:
            ValueError: If there is no complete checkpoint, the given one is not, or `enable_jit_checkpoint` is on.
            SystemExit: With code 143 if SIGTERM came: after the current optimizer step, and with its checkpoint saved.
        """
        if self.args.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint=True saves in the middle of an optimizer step and on one rank alone; leave it "
                "off: SIGTERM is handled here, after the step and on all ranks together."
            )
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_complete_checkpoint()
        elif resume_from_checkpoint:
            self._raise_together(self._incompleteness(Path(resume_from_checkpoint)))
        stop = StopOnSigterm(self.accelerator)
        callbacks = [stop]
        if resume_from_checkpoint:
            callbacks.append(AtTrainBegin(lambda: self._restore(resume_from_checkpoint)))
        for callback in callbacks:
            self.add_callback(callback)
        try:
            with stop.listening():
                output = super().train(resume_from_checkpoint, *args, **kwargs)
                if stop.agreed:
                    # A launcher ends all ranks when the first one exits; the main one may still be writing.
                    self.accelerator.wait_for_everyone()
        finally:
            for callback in callbacks:
                self.remove_callback(callback)
        if stop.agreed:
            logger.warning(
                f"SIGTERM: stopped after step {self.state.global_step} of {self.state.max_steps} with a checkpoint in "
                f"{self.args.output_dir!r}; resume with resume_from_checkpoint=True."
            )
            raise SystemExit(EXIT_CODE)
        return output

    # ------------------------------------------------------------------------------------------- choosing a checkpoint

    def _newest_complete_checkpoint(self) -> str:
        run = Path(self.args.output_dir)
        found = list_checkpoints(run)
        # One choice for all ranks: with disks of their own, nodes can differ in their last complete one.
        complete = set.intersection(*gather_object([{step for step, reason in found.items() if reason is None}]))
        if not complete:
            reasons = "".join(f"; checkpoint-{step}: {reason}" for step, reason in found.items() if reason)
            raise ValueError(
                f"resume_from_checkpoint=True: no complete checkpoint in {self.args.output_dir!r}{reasons}"
            )
        newest = max(complete)
        if self.args.should_save:
            for step, reason in reversed(found.items()):  # of those set aside, the newest is kept
                if step > newest:
                    aside = set_aside(checkpoint_folder(run, step))
                    logger.warning(
                        f"checkpoint-{step} is not complete ({reason or 'on another node'}): renamed to {aside.name}; "
                        f"resuming from checkpoint-{newest}."
                    )
        return str(checkpoint_folder(run, newest))

    @staticmethod
    def _incompleteness(folder: Path) -> str | None:
        reason = why_incomplete(folder)
        return f"cannot resume from {str(folder)!r}: {reason}" if reason else None

    @staticmethod
    def _raise_together(problem: str | None) -> None:
        """Raise on all ranks what one rank found: one that fails alone leaves the others waiting."""
        problems = [found for found in gather_object([problem]) if found]
        if problems:
            raise ValueError(problems[0])

    # ----------------------------------------------------------------------------------------------- hooks into saving

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:
            uncommit(checkpoint_folder(Path(self._get_output_dir(trial=trial)), self.state.global_step))
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str):
        # The last files but trainer_state.json, and the last place that all ranks pass before transformers deletes
        # older checkpoints.
        super()._save_rng_state(output_dir)
        state = self._resume_state()
        write_atomically(self._rank_file(output_dir), lambda stream: torch.save(state, stream))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(Path(output_dir))

    def _rank_file(self, folder: str) -> Path:
        return Path(folder) / RANK_FILE.format(self.accelerator.process_index)

    def _geometry(self) -> dict[str, int]:
        """What must be the same for micro-steps and buffered rollouts to fit."""
        names = (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "steps_per_generation",
            "num_iterations",
        )
        return {
            "processes": self.accelerator.num_processes,
            **{name: getattr(self.args, name) for name in (*names, "num_generations")},
        }

    def _resume_state(self) -> dict[str, Any]:
        block_is_open = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        table = None
        if self.log_completions and self.accelerator.is_main_process:
            table = {name: plain(self._logs[name]) for name in TABLE_COLUMNS}
        return {
            "global_step": self.state.global_step,
            "geometry": self._geometry(),
            "micro_step": self._step,
            "buffered_inputs": self._buffered_inputs if block_is_open else None,
            "metrics": {name: [float(value) for value in values] for name, values in self._metrics["train"].items()},
            "loss_sum": self._tr_loss,
            "last_logged_step": self._globalstep_last_logged,
            "table": table,
        }

    # ---------------------------------------------------------------------------------------------- hooks into loading

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # Resumed from its last checkpoint: transformers looks at max_steps after a step only, and takes one more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _restore(self, checkpoint: str) -> None:
        path = self._rank_file(checkpoint)
        state, broken = None, None
        try:
            state = send_to_device(read_resume_state(path), self.accelerator.device)
        except ValueError as error:
            broken = str(error)
        self._raise_together(broken)
        misfits = [misfit for misfit in gather_object([self._misfit(path, state)]) if misfit]
        if misfits:
            logger.warning(
                f"Resuming as TRL does, not exactly: {misfits[0]}. Model, optimizer, step and entropy band continue; "
                "what was left of the last generation batch is generated anew, and metrics that were not logged yet "
                "are lost."
            )
            return
        self._step = state["micro_step"]
        self._buffered_inputs = state["buffered_inputs"]
        self._metrics["train"].update(state["metrics"])
        self._tr_loss += state["loss_sum"]
        # `train_loss` at the end is the mean of this call's steps.
        self._total_loss_scalar -= self.accelerator.reduce(state["loss_sum"], reduction="mean").item()
        self._globalstep_last_logged = state["last_logged_step"]
        if state["table"] is not None:
            restore_table(self._logs, state["table"])

    def _misfit(self, path: Path, state: dict[str, Any] | None) -> str | None:
        if state is None:
            return f"{path.name} is not in the checkpoint"
        if state["global_step"] != self.state.global_step:
            return f"{path.name} is of step {state['global_step']}, trainer_state.json of {self.state.global_step}"
        saved, now = state["geometry"], self._geometry()
        changed = [f"{name} was {saved.get(name)} and is {now[name]}" for name in now if saved.get(name) != now[name]]
        return ", ".join(changed) or None


def read_resume_state(path: Path) -> dict[str, Any] | None:
    """
    One rank's file, on the CPU; `None` if there is none.

    Raises:
        ValueError: If the file is cut off, corrupted or not one of ours.
    """
    if not path.exists():
        return None
    try:
        # Not to the accelerator's device: that of a rank on CPU is "cpu:0", which torch.load does not know.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling garbage raises almost anything, IndexError and KeyError among them
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} cannot be read ({reason}); without this file, resuming is only less exact."
        ) from None
    expected = {
        "global_step": int,
        "geometry": dict,
        "micro_step": int,
        "buffered_inputs": (list, type(None)),
        "metrics": dict,
        "loss_sum": torch.Tensor,
        "last_logged_step": int,
        "table": (dict, type(None)),
    }
    if not isinstance(state, dict) or set(state) != set(expected):
        raise ValueError(f"{path} is not a file of this package: it holds {describe(state)}.")
    for name, kind in expected.items():
        if not isinstance(state[name], kind):
            raise ValueError(f"{path} holds {name}={describe(state[name])}.")
    return state


def describe(value: Any) -> str:
    return f"a dict of {sorted(map(str, value))}" if isinstance(value, dict) else f"a {type(value).__name__}"


def plain(value: Any) -> Any:
    """Lists, dicts, numbers and text of `value`, which `torch.load` reads without running code; the rest as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def restore_table(logs: dict[str, Any], table: dict[str, Any]) -> None:
    """Put the rows of TRL's completions table back into its queues, which are as long as a generation batch."""
    for name in TABLE_COLUMNS:
        if isinstance(table[name], dict):
            for column, rows in table[name].items():
                logs[name][column].extend(rows)
        else:
            logs[name].extend(table[name])
