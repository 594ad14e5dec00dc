"""Train a policy with one method and measure it, in the same way for every trainer, so that methods compare."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, TrainingArguments

from ..evaluation.accuracy import evaluate_policy
from ..reports.log import entropies
from ..tasks import expressions, starting_policy


class Task(NamedTuple):
    """A policy to start from, and what to train and to measure it on."""

    policy: Path
    train: Dataset
    test: Dataset
    reward: Callable[..., list[float]]
    canonical: Callable[[str], str]
    max_completion_length: int


def expression_task(seed: int = 0, progress: bool = True) -> Task:
    """The embedded task; `seed` orders the training prompts. Makes the starting policy on the first call."""
    return Task(
        policy=starting_policy(progress=progress),
        train=expressions.make_dataset("train", 4096, seed),
        test=expressions.make_dataset("test", len(expressions.TEST_TARGETS), 0),
        reward=expressions.expression_reward,
        canonical=expressions.canonical_answer,
        max_completion_length=expressions.MAX_COMPLETION_LENGTH,
    )


def expression_arguments(output_dir: str, *, max_steps: int = 300, seed: int = 0) -> dict[str, Any]:
    """
    Trainer arguments for the embedded task on a CPU, the same for every method (also in `configs/quickstart.yaml`).

    At this learning rate plain GRPO loses most of its entropy within 300 steps, and one step moves the entropy by less
    than one reading of it scatters.
    """
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": 128,
        "num_generations": 8,
        "max_completion_length": expressions.MAX_COMPLETION_LENGTH,
        "max_steps": max_steps,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "seed": seed,
    }


def load_policy(task: Task) -> tuple[Any, Any]:
    """The task's starting policy: its model and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(task.policy), AutoTokenizer.from_pretrained(task.policy)


def evaluate_start(task: Task, *, on_training_prompts: bool = False, progress: bool = False) -> dict[str, float]:
    """[`evaluate`] of the starting policy; its `entropy` on the training prompts is what a run measures first."""
    if on_training_prompts:
        task = task._replace(test=expressions.make_dataset("train", len(expressions.TRAIN_TARGETS), 0))
    return evaluate(*load_policy(task), task, progress=progress)


class Run(NamedTuple):
    """A finished run: its log (one record per logging step), its evaluation, and seconds of training."""

    log: list[dict[str, Any]]
    evaluation: dict[str, float]
    seconds: float


def evaluate(model, tokenizer, task: Task, *, samples: int = 32, repeats: int = 4, seed: int = 0, progress=False):
    """
    Mean@n, pass@n, distinct right answers and entropy at temperature 1 on the task's held-out prompts.

    The prompts are sampled `repeats` times over, which divides the variance of every figure by that number.
    """
    return evaluate_policy(
        model,
        tokenizer,
        concatenate_datasets([task.test] * repeats),
        task.reward,
        n=samples,
        ks=(samples,),
        canonical=task.canonical,
        max_new_tokens=task.max_completion_length,
        batch_size=512,
        seed=seed,
        progress=progress,
    )


def train_and_evaluate(
    trainer_class: type,
    args: TrainingArguments,
    task: Task,
    *,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """
    Train `task.policy` with `trainer_class` and evaluate what comes out. Its log is saved in `output_dir`.

    Args:
        trainer_class (`type`): A trainer with the constructor of TRL's `GRPOTrainer`.
        args (`TrainingArguments`): The trainer's config.
        task (`Task`): Start, data and reward.
        callbacks (`Sequence[TrainerCallback]`): Added to the trainer's own.
    """
    model, tokenizer = load_policy(task)
    trainer = trainer_class(
        model=model,
        reward_funcs=task.reward,
        args=args,
        train_dataset=task.train,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    # It would print every log record as a dict between the progress bars; the records are returned and saved.
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_state()
    log = [record for record in trainer.state.log_history if "reward" in record]
    return Run(log, evaluate(trainer.model, tokenizer, task, seed=args.seed), seconds)


def measured_entropies(log: Sequence[Mapping[str, Any]]) -> list[float]:
    """Batch entropies in nats, measured before any filter, in order; of a plain TRL run, TRL's own."""
    return entropies(log)
