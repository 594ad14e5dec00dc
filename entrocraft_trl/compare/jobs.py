"""The runs that an experiment means, what each is known by, and the record that it leaves."""

import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from ..control.schedule import Knot
from ..metric_names import ACCEPTED, HIGH, LOW
from ..reports.log import entropy_key, read_log
from .arms import TRAINERS, method_version
from .bands import FollowsBand, band_of
from .experiment import Arm, Experiment
from .records import read_record, write_record
from .run import evaluate, load, train_and_evaluate


class RunError(RuntimeError):
    """Runs failed, cannot begin, or a worker was killed; what is done is kept."""


@dataclass(frozen=True)
class Start:
    """The starting policy as it was measured: its entropy in nats on training prompts, and its evaluation."""

    identity: dict[str, Any]
    entropy: float
    evaluation: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run: an arm on a seed, with a band in nats if it is steered, and with a candidate's settings."""

    experiment: Experiment
    arm: Arm
    seed: int
    band: str | None = None
    knots: tuple[Knot, ...] | None = None
    more: tuple[tuple[str, Any], ...] = ()
    start: dict[str, Any] | None = None

    @property
    def title(self) -> str:
        """For a line of the progress."""
        band, tried = f", band {self.band}" if self.band else "", ", ".join(f"{k} {v}" for k, v in self.more)
        return f"{self.arm.name}{band}, seed {self.seed}" + (f", with {tried}" if tried else "")

    def settings(self) -> dict[str, Any]:
        """
        What the run is known by, as JSON values: all of its settings, where it starts, the versions of its method and
        of the libraries. Its name in the table is none of them.
        """
        experiment = self.experiment
        settings = {
            "method": self.arm.method,
            "arm": {**self.arm.settings, **dict(self.more)},
            "follow": self.arm.follow,
            "training": {**experiment.task.arguments(), **experiment.training},
            "knots": self.knots and [list(knot) for knot in self.knots],
            "seed": self.seed,
            "evaluation": experiment.evaluation._asdict(),
            "start": self.start,
            "method_version": method_version(self.arm.method),
            "processes": PartialState().num_processes,
            "versions": library_versions(),
        }
        return json.loads(json.dumps(settings))

    @property
    def file_name(self) -> str:
        """Of the record, without suffix, and of the folder with checkpoints: what a person looks for, and a digest."""
        words = [self.arm.name, *([self.band] if self.band else []), str(self.seed)]
        plain = "-".join("".join(c if c.isalnum() else "_" for c in word.lower()) for word in words)
        return f"{plain}-{digest_of(self.settings())}"

    def record(self, folder: Path) -> dict[str, Any] | None:
        """The record that the run, under whatever name, has left in `folder`; `None` if it did not finish."""
        settings = self.settings()
        for file in sorted(folder.glob(f"*-{digest_of(settings)}.json")):
            if (record := read_record(file, settings)) is not None:
                return {**record, "arm": self.arm.name, "band": self.band}
        return None


@functools.cache
def library_versions() -> dict[str, str]:
    """Of the libraries that a training is made of."""
    return {name: version(name) for name in ("trl", "transformers", "torch")}


