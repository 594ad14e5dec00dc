"""
Few accepted rollouts: what a floor under the loss normaliser changes, on the embedded task.

    python -m benchmarks.scarcity    # about 10 minutes on one thread

Late in training few rollouts are wrong, so that a step that keeps only these rests on a handful of samples, which
Eq. 5 of the paper scales up to a whole batch (its appendix C.6). Here a policy that is already mostly right is held
under a band that lies above its entropy, with different values of `min_accepted_share`. Finished runs are kept in
`runs/scarcity/`. Writes `benchmarks/results/scarcity.{json,md,png}`.
"""

import argparse
import json
import math
import re
from pathlib import Path
from statistics import mean, median

from benchmarks.control import HALF_WIDTH, band_around
from benchmarks.runs import RESULTS, one_quiet_thread, policy_folder
from entrocraft_trl.compare.records import kept_record
from entrocraft_trl.metric_names import (
    ACCEPTED_TOKENS,
    DIRECTION,
    EFFECTIVE_BATCH_SIZE,
    REJECTED_NEGATIVE,
    REJECTED_POSITIVE,
)
from entrocraft_trl.reports.log import accepted_shares, entropies, final_entropy, rewards, rms_outside, values


FOLDER = Path("runs/scarcity")
STEPS = 150
SEEDS = (0, 1, 2)
FLOORS = (0.0, 0.1, 0.25, 0.5)
ROLLOUTS = 128  # in a generation batch of `expression_arguments`
# TRL clips gradients to norm 1. Where that binds, it scales a step back to the same size whatever the normaliser, so
# that a floor can only act without it; the logged norm is the one before clipping.
NO_CLIPPING = {"max_grad_norm": 1e9}
# Rewards of +1/-1 out of band are how the official code acts. They are what becomes scarce: the test m * A >= 0 on
# the estimator's advantages also keeps the rollouts of groups without contrast, whose advantage is 0.
REWARDS = {"out_of_band_advantages": "reward", "reward_coding": "zero_one"}
RULES = {
    "sign": {"rejection_rule": "advantage_sign"},
    "sign, no clipping": {"rejection_rule": "advantage_sign", **NO_CLIPPING},
    "sign, +1/-1 rewards, no clipping": {"rejection_rule": "advantage_sign", **REWARDS, **NO_CLIPPING},
    "entropy change, no clipping": {"rejection_rule": "entropy_change", **NO_CLIPPING},
}


def starting_point() -> tuple[Path, float]:
    """A policy that is mostly right (taught no habit), and its entropy in nats on the training prompts."""
    from entrocraft_trl.compare.run import evaluate_start
    from entrocraft_trl.tasks import WarmupSettings, starting_policy
    from entrocraft_trl.tasks.task import expression_task

    policy = starting_policy(settings=WarmupSettings(habit_share=0.0), progress=False)
    task = expression_task(progress=False)._replace(policy=policy)
    return policy, evaluate_start(task, on_training_prompts=True)["entropy"]


def run_one(rule: str, floor: float, seed: int, policy: Path, centre: float) -> dict:
    """One training run; its record is read from disk if it was run before."""
    folder = policy_folder(FOLDER, centre - HALF_WIDTH)
    file = folder / f"{re.sub('[^a-z0-9]+', '_', rule)}-{floor:g}-{seed}.json"
    settings = {"centre": centre, "floor": floor, "seed": seed, "steps": STEPS, **RULES[rule]}
    return kept_record(file, settings, lambda: train(rule, floor, seed, policy, centre, str(file.with_suffix(""))))


