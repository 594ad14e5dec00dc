"""
Exact resume: what TRL and transformers do not save, in one file per rank beside theirs.

TRL's trainers count micro-steps, and serve several of them from one generation batch. Neither is in TRL's checkpoints:
a resumed run generates anew in the middle of the block and counts from 0, and what it had measured but not logged is
gone.
"""

from collections import deque
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device
from transformers import TrainerCallback

from ..atomic import write_atomically
from .choice import asks_the_hub, found_by_all_ranks, resolve_checkpoint, word_of
from .finite import FiniteTrainingMixin
from .hub_download import fetch_for_all
from .manifest import (
    RANK_FILE,
    checkpoint_folder,
    run_of,
    set_aside,
    step_of_folder,
    telling_what_is_kept,
    uncommit,
    why_incomplete,
    write_manifest,
)
from .rank_file import TABLE_COLUMNS, read_rank_file
from .running import RunningMixin
from .sigterm import StopOnSigterm


logger = get_logger(__name__)


class AtTrainBegin(TrainerCallback):
    """Calls `action` when transformers has set its own counters and has not taken a step."""

    def __init__(self, action: Callable[[], None]):
        self.action = action

    def on_train_begin(self, args, state, control, **kwargs):
        self.action()


class ExactResumeMixin(FiniteTrainingMixin, RunningMixin):
    """
    Makes TRL's GRPO and RLOO trainers continue a checkpoint exactly, choose a complete one, stop on SIGTERM, and save
    nothing that is not finite.

    Saved and restored are each rank's place in the generation block and what is left of its rollouts, the metrics and
    the loss that were not logged yet, and the completions table.
    """

    def train(self, resume_from_checkpoint: str | PathLike | bool | None = None, *args, **kwargs):
        """
        Train, as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint (`str`, `PathLike` or `bool`, *optional*):
                - `"auto"`: the newest complete checkpoint in `args.output_dir` if there is one; otherwise the run
                  starts from step 0. One script then starts a run and restarts it.
                - `"hub"`: first fetch the newest checkpoint of `args.hub_model_id`, if there is one and it is not here
                  already; then as `"auto"`.
                - `True` or `"last"`: the newest complete checkpoint in `args.output_dir`, which has to be there.
                - A checkpoint folder. One that bears the name of such a word is meant by `"./auto"`.
                - Nothing, `False` or `"none"`: start from step 0.

                Newer folders in `args.output_dir` in which something is missing are renamed to
                `_incomplete-checkpoint-...` when the newest complete one is resumed.

        Raises:
            ValueError: If there is no complete checkpoint, the given one is not, `"hub"` is without `hub_model_id`,
                `output_dir` is in use by another process or holds checkpoints of another run, or
                `enable_jit_checkpoint` is on.
            OSError: If the Hub cannot be reached or refuses; on all ranks together.
            FloatingPointError: If loss, gradient norm or parameters are NaN or infinite; on all ranks together.
            SystemExit: With code 143 if SIGTERM came: after the current optimizer step, and with its checkpoint saved.
                After the last step too: what follows `train` in a script is left to the next start.
        """
        if self.args.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint=True saves in the middle of an optimizer step and on one rank alone; leave it "
                "off: SIGTERM is handled here, after the step and on all ranks together."
            )
        with self.running():
            resumed = self._choose_checkpoint(resume_from_checkpoint)
            self._run_id = self._identify_run(resumed)
            return self._train_and_stop(resumed, *args, **kwargs)

    def _agree_to_stop(self) -> bool:
        # Also of ranks that the signal did not reach: the main one must not wait for the Hub either.
        agreed = self._agree_on_step(self.sigterm_received)
        if agreed:  # never the other way round: the signal may come within the reduction
            self.sigterm_received = True
        return agreed

    def _train_and_stop(self, resumed: str | None, *args, **kwargs):
        self._stop = stop = StopOnSigterm(self._agree_to_stop)
        callbacks = [stop]
        self._step_loss = 0.0  # of a step that an error interrupted
        if resumed:
            callbacks.append(AtTrainBegin(lambda: self._restore(resumed)))
        for callback in callbacks:
            self.add_callback(callback)
        try:
            output = super().train(resumed, *args, **kwargs)
            self._refuse_unfinite_parameters("At the end, after")
        finally:
            for callback in callbacks:
                self.remove_callback(callback)
        if stop.agreed:
            self.exit_on_sigterm(
                f"stopped after step {self.state.global_step} of {self.state.max_steps} with a checkpoint in "
                f"{self.args.output_dir!r}; resume with resume_from_checkpoint=True."
            )
        return output

    # ------------------------------------------------------------------------------------------- choosing a checkpoint

    def _choose_checkpoint(self, value: str | PathLike | bool | None) -> str | None:
        """The checkpoint that `value` means, the same on all ranks; what is newer and not complete is set aside."""
        if asks_the_hub(value, self.args):
            fetch_for_all(self.args)
        run = Path(self.args.output_dir)
        found = found_by_all_ranks(run)
        chosen, problem = None, None
        try:
            chosen = resolve_checkpoint(value, self.args.output_dir, found)
        except ValueError as error:
            problem = str(error)
        # All ranks have looked when one renames: a folder that goes away meanwhile is a file not found.
        self._raise_together(problem)
        if chosen is not None and word_of(value) is not None and self.args.should_save:
            self._set_newer_aside(run, step_of_folder(Path(chosen).name), found)
        return chosen

    @staticmethod
    def _set_newer_aside(run: Path, chosen: int, found: dict[int, str | None]) -> None:
        for step, reason in reversed(found.items()):  # of those set aside, the newest is kept
            folder = checkpoint_folder(run, step)
            if step > chosen and folder.is_dir():  # it may be on another node only
                aside = set_aside(folder)
                logger.warning(
                    f"checkpoint-{step} is not complete ({reason}): renamed to {aside.name}; "
                    f"resuming from checkpoint-{chosen}."
                )

    @staticmethod
    def _identify_run(resumed: str | None) -> str:
        """The run that `resumed` is of, or a new one."""
        known = run_of(Path(resumed)) if resumed else None
        return gather_object([known or uuid4().hex])[0]  # the main process's

    # ----------------------------------------------------------------------------------------------- hooks into saving

    def _save_checkpoint(self, model, trial):
        self._refuse_unfinite_parameters("Before the save of")
        run = Path(self._get_output_dir(trial=trial))
        folder = checkpoint_folder(run, self.state.global_step)
        with telling_what_is_kept(run, f"checkpoint {str(folder)!r}"):
            if self.args.should_save:
                uncommit(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir=None, _internal_call=False):
        if _internal_call:  # of a checkpoint, or of a model that is on disk already
            return super().save_model(output_dir, _internal_call)
        with telling_what_is_kept(Path(self.args.output_dir), f"model in {(output_dir or self.args.output_dir)!r}"):
            return super().save_model(output_dir)

    def _save_rng_state(self, output_dir: str):
        # The last files but trainer_state.json, and the last place that all ranks pass before transformers deletes
        # older checkpoints.
        super()._save_rng_state(output_dir)
        state = self._resume_state()
        write_atomically(self._rank_file(output_dir), lambda stream: torch.save(state, stream))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(Path(output_dir), self._run_id)

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
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self._stop_after_last_step()

    def _stop_after_last_step(self) -> None:
        """SIGTERM that came since the last step began, in its save perhaps: as after any other step."""
        if self._stop.agreed or not self._any_rank(self.sigterm_received):
            return
        self._stop.agreed = self.sigterm_received = True
        checkpoint = checkpoint_folder(Path(self.args.output_dir), self.state.global_step)
        if gather_object([why_incomplete(checkpoint)])[0] is not None:  # the main process's disk decides
            self._save_checkpoint(self.model, trial=None)
        self.state.best_model_checkpoint = None  # see StopOnSigterm.on_save

    def _restore(self, checkpoint: str) -> None:
        path = self._rank_file(checkpoint)
        state, broken = None, None
        try:
            state = send_to_device(read_rank_file(path), self.accelerator.device)
        except ValueError as error:
            broken = str(error)
        self._raise_together(broken)
        if self._ranks_with_unfinite_parameters():  # an earlier version saved it, or someone else
            raise ValueError(
                f"cannot resume from {checkpoint!r}: a parameter in it is NaN or infinite; move this folder away to "
                "resume from an earlier one."
            )
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
