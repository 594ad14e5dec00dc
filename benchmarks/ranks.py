"""
What entropy control costs per step under two processes, against plain GRPO under the same launcher.

    accelerate launch --config_file configs/accelerate/cpu_ddp.yaml -m benchmarks.ranks    # about 3 minutes

The arms take turns, several times over, in one launch: whatever else the machine does meets them all. Writes
`benchmarks/results/ranks.{json,md}`.
"""

import json
import time
from statistics import median

from benchmarks.runs import RESULTS, one_quiet_thread


STEPS, WARM_UP, REPEATS = 20, 3, 9  # the first steps of a run allocate memory and fill caches
# A band that is never left, and one that is never reached: then every step rejects.
INSIDE = {"entropy_unit": "nats", "entropy_low": [0.0], "entropy_high": [100.0]}
ABOVE = {"entropy_unit": "nats", "entropy_low": [50.0], "entropy_high": [60.0]}
ARMS = {
    "grpo": None,
    "advantage_sign, inside its band": {"rejection_rule": "advantage_sign", **INSIDE},
    "advantage_sign, rejecting": {"rejection_rule": "advantage_sign", **ABOVE},
    "entropy_change, rejecting": {"rejection_rule": "entropy_change", **ABOVE},
}


def step_seconds(arm: str) -> float:
    """Median seconds of an optimizer step, generation included, over the steps of one run after its warm-up."""
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftGRPOTrainer
    from entrocraft_trl.tasks.task import expression_arguments, expression_task, load_policy

    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            marks.append(time.perf_counter())

    arguments = expression_arguments("runs/ranks", max_steps=STEPS) | {"disable_tqdm": True}
    arguments["per_device_train_batch_size"] //= 2  # two processes: the same 128 rollouts a step
    arguments["learning_rate"] = 1e-8  # so small that all arms sample the same rollouts, as long in each
    trainer_class, config = GRPOTrainer, GRPOConfig
    if ARMS[arm] is not None:
        trainer_class, config = EntrocraftGRPOTrainer, EntrocraftGRPOConfig
        arguments |= ARMS[arm]
    task = expression_task(progress=False)
    model, tokenizer = load_policy(task)
    trainer = trainer_class(
        model=model,
        reward_funcs=task.reward,
        args=config(**arguments),
        train_dataset=task.train,
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.accelerator.wait_for_everyone()
    return median(after - before for before, after in zip(marks[WARM_UP:], marks[WARM_UP + 1 :], strict=False))


def main() -> None:
    from accelerate import PartialState

    state = PartialState(cpu=True)
    if state.num_processes != 2:
        raise SystemExit(f"start it with two processes (see the first lines of this file), not {state.num_processes}")
    one_quiet_thread()
    from entrocraft_trl.tasks.task import expression_task

    with state.main_process_first():
        expression_task(progress=False)  # makes the starting policy if it is not there yet
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(REPEATS):
        for arm in ARMS:
            seconds[arm].append(step_seconds(arm))
    if state.is_main_process:
        write_report(seconds)
    state.wait_for_everyone()
    state.destroy_process_group()


def write_report(seconds: dict[str, list[float]]) -> None:
    """Write `ranks.json` and `ranks.md`, and print the table: ratios to plain GRPO's step of the same turn."""
    rows = []
    for arm, values in seconds.items():
        ratios = [value / plain for value, plain in zip(values, seconds["grpo"], strict=True)]
        rows.append({"arm": arm, "seconds": median(values), "ratio": median(ratios), "ratios": ratios})
    lines = ["| method | seconds a step | ratio to plain GRPO (least to most) |", "|---|---|---|"]
    for row in rows:
        low, high = min(row["ratios"]), max(row["ratios"])
        lines.append(f"| {row['arm']} | {row['seconds']:.3f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) |")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "ranks.json").write_text(json.dumps({"repeats": REPEATS, "rows": rows}, indent=2) + "\n")
    text = (
        f"Two CPU processes over gloo (DDP), one thread each, 64 rollouts a process and step, 0.45M parameters: "
        f"medians over {REPEATS} turns of {STEPS - WARM_UP} steps. Made by `python -m benchmarks.ranks` under the "
        "launcher.\n\n"
    )
    (RESULTS / "ranks.md").write_text(text + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
