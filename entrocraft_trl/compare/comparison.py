"""A comparison from files to results: start, tuning, runs, table, JSON, figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..atomic import write_atomically
from ..reports.plots import save_figure
from .drawing import DRAWN, draw_summary
from .experiment import Experiment
from .figures import Measured, measure
from .jobs import Job, RunError, Start, jobs_of, measured_start, tuning_jobs
from .table import caption, markdown, rows_of
from .workers import measure_start, run_jobs, under_launcher


def compare(
    experiments: Sequence[Experiment],
    output_dir: Path,
    report: Path,
    workers: int = 0,
    progress: bool = True,
    only_read: bool = False,
) -> str:
    """
    Run what is not done yet, and write table, JSON and figures.

    Args:
        experiments (`Sequence[Experiment]`): Their rows stand in one table each, one JSON and one summary.
        output_dir (`Path`): Folder of the records and of runs under way, a folder for each experiment.
        report (`Path`): Beginning of the paths of what is written: `.md`, `.json` and figures.
        workers (`int`): Runs side by side; 0: what the files say.
        only_read (`bool`): Run nothing; report of what is done.

    Returns:
        `str`: what `.md` holds.

    Raises:
        [`~jobs.RunError`]: If runs failed, after all others have ended and the report is written; if a worker was
            killed.
    """
    parts, rows, content = [], [], {"starts": {}, "tuning": {}}
    failures: dict[str, str] = {}
    figures: dict[str, Any] = {}
    for experiment in experiments:
        folder = output_dir / experiment.name
        start, tuning, records, failed = run_experiment(experiment, folder, workers, progress, only_read)
        failures |= {f"{experiment.name}, {title}": error for title, error in failed.items()}
        found = rows_of(experiment, start, records)
        rows += found
        heading = f"## {experiment.name.replace('_', ' ')}\n\n" if len(experiments) > 1 else ""
        parts.append(f"{heading}{caption(experiment, start)}\n\n{markdown(experiment, found)}")
        if tuning:
            parts.append(_told(experiment, tuning))
        content["starts"][experiment.name] = {"entropy": start.entropy, **start.evaluation}
        content["tuning"][experiment.name] = tuning
        for name in experiment.report.figures:
            figures[_figure_name(experiment, name, len(experiments))] = DRAWN[name](experiment, start, records)
    if len(rows) > 1 and any(experiment.report.summary for experiment in experiments):
        figures["_summary"] = draw_summary(experiments, rows)
    text = "\n".join(parts)
    if not under_launcher() or PartialState().is_main_process:
        report.parent.mkdir(parents=True, exist_ok=True)
        for suffix, written in ((".json", json.dumps({**content, "rows": rows}, indent=1) + "\n"), (".md", text)):
            path = report.with_name(report.name + suffix)
            write_atomically(path, lambda stream, written=written: stream.write(written.encode()))
        for name, figure in figures.items():
            save_figure(figure, report.with_name(f"{report.name}{name}.png"))
    if failures:
        told = "; ".join(f"{title}: {error}" for title, error in failures.items())
        raise RunError(f"{len(failures)} runs failed, and the table is without them: {told}")
    return text


def run_experiment(
    experiment: Experiment, folder: Path, workers: int = 0, progress: bool = True, only_read: bool = False
) -> tuple[Start, dict[str, list[dict[str, Any]]], list[dict[str, Any]], dict[str, str]]:
    """
    The start, what tuning tried, by arm, the records of all runs for the table, and what failed, by title. With
    `only_read`, those that are done; an arm whose candidates are not all done has none yet.

    Raises:
        ValueError: With `only_read`, if not even the start was measured.
    """
    start = measured_start(experiment, folder, only_read=True) if only_read else measure_start(experiment, folder)
    if start is None:
        raise ValueError(f"no run of {experiment.name} is done in {str(folder)!r}")
    failures: dict[str, str] = {}

    def records_of(jobs: Sequence[Job]) -> list[dict[str, Any] | None]:
        if only_read or not jobs:
            return [job.record(folder) for job in jobs]
        records, failed = run_jobs(jobs, folder, workers or experiment.workers, progress)
        failures.update(failed)
        return records

    tried = tuning_jobs(experiment, start)
    tuning: dict[str, list[dict[str, Any]]] = {}
    waiting = set()  # arms of which nobody knows yet what is best
    for job, record in zip(tried, records_of(tried), strict=True):
        value = None if record is None else _score(experiment, start, record)
        if record is None and only_read:
            waiting.add(job.arm.name)
        tuning.setdefault(job.arm.name, []).append({"settings": dict(job.more), "value": value, "chosen": False})
    chosen = {}
    for name in tuning.keys() - waiting:
        best = choose(tuning[name], experiment.tuning.best)
        best["chosen"] = True
        chosen[name] = best["settings"]
    jobs = [job for job in jobs_of(experiment, start, chosen) if job.arm.name not in waiting]
    return start, tuning, [record for record in records_of(jobs) if record is not None], failures


def choose(candidates: Sequence[dict[str, Any]], best: str) -> dict[str, Any]:
    """The candidate of the best value, the first of equal ones; one without a value, whose run failed, comes last."""
    sign = 1.0 if best == "smallest" else -1.0
    return min(candidates, key=lambda c: float("inf") if c["value"] is None else sign * c["value"])


def _score(experiment: Experiment, start: Start, record: dict[str, Any]) -> float | None:
    plan = experiment.bands.get(experiment.tuning.band)
    knots = plan and plan.knots(start.entropy)
    run = Measured(record, knots, plan and plan.jump, experiment.report.skip)
    return measure(run)[experiment.tuning.by]


def _told(experiment: Experiment, tuning: dict[str, list[dict[str, Any]]]) -> str:
    """Which settings were tried and taken, in a line a method."""
    figure, seed = experiment.tuning.by.replace("_at_n", f"@{experiment.evaluation.samples}"), experiment.tuning.seed
    lines = [f"Tuned on seed {seed}, {experiment.tuning.best} {figure}; the settings that were taken are in bold:", ""]
    for name, candidates in tuning.items():
        words = []
        for candidate in candidates:
            settings = ", ".join(f"{key} {value}" for key, value in candidate["settings"].items()) or "as it is"
            value = "–" if candidate["value"] is None else f"{candidate['value']:.3g}"
            words.append(f"**{settings}** ({value})" if candidate["chosen"] else f"{settings} ({value})")
        lines.append(f"- {name}: " + "; ".join(words))
    return "\n".join(lines) + "\n"


def _figure_name(experiment: Experiment, name: str, experiments: int) -> str:
    """What comes after the report's name: nothing for the one figure of one experiment."""
    which = f"_{experiment.name}" if experiments > 1 else ""
    return which + ("" if name == experiment.report.figures[0] else f"_{name}")
