"""What `entrocraft eval` writes and prints: summary and figure of a data set, the table over benchmarks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..evaluation.benchmarks import average
from ..printable import printable
from .tables import markdown_table


def write_results(
    name: str, args: argparse.Namespace, settings: Mapping[str, Any], records: Sequence[dict[str, Any]]
) -> dict[str, float | None]:
    """Summary and figure of the data set `name`, from the records of its `P` prompts. Returns `P` and its metrics."""
    from ..evaluation.accuracy import pass_at_k_curve
    from ..evaluation.records import summarise_records
    from ..reports.plots import plot_pass_at_k, save_figure

    metrics = summarise_records(records)
    folder = Path(args.output_dir)
    _write_json(folder / "summary.json", {"metrics": metrics, "settings": settings})
    figure = plot_pass_at_k({Path(args.model).name: pass_at_k_curve(metrics)}, name)
    save_figure(figure, folder / "pass_at_k.png")
    print(f"{f'{name}: ' if args.benchmarks else ''}{len(records)} prompts, {args.n} completions each")
    for title, value in metrics.items():
        print(f"{title:<17} {'not measured' if value is None else f'{value:.4g}'}")
    print(f"numbers: {printable(str(folder / 'summary.json'))}")
    print(f"figure:  {printable(str(folder / 'pass_at_k.png'))}", flush=True)
    return {"prompts": len(records), **metrics}


def write_table(args: argparse.Namespace, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """The table over benchmarks: mean@n and pass@n of each and on average, as Markdown and with all else as JSON."""
    shown = f"mean@{args.n}", f"pass@{args.n}"
    means = average(figures, shown)
    rows = {**figures, "average": {"prompts": "–", **means}}
    cells = [["benchmark", "prompts", *shown]]
    cells += [[name, str(row["prompts"]), *(f"{row[title]:.3f}" for title in shown)] for name, row in rows.items()]
    text = (
        f"{printable(args.model)}: {args.n} samples a prompt at temperature {args.temperature:g}, "
        f"top-p {args.top_p:g}, top-k {args.top_k}, up to {args.max_new_tokens} tokens. "
        f"In the average each benchmark counts once.\n\n{markdown_table(cells)}\n"
    )
    folder = Path(args.output_dir)
    write_atomically(folder / "benchmarks.md", lambda stream: stream.write(text.encode()))
    _write_json(folder / "benchmarks.json", {"benchmarks": figures, "average": means})
    print(f"\n{text}\ntable:   {printable(str(folder / 'benchmarks.md'))}")
    print(f"numbers: {printable(str(folder / 'benchmarks.json'))}")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    write_atomically(path, lambda stream: stream.write(text))