def train(rule: str, floor: float, seed: int, policy: Path, centre: float, output_dir: str) -> dict:
    """Train under one rule and floor; the readings of its steps and the evaluation."""
    from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftGRPOTrainer
    from entrocraft_trl.compare.run import train_and_evaluate
    from entrocraft_trl.tasks.task import expression_arguments, expression_task

    config = EntrocraftGRPOConfig(
        **expression_arguments(output_dir, max_steps=STEPS, seed=seed) | {"disable_tqdm": True},
        **RULES[rule],
        min_accepted_share=floor,
        entropy_unit="nats",
        entropy_schedule="constant",
        entropy_low=[centre - HALF_WIDTH],
        entropy_high=[centre + HALF_WIDTH],
    )
    task = expression_task(seed, progress=False)._replace(policy=policy)
    run = train_and_evaluate(EntrocraftGRPOTrainer, config, task)
    return {
        "rule": rule,
        "min_accepted_share": floor,
        "seed": seed,
        "centre": centre,
        "entropy": entropies(run.log),
        "reward": rewards(run.log),
        "accepted": accepted_shares(run.log),
        "accepted_tokens": values(run.log, ACCEPTED_TOKENS),
        "carrying": [carrying_rollouts(entry, rule) for entry in run.log],
        "grad_norm": values(run.log, "grad_norm"),
        "evaluation": run.evaluation,
        "seconds": run.seconds,
    }


def carrying_rollouts(entry: dict, rule: str) -> float:
    """Accepted rollouts with an advantage other than 0: those that a step rests on."""
    if RULES[rule].get("out_of_band_advantages") == "reward" and entry[DIRECTION]:
        return entry[EFFECTIVE_BATCH_SIZE]
    with_advantage = ROLLOUTS * (1.0 - entry["frac_reward_zero_std"])
    return with_advantage - entry[REJECTED_POSITIVE] - entry[REJECTED_NEGATIVE]