def digest_of(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def jobs_of(experiment: Experiment, start: Start, chosen: dict[str, dict[str, Any]]) -> list[Job]:
    """
    All runs for the table. A method that no band steers runs once on each seed; seeds come first, so that a comparison
    that is cut short has whole tables.

    Args:
        chosen (`dict[str, dict]`): Settings of each arm that was tuned.
    """
    jobs = []
    for seed in experiment.seeds:
        for arm in experiment.arms.values():
            more = tuple(chosen.get(arm.name, {}).items())
            for band in (experiment.bands or [None]) if arm.is_steered else [None]:
                jobs.append(_job(experiment, start, arm, seed, band, more))
    return jobs


def tuning_jobs(experiment: Experiment, start: Start) -> list[Job]:
    """The runs that choose among candidates, in the order of the file."""
    tuning = experiment.tuning
    if tuning is None:
        return []
    return [
        _job(experiment, start, arm, tuning.seed, tuning.band if arm.is_steered else None, tuple(more.items()))
        for arm in experiment.arms.values()
        for more in tuning.candidates.get(arm.name, [])
    ]


def _job(experiment: Experiment, start: Start, arm: Arm, seed: int, band: str | None, more: tuple) -> Job:
    try:
        knots = tuple(experiment.bands[band].knots(start.entropy)) if band is not None else None
    except ValueError as error:  # known only now that the entropy is
        raise RunError(f"{experiment.file}: bands.{band}: {error}") from error
    # Evaluations of the start do not matter to a run; its entropy does only through the band.
    return Job(experiment, arm, seed, band, knots, more, start.identity)


# ----------------------------------------------------------------------------------------------------------- measuring


class ReportsSteps(TrainerCallback):
    """Calls `report` with the number of optimizer steps made, those of an earlier life included."""

    def __init__(self, report: Callable[[int], None]):
        self.report = report

    def on_train_begin(self, args, state, control, **kwargs):
        self.report(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.report(state.global_step)


def run_job(job: Job, folder: Path, report: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """
    Train, evaluate and keep the record in `folder`; a run that was killed goes on from its last checkpoint. Under a
    launcher all ranks call this together, and the main process writes.
    """
    record = from_main_process(job.record(folder))
    if record is not None:
        return record
    experiment, arm = job.experiment, job.arm
    run_folder = folder / job.file_name
    args = experiment.config(arm, str(run_folder), job.seed, job.knots, dict(job.more))
    task = experiment.task.task(job.seed, experiment.evaluation.temperature, args.max_completion_length)
    callbacks = [ReportsSteps(report)]
    if arm.follow:
        callbacks.append(FollowsBand(arm.follow, job.knots))
    options = experiment.evaluation._asdict()
    held_out = task.test if options.pop("every") else None
    options.pop("temperature")
    run = train_and_evaluate(
        TRAINERS[arm.method][0],
        args,
        task,
        callbacks=callbacks,
        loading=experiment.task.loading(),
        peft_config=experiment.task.adapter(),
        held_out=held_out,
        resume="auto",
        alike=experiment.task.has_words,
        **options,
    )
    record = {
        "arm": arm.name,
        "band": job.band,
        "seed": job.seed,
        "max_steps": experiment.max_steps,
        "samples": experiment.evaluation.samples,
        "rollouts": args.generation_batch_size,
        "controlled": arm.is_steered,
    }
    if PartialState().is_main_process:
        record |= record_of(read_log(run_folder), job.knots, experiment.max_steps)
        record["evaluation"] = run.evaluation
        record = write_record(folder / f"{job.file_name}.json", job.settings(), record)
        for checkpoint in run_folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return from_main_process(record)


def from_main_process(value: Any) -> Any:
    """The main process's `value`, on all ranks of a launcher: what lies on a disk, each may see at another time."""
    return broadcast_object_list([value])[0]


def record_of(log: list[dict[str, Any]], knots: Sequence[Knot] | None, max_steps: int) -> dict[str, Any]:
    """
    What a log says step by step, as JSON values: `series` at the readings of the entropy, with the number of steps
    made before each; `step_seconds` of every step and their sum `seconds`; `held_out` points of evaluations during
    training; and the log itself.
    """
    readings = [entry for entry in log if "reward" in entry and entropy_key(log) in entry]
    steps = [entry["step"] - 1 for entry in readings]
    edges = [band_of(knots, step / max_steps) for step in steps] if knots else [(None, None)] * len(steps)
    accuracy = next((key for entry in log for key in entry if key.startswith("eval_mean@")), None)
    # A run that goes on from a checkpoint evaluates it once more; the first time counts.
    held_out = list({entry["step"]: entry for entry in reversed(log) if accuracy in entry}.values())[::-1]
    seconds = [entry["step_time"] for entry in log if "step_time" in entry]
    return {
        "series": {
            "step": steps,
            "entropy": [entry[entropy_key(log)] for entry in readings],
            "low": [entry.get(LOW, low) for entry, (low, _) in zip(readings, edges, strict=True)],
            "high": [entry.get(HIGH, high) for entry, (_, high) in zip(readings, edges, strict=True)],
            "reward": [entry["reward"] for entry in readings],
            "accepted": [entry.get(ACCEPTED, 1.0) for entry in readings],
        },
        "step_seconds": seconds,
        "seconds": sum(seconds),
        "held_out": {"step": [e["step"] for e in held_out], "accuracy": [e[accuracy] for e in held_out]},
        "log": log,
    }


def measured_start(experiment: Experiment, folder: Path, *, only_read: bool = False) -> Start | None:
    """
    The starting policy, measured, or read from `folder` if it was; with `only_read`, `None` if it was not.
    """
    evaluation = experiment.evaluation
    args = experiment.config(next(iter(experiment.arms.values())), tempfile.gettempdir(), 0, None, {})
    task = experiment.task.task(0, evaluation.temperature, args.max_completion_length)
    identity = experiment.task.identity(task.policy)
    settings = {"start": identity, "evaluation": evaluation._asdict(), "versions": library_versions()}
    settings = json.loads(json.dumps(settings))
    file = folder / f"start-{digest_of(settings)}.json"
    record = from_main_process(read_record(file, settings))
    if record is None:
        if only_read:
            return None
        policy = load(task, experiment.task.loading())
        if not getattr(policy[0], "is_quantized", False):  # such a model is where it belongs
            policy[0].to(args.device)
        options = {name: getattr(evaluation, name) for name in ("samples", "repeats", "batch_size")}
        figures = evaluate(*policy, task, alike=experiment.task.has_words, **options)
        # The entropy that a run measures first, on what it samples at temperature 1.
        prompts = experiment.task.training_prompts(task)
        warm = experiment.task.task(0, 1.0, args.max_completion_length)._replace(test=prompts)
        record = {"entropy": evaluate(*policy, warm, **options)["entropy"], "evaluation": figures}
        if PartialState().is_main_process:
            write_record(file, settings, record)
    return Start(identity, record["entropy"], record["evaluation"])
