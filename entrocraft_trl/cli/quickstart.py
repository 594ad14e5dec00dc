"""`entrocraft quickstart`: plain GRPO beside Entrocraft on the embedded task, with a table and a figure."""

import json
import time
from pathlib import Path
from typing import Any

from . import CommandError, CommandParser


# Multiples of the initial entropy. Plain GRPO falls below it within the run, so there is something to hold up.
BAND = {"entropy_low": [0.9, 0.5], "entropy_high": [1.05, 0.65]}
# Title in table and figure -> rejection rule; `None` is plain GRPO.
ARMS = {"GRPO": None, "Entrocraft, advantage sign": "advantage_sign", "Entrocraft, entropy change": "entropy_change"}


def main(argv: list[str]) -> None:
    """Run the command with the options in `argv`; see `entrocraft quickstart --help`."""
    parser = CommandParser(
        prog="entrocraft quickstart",
        description="Train a tiny model three times from the same start and seed - plain GRPO, Entrocraft with the "
        "paper's rule, Entrocraft with the entropy-change rule - on a CPU, without the Hub, and compare.",
    )
    parser.add_argument("--output_dir", default="runs/quickstart", help="folder for summary.json, logs and figure")
    parser.add_argument("--max_steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--seed", type=int, default=0, help="seed of all three runs")
    options = parser.parse_args(argv)
    if options.max_steps < 1:
        parser.error(f"--max_steps must be at least 1, got {options.max_steps}")
    if not 0 <= options.seed < 2**32:  # NumPy's rule, which would be met after the starting policy is made
        parser.error(f"--seed must lie between 0 and {2**32 - 1}, got {options.seed}")
    run(Path(options.output_dir), options.max_steps, options.seed)


def run(output_dir: Path, max_steps: int, seed: int) -> dict[str, Any]:
    """
    Train and evaluate all arms, print the table, and write `summary.json` and `quickstart.png` into `output_dir`.

    Returns:
        `dict`: The content of `summary.json`.

    Raises:
        [`CommandError`]: if the results or the starting policy cannot be written.
    """
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    from .. import EntrocraftGRPOConfig, EntrocraftGRPOTrainer
    from ..compare.run import evaluate_start, expression_arguments, expression_task, train_and_evaluate
    from ..reports.plots import plot_comparison, save_figure

    transformers.logging.set_verbosity_error()
    start = time.perf_counter()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        task = expression_task(seed)
    except OSError as error:
        raise CommandError(str(error)) from error
    warmed_up = time.perf_counter()
    evaluations = {"starting policy": evaluate_start(task, progress=True)}
    seconds = {"warm-up": warmed_up - start, "evaluation of the start": time.perf_counter() - warmed_up}
    logs = {}
    for number, (name, rule) in enumerate(ARMS.items(), 1):
        print(f"\n[{number}/{len(ARMS)}] {name}: {max_steps} steps", flush=True)
        arguments = expression_arguments(str(output_dir / (rule or "grpo")), max_steps=max_steps, seed=seed)
        if rule is None:
            result = train_and_evaluate(GRPOTrainer, GRPOConfig(**arguments), task)
        else:
            config = EntrocraftGRPOConfig(**arguments, **BAND, rejection_rule=rule)
            result = train_and_evaluate(EntrocraftGRPOTrainer, config, task)
        logs[name], evaluations[name], seconds[name] = result
    summary = {
        "max_steps": max_steps,
        "seed": seed,
        "rows": [row(name, evaluations[name], logs, seconds) for name in evaluations],
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "curves": {name: curve(log) for name, log in logs.items()},
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    figure = save_figure(plot_comparison(logs), output_dir / "quickstart.png")
    print("\n" + table(summary["rows"]))
    for line in verdicts(summary["rows"]):
        print(line)
    print(f"\nSeconds: {summary['seconds']}\nFigure: {figure}\nNumbers: {output_dir / 'summary.json'}")
    return summary


def curve(log: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Entropy in nats and mean reward at each step."""
    from ..reports.log import entropies, rewards

    return {"entropy": entropies(log), "reward": rewards(log)}


def row(name: str, evaluation: dict[str, float], logs: dict[str, list], seconds: dict[str, float]) -> dict[str, Any]:
    """One line of the table. `final_entropy` is the mean of the last 10 readings in nats, before that of the start."""
    from ..reports.log import bands, entropies, final_entropy, share_inside

    figures = {
        "policy": name,
        "mean@32": evaluation["mean@32"],
        "pass@32": evaluation["pass@32"],
        "distinct_correct": evaluation["distinct_correct"],
        "final_entropy": evaluation["entropy"],
        "in_band_share": None,
        "seconds": None,
    }
    if name in logs:
        readings = entropies(logs[name])
        # All arms share the first batch, hence the initial entropy, hence the band in nats; plain GRPO logs none.
        edges = next(filter(None, map(bands, logs.values())))
        figures["final_entropy"] = final_entropy(readings)
        figures["in_band_share"] = share_inside(readings, edges)
        figures["seconds"] = seconds[name]
    return figures


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table that also reads well in a terminal."""
    titles = ["policy", "mean@32", "pass@32", "distinct right", "final entropy", "steps in band", "seconds"]
    forms = ["{}", "{:.3f}", "{:.3f}", "{:.1f}", "{:.3f}", "{:.0%}", "{:.0f}"]
    cells = [titles] + [
        ["–" if value is None else form.format(value) for form, value in zip(forms, r.values(), strict=True)]
        for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Plain words for an Entrocraft arm that left its band in more than a third of its steps."""
    return [
        f"{r['policy']} was inside its band in only {r['in_band_share']:.0%} of the steps: the rule did not hold it."
        for r in rows
        if r["in_band_share"] is not None and r["policy"] != "GRPO" and r["in_band_share"] < 2 / 3
    ]