def measure(record: dict) -> dict:
    """Figures of one run; entropies in nats. Jumps are between the readings of consecutive steps."""
    entropy, norms = record["entropy"], record["grad_norm"]
    counted = entropy[STEPS // 10 :]
    jumps = [abs(b - a) for a, b in zip(entropy, entropy[1:], strict=False)]
    rejecting = [share < 1.0 for share in record["accepted"]]
    return {
        **{name: record[name] for name in ("rule", "min_accepted_share", "seed")},
        "rejecting_steps": mean(rejecting),
        "smallest_accepted": round(ROLLOUTS * min(record["accepted"])),
        "smallest_carrying": round(min(record["carrying"])),
        "floor_binds": mean(share < record["min_accepted_share"] for share in record["accepted_tokens"]),
        "grad_norm_median": median(norms),
        "grad_norm_max": max(norms),
        "jump_rms": math.sqrt(mean(jump * jump for jump in jumps)),
        "jump_max": max(jumps),
        "rms_outside": rms_outside(counted, [band_around(record["centre"])] * len(counted)),
        "entropy_end": final_entropy(entropy),
        "reward_best": max(running_mean(record["reward"])),
        "reward_dip": largest_fall(running_mean(record["reward"])),
        "mean_at_32": record["evaluation"]["mean@32"],
        "distinct_correct": record["evaluation"]["distinct_correct"],
    }


def running_mean(values: list[float], window: int = 10) -> list[float]:
    return [mean(values[i : i + window]) for i in range(len(values) - window + 1)]


def largest_fall(values: list[float]) -> float:
    """Largest amount by which a value lies below an earlier one."""
    best, fall = -math.inf, 0.0
    for value in values:
        best = max(best, value)
        fall = max(fall, best - value)
    return fall


COLUMNS = {
    "rejecting_steps": ("steps that reject", "{:.0%}"),
    "smallest_accepted": ("fewest accepted", "{:.0f}"),
    "smallest_carrying": ("fewest with an advantage", "{:.0f}"),
    "floor_binds": ("floor binds", "{:.0%}"),
    "grad_norm_median": ("grad norm, median", "{:.2f}"),
    "grad_norm_max": ("largest", "{:.2f}"),
    "jump_rms": ("entropy jump, RMS (nats)", "{:.3f}"),
    "jump_max": ("largest (nats)", "{:.3f}"),
    "rms_outside": ("RMS outside (nats)", "{:.3f}"),
    "entropy_end": ("entropy at the end", "{:.3f}"),
    "reward_best": ("best reward", "{:.3f}"),
    "reward_dip": ("reward dip", "{:.3f}"),
    "mean_at_32": ("mean@32", "{:.3f}"),
    "distinct_correct": ("distinct right", "{:.1f}"),
}


def markdown(rows: list[dict]) -> str:
    """One line per rule and floor; the seeds' values with a slash between them."""
    lines = [
        "| rule | floor | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---|---" + "|---" * len(COLUMNS) + "|",
    ]
    for rule in RULES:
        for floor in FLOORS:
            chosen = [row for row in rows if row["rule"] == rule and row["min_accepted_share"] == floor]
            if chosen:
                cells = [" / ".join(form.format(row[name]) for row in chosen) for name, (_, form) in COLUMNS.items()]
                lines.append(f"| {rule} | {floor:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(records: list[dict]):
    """One column per rule: entropy, reward, accepted rollouts with an advantage, and gradient norm (first seed)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(FLOORS, ("#000000", "#E69F00", "#0072B2", "#CC79A7"), strict=True))
    curves = {
        "entropy": "entropy (nats)",
        "reward": "reward, 10-step mean",
        "carrying": "accepted rollouts\nwith an advantage",
        "grad_norm": "gradient norm",
    }
    figure, axes = plt.subplots(4, len(RULES), figsize=(3.3 * len(RULES), 8), sharex=True, sharey="row", squeeze=False)
    for column, rule in enumerate(RULES):
        for record in records:
            if record["rule"] != rule or record["seed"] != SEEDS[0]:
                continue
            floor = record["min_accepted_share"]
            for axis, name in zip(axes[:, column], curves, strict=True):
                values = running_mean(record[name]) if name == "reward" else record[name]
                axis.plot(values, color=colours[floor], linewidth=0.9, alpha=0.8, label=f"floor {floor:g}")
        centre = records[0]["centre"]
        axes[0][column].axhspan(centre - HALF_WIDTH, centre + HALF_WIDTH, color="#E69F00", alpha=0.25, linewidth=0)
        axes[0][column].set_title(rule, fontsize=10)
        axes[-1][column].set_xlabel("optimizer step", fontsize=9)
        axes[-1][column].set_yscale("log")
    for axis, title in zip(axes[:, 0], curves.values(), strict=True):
        axis.set_ylabel(title, fontsize=9)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    axes[1][0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scarcity", description=__doc__.split("\n")[1])
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default: %(default)s)")
    options = parser.parse_args(argv)
    one_quiet_thread()
    policy, initial = starting_point()
    centre = initial + HALF_WIDTH
    records = []
    for seed in SEEDS[: options.seeds]:
        for rule in RULES:
            free = run_one(rule, 0.0, seed, policy, centre)
            for floor in FLOORS:
                # A floor that no step reaches changes no bit of the run.
                binds = min(*free["accepted"], *free["accepted_tokens"]) < floor
                record = run_one(rule, floor, seed, policy, centre) if binds else free
                records.append({**record, "min_accepted_share": floor})
                print(
                    {k: round(v, 4) if isinstance(v, float) else v for k, v in measure(records[-1]).items()},
                    flush=True,
                )
    write_report(records, centre)


def write_report(records: list[dict], centre: float) -> None:
    """Write `scarcity.json`, `scarcity.md` and `scarcity.png`, and print the table."""
    rows = [measure(record) for record in records]
    table = markdown(rows)
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {
        "initial_entropy": centre - HALF_WIDTH,
        "band": [centre - HALF_WIDTH, centre + HALF_WIDTH],
        "rows": rows,
    }
    (RESULTS / "scarcity.json").write_text(json.dumps(content, indent=2) + "\n")
    (RESULTS / "scarcity.md").write_text(
        f"Constant band {centre - HALF_WIDTH:.3f} to {centre + HALF_WIDTH:.3f} nats, {STEPS} steps from a mostly "
        f"right policy of {centre - HALF_WIDTH:.3f} nats, {ROLLOUTS} rollouts a step; a slash separates seeds. Floor: "
        "`min_accepted_share`. Fewest accepted, and fewest of these with an advantage other than 0: in the scarcest "
        "step. Reward dip: largest fall of the 10-step mean below an earlier value. Made by `python -m "
        "benchmarks.scarcity`.\n\n" + table
    )
    print(table)
    draw(records).savefig(RESULTS / "scarcity.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
