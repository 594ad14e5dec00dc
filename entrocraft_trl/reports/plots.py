"""Figures of runs and bands. They read log records only, so they serve any trainer; nothing is shown on screen."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..atomic import write_atomically
from ..metric_names import ACCEPTED, HIGH, LOW
from ..printable import printable
from .log import Record, entropy_key, series


DPI = 150
# Okabe and Ito's palette, which colour-blind readers can tell apart. The band takes the neutral grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BAND_COLOUR = "#8C8C8C"
BAND_ALPHA = 0.3
SMOOTH_FROM = 80  # records from which a noisy curve gets a running mean over it


def plot_run(log: Sequence[Record], title: str | None = None) -> Figure:
    """
    One run: entropy against its band, reward, and the accepted share of rollouts, stacked.

    Args:
        log (`Sequence[Mapping]`):
            Records as [`~log.read_log`] returns them. A plain TRL run has no band and no accepted share: its third
            panel is left out.
        title (`str`, *optional*):
            Heading.

    Raises:
        `ValueError`: if no record holds an entropy.
    """
    steps, entropy = series(log, entropy_key(log))
    if not steps:
        raise ValueError("the log holds no entropy, so there is nothing to draw")
    accepted_steps, accepted = series(log, ACCEPTED)
    panels = 3 if accepted else 2
    figure, axes = _stack(panels)
    _shade_band(axes[0], log)
    axes[0].plot(steps, entropy, color=COLOURS[0], linewidth=1.6, label="measured")
    _finish(axes[0], "Entropy (nats)")
    _legend(axes[0], title)
    _line(axes[1], *series(log, "reward"), COLOURS[2])
    _finish(axes[1], "Mean reward")
    if accepted:
        _line(axes[2], accepted_steps, [100 * share for share in accepted], COLOURS[1])
        axes[2].set_ylim(-4, 104)
        axes[2].set_yticks([0, 50, 100])
        _finish(axes[2], "Accepted\nrollouts (%)")
    _label_steps(axes[-1])
    return figure


def plot_comparison(logs: Mapping[str, Sequence[Record]], title: str | None = None) -> Figure:
    """
    Entropy and reward of several runs, with the bands of the runs that have one.

    Args:
        logs (`Mapping[str, Sequence[Mapping]]`):
            Name of each run and its records.
        title (`str`, *optional*):
            Heading.

    Raises:
        `ValueError`: if there is no run, or a run's log holds no entropy.
    """
    if not logs:
        raise ValueError("there is no run to compare")
    figure, axes = _stack(2)
    bands = {name: (series(log, LOW), series(log, HIGH)) for name, log in logs.items()}
    bands = {name: band for name, band in bands.items() if band[0][0]}
    shared = len(bands) > 0 and all(band == next(iter(bands.values())) for band in bands.values())
    if shared:  # one grey shade; otherwise each band takes its run's colour
        _shade_band(axes[0], logs[next(iter(bands))])
    for index, (name, log) in enumerate(logs.items()):
        steps, entropy = series(log, entropy_key(log))
        if not steps:
            raise ValueError(f"the log of {name!r} holds no entropy, so there is nothing to draw")
        colour = COLOURS[index % len(COLOURS)]
        if name in bands and not shared:
            _shade_band(axes[0], log, colour, label=None)
        axes[0].plot(steps, entropy, color=colour, linewidth=1.6, label=_label(name))
        _line(axes[1], *series(log, "reward"), colour)
    _finish(axes[0], "Entropy (nats)")
    _legend(axes[0], title)
    _finish(axes[1], "Mean reward")
    _label_steps(axes[1])
    return figure


def plot_schedule(
    bands: Sequence[tuple[float, float, float]],
    unit: str = "nats",
    total_steps: int | None = None,
    title: str | None = None,
) -> Figure:
    """
    A band before any training.

    Args:
        bands (`Sequence[tuple[float, float, float]]`):
            Points `(progress, low, high)` in order, progress in 0..1, `(N, 3)`.
        unit (`str`, *optional*, defaults to `"nats"`):
            Unit of the edges, for the axis.
        total_steps (`int`, *optional*):
            Optimizer steps of the schedule, for the axis. Without it, the axis shows progress in percent.
        title (`str`, *optional*):
            Heading.

    Raises:
        `ValueError`: if there is no point.
    """
    if not bands:
        raise ValueError("there is no band to draw")
    progress, low, high = zip(*bands, strict=True)
    figure = Figure(figsize=(6.4, 3.2), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    x = [point * (total_steps or 100) for point in progress]
    axis.fill_between(x, low, high, color=BAND_COLOUR, alpha=BAND_ALPHA, linewidth=0, label="band")
    axis.plot(x, high, color=COLOURS[1], linewidth=1.6, label="high edge")
    axis.plot(x, low, color=COLOURS[0], linewidth=1.6, label="low edge")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("Optimizer step" if total_steps else "Progress of the schedule (%)")
    _finish(axis, f"Entropy ({unit})")
    _legend(axis, title)
    return figure


def plot_pass_at_k(curves: Mapping[str, Mapping[int, float]], title: str | None = None) -> Figure:
    """
    Share of prompts solved by at least one of `k` samples, against `k` on a logarithmic axis.

    Args:
        curves (`Mapping[str, Mapping[int, float]]`):
            Name of each policy and its pass@k, `{k: share}`.
        title (`str`, *optional*):
            Heading.
    """
    figure = Figure(figsize=(6.4, 3.6), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    for index, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        axis.plot(sorted(curve), [curve[k] for k in sorted(curve)], marker="o", color=colour, label=_label(name))
    _label_ks(axis, sorted({k for curve in curves.values() for k in curve}))
    _legend(axis, title)
    return figure


def plot_entropy_and_pass_at_k(
    readings: Mapping[str, Sequence[Sequence[float]]],
    band: Sequence[tuple[float, float]],
    curves: Mapping[str, Sequence[Mapping[int, float]]],
    title: str | None = None,
) -> Figure:
    """
    What a band does to the entropy, beside what that does to pass@k. Of several seeds, means are drawn over pale lines
    for each seed (entropy) and over a pale area of a sample standard deviation to both sides (pass@k).

    Args:
        readings (`Mapping[str, Sequence[Sequence[float]]]`):
            Name of each run and its entropies in nats, one a step, on each of `S` seeds, `(S, T)`.
        band (`Sequence[tuple[float, float]]`):
            Low and high edge at each step, `(T, 2)`.
        curves (`Mapping[str, Sequence[Mapping[int, float]]]`):
            Name of each policy and its pass@k on each seed, `{k: share}`, `(S,)`. A policy that is no run, such as the
            one they start from, is dashed.
        title (`str`, *optional*):
            Heading.
    """
    figure = Figure(figsize=(9.6, 4.2), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = dict(zip(readings, itertools.cycle(COLOURS), strict=False))
    low, high = zip(*band, strict=True)
    steps = range(1, len(band) + 1)
    left.fill_between(steps, low, high, color=BAND_COLOUR, alpha=BAND_ALPHA, linewidth=0, label="band")
    for name, seeds in readings.items():
        for seed in seeds if len(seeds) > 1 else ():
            left.plot(steps, seed, color=colours[name], linewidth=0.6, alpha=0.35)
        means = [mean(step) for step in zip(*seeds, strict=True)]
        left.plot(steps, means, color=colours[name], linewidth=1.6, label=_label(name))
    left.set_ylim(bottom=0)
    _finish(left, "Entropy (nats)")
    _label_steps(left)
    for name, seeds in curves.items():
        style = {"color": colours.get(name, "#444444"), "linestyle": "-" if name in colours else "--"}
        ks = sorted(seeds[0])
        shares = [[seed[k] for seed in seeds] for k in ks]
        means = [mean(share) for share in shares]
        right.plot(ks, means, marker="o", markersize=4, linewidth=1.6, **style)
        if len(seeds) > 1:
            sides = [(m - stdev(share), m + stdev(share)) for m, share in zip(means, shares, strict=True)]
            right.fill_between(ks, *zip(*sides, strict=True), color=style["color"], alpha=0.15, linewidth=0)
        if name not in colours:  # the legend is the left panel's
            left.plot([], [], label=_label(name), **style)
    _label_ks(right, sorted({k for seeds in curves.values() for curve in seeds for k in curve}))
    _legend(left, title)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike) -> Path:
    """Write a figure in one piece, making its folder; the suffix says the format (PNG without). Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:] or "png", dpi=DPI)
    write_atomically(path, lambda stream: stream.write(image.getvalue()))
    return path


