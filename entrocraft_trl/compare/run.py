"""Train a policy with one method and measure it, in the same way for every trainer, so that methods compare."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import concatenate_datasets
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from ..evaluation.evaluate import evaluate_policy
from ..tasks import expressions
from ..tasks.task import Task, load_policy


class Run(NamedTuple):
    """A finished run: its log (one record per logging step), its evaluation, and seconds of training."""

    log: list[dict[str, Any]]
    evaluation: dict[str, float]
    seconds: float


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    samples: int = 32,
    repeats: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, float]:
    """
    [`evaluate_policy`] on the task's held-out prompts, with the task's sampling settings.

    The prompts are sampled `repeats` times over, which divides the variance of every figure by that number.
    """
    return evaluate_policy(
        model,
        tokenizer,
        concatenate_datasets([task.test] * repeats),
        task.reward,
        samples,
        generation_config=task.generation_config,
        canonical=task.canonical,
        batch_size=512,
        seed=seed,
        progress=progress,
    )


def evaluate_start(
    task: Task, *, on_training_prompts: bool = False, seed: int = 0, progress: bool = False
) -> dict[str, float]:
    """
    [`evaluate`] of the starting policy. At temperature 1, its `entropy` on the training prompts is what a run measures
    first.
    """
    if on_training_prompts:
        task = task._replace(test=expressions.make_dataset("train", len(expressions.TRAIN_TARGETS), 0))
    return evaluate(*load_policy(task), task, seed=seed, progress=progress)


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
