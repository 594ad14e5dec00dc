"""
A real language model held in a band by each rule, beside plain GRPO and TRL's adaptive bonus, on the sentence task.

    make real-model && python -m benchmarks.real_model    # two to three hours on two cores

Each arm is a process of one thread, two side by side. A call that was stopped is repeated: finished arms are kept in
`runs/real-model/`, an arm of ours that was under way goes on from its last checkpoint, another one starts anew. Writes
`benchmarks/results/real_model.{json,md,png}` after each arm.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.real_model_report import write_report
from entrocraft_trl.compare.records import read_record, write_record


FOLDER = Path("runs/real-model")
ARMS = ("advantage_sign", "influence", "entropy_change", "grpo", "adaptive_bonus")
# The middle is the entropy of the model at its start (benchmarks/results/sentences.md); four scatters of 64 rollouts.
CENTRE, WIDTH = 2.44, 0.37
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 4,
    "num_generations": 8,
    "max_steps": 60,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "logging_steps": 1,
    "save_steps": 10,
    "save_total_limit": 1,
    "report_to": "none",
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "seed": 0,
}
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
BAND = {
    "entropy_unit": "nats",
    "entropy_schedule": "constant",
    "entropy_low": [CENTRE - WIDTH / 2],
    "entropy_high": [CENTRE + WIDTH / 2],
}
# The bonus as TRL has it: step and bound are its defaults, the target is the band's centre.
BONUS = {"use_adaptive_entropy": True, "entropy_target": CENTRE}


def settings_of(arm: str) -> dict[str, Any]:
    """All that an arm's numbers depend on."""
    if arm == "grpo":
        return SETTINGS
    if arm == "adaptive_bonus":
        return SETTINGS | BONUS
    return SETTINGS | BAND | {"rejection_rule": arm}


def train(arm: str) -> None:
    """One arm in this process, on one thread; writes its record."""
    import torch
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks.runs import one_quiet_thread
    from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftGRPOTrainer
    from entrocraft_trl.compare.run import evaluate
    from entrocraft_trl.tasks.sentences import MAX_COMPLETION_LENGTH
    from entrocraft_trl.tasks.task import load_policy, sentence_task

    one_quiet_thread()
    torch.manual_seed(0)
    ours = arm not in ("grpo", "adaptive_bonus")
    config = (EntrocraftGRPOConfig if ours else GRPOConfig)(
        output_dir=str(FOLDER / arm), max_completion_length=MAX_COMPLETION_LENGTH, **settings_of(arm)
    )
    task = sentence_task(temperature=0.6)
    model, tokenizer = load_policy(task)
    trainer = (EntrocraftGRPOTrainer if ours else GRPOTrainer)(
        model=model,
        reward_funcs=task.reward,
        args=config,
        train_dataset=task.train,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
    )
    trainer.train(resume_from_checkpoint="auto") if ours else trainer.train()
    log = [record for record in trainer.state.log_history if "reward" in record]
    evaluation = evaluate(trainer.model, tokenizer, task, repeats=1)
    write_record(record_file(arm), record_settings(arm), {"arm": arm, "log": log, "evaluation": evaluation})


def record_file(arm: str) -> Path:
    return FOLDER / f"{arm}.json"


def record_settings(arm: str) -> dict[str, Any]:
    return settings_of(arm) | {"lora": LORA}


def run_arm(arm: str) -> None:
    """In a process of its own; what it prints goes into a file beside its record."""
    if read_record(record_file(arm), record_settings(arm)) is not None:
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Without these, glibc returns each step's activations to the system, which clears them anew in the next.
    keep_memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": str(2**30)}
    environment = os.environ | keep_memory | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(FOLDER / f"{arm}.log", "a", encoding="utf-8") as out:
        line = [sys.executable, "-m", "benchmarks.real_model", "--arm", arm]
        subprocess.run(line, env=environment, stdout=out, stderr=out, check=True)
    print(f"{arm}: {json.loads(record_file(arm).read_text())['evaluation']}", flush=True)
    write_report(*finished())


def finished() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Records of the arms that have one, and the band's settings."""
    records = [read_record(record_file(arm), record_settings(arm)) for arm in ARMS]
    return [record for record in records if record is not None], BAND


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arm", choices=ARMS, help="Train this one here, as a call without it does in processes.")
    options = parser.parse_args()
    if options.arm:
        return train(options.arm)
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(run_arm, ARMS))
    write_report(*finished())


if __name__ == "__main__":
    main()
