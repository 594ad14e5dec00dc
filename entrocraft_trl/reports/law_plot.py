"""Figure of the entropy law: the curve through a run's points, and what its beginning foretold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from ..printable import printable
from .law import Law, Point, Prediction
from .plots import COLOURS, DPI


CURVE_POINTS = 100
Run = tuple[Sequence[Point], Law, Prediction | None]


def plot_law(runs: Mapping[str, Run]) -> Figure:
    """
    A line of panels for each run: accuracy over entropy with the fitted law, and over steps with what was predicted.

    Args:
        runs (`Mapping[str, tuple]`): Name of each run, its points, the law fitted to all of them, and what the first
            of them predict, if there are enough.

    Raises:
        ValueError: If there is no run.
    """
    if not runs:
        raise ValueError("there is no run to draw")
    figure = Figure(figsize=(8.4, 2.9 * len(runs)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(runs), 2, sharey="row", squeeze=False)
    for (left, right), (name, (points, law, prediction)) in zip(axes, runs.items(), strict=True):
        _over_entropy(left, points, law, prediction)
        _over_steps(right, points, prediction)
        left.set_title(printable(name), fontsize=9, loc="left").set_parse_math(False)
        left.set_ylabel("accuracy")
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(color="#DDDDDD", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.legend(fontsize=8, frameon=False)
    axes[-1][0].set_xlabel("entropy (nats)")
    axes[-1][1].set_xlabel("optimizer step")
    return figure


def _over_entropy(axis, points: Sequence[Point], law: Law, prediction: Prediction | None) -> None:
    entropies = [point.entropy for point in points]
    fitted = prediction.fitted if prediction else 0
    axis.scatter(
        entropies[:fitted], [p.accuracy for p in points[:fitted]], s=12, color="#444444", label="first points"
    )
    axis.scatter(entropies[fitted:], [p.accuracy for p in points[fitted:]], s=12, color=COLOURS[0])
    low, high = min(entropies), max(entropies)
    places = [low + (high - low) * place / CURVE_POINTS for place in range(CURVE_POINTS + 1)]
    label = f"{law.b:.2f} {-law.a:+.2f} exp(H)"
    axis.plot(places, [law.accuracy(place) for place in places], color=COLOURS[0], linewidth=1.4, label=label)
    if prediction:
        early = [prediction.law.accuracy(place) for place in places]
        axis.plot(places, early, color=COLOURS[1], linestyle="--", linewidth=1.2, label="fitted to the first")
    accuracies = [point.accuracy for point in points]
    margin = 0.1 * (max(accuracies) - min(accuracies)) + 0.01
    axis.set_ylim(min(accuracies) - margin, max(accuracies) + 3 * margin)  # a wild extrapolation would hide the points


def _over_steps(axis, points: Sequence[Point], prediction: Prediction | None) -> None:
    steps = [point.step for point in points]
    axis.plot(steps, [point.accuracy for point in points], color=COLOURS[0], linewidth=1.4, label="measured")
    if prediction is None:
        return
    rest = points[prediction.fitted :]
    later = [point.step for point in rest]
    axis.axvline(steps[prediction.fitted - 1], color="#444444", linewidth=0.8, linestyle=":")
    for label, values, colour in (
        ("law", [prediction.law.accuracy(point.entropy) for point in rest], COLOURS[1]),
        ("constant", [prediction.constant] * len(rest), COLOURS[2]),
        ("straight line", [prediction.slope * step + prediction.intercept for step in later], COLOURS[3]),
    ):
        axis.plot(later, values, color=colour, linewidth=1.2, linestyle="--", label=f"predicted: {label}")
