"""`entrocraft law`: how a run's held-out accuracy depends on its entropy, and what its beginning foretold."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..printable import printable
from . import CommandError, CommandParser, is_main_process, user_errors
from .tables import markdown_table


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="entrocraft law",
        description="Fit R = -a exp(H) + b (arXiv 2505.22617) to the entropies and held-out accuracies of runs that "
        "evaluated during training; predict the later accuracies of each run from its beginning and its later "
        "entropies; print both with their errors, and draw them.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN_DIR",
        help="run of `entrocraft train`; folder or record of `entrocraft compare`",
    )
    parser.add_argument(
        "--metric",
        help="accuracy in the log (default: eval_mean@n); `reward`, if that is 0 or 1 and each prompt is seen once",
    )
    parser.add_argument("--share", type=float, default=0.15, help="share of the points that predicts the rest")
    parser.add_argument("--output", default="law.png", help="figure to write; the numbers go beside it, as .json")
    return parser


def main(argv: list[str]) -> None:
    """Run the command: prints a table and what is to be said of each run, and writes figure and numbers."""
    from ..reports.law_plot import plot_law
    from ..reports.plots import save_figure

    with user_errors():
        options = make_parser().parse_args(argv)
        if not 0 < options.share < 1:
            raise CommandError(f"--share must lie between 0 and 1, got {options.share}")
        found = [run for path in options.runs for run in runs_at(Path(path))]
        if not found:
            raise CommandError(f"no run in {printable(', '.join(options.runs))}")
        results, drawn = {}, {}
        for name, log, controlled in found:
            if name in results:  # of another folder
                name = f"{name} ({len(results) + 1})"
            results[name], run = judge(name, log, controlled, options.metric, options.share)
            drawn[name + (", entropy controlled" if results[name]["controlled_by"] else "")] = run
        figure = save_figure(plot_law(drawn), options.output)
        numbers = figure.with_suffix(".json")
        numbers.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if is_main_process():
        print(printable_table(results))
        print()
        for name, result in results.items():
            print(printable(f"{name}: {result['said']}"))
        print(f"\nFigure: {printable(str(figure))}\nNumbers: {printable(str(numbers))}")


def runs_at(path: Path) -> Iterator[tuple[str, list[dict[str, Any]], bool]]:
    """
    Name, log, and whether its record says that the entropy was controlled, of each run that a path means.

    Raises:
        ValueError, OSError: If there is none.
    """
    from ..reports.log import read_log

    records = [path] if path.suffix == ".json" and path.is_file() else sorted(path.glob("*.json"))
    found = [(file, content) for file in records if (content := _record(file)) is not None]
    if not found:
        yield path.resolve().name, read_log(path), False
    for file, content in found:
        if "log" in content:  # a start has none
            yield file.stem.rpartition("-")[0] or file.stem, content["log"], bool(content["controlled"])


def _record(file: Path) -> dict[str, Any] | None:
    """A record of `entrocraft compare`, of a run or of the start, which `*.json` names too; `None` of another file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    kinds = ({"log", "controlled"}, {"settings", "entropy", "evaluation"})
    return content if isinstance(content, dict) and any(kind <= content.keys() for kind in kinds) else None


def judge(
    name: str, log: list[dict[str, Any]], controlled: bool, metric: str | None, share: float
) -> tuple[dict, tuple]:
    """
    What the law says of one run: its numbers as JSON values, and what is drawn.

    Raises:
        ValueError: Naming the run, if it has no points or no two entropies.
    """
    from ..reports.law import FEWEST, controlled_by, fit_error, fit_law, law_points, predict_rest

    try:
        points = law_points(log, metric)
        law = fit_law(points)
        prediction = predict_rest(points, share) if len(points) > FEWEST else None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    control = controlled_by(log) or ("the comparison's band" if controlled else None)
    result = {
        "points": len(points),
        "a": law.a,
        "b": law.b,
        "ceiling": law.ceiling,
        "fit_error": fit_error(law, points),
        "prediction": prediction and {**prediction._asdict(), "law": prediction.law._asdict()},
        "controlled_by": control,
    }
    return {**result, "said": _said(result)}, (points, law, prediction)


def _said(result: dict[str, Any]) -> str:
    """One or two sentences of a run."""
    if result["controlled_by"]:
        return (
            f"its entropy was controlled ({result['controlled_by']}), so the law, which is stated for trainings that "
            "are not, does not apply: the numbers only show how far it is from holding."
        )
    told = (
        f"with its entropy used up, the fit gives an accuracy of {result['ceiling']:.3f}."
        if result["a"] > 0
        else "its accuracy did not fall with its entropy (a is not positive): no entropy was traded for accuracy."
    )
    prediction = result["prediction"]
    if prediction is None:
        return told + " There are too few points to predict any."
    errors = {"a constant": prediction["constant_error"], "a straight line": prediction["line_error"]}
    better = [words for words, error in errors.items() if error <= prediction["law_error"]]
    verdict = f"predicted no better than {' or '.join(better)}" if better else "predicted better than both others"
    return f"{told} From the first {prediction['fitted']} points the law {verdict}."


def printable_table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each run; errors are root mean squares, in accuracy."""
    heading = ["run", "points", "a", "b", "ceiling b - a", "fit error", "predicted: law", "constant", "straight line"]
    cells = [heading]
    for name, result in results.items():
        prediction = result["prediction"]
        errors = [prediction[f"{kind}_error"] if prediction else None for kind in ("law", "constant", "line")]
        numbers = [result[key] for key in ("a", "b", "ceiling", "fit_error")] + errors
        written = ["–" if number is None else f"{number:.3f}" for number in numbers]
        cells.append([printable(name), str(result["points"]), *written])
    return markdown_table(cells)
