"""Table, JSON and figure of `benchmarks.control`, from the records of its runs."""

import json
from pathlib import Path

from benchmarks.control import HALF_WIDTH, METHODS, band_around, band_knots, centre_at, measure
from entrocraft_trl.compare.records import spread


COLUMNS = {
    "rms_outside": ("RMS outside (nats)", "{:.4f}"),
    "in_band_share": ("steps inside", "{:.0%}"),
    "reentry_steps": ("re-entry (steps)", "{:.0f}"),
    "accepted_share": ("accepted", "{:.0%}"),
    "mean_at_32": ("mean@32", "{:.3f}"),
    "pass_at_32": ("pass@32", "{:.3f}"),
    "distinct_correct": ("distinct right", "{:.1f}"),
    "scatter": ("scatter (nats)", "{:.4f}"),
}


def write_report(folder: Path, records: list[dict], bands, initial: float, start: dict, tuning: dict) -> None:
    """Write `control.json`, `control.md` and `control.png` into `folder`, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for band in bands:
        knots = band_knots(initial)[band]
        for method in METHODS:
            chosen = [r for r in records if r["method"] == method and r["band"] in (band, "none")]
            if not chosen:
                continue
            figures = [measure(record, knots, band) for record in chosen]
            summary = {name: spread([figure[name] for figure in figures]) for name in COLUMNS}
            rows.append(
                {
                    "method": method,
                    "band": band,
                    "seeds": sorted(record["seed"] for record in chosen),
                    **{name: value["mean"] for name, value in summary.items()},
                    "std": {name: value["std"] for name, value in summary.items()},
                }
            )
    content = {"initial_entropy": initial, "starting_policy": start, "bonus_tuning_rms": tuning, "rows": rows}
    (folder / "control.json").write_text(json.dumps(content, indent=2) + "\n")
    table = markdown(rows)
    (folder / "control.md").write_text(
        "Mean ± standard deviation over seeds. RMS distance and steps inside leave out the first 10% of the steps; "
        f"every band is {2 * HALF_WIDTH:.2f} nats wide; initial entropy {initial:.3f} nats. Made by "
        "`python -m benchmarks.control`.\n\n" + table
    )
    print(table)
    draw(records, bands, initial).savefig(folder / "control.png", dpi=150, bbox_inches="tight")


def markdown(rows: list[dict]) -> str:
    lines = [
        "| band | method | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---|---" + "|---" * len(COLUMNS) + "|",
    ]
    for row in rows:
        cells = []
        for name, (_, form) in COLUMNS.items():
            value, std = row[name], row["std"][name]
            cells.append("–" if value is None else f"{form.format(value)} ± {form.format(std)}")
        lines.append(f"| {row['band']} | `{row['method']}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(records: list[dict], bands, initial: float):
    """One row of panels per method, one column per band: every seed's entropy over its band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(METHODS, ("#666666", "#D55E00", "#0072B2", "#009E73"), strict=True))
    figure, axes = plt.subplots(
        len(METHODS),
        len(bands),
        figsize=(2.9 * len(bands), 2.0 * len(METHODS)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for column, band in enumerate(bands):
        knots = band_knots(initial)[band]
        for line, method in enumerate(METHODS):
            axis = axes[line][column]
            for record in records:
                if record["method"] == method and record["band"] in (band, "none"):
                    steps = range(len(record["entropy"]))
                    edges = [band_around(centre_at(knots, step / record["steps"])) for step in steps]
                    low, high = zip(*edges, strict=True)
                    axis.fill_between(steps, low, high, color="#E69F00", alpha=0.25, linewidth=0)
                    axis.plot(steps, record["entropy"], color=colours[method], linewidth=0.8, alpha=0.8)
            axis.spines[["top", "right"]].set_visible(False)
            if line == 0:
                axis.set_title(band.replace("_", " then "), fontsize=10)
            if column == 0:
                axis.set_ylabel(f"{method.replace('_', ' ')}\nentropy (nats)", fontsize=9)
            if line == len(METHODS) - 1:
                axis.set_xlabel("optimizer step", fontsize=9)
    axes[0][0].set_ylim(bottom=0)
    figure.tight_layout()
    return figure
