"""`entrocraft quickstart`: plain GRPO beside Entrocraft on the embedded task, with a table and a figure."""

import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from ..printable import printable
from . import CommandError, CommandParser
from .tables import markdown_table


# Multiples of the initial entropy. Plain GRPO falls below it within the run, so there is something to hold up.
BAND = {"entropy_low": [0.9, 0.5], "entropy_high": [1.05, 0.65]}
START = "starting policy"
# Title in table and figure -> rejection rule; `None` is plain GRPO.
ARMS = {"GRPO": None, "Entrocraft, advantage sign": "advantage_sign", "Entrocraft, entropy change": "entropy_change"}
# Of the evaluation, as in the paper's. At 1 the slips of the sampling drown what the policies know.
TEMPERATURE = 0.6
SAMPLES = 32


def main(argv: list[str]) -> None:
    """Run the command with the options in `argv`; see `entrocraft quickstart --help`."""
    parser = CommandParser(
        prog="entrocraft quickstart",
        description="Train a tiny model three times from the same start and seed - plain GRPO, Entrocraft with the "
        "paper's rule, Entrocraft with the entropy-change rule - on a CPU, without the Hub, and compare. Started "
        "again with the same settings, it continues after the finished runs.",
    )
    parser.add_argument("--output_dir", default="runs/quickstart", help="folder for summary.json, runs and figure")
    parser.add_argument("--max_steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="seeds; several give mean and spread (default: 0)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew instead of continuing")
    options = parser.parse_args(argv)
    if options.max_steps < 1:
        parser.error(f"--max_steps must be at least 1, got {options.max_steps}")
    for seed in options.seeds:
        if not 0 <= seed < 2**32:  # NumPy's rule, which would be met after the starting policy is made
            parser.error(f"--seeds must lie between 0 and {2**32 - 1}, got {seed}")
    if len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds must differ, got {options.seeds}")
    run(Path(options.output_dir), options.max_steps, options.seeds, options.overwrite)


def run(output_dir: Path, max_steps: int, seeds: Sequence[int], overwrite: bool = False) -> dict[str, Any]:
    """
    Train and evaluate all arms on all seeds, print the table, and write `summary.json`, `quickstart.md` and
    `quickstart.png` into `output_dir`. Finished runs are kept there.

    Returns:
        `dict`: The content of `summary.json`.

    Raises:
        [`CommandError`]: if the results or the starting policy cannot be written.
    """
    import torch
    import transformers

    from .. import __version__
    from ..atomic import write_atomically
    from ..reports.plots import save_figure
    from ..tasks.task import expression_task

    transformers.logging.set_verbosity_error()
    if not torch.accelerator.is_available():
        # The model is so small that threads wait for one another, ten times as long where something else has a core.
        torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        policy = expression_task().policy
    except OSError as error:
        raise CommandError(str(error)) from error
    seconds = {"warm-up": time.perf_counter() - start}
    versions = {"entrocraft_trl": __version__, **{name: version(name) for name in ("trl", "transformers", "torch")}}
    shared = {"start": policy.name, "max_steps": max_steps, "band": BAND, "temperature": TEMPERATURE, **versions}
    records = {}
    jobs = [(name, seed) for seed in seeds for name in (START, *ARMS)]  # a cut call leaves whole tables
    for number, (name, seed) in enumerate(jobs, 1):
        print(f"\n[{number}/{len(jobs)}] {name}, seed {seed}", end="", flush=True)
        records[name, seed] = _finished_run(output_dir, name, seed, shared, overwrite)
    seconds["all"] = time.perf_counter() - start
    runs = [
        {"policy": name, "seed": seed, **figures(records[name, seed], [records[arm, seed] for arm in ARMS])}
        for name, seed in jobs
    ]
    rows = [row(name, [run for run in runs if run["policy"] == name]) for name in (START, *ARMS)]
    summary = {
        "max_steps": max_steps,
        "seeds": list(seeds),
        "samples": SAMPLES,
        "temperature": TEMPERATURE,
        "rows": rows,
        "runs": runs,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    report = f"{caption(seeds, max_steps)}\n\n{table(rows)}\n"
    for file, text in (("summary.json", json.dumps(summary, indent=2) + "\n"), ("quickstart.md", report)):
        write_atomically(output_dir / file, lambda stream, text=text: stream.write(text.encode()))
    figure = save_figure(draw(records, seeds), output_dir / "quickstart.png")
    print("\n\n" + report)
    for line in verdicts(rows):
        print(line)
    if len(seeds) == 1:
        print(
            "One seed of a tiny model says little, and its figures differ from machine to machine. The table of three "
            "seeds is in benchmarks/results/quickstart.md; `entrocraft quickstart --seeds 0 1 2` makes it."
        )
    print(f"\nSeconds: {summary['seconds']}")
    for title, path in (("Figure", figure), ("Numbers", output_dir / "summary.json")):
        print(f"{title}: {printable(str(path))}")
    return summary


# ---------------------------------------------------------------------------------------------------------------- runs


def _finished_run(output_dir: Path, name: str, seed: int, shared: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """Log, evaluation and seconds of one arm on one seed; trained unless it was before, with the same settings."""
    from ..compare.records import read_record, write_record

    folder = output_dir / f"{'start' if name == START else ARMS[name] or 'grpo'}-{seed}"
    file, settings = folder.with_suffix(".json"), {"policy": name, "seed": seed, **shared}
    record = None if overwrite else read_record(file, settings)
    if record is not None:
        print(f": kept from an earlier call in {printable(str(file))}; --overwrite starts anew", flush=True)
        return record
    print(flush=True)
    return write_record(file, settings, train(name, seed, shared["max_steps"], folder))


def train(name: str, seed: int, max_steps: int, folder: Path) -> dict[str, Any]:
    """Train one arm and evaluate it; the starting policy is only evaluated, and its log is empty."""
    from trl import GRPOConfig, GRPOTrainer

    from .. import EntrocraftGRPOConfig, EntrocraftGRPOTrainer
    from ..compare.run import evaluate_start, train_and_evaluate
    from ..tasks.task import expression_arguments, expression_task

    task = expression_task(seed, temperature=TEMPERATURE)
    if name == START:
        return {"log": [], "evaluation": evaluate_start(task, seed=seed, progress=True), "seconds": None}
    arguments = expression_arguments(str(folder), max_steps=max_steps, seed=seed)
    rule = ARMS[name]
    if rule is None:
        run = train_and_evaluate(GRPOTrainer, GRPOConfig(**arguments), task)
    else:
        config = EntrocraftGRPOConfig(**arguments, **BAND, rejection_rule=rule)
        run = train_and_evaluate(EntrocraftGRPOTrainer, config, task)
    return run._asdict()


# -------------------------------------------------------------------------------------------------------------- report


def shared_band(records: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """
    Edges in nats at each step of one seed's arms. All share the first batch, hence the initial entropy, hence the
    band; plain GRPO logs none.
    """
    from ..reports.log import bands

    return next(filter(None, (bands(record["log"]) for record in records)))


def figures(record: dict[str, Any], arms: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    What is said of one policy on one seed, given the records of all arms on that seed. `final_entropy` is in nats: the
    mean of the last 10 readings, and for the starting policy the first reading of the arms.
    """
    from ..evaluation.accuracy import pass_at_k_curve
    from ..reports.log import entropies, final_entropy, share_inside

    evaluation, readings = record["evaluation"], entropies(record["log"])
    return {
        "mean@32": evaluation[f"mean@{SAMPLES}"],
        "pass@32": evaluation[f"pass@{SAMPLES}"],
        "distinct_correct": evaluation["distinct_correct"],
        "final_entropy": final_entropy(readings) if readings else entropies(arms[0]["log"])[0],
        "in_band_share": share_inside(readings, shared_band(arms)) if readings else None,
        "seconds": record["seconds"],
        "pass_at_k": pass_at_k_curve(evaluation),
    }


# Figure -> title of its column and format.
COLUMNS = {
    "mean@32": ("mean@32", "{:.3f}"),
    "pass@32": ("pass@32", "{:.3f}"),
    "distinct_correct": ("distinct right", "{:.1f}"),
    "final_entropy": ("final entropy", "{:.3f}"),
    "in_band_share": ("steps in band", "{:.0%}"),
    "seconds": ("seconds", "{:.0f}"),
}


def row(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table: means over the policy's runs and, of several, sample standard deviations in `std`."""
    from ..compare.records import spread

    spreads = {figure: spread([run[figure] for run in runs]) for figure in COLUMNS}
    means = {figure: value["mean"] for figure, value in spreads.items()}
    std = {figure: value["std"] for figure, value in spreads.items() if len(runs) > 1}
    return {"policy": name, **means, "std": std}


def caption(seeds: Sequence[int], max_steps: int) -> str:
    """What the table is about, in one line."""
    seeds_used = f"seed {seeds[0]}"
    if len(seeds) > 1:
        seeds_used = f"mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}"
    return (
        f"After {max_steps} steps, on held-out targets: {SAMPLES} samples of each at temperature {TEMPERATURE}, four "
        f"times over; {seeds_used}. Entropy in nats, of training batches at temperature 1."
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""

    def cell(row: dict[str, Any], figure: str, form: str) -> str:
        if row[figure] is None:
            return "–"
        spread = f" ± {form.format(row['std'][figure])}" if figure in row["std"] else ""
        return form.format(row[figure]) + spread

    cells = [["policy", *(title for title, _ in COLUMNS.values())]]
    cells += [[row["policy"], *(cell(row, figure, form) for figure, (_, form) in COLUMNS.items())] for row in rows]
    return markdown_table(cells)


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Plain words for an Entrocraft arm that left its band in more than a third of its steps."""
    return [
        f"{r['policy']} was inside its band in only {r['in_band_share']:.0%} of the steps: the rule did not hold it."
        for r in rows
        if r["in_band_share"] is not None and r["policy"] != "GRPO" and r["in_band_share"] < 2 / 3
    ]


def draw(records: dict[tuple[str, int], dict[str, Any]], seeds: Sequence[int]):
    """Entropy in its band, beside pass@k over k. Each seed has a band, from where it starts: the mean one is drawn."""
    from ..evaluation.accuracy import pass_at_k_curve
    from ..reports.log import entropies
    from ..reports.plots import plot_entropy_and_pass_at_k

    by_seed = [shared_band([records[arm, seed] for arm in ARMS]) for seed in seeds]
    band = [tuple(map(mean, zip(*edges, strict=True))) for edges in zip(*by_seed, strict=True)]
    readings = {arm: [entropies(records[arm, seed]["log"]) for seed in seeds] for arm in ARMS}
    curves = {name: [pass_at_k_curve(records[name, seed]["evaluation"]) for seed in seeds] for name in (START, *ARMS)}
    return plot_entropy_and_pass_at_k(readings, band, curves)
