"""
How well each method keeps the policy's entropy in a band, on the embedded task.

    python -m benchmarks.control            # everything, both cores, under 90 minutes on a 2-core CPU machine
    python -m benchmarks.control --quick    # one seed, two bands, few steps: about 5 minutes

Each finished run is kept in `runs/control/`, so that a second call continues where the first one stopped. Writes
`benchmarks/results/control.{json,md,png}` (`--quick` writes to `runs/control-quick/`).
"""

import argparse
import math
import multiprocessing
import os
from pathlib import Path
from statistics import mean

from benchmarks.runs import RESULTS, one_quiet_thread, policy_folder
from entrocraft_trl.compare.records import kept_record
from entrocraft_trl.reports.log import (
    accepted_shares,
    entropies,
    reading_scatter,
    reentry_steps,
    rewards,
    rms_outside,
    share_inside,
)


METHODS = ("grpo", "adaptive_bonus", "advantage_sign", "entropy_change")
HALF_WIDTH = 0.05  # nats: every band is 0.10 nats wide
STEPS, QUICK_STEPS = 300, 60
SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
# Bonus step and bound: TRL's defaults, two stronger and two weaker ones (the last is that of arXiv 2505.22312).
BONUS_CANDIDATES = {
    "4e-2/1": (4e-2, 1.0),
    "1.5e-2/1": (1.5e-2, 1.0),
    "5e-3/1": (5e-3, 1.0),
    "1e-3/0.1": (1e-3, 0.1),
    "1e-4/5e-3": (1e-4, 5e-3),
}


def band_knots(initial: float) -> dict[str, list[tuple[float, float]]]:
    """Centres in nats at progress values, joined by straight lines ("cosine" is drawn with many short ones)."""
    # Above where plain GRPO ends up, so that there is something to hold on every band.
    end = 0.5 * initial
    cosine = [(p / 20, initial + (end - initial) * (1 - math.cos(math.pi * p / 20)) / 2) for p in range(21)]
    return {
        "constant": [(0.0, 0.85 * initial), (1.0, 0.85 * initial)],
        "linear": [(0.0, initial), (1.0, end)],
        "cosine": cosine,
        "rise_decay": [(0.0, initial), (1 / 3, 1.15 * initial), (1.0, end)],
        "step": [
            (0.0, 0.85 * initial),
            (0.5, 0.85 * initial),
            (0.5, 0.85 * initial - 0.15),
            (1.0, 0.85 * initial - 0.15),
        ],
    }


def centre_at(knots: list[tuple[float, float]], progress: float) -> float:
    """The band's centre in nats."""
    from entrocraft_trl.control.schedule import Knot, band_at

    return band_at(progress, shape="piecewise", knots=[Knot(p, c, c) for p, c in knots]).low


def band_around(centre: float) -> tuple[float, float]:
    """Low and high edge in nats."""
    return centre - HALF_WIDTH, centre + HALF_WIDTH


def run_one(job: dict) -> dict:
    """One training run in this worker process; its record is read from disk if it was run before."""
    file = Path(job["folder"]) / f"{job['method']}-{job['band']}-{job['seed']}.json"
    settings = {key: job[key] for key in ("method", "band", "seed", "steps", "initial_entropy")}
    if job["method"].startswith("adaptive_bonus"):
        settings["bonus"] = list(job["bonus"])
    return kept_record(file, settings, lambda: train(job, str(file.with_suffix(""))))


def train(job: dict, output_dir: str) -> dict:
    """Train with the job's method and band; the readings of all steps and the evaluation."""
    one_quiet_thread()
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftGRPOTrainer
    from entrocraft_trl.compare.run import train_and_evaluate
    from entrocraft_trl.tasks.task import expression_arguments, expression_task

    knots = band_knots(job["initial_entropy"]).get(job["band"])
    common = expression_arguments(output_dir, max_steps=job["steps"], seed=job["seed"]) | {"disable_tqdm": True}
    callbacks = []
    if job["method"].startswith("adaptive_bonus"):

        class TargetFollowsBand(TrainerCallback):
            # TRL's target is one number; moving it with the band gives the method its best case.
            def on_step_begin(self, args, state, control, **kwargs):
                args.entropy_target = centre_at(knots, state.global_step / state.max_steps)

        delta, bound = job["bonus"]
        config = GRPOConfig(
            **common,
            use_adaptive_entropy=True,
            entropy_coef_delta=delta,
            entropy_coef_max=bound,
            entropy_target=centre_at(knots, 0.0),
        )
        trainer, callbacks = GRPOTrainer, [TargetFollowsBand()]
    elif job["method"] == "grpo":
        trainer, config = GRPOTrainer, GRPOConfig(**common)
    else:
        trainer = EntrocraftGRPOTrainer
        config = EntrocraftGRPOConfig(
            **common,
            rejection_rule=job["method"],
            entropy_unit="nats",
            entropy_schedule="piecewise",
            entropy_knots=[f"{p}:{c - HALF_WIDTH}:{c + HALF_WIDTH}" for p, c in knots],
        )
    run = train_and_evaluate(trainer, config, expression_task(job["seed"], progress=False), callbacks=callbacks)
    return {
        **{key: job[key] for key in ("method", "band", "seed", "steps")},
        "entropy": entropies(run.log),
        "reward": rewards(run.log),
        "accepted": accepted_shares(run.log) or [1.0] * len(run.log),
        "evaluation": run.evaluation,
        "seconds": run.seconds,
    }


