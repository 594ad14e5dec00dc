"""Table, JSON and figure of `benchmarks.rules`, from the figures of its policies."""

import json
import math

from benchmarks.rules import BATCHES, GROUP, PROMPTS, STEP_KL
from benchmarks.runs import RESULTS


def write_report(rows: list[dict]) -> None:
    """Write `rules.json`, `rules.md` and `rules.png`, and print the table."""
    rows.sort(key=lambda row: -row["entropy"])
    summary = summarise(rows)
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"step_kl": STEP_KL, "signs": summary, "rows": rows}
    (RESULTS / "rules.json").write_text(json.dumps(content, indent=2) + "\n")
    text = (
        f"Policies by falling entropy; {BATCHES} batches of {PROMPTS * GROUP} rollouts, {GROUP} a prompt (mean ± "
        "standard deviation over batches). Margin: mean over rollouts of the sum of S - N, N exact. Predicted: minus "
        "the sum of `c_i` over the accepted rollouts, per accepted token and unit of step (1e-3 nats). Realised: "
        f"change of the mean token entropy (1e-3 nats) after one SGD step of KL {STEP_KL:g} per token, on the same "
        "contexts, and on fresh samples (common random numbers). Made by `python -m benchmarks.rules`.\n\n"
        f"{markdown(rows)}\n"
        "Clear: the change is more than two standard errors (over batches) from 0. By the advantage's sign, a "
        "negative-only update raises the entropy and a positive-only one lowers it.\n\n"
        f"{verdict(summary)}"
    )
    (RESULTS / "rules.md").write_text(text)
    print(text)
    draw(rows).savefig(RESULTS / "rules.png", dpi=150, bbox_inches="tight")


def sign_matches(rows: list[dict], expected: str, realised: str) -> dict[str, str]:
    """
    On how many of the one-sided updates does the realised change have the expected sign, of all updates and of those
    whose change differs from 0 by more than two standard errors?
    """
    right = {"all": [], "clear": []}
    for row in rows:
        for side in ("negative", "positive"):
            change = row[f"{realised}_{side}"]
            if change is None:
                continue
            # What the paper's theorem says: negative-only raises the entropy, positive-only lowers it.
            theorem = 1.0 if side == "negative" else -1.0
            match = (theorem if expected == "theorem" else row[f"{expected}_{side}"]) * change > 0
            right["all"].append(match)
            if abs(change) > 2 * row.get(f"{realised}_{side}_std", math.inf) / math.sqrt(BATCHES):
                right["clear"].append(match)
    return {name: f"{sum(matches)}/{len(matches)}" for name, matches in right.items()}


def markdown(rows: list[dict]) -> str:
    lines = [
        "| # | policy | entropy (nats) | reward | margin, wrong | margin, right | rules agree | weighted by c | "
        "negative-only: predicted | realised | fresh samples | positive-only: predicted | realised | fresh samples |",
        "|---" * 14 + "|",
    ]
    for index, row in enumerate(rows, start=1):
        cells = [str(index), row["policy"], f"{row['entropy']:.3f}", f"{row['reward']:.3f}"]
        cells += [cell(row, "margin_negative", "{:+.3f}"), cell(row, "margin_positive", "{:+.3f}")]
        cells += [cell(row, "agreement", "{:.0%}"), cell(row, "agreement_weighted", "{:.0%}")]
        for side in ("negative", "positive"):
            cells.append(cell(row, f"predicted_{side}", "{:+.1f}", 1e3))
            for name in ("realised", "realised_fresh"):
                cells.append(cell(row, f"{name}_{side}", "{:+.2f}", 1e3))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(row: dict, name: str, form: str, scale: float = 1.0) -> str:
    """A number, with its standard deviation over batches where there is one."""
    if row[name] is None:
        return "–"
    text = form.format(scale * row[name])
    if f"{name}_std" in row:
        text += " ± " + form.replace("+", "").format(scale * row[f"{name}_std"])
    return text