def _stack(panels: int) -> tuple[Figure, list[Axes]]:
    """Panels over one another on a common step axis; the first is the tallest."""
    heights = [1.7, 1.0, 0.8][:panels]
    figure = Figure(figsize=(6.8, 1.0 + 1.55 * sum(heights)), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(panels, 1, sharex=True, gridspec_kw={"height_ratios": heights}))
    return figure, axes


def _shade_band(axis: Axes, log: Sequence[Record], colour: str = BAND_COLOUR, label: str | None = "band") -> None:
    steps, low = series(log, LOW)
    _, high = series(log, HIGH)
    if len(steps) == 1:  # an area between single points would be invisible
        axis.vlines(steps, low, high, color=colour, alpha=BAND_ALPHA, linewidth=8, label=label)
    elif steps:
        axis.fill_between(steps, low, high, color=colour, alpha=BAND_ALPHA, linewidth=0, label=label)


def _line(axis: Axes, steps: Sequence[float], values: Sequence[float], colour: str) -> None:
    """A curve; a long one as a pale line with its running mean over it."""
    if len(values) < SMOOTH_FROM:
        axis.plot(steps, values, color=colour, linewidth=1.6)
        return
    window = len(values) // 20
    means = [
        sum(part) / len(part) for part in (values[max(0, i - window) : i + window + 1] for i in range(len(values)))
    ]
    axis.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
    axis.plot(steps, means, color=colour, linewidth=1.6)


def _finish(axis: Axes, label: str) -> None:
    """What all panels share: the label, open corners and a light grid."""
    axis.set_ylabel(label)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    for line in axis.get_lines():
        if len(line.get_xdata()) == 1:
            line.set_marker("o")  # a line of one point would be invisible


def _label_steps(axis: Axes) -> None:
    axis.set_xlabel("Optimizer step")
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def _label_ks(axis: Axes, ks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("k (samples per prompt)")
    _finish(axis, "pass@k")


def _label(name: str) -> str:
    """A name for a legend; matplotlib leaves out of it what begins with an underscore."""
    return f" {printable(name)}" if name.startswith("_") else printable(name)


def _legend(axis: Axes, title: str | None) -> None:
    """Heading and legend above all panels, where they cover no data; in as many columns as fit the figure's width."""
    handles, labels = axis.get_legend_handles_labels()
    # About 12 characters to an inch, 8 of them for a label's sample of its line and the gap.
    columns = max(1, min(4, int(12.5 * axis.figure.get_figwidth()) // (max(map(len, labels)) + 8)))
    legend = axis.figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=9,
        title=None if title is None else "\n".join(map(printable, title.split("\n"))),
        title_fontsize=11,
        alignment="left",
    )
    # Names of models, runs and data sets are text: what stands between two dollar signs would be read as a formula.
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_parse_math(False)
