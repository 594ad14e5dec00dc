"""
What a step costs that computes only rows with a gradient, against plain GRPO, on the same rollouts.

    python -m benchmarks.throughput_rows                       # about 40 minutes on one core
    python -m benchmarks.throughput_rows --processes 2         # over gloo, one thread each
    python -m benchmarks.throughput_rows --cases "0.5B, 256 to 1024 tokens"    # on a GPU

Each arm is a process of its own (or two), and arms take turns: whatever else the machine does meets them all. Ideal is
the share of padded tokens, those of prompts included, that go through the model; a line through all arms says how far
the update follows it. Writes `benchmarks/results/throughput_rows.{json,md}`; cases that were not run keep their rows.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import correlation, linear_regression, median

from benchmarks.runs import RESULTS, printed_by
from benchmarks.throughput_rows_arm import ARMS, CASES, PLAIN


REPEATS = 3
LAUNCH_FILE = Path(__file__).parents[1] / "configs" / "accelerate" / "cpu_ddp.yaml"


def measure(case: str, arm: str, processes: int) -> dict:
    target = ["-m", "benchmarks.throughput_rows_arm", case, arm]
    line = [sys.executable, *target]
    if processes > 1:
        launcher = str(Path(sys.executable).with_name("accelerate"))
        line = [launcher, "launch", "--config_file", str(LAUNCH_FILE), "--num_processes", str(processes), *target]
    found = printed_by(line, f"{case}, {arm}")
    if found["processes"] != processes:  # a launch file that does not fit starts one process, and says nothing
        raise SystemExit(f"{case}, {arm}: {found['processes']} processes, not {processes}")
    return found


def rows_of(case: str, turns: list[dict[str, dict]]) -> list[dict]:
    """One row for each arm: medians over turns of the ratios to plain GRPO in the same turn."""
    rows = []
    for arm in turns[0]:
        if arm == PLAIN:
            continue
        ratios = {
            name: [turn[arm][name] / turn[PLAIN][name] for turn in turns] for name in ("step", "update", "memory")
        }
        first = turns[0][arm]
        rows.append(
            {
                "case": case,
                "arm": arm,
                "processes": first["processes"],
                "device": first["device"],
                "computed_rows": first["computed_rows"],
                "ideal": first["computed_tokens"],
                **{f"{name}_ratio": median(values) for name, values in ratios.items()},
                "update_ratio_range": [min(ratios["update"]), max(ratios["update"])],
                "step_seconds": median(turn[arm]["step"] for turn in turns),
                "same_rollouts": all(turn[arm]["tokens"] == turn[PLAIN]["tokens"] for turn in turns),
                "repeats": len(turns),
            }
        )
    return rows


def line_through(rows: list[dict]) -> dict[str, float]:
    """The update's ratio as a line over the ideal, by least squares: slope, intercept and R^2."""
    ideal, found = [row["ideal"] for row in rows], [row["update_ratio"] for row in rows]
    slope, intercept = linear_regression(ideal, found)
    return {"slope": slope, "intercept": intercept, "r_squared": correlation(ideal, found) ** 2}


def write_report(rows: list[dict]) -> None:
    """Write `throughput_rows.json` and `.md`, and print the table."""
    kinds = list(dict.fromkeys((row["case"], row["processes"]) for row in rows))
    lines = []
    fits = []
    for case, processes in kinds:
        chosen = [row for row in rows if (row["case"], row["processes"]) == (case, processes)]
        fit = line_through(chosen)
        fits.append({"case": case, "processes": processes, **fit})
        lines += [
            f"{case}, {processes} process{'es' if processes > 1 else ''}, {chosen[0]['device']}: update = "
            f"{fit['intercept']:.3f} + {fit['slope']:.3f} ideal, R² {fit['r_squared']:.3f}",
            "",
            "| arm | rows computed | ideal | update, ratio to plain GRPO (least to most) | step | peak memory |",
            "|---|---|---|---|---|---|",
        ]
        for row in chosen:
            low, high = row["update_ratio_range"]
            lines.append(
                f"| {row['arm']} | {row['computed_rows']:.0%} | {row['ideal']:.3f} | {row['update_ratio']:.3f} "
                f"({low:.3f} to {high:.3f}) | {row['step_ratio']:.3f} | {row['memory_ratio']:.3f} |"
            )
        lines.append("")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "throughput_rows.json").write_text(json.dumps({"fits": fits, "rows": rows}, indent=2) + "\n")
    text = (
        "Update: forward and backward passes of an optimizer step, without the optimizer; step: generation, reading, "
        "update and optimizer. Ideal: share of padded tokens, prompts included, that go through the model in the "
        "update. Medians over turns of the ratio to plain GRPO in the same turn, which computes all rows of the same "
        "rollouts. Dead: groups of equal rewards. Made by `python -m benchmarks.throughput_rows`.\n\n"
    )
    (RESULTS / "throughput_rows.md").write_text(text + "\n".join(lines))
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    on_cpu = [name for name, case in CASES.items() if not case.case.on_gpu and name != "sanity"]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=on_cpu, help="Default: those for a CPU.")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help=f"{PLAIN} is always among them.")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    arguments = parser.parse_args()
    file = RESULTS / "throughput_rows.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for case in arguments.cases:
        turns = []
        for turn in range(arguments.repeats):
            turns.append({})
            for arm in dict.fromkeys([PLAIN, *arguments.arms]):
                print(f"{case}, turn {turn + 1} of {arguments.repeats}: {arm}", flush=True)
                turns[-1][arm] = measure(case, arm, arguments.processes)
        kind = case, arguments.processes
        rows = [row for row in rows if (row["case"], row["processes"]) != kind] + rows_of(case, turns)
        write_report(rows)


if __name__ == "__main__":
    main()
