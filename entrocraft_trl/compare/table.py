"""The table of a comparison: a row for each method and band, means and standard deviations over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

from .experiment import Experiment
from .figures import FIGURES, Measured, measure
from .jobs import Start
from .records import spread


def rows_of(experiment: Experiment, start: Start, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Rows as JSON values: `method`, `paper` (arXiv number), `regime` (the experiment's name), `schedule` (the band's),
    `seeds`, and each figure's mean, with the standard deviations in `std`. A method that no band steers is measured
    beside every band.
    """
    rows = []
    for band, plan in list(experiment.bands.items()) or [(None, None)]:
        knots = plan and plan.knots(start.entropy)
        for name in experiment.arms:
            chosen = [record for record in records if record["arm"] == name and record["band"] in (band, None)]
            if not chosen:  # of a comparison that was cut short
                continue
            found = [measure(Measured(r, knots, plan and plan.jump, experiment.report.skip)) for r in chosen]
            means = {figure: spread([figures[figure] for figures in found]) for figure in FIGURES}
            rows.append(
                {
                    "method": name,
                    "paper": experiment.arms[name].paper,
                    "regime": experiment.name,
                    "schedule": band,
                    "seeds": sorted(record["seed"] for record in chosen),
                    **{key_of(figure, experiment): value["mean"] for figure, value in means.items()},
                    "std": {key_of(figure, experiment): value["std"] for figure, value in means.items()},
                }
            )
    return rows


def key_of(figure: str, experiment: Experiment) -> str:
    """The figure's name in JSON: `mean_at_32` of `mean_at_n` at 32 samples."""
    return figure.removesuffix("_n") + f"_{experiment.evaluation.samples}" if figure.endswith("_at_n") else figure


def markdown(experiment: Experiment, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows with the columns that the experiment asks for; spreads where there are several seeds."""
    columns = experiment.report.columns
    titles = [FIGURES[column].title.format(n=experiment.evaluation.samples) for column in columns]
    with_band = any(row["schedule"] is not None for row in rows)
    heading = [*(["band"] if with_band else []), "method", *titles]
    lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    for row in rows:
        method = f"[{row['method']}](https://arxiv.org/abs/{row['paper']})" if row["paper"] else row["method"]
        cells = [row["schedule"], method] if with_band else [method]
        lines.append("| " + " | ".join([*cells, *(cell(experiment, row, column) for column in columns)]) + " |")
    return "\n".join(lines) + "\n"


def cell(experiment: Experiment, row: Mapping[str, Any], figure: str) -> str:
    """One figure of a row: its mean and, over several seeds, its spread."""
    key, form = key_of(figure, experiment), FIGURES[figure].form
    if row[key] is None:
        return "–"
    return form.format(row[key]) + (f" ± {form.format(row['std'][key]).lstrip('+')}" if len(row["seeds"]) > 1 else "")


def caption(experiment: Experiment, start: Start) -> str:
    """What the table is about, and how it was made."""
    evaluation, seeds, n = experiment.evaluation, experiment.seeds, experiment.evaluation.samples
    repeats = f", {evaluation.repeats} times over" if evaluation.repeats > 1 else ""
    over = (
        f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    )
    sentences = [
        f"{experiment.max_steps} optimizer steps from {start.entropy:.3f} nats; {over}.",
        f"Evaluated with {n} samples of each held-out prompt{repeats}, at temperature {evaluation.temperature:g}; "
        f"there the starting policy has mean@{n} {start.evaluation[f'mean@{n}']:.3f}, pass@{n} "
        f"{start.evaluation[f'pass@{n}']:.3f} and {start.evaluation['distinct_correct']:.1f} distinct right answers.",
    ]
    if experiment.bands:
        sentences.append(
            f"Distances from the band leave out the first {experiment.report.skip:.0%} of the steps, the way into it."
        )
    return " ".join([*sentences, *([experiment.report.note] if experiment.report.note else [])])