def draw(rows: list[dict]):
    """Agreement and margins against entropy (left), predicted against realised changes (middle and right)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 4.6))
    grid = figure.add_gridspec(2, 3)
    share, margin = (figure.add_subplot(grid[line, 0]) for line in (0, 1))
    share.sharex(margin)
    entropies = [row["entropy"] for row in rows]
    share.plot(entropies, [row["agreement"] for row in rows], "o", color="#009E73", label="of the rollouts")
    weighted = [row["agreement_weighted"] for row in rows]
    share.plot(entropies, weighted, "s", color="#666666", markerfacecolor="none", label="of the sum of |c|")
    number_points(share, zip(entropies, [row["agreement"] for row in rows], strict=True))
    share.set(ylim=(0, 1), ylabel="both rules agree on")
    share.tick_params(labelbottom=False)
    for side, (title, colour, marker) in SIDES.items():
        values = [row[f"margin_{side}"] for row in rows]
        margin.plot(entropies, values, marker, color=colour, label=f"{title} rollouts")
    margin.axhline(0, color="#999999", linewidth=0.8)
    margin.set(xlabel="policy entropy (nats)", ylabel="mean margin (nats)")
    for axis in (share, margin):
        axis.legend(fontsize=7, ncols=2, loc="lower left", bbox_to_anchor=(0, 0.97), frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    for column, name, title in ((1, "realised", "on the same contexts"), (2, "realised_fresh", "on fresh samples")):
        axis = figure.add_subplot(grid[:, column])
        draw_changes(axis, rows, name)
        axis.set_title(f"entropy change {title}", fontsize=10)
    figure.axes[2].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    return figure


SIDES = {"negative": ("wrong", "#0072B2", "v"), "positive": ("right", "#D55E00", "^")}


def draw_changes(axis, rows: list[dict], name: str) -> None:
    """Predicted against realised changes (1e-3 nats), square-root scaled; in the grey quadrants their signs agree."""
    import numpy as np

    def root(values):
        return np.sign(values) * np.abs(values) ** 0.5

    def square(values):
        return values * abs(values)

    reach_x, reach_y = 60.0, 6.0
    for side, (_, colour, marker) in SIDES.items():
        x = [1e3 * row[f"predicted_{side}"] for row in rows]
        y = [1e3 * row[f"{name}_{side}"] for row in rows]
        errors = [1e3 * row[f"{name}_{side}_std"] / math.sqrt(BATCHES) for row in rows]
        axis.errorbar(x, y, yerr=errors, fmt=marker, color=colour, linewidth=1, label=f"{side}-only update")
        number_points(axis, zip(x, y, strict=True), colour)
    axis.axhline(0, color="#999999", linewidth=0.8)
    axis.axvline(0, color="#999999", linewidth=0.8)
    axis.set_xscale("function", functions=(root, square))
    axis.set_yscale("function", functions=(root, square))
    axis.set(xlim=(-reach_x, reach_x), ylim=(-reach_y, reach_y))
    axis.set(xticks=(-50, -20, -5, 0, 5, 20, 50), yticks=(-5, -2, -0.5, 0, 0.5, 2, 5))
    axis.axvspan(0, reach_x, 0.5, 1.0, color="#F0F0F0", zorder=0)
    axis.axvspan(-reach_x, 0, 0.0, 0.5, color="#F0F0F0", zorder=0)
    axis.set(xlabel="predicted (1e-3 nats per unit of step)", ylabel="realised (1e-3 nats)")
    axis.spines[["top", "right"]].set_visible(False)


def number_points(axis, points, colour: str = "#333333") -> None:
    """The policies' numbers in the table beside their points."""
    for index, point in enumerate(points, start=1):
        axis.annotate(str(index), point, textcoords="offset points", xytext=(5, 3), fontsize=7, color=colour)


def summarise(rows: list[dict]) -> dict[str, dict[str, str]]:
    """How often each way to foresee the direction of a one-sided update was right."""
    return {
        f"{expected}_{realised}": sign_matches(rows, expected, realised)
        for expected in ("theorem", "predicted")
        for realised in ("realised", "realised_fresh")
    }


def verdict(summary: dict[str, dict[str, str]]) -> str:
    lines = [
        "| direction of a one-sided update foreseen by | same contexts, all | same contexts, clear "
        "| fresh samples, all | fresh samples, clear |",
        "|---" * 5 + "|",
    ]
    titles = {"theorem": "sign of the advantage", "predicted": "predicted entropy change"}
    for expected, title in titles.items():
        counts = [
            summary[f"{expected}_{realised}"][which]
            for realised in ("realised", "realised_fresh")
            for which in ("all", "clear")
        ]
        lines.append(f"| {title} | " + " | ".join(counts) + " |")
    return "\n".join(lines) + "\n"
