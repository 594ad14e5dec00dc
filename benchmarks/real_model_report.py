"""Table, JSON and figure of `benchmarks.real_model`, from the records of the arms that are done."""

import json
from statistics import mean, median
from typing import Any

from benchmarks.runs import RESULTS
from entrocraft_trl.reports.log import accepted_shares, entropies, final_entropy, rewards, rms_outside, share_inside


NAMES = {
    "start": "starting policy",
    "grpo": "GRPO",
    "adaptive_bonus": "GRPO with TRL's adaptive bonus",
    "advantage_sign": "advantage sign (the paper's rule)",
    "entropy_change": "entropy change",
    "influence": "influence",
}
COLOURS = {
    "grpo": "#666666",
    "adaptive_bonus": "#CC79A7",
    "advantage_sign": "#D55E00",
    "entropy_change": "#0072B2",
    "influence": "#009E73",
}
COLUMNS = {
    "rms_outside": ("RMS outside (nats)", "{:.3f}"),
    "share_inside": ("steps in band", "{:.0%}"),
    "final_entropy": ("final entropy", "{:.2f}"),
    "reward": ("reward, last ten steps", "{:.2f}"),
    "accepted_share": ("accepted", "{:.0%}"),
    "mean@32": ("mean@32", "{:.3f}"),
    "pass@32": ("pass@32", "{:.3f}"),
    "distinct_correct": ("distinct right", "{:.1f}"),
    "self_similarity": ("self-similarity", "{:.3f}"),
    "step_seconds": ("seconds a step", "{:.0f}"),
}
EVALUATION = ("mean@32", "pass@32", "distinct_correct", "self_similarity")


def row_of(arm: str, log: list[dict[str, Any]], evaluation: dict[str, float], band: tuple[float, float]) -> dict:
    """Figures of one arm against the band, which a method without one is measured against too."""
    readings = entropies(log)
    edges = [band] * len(readings)
    return {
        "method": arm,
        "steps": len(readings),
        "rms_outside": rms_outside(readings, edges),
        "share_inside": share_inside(readings, edges),
        "final_entropy": final_entropy(readings),
        "reward": mean(rewards(log)[-10:]),
        "accepted_share": mean(accepted_shares(log) or [1.0]),
        "step_seconds": median(record["step_time"] for record in log),
        **{name: evaluation.get(name) for name in EVALUATION},
    }


def write_report(records: list[dict], start: dict[str, float] | None, band: tuple[float, float], caption: str) -> None:
    """Write `real_model.{json,md,png}`, and print the table."""
    rows = [row_of(record["arm"], record["log"], record["evaluation"], band) for record in records]
    series = {
        record["arm"]: {
            "entropy": entropies(record["log"]),
            "reward": rewards(record["log"]),
            "accepted": accepted_shares(record["log"]),
            "evaluation": record["evaluation"],
        }
        for record in records
    }
    content = {"caption": caption, "band": list(band), "start": start, "rows": rows, "series": series}
    (RESULTS / "real_model.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = table(rows, start)
    (RESULTS / "real_model.md").write_text(f"{caption}\n\n{text}", encoding="utf-8")
    print(text, flush=True)
    draw(series, band).savefig(RESULTS / "real_model.png", dpi=150, bbox_inches="tight")


def table(rows: list[dict], start: dict[str, float] | None) -> str:
    lines = [
        "| policy | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    if start:
        rows = [{"method": "start", "final_entropy": start["entropy"], **start}, *rows]
    for row in rows:
        cells = ["–" if row.get(name) is None else pattern.format(row[name]) for name, (_, pattern) in COLUMNS.items()]
        lines.append(f"| {NAMES[row['method']]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(series: dict[str, dict], band: tuple[float, float]):
    """Entropy over the band, and reward, smoothed over five steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhspan(*band, color="grey", alpha=0.2, label="band")
    for arm, values in series.items():
        style = {"color": COLOURS[arm], "label": NAMES[arm]}
        left.plot(range(1, len(values["entropy"]) + 1), values["entropy"], **style)
        smooth = [mean(values["reward"][max(index - 4, 0) : index + 1]) for index in range(len(values["reward"]))]
        right.plot(range(1, len(smooth) + 1), smooth, **style)
    left.set(xlabel="step", ylabel="entropy (nats)")
    right.set(xlabel="step", ylabel="reward (mean of five steps)")
    left.legend(fontsize=8)
    return figure