def start_of_task() -> tuple[float, dict[str, float]]:
    """Entropy in nats of the starting policy on the training prompts, which sets all bands, and its evaluation."""
    from entrocraft_trl.compare.run import evaluate_start
    from entrocraft_trl.tasks.task import expression_task

    task = expression_task()
    return evaluate_start(task, on_training_prompts=True)["entropy"], evaluate_start(task)


def measure(record: dict, knots: list[tuple[float, float]], band: str) -> dict[str, float | None]:
    """Figures of one run against one band; the first 10% of the steps, the way into the band, do not count."""
    readings, steps = record["entropy"], record["steps"]
    edges = [band_around(centre_at(knots, step / steps)) for step in range(len(readings))]
    counted = slice(steps // 10, None)
    return {
        "rms_outside": rms_outside(readings[counted], edges[counted]),
        "in_band_share": share_inside(readings[counted], edges[counted]),
        "reentry_steps": reentry_steps(readings, edges, jump=steps // 2) if band == "step" else None,
        "accepted_share": mean(record["accepted"]),
        "mean_at_32": record["evaluation"]["mean@32"],
        "pass_at_32": record["evaluation"]["pass@32"],
        "distinct_correct": record["evaluation"]["distinct_correct"],
        "scatter": reading_scatter(readings),
    }


def jobs(folder: Path, initial: float, steps: int, seeds, bands, bonus=None) -> list[dict]:
    """Plain GRPO knows no band: one run per seed serves all. Seeds come first, so that a cut run is a whole table."""
    shared = {"folder": str(folder), "initial_entropy": initial, "steps": steps, "bonus": bonus}
    rows = []
    for seed in seeds:
        rows.append({**shared, "method": "grpo", "band": "none", "seed": seed})
        rows += [{**shared, "method": m, "band": b, "seed": seed} for b in bands for m in METHODS[1:]]
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.control", description=__doc__.split("\n")[1])
    parser.add_argument("--quick", action="store_true", help="one seed, two bands, few steps")
    options = parser.parse_args(argv)
    # Workers take one thread each: two runs side by side beat one run on two threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from benchmarks.control_report import write_report

    steps, seeds = (QUICK_STEPS, QUICK_SEEDS) if options.quick else (STEPS, SEEDS)
    initial, start = start_of_task()
    folder = policy_folder(Path("runs/control-quick" if options.quick else "runs/control"), initial)
    bands = ("constant", "step") if options.quick else tuple(band_knots(initial))
    print(f"initial entropy {initial:.3f} nats, starting policy {start}", flush=True)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count() or 1) as pool:
        bonus, tuning = tune_bonus(pool, folder, initial, steps)
        todo = jobs(folder, initial, steps, seeds, bands, bonus)
        records = []
        for record in pool.imap_unordered(run_one, todo):
            records.append(record)
            name = f"{record['method']} {record['band']} seed {record['seed']}"
            print(f"[{len(records)}/{len(todo)}] {name}: {record['seconds']:.0f} s", flush=True)
    write_report(folder if options.quick else RESULTS, records, bands, initial, start, tuning)


def tune_bonus(pool, folder: Path, initial: float, steps: int) -> tuple[tuple[float, float], dict[str, float]]:
    """The bonus's step and bound with the smallest RMS distance on the constant band, on a seed of its own."""
    tuning = [
        {
            "folder": str(folder),
            "initial_entropy": initial,
            "steps": steps,
            "method": f"adaptive_bonus_{name.replace('/', '_')}",
            "band": "constant",
            "seed": 100,
            "bonus": bonus,
        }
        for name, bonus in BONUS_CANDIDATES.items()
    ]
    knots = band_knots(initial)["constant"]
    distances = {
        name: measure(record, knots, "constant")["rms_outside"]
        for name, record in zip(BONUS_CANDIDATES, pool.map(run_one, tuning, chunksize=1), strict=True)
    }
    best = min(distances, key=distances.get)
    print(f"adaptive bonus, RMS distance by step/bound: {distances}; best {best}", flush=True)
    return BONUS_CANDIDATES[best], distances


if __name__ == "__main__":
    main()
