"""
What reading the policy's entropy costs: time of a step, time of its update, and peak memory, against plain GRPO.

    make bench-throughput               # about 40 minutes on one core
    python -m benchmarks.throughput --cases "0.5B, 256 to 1024 tokens"    # on a GPU

Each arm is a process of its own, and arms take turns: whatever else the machine does meets them all. On a CPU time is
that of the process, on one thread. All arms sample the same rollouts. Writes `benchmarks/results/throughput.{json,md,
png}`; cases that were not run keep their rows.
"""

import argparse
import json
import sys
from statistics import median

from benchmarks.runs import RESULTS, printed_by
from benchmarks.throughput_arm import ARMS, CASES


REPEATS = 3


def measure(case: str, arm: str) -> dict:
    line = [sys.executable, "-m", "benchmarks.throughput_arm", case, arm]
    return printed_by(line, f"{case}, {arm}")


def rows_of(case: str, turns: list[dict[str, dict]]) -> list[dict]:
    """One row for each arm: medians over turns of the ratios to the plain arm of the same turn."""
    rows = []
    for arm, (_, against, _) in ARMS.items():
        if arm == against or arm not in turns[0]:
            continue
        ratios = {
            name: [turn[arm][name] / turn[against][name] for turn in turns] for name in ("step", "update", "memory")
        }
        same = all(turn[arm]["tokens"] == turn[against]["tokens"] for turn in turns)
        rows.append(
            {
                "case": f"{case}: {arm}",
                "device": turns[0][arm]["device"],
                "ideal": 1.0,  # every row is computed
                "update_ratio": median(ratios["update"]),
                "step_ratio": median(ratios["step"]),
                "step_ratio_range": [min(ratios["step"]), max(ratios["step"])],
                "memory_ratio": median(ratios["memory"]),
                "step_seconds": median(turn[arm]["step"] for turn in turns),
                "same_rollouts": same,
                "repeats": len(turns),
            }
        )
    return rows


def write_report(rows: list[dict]) -> None:
    """Write `throughput.json`, `.md` and `.png`, and print the table."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "throughput.json").write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    lines = [
        "| case | device | step, ratio to plain GRPO (least to most) | update | peak memory | seconds a step |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["step_ratio_range"]
        lines.append(
            f"| {row['case']} | {row['device']} | {row['step_ratio']:.3f} ({low:.3f} to {high:.3f}) | "
            f"{row['update_ratio']:.3f} | {row['memory_ratio']:.3f} | {row['step_seconds']:.2f} |"
        )
    text = (
        "Step: generation, reading and update. Peak memory: of the whole process on a CPU, of PyTorch's allocations "
        "on a GPU. Medians over turns of the ratio to plain GRPO in the same turn. *Own pass* and *TRL's pass* are "
        "what a run with a rollout engine or dropout reads from. Made by `python -m benchmarks.throughput`.\n\n"
    )
    (RESULTS / "throughput.md").write_text(text + "\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(rows).savefig(RESULTS / "throughput.png", dpi=150, bbox_inches="tight")


def draw(rows: list[dict]):
    """Ratio of each case, its spread, and the line of plain GRPO."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.3 * len(rows)))
    axes = figure.subplots()
    places = range(len(rows))
    values = [row["step_ratio"] for row in rows]
    spread = [
        [value - row["step_ratio_range"][0] for value, row in zip(values, rows, strict=True)],
        [row["step_ratio_range"][1] - value for value, row in zip(values, rows, strict=True)],
    ]
    axes.errorbar(values, places, xerr=spread, fmt="o", capsize=3)
    axes.axvline(1.0, color="grey", linewidth=1, label="plain GRPO")
    axes.set_yticks(places, [row["case"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("time of a step, ratio to plain GRPO (median, least to most)")
    axes.legend(loc="upper right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    on_cpu = [name for name, case in CASES.items() if not case.on_gpu]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=on_cpu, help="Default: those for a CPU.")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    arguments = parser.parse_args()
    file = RESULTS / "throughput.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for case in arguments.cases:
        turns = []
        for turn in range(arguments.repeats):
            turns.append({})
            for arm in CASES[case].arms or ARMS:
                print(f"{case}, turn {turn + 1} of {arguments.repeats}: {arm}", flush=True)
                turns[-1][arm] = measure(case, arm)
        rows = [row for row in rows if not row["case"].startswith(f"{case}: ")] + rows_of(case, turns)
        write_report(rows)


if __name__ == "__main__":
    main()
