"""An experiment: methods with their settings, bands, seeds, task, budget, evaluation. `reading` reads it from YAML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..control.config import EntropyControlConfig
from .arms import TRAINERS
from .bands import BandPlan, band_fields, band_of, followed
from .start import StartingPoint


class Arm(NamedTuple):
    """
    A method of the experiment: its name in tables, that in [`TRAINERS`], its settings, which of its settings in nats
    follow the band, and which edge of it, and where it is from, as an arXiv number ("": nowhere).
    """

    name: str
    method: str
    settings: dict[str, Any]
    follow: dict[str, str]
    paper: str = ""

    @property
    def takes_bands(self) -> bool:
        """Whether the method itself takes a band."""
        return issubclass(TRAINERS[self.method][1], EntropyControlConfig)

    @property
    def is_steered(self) -> bool:
        """Whether the run depends on the band: one that does not serves all bands."""
        return self.takes_bands or bool(self.follow)


class Evaluation(NamedTuple):
    """
    How a trained policy is measured: `samples` of each held-out prompt at a temperature, `repeats` times over; and,
    with `every`, after so many optimizer steps during training, as the trainer evaluates: at its own temperature,
    `samples` a prompt.
    """

    temperature: float = 0.6
    samples: int = 32
    repeats: int = 1
    batch_size: int = 512
    every: int | None = None


class Tuning(NamedTuple):
    """
    Settings that are tried for each method on a seed and a band of their own; the best by the figure `by` is trained.
    """

    seed: int
    candidates: dict[str, list[dict[str, Any]]]
    by: str = "mean_at_n"
    best: str = "largest"
    band: str | None = None


class Report(NamedTuple):
    """
    Columns of the table, a sentence over it, the share of the steps that is the way into the band, what is drawn
    (`"entropy"`, `"reward"`, `"pass_at_k"`), and whether a summary of all methods is.
    """

    columns: tuple[str, ...]
    note: str = ""
    skip: float = 0.1
    figures: tuple[str, ...] = ("entropy",)
    summary: bool = False


@dataclass(frozen=True)
class Experiment:
    """A file that was read; see `configs/compare/README.md` for its keys."""

    file: Path
    task: StartingPoint
    training: dict[str, Any]
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    bands: dict[str, BandPlan]
    evaluation: Evaluation
    tuning: Tuning | None
    report: Report
    workers: int
    checkpoint_steps: int | None

    @property
    def name(self) -> str:
        """The file's, which tables call the regime."""
        return self.file.stem

    @property
    def max_steps(self) -> int:
        return self.training["max_steps"]

    def config(self, arm: Arm, output_dir: str, seed: int, knots: Sequence | None, more: Mapping[str, Any]) -> Any:
        """
        The config that an arm trains with.

        Args:
            knots (`Sequence[Knot]`, *optional*): The band in nats.
            more (`Mapping[str, Any]`): Settings of the arm that win: those of a candidate.
        """
        settings = {"disable_tqdm": True, **self.task.arguments(), **self.training, **arm.settings, **more}
        if knots is not None and arm.takes_bands:
            settings |= band_fields(knots)
        if knots is not None:
            settings |= followed(arm.follow, band_of(knots, 0.0))
        if self.evaluation.every:
            samples = self.evaluation.samples
            settings |= {
                "eval_strategy": "steps",
                "eval_steps": self.evaluation.every,
                "eval_on_start": True,
                "num_generations_eval": samples,
                "per_device_eval_batch_size": samples * max(1, 256 // samples),
            }
        if self.checkpoint_steps:
            settings |= {"save_strategy": "steps", "save_steps": self.checkpoint_steps, "save_total_limit": 1}
        return TRAINERS[arm.method][1](**settings, output_dir=output_dir, seed=seed)
