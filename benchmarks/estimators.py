"""
Entropy control under other losses and advantage estimators, on the embedded task.

    python -m benchmarks.estimators    # about 5 minutes on one thread

One run per estimator with the entropy-change rule and the constant band of `benchmarks.control`, from the same start
and with the same other settings. Finished runs are kept in `runs/estimators/`. Writes
`benchmarks/results/estimators.{json,md,png}`.
"""

import json
import math
import re
from pathlib import Path
from statistics import mean

from benchmarks.control import HALF_WIDTH, band_around, band_knots, start_of_task
from benchmarks.runs import RESULTS, one_quiet_thread, policy_folder
from entrocraft_trl.compare.records import kept_record
from entrocraft_trl.metric_names import ENTROPY
from entrocraft_trl.reports.log import accepted_shares, reading_scatter, rewards, rms_outside, series, share_inside


FOLDER = Path("runs/estimators")
STEPS, SEED = 100, 0
COUNTED_FROM = STEPS // 5  # the way from the initial entropy into the band does not count
GSPO = {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 3e-4, "epsilon_high": 4e-4}
# What each estimator changes in the config; all else is `expression_arguments`. On policy every ratio is 1, and the
# clipped losses differ only in how they weigh tokens: DAPO and CISPO have one gradient, GSPO and SAPO another. Where
# they differ is the second pass over a batch, so that they run with two.
ESTIMATORS = {
    "DAPO = CISPO, on policy": {"loss_type": "dapo", "epsilon_high": 0.28},
    "GSPO = SAPO, on policy": GSPO,
    "Dr. GRPO, on policy": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    # RLOO's own default adds a KL reward (beta 0.05), which would pull on the entropy too: off, as for the others.
    "RLOO, on policy": {"beta": 0.0},
    "DAPO, 2 passes": {"loss_type": "dapo", "epsilon_high": 0.28, "num_iterations": 2},
    "CISPO, 2 passes": {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2},
    "GSPO, 2 passes": {**GSPO, "num_iterations": 2},
    "SAPO, 2 passes": {"loss_type": "sapo", "num_iterations": 2},
}


def run_one(name: str, initial: float) -> dict:
    """One training run; its record is read from disk if it was run before."""
    file = policy_folder(FOLDER, initial) / f"{re.sub('[^a-z0-9]+', '_', name.lower())}.json"
    settings = {"initial_entropy": initial, "steps": STEPS, "seed": SEED, **ESTIMATORS[name]}
    return kept_record(file, settings, lambda: train(name, initial, str(file.with_suffix(""))))


def train(name: str, initial: float, output_dir: str) -> dict:
    """Train with one estimator; the readings of its steps and the evaluation."""
    from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftGRPOTrainer, EntrocraftRLOOConfig, EntrocraftRLOOTrainer
    from entrocraft_trl.compare.run import train_and_evaluate
    from entrocraft_trl.tasks.task import expression_arguments, expression_task

    centre = band_knots(initial)["constant"][0][1]
    arguments = expression_arguments(output_dir, max_steps=STEPS, seed=SEED) | {
        "disable_tqdm": True,
        "rejection_rule": "entropy_change",
        "entropy_unit": "nats",
        "entropy_schedule": "constant",
        "entropy_low": [centre - HALF_WIDTH],
        "entropy_high": [centre + HALF_WIDTH],
    }
    arguments |= ESTIMATORS[name]
    if name.startswith("RLOO"):
        trainer, config = EntrocraftRLOOTrainer, EntrocraftRLOOConfig(**arguments)
    else:
        trainer, config = EntrocraftGRPOTrainer, EntrocraftGRPOConfig(**arguments)
    run = train_and_evaluate(trainer, config, expression_task(SEED, progress=False))
    # The second pass over a batch measures nothing.
    log = [entry for entry in run.log if ENTROPY in entry]
    steps, readings = series(log, ENTROPY)
    return {
        "estimator": name,
        "centre": centre,
        "steps": [step - 1 for step in steps],
        "entropy": readings,
        "reward": rewards(log),
        "accepted": accepted_shares(log),
        "evaluation": run.evaluation,
        "seconds": run.seconds,
    }


def measure(record: dict) -> dict[str, float | str]:
    """Figures of one run; RMS distance outside, mean entropy and scatter in nats."""
    counted = [h for step, h in zip(record["steps"], record["entropy"], strict=True) if step >= COUNTED_FROM]
    edges = [band_around(record["centre"])] * len(counted)
    return {
        "estimator": record["estimator"],
        "rms_outside": rms_outside(counted, edges),
        "in_band_share": share_inside(counted, edges),
        "entropy_minus_centre": mean(counted) - record["centre"],
        "scatter": reading_scatter(counted),
        "accepted_share": mean(record["accepted"]),
        "reward_start": mean(record["reward"][: len(record["reward"]) // 10]),
        "reward_end": mean(record["reward"][-(len(record["reward"]) // 10) :]),
        "mean_at_32": record["evaluation"]["mean@32"],
        "seconds": record["seconds"],
    }


def markdown(rows: list[dict]) -> str:
    lines = [
        "| estimator | RMS outside (nats) | readings inside | mean minus centre | scatter | accepted | reward, first "
        "-> last tenth | mean@32 | seconds |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        reward = f"{row['reward_start']:.3f} -> {row['reward_end']:.3f}"
        lines.append(
            f"| {row['estimator']} | {row['rms_outside']:.4f} | {row['in_band_share']:.0%} "
            f"| {row['entropy_minus_centre']:+.3f} | {row['scatter']:.3f} | {row['accepted_share']:.0%} "
            f"| {reward} | {row['mean_at_32']:.3f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def draw(records: list[dict]):
    """One panel per estimator: the measured entropy over the band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 3
    rows = math.ceil(len(records) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(9, 2.0 * rows), sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(records) :]:
        axis.set_visible(False)
    for axis, record in zip(axes.flat, records, strict=False):
        centre = record["centre"]
        axis.axhspan(centre - HALF_WIDTH, centre + HALF_WIDTH, color="#E69F00", alpha=0.25, linewidth=0)
        axis.plot(record["steps"], record["entropy"], color="#009E73", linewidth=1.0)
        axis.set_title(record["estimator"], fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("entropy (nats)", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step", fontsize=9)
    figure.tight_layout()
    return figure


def main() -> None:
    one_quiet_thread()
    initial, _ = start_of_task()
    records = []
    for name in ESTIMATORS:
        records.append(run_one(name, initial))
        print(measure(records[-1]), flush=True)
    rows = [measure(record) for record in records]
    centre = records[0]["centre"]
    table = markdown(rows)
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"initial_entropy": initial, "band": [centre - HALF_WIDTH, centre + HALF_WIDTH], "rows": rows}
    (RESULTS / "estimators.json").write_text(json.dumps(content, indent=2) + "\n")
    (RESULTS / "estimators.md").write_text(
        f"Entropy-change rule, constant band {centre - HALF_WIDTH:.3f} to {centre + HALF_WIDTH:.3f} nats, {STEPS} "
        f"optimizer steps from {initial:.3f} nats, one seed, the same learning rate for all. The first {COUNTED_FROM} "
        "steps, the way into the band, do not count. Made by `python -m benchmarks.estimators`.\n\n" + table
    )
    print(table)
    draw(records).savefig(RESULTS / "estimators.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
