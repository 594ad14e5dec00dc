"""Figures of a comparison: a small panel for each method, all seeds in it, and a summary of all methods."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..evaluation.accuracy import pass_at_k_curve
from ..printable import printable
from ..reports.plots import BAND_ALPHA, BAND_COLOUR, COLOURS
from .bands import band_of
from .experiment import Experiment
from .figures import FIGURES, WINDOW, running_mean
from .jobs import Start
from .table import key_of


COLUMNS = 4  # of panels, where one band or none is compared
SUMMARY = ("mean_at_n", "distinct_correct", "rms_outside", "final_entropy", "step_seconds")
Records = Sequence[Mapping[str, Any]]


def draw_entropy(experiment: Experiment, start: Start, records: Records) -> Figure:
    """Every seed's entropy over its band: panels of methods by bands, or of methods alone."""

    def panel(axis: Axes, chosen: Records, band: str | None) -> None:
        if band is not None:
            knots = experiment.bands[band].knots(start.entropy)
            steps = range(experiment.max_steps + 1)
            low, high = zip(*(band_of(knots, step / experiment.max_steps) for step in steps), strict=True)
            axis.fill_between(steps, low, high, color=BAND_COLOUR, alpha=BAND_ALPHA, linewidth=0)
        for record, colour in zip(chosen, _colours(chosen), strict=True):
            axis.plot(record["series"]["step"], record["series"]["entropy"], color=colour, linewidth=0.8, alpha=0.8)

    return _panels(experiment, records, panel, "optimizer step", "entropy (nats)")


def draw_reward(experiment: Experiment, start: Start, records: Records) -> Figure:
    """Running means of the reward; dashed, the mean over seeds of the first method."""

    def curve(record: Mapping[str, Any]) -> tuple[list[float], list[float]]:
        means = running_mean(record["series"]["reward"])
        return record["series"]["step"][-len(means) :], means

    figure = _curves(experiment, records, curve, "optimizer step", f"reward, mean of {WINDOW} readings")
    figure.axes[0].set_xlim(left=0)
    return figure


def draw_pass_at_k(experiment: Experiment, start: Start, records: Records) -> Figure:
    """pass@k over k; dashed, the mean over seeds of the first method."""

    def curve(record: Mapping[str, Any]) -> tuple[list[float], list[float]]:
        shares = pass_at_k_curve(record["evaluation"])
        return list(shares), list(shares.values())

    figure = _curves(experiment, records, curve, "k (samples a prompt)", "pass@k")
    for axis in figure.axes:
        ks = [k for k in (1, 4, 16, 64) if k <= experiment.evaluation.samples]
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.minorticks_off()
    return figure


DRAWN = {"entropy": draw_entropy, "reward": draw_reward, "pass_at_k": draw_pass_at_k}


def draw_summary(experiments: Sequence[Experiment], rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Figures of all methods as dots, a standard deviation to both sides, a colour for each experiment and band."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    sets = list(dict.fromkeys((row["regime"], row["schedule"]) for row in rows))
    figure = Figure(figsize=(2.6 * len(SUMMARY) + 2, 0.24 * len(methods) * max(1, len(sets)) ** 0.5 + 1.4), dpi=150)
    axes = figure.subplots(1, len(SUMMARY), sharey=True, squeeze=False)[0]
    by_name = {experiment.name: experiment for experiment in experiments}
    for axis, name in zip(axes, SUMMARY, strict=True):
        for index, (regime, schedule) in enumerate(sets):
            experiment = by_name[regime]
            key = key_of(name, experiment)
            chosen = [r for r in rows if (r["regime"], r["schedule"]) == (regime, schedule) and r[key] is not None]
            shift = (index - (len(sets) - 1) / 2) * 0.7 / len(sets)
            axis.errorbar(
                [row[key] for row in chosen],
                [methods.index(row["method"]) + shift for row in chosen],
                xerr=[row["std"][key] for row in chosen],
                fmt="o",
                markersize=3.5,
                linewidth=1,
                color=COLOURS[index % len(COLOURS)],
                label=" ".join(filter(None, (regime.replace("_", " "), schedule))),
            )
        axis.set_xlabel(FIGURES[name].title.format(n=experiments[0].evaluation.samples), fontsize=9)
        axis.grid(axis="both", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        highest = max((row[key_of(name, by_name[row["regime"]])] or 0.0 for row in rows), default=1.0)
        axis.set_xlim(left=-0.04 * highest)  # a dot at 0 is a whole dot
    axes[0].set_yticks(range(len(methods)), [printable(method) for method in methods], fontsize=9)
    axes[0].set_ylim(len(methods) - 0.4, -0.6)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False)
    figure.set_layout_engine("constrained")
    return figure


# -------------------------------------------------------------------------------------------------------------- panels


def _curves(
    experiment: Experiment,
    records: Records,
    curve: Callable[[Mapping[str, Any]], tuple[list[float], list[float]]],
    x_label: str,
    y_label: str,
) -> Figure:
    """Panels of one curve a seed, with the first method's mean behind them."""
    first = next(iter(experiment.arms))

    def panel(axis: Axes, chosen: Records, band: str | None) -> None:
        beside = [curve(record) for record in _of_panel(records, first, band)]
        if beside and chosen and chosen[0]["arm"] != first:
            shortest = min(len(x) for x, _ in beside)
            means = [mean(values) for values in zip(*(y[:shortest] for _, y in beside), strict=True)]
            axis.plot(beside[0][0][:shortest], means, color="#444444", linestyle="--", linewidth=0.9)
        for record, colour in zip(chosen, _colours(chosen), strict=True):
            axis.plot(*curve(record), color=colour, linewidth=0.9, alpha=0.85)

    return _panels(experiment, records, panel, f"{x_label}; dashed: {printable(first)}", y_label)


def _of_panel(records: Records, arm: str, band: str | None) -> list[Mapping[str, Any]]:
    return [record for record in records if record["arm"] == arm and record["band"] in (band, None)]


def _colours(chosen: Records) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(chosen))]


def _panels(
    experiment: Experiment,
    records: Records,
    panel: Callable[[Axes, Records, str | None], None],
    x_label: str,
    y_label: str,
) -> Figure:
    """A panel for each method and band, methods in lines where there are several bands."""
    bands, done = list(experiment.bands) or [None], {record["arm"] for record in records}
    arms = [arm for arm in experiment.arms if arm in done] or list(experiment.arms)
    if len(bands) > 1:
        lines, columns = len(arms), len(bands)
        places = {(arm, band): (line, column) for line, arm in enumerate(arms) for column, band in enumerate(bands)}
    else:
        columns = min(COLUMNS, len(arms))
        lines = math.ceil(len(arms) / columns)
        places = {(arm, bands[0]): divmod(index, columns) for index, arm in enumerate(arms)}
    figure = Figure(figsize=(2.6 * columns, 1.75 * lines + 0.4), dpi=150, layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for (arm, band), (line, column) in places.items():
        axis = axes[line][column]
        panel(axis, _of_panel(records, arm, band), band)
        title = printable(arm) if len(bands) == 1 else f"{arm}, {str(band).replace('_', ' ')}"
        axis.set_title(title, fontsize=8).set_parse_math(False)
    for axis in axes.flat[len(places) :]:
        axis.set_visible(False)
    for column, above in enumerate(axes[-2] if lines > 1 else ()):  # its numbers stand below a panel that is hidden
        above.tick_params(labelbottom=not axes[-1][column].get_visible())
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0][0].set_ylim(bottom=0)
    figure.supxlabel(x_label, fontsize=9)
    figure.supylabel(y_label, fontsize=9)
    return figure
