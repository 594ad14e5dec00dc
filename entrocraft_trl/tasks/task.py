"""A task for comparisons: a policy to start from, data, reward, settings. The embedded one needs no download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import expressions, sentences
from .real_model import real_model_path
from .warmup import starting_policy


class Task(NamedTuple):
    """A policy to start from, what to train and to measure it on, and how to sample when measuring."""

    policy: Path | str
    train: Dataset
    test: Dataset
    reward: Callable[..., list[float]]
    canonical: Callable[[str], str]
    generation_config: GenerationConfig


def expression_task(
    seed: int = 0, *, temperature: float = 1.0, progress: bool = True, policy: Path | str | None = None
) -> Task:
    """
    The embedded task; `seed` orders the training prompts, `temperature` is that of evaluations. Makes the starting
    policy on the first call, unless another `policy` is given.
    """
    return Task(
        policy=policy or starting_policy(progress=progress),
        train=expressions.make_dataset("train", 4096, seed),
        test=expressions.make_dataset("test", len(expressions.TEST_TARGETS), 0),
        reward=expressions.expression_reward,
        canonical=expressions.canonical_answer,
        generation_config=GenerationConfig(
            do_sample=True, temperature=temperature, max_new_tokens=expressions.MAX_COMPLETION_LENGTH
        ),
    )


def sentence_task(
    seed: int = 0,
    *,
    temperature: float = 1.0,
    test_size: int = len(sentences.TEST_WORDS) // 2,
    policy: Path | str | None = None,
) -> Task:
    """
    The task of a real language model, which `make real-model` fetches.

    Args:
        seed (`int`, *optional*, defaults to `0`): Seed of the training prompts.
        temperature (`float`, *optional*, defaults to `1.0`): That of evaluations.
        test_size (`int`, *optional*): Prompts of an evaluation. Defaults to as many as hold each test word once.
        policy (`Path` or `str`, *optional*): Another chat model, by folder or name on the Hub.

    Raises:
        `FileNotFoundError`: if no other is given, and the model has not been made.
    """
    return Task(
        policy=policy or real_model_path(),
        train=sentences.make_dataset("train", 4096, seed),
        test=sentences.make_dataset("test", test_size, 0),
        reward=sentences.sentence_reward,
        canonical=sentences.canonical_sentence,
        generation_config=GenerationConfig(
            do_sample=True, temperature=temperature, max_new_tokens=sentences.MAX_COMPLETION_LENGTH
        ),
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


def load_policy(task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The task's starting policy: its model and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(task.policy), AutoTokenizer.from_pretrained(task.policy)
