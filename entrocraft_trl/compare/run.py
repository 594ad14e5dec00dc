"""Train a policy with one method and measure it, in the same way for every trainer, so that methods compare."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from peft import PeftConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..evaluation.accuracy import self_similarity
from ..evaluation.evaluate import evaluate_policy, sample_and_score
from ..evaluation.records import summarise_records
from ..tasks.task import Task, load_policy


ALIKE = 100  # right answers that self-similarity is taken of, since it grows with their number


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
    batch_size: int = 512,
    alike: bool = False,
    progress: bool = False,
) -> dict[str, float]:
    """
    [`evaluate_policy`] on the task's held-out prompts, with the task's sampling settings.

    The prompts are sampled `repeats` times over, which divides the variance of every figure by that number. Processes
    of one launcher share them; each needs the whole model.

    Args:
        alike (`bool`): Whether to add `self_similarity` of the first [`ALIKE`] right answers, and
            `self_similarity_of`, how many there were. For answers in words.
    """
    rows = concatenate_datasets([task.test] * repeats)
    options = {"generation_config": task.generation_config, "batch_size": batch_size, "progress": progress}
    ranks = PartialState()
    if ranks.num_processes == 1 and not alike:
        return evaluate_policy(
            model, tokenizer, rows, task.reward, samples, canonical=task.canonical, seed=seed, **options
        )
    rows = rows.shard(ranks.num_processes, ranks.process_index, contiguous=True)
    seed += ranks.process_index
    records = gather_object(sample_and_score(model, tokenizer, rows, task.reward, samples, seed=seed, **options))
    figures = summarise_records(records, canonical=task.canonical)
    if not alike:
        return figures
    answers = [
        task.canonical(text)
        for record in records
        for text, reward in zip(record["completions"], record["rewards"], strict=True)
        if reward is not None and reward > 0.5
    ][:ALIKE]
    similarity = self_similarity(answers)  # NaN without an answer of four words, which JSON does not have
    return figures | {
        "self_similarity": None if math.isnan(similarity) else similarity,
        "self_similarity_of": len(answers),
    }


def evaluate_start(task: Task, *, seed: int = 0, progress: bool = False) -> dict[str, float]:
    """[`evaluate`] of the starting policy."""
    return evaluate(*load_policy(task), task, seed=seed, progress=progress)


def train_and_evaluate(
    trainer_class: type,
    args: TrainingArguments,
    task: Task,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    loading: Mapping[str, Any] | None = None,
    peft_config: PeftConfig | None = None,
    held_out: Dataset | None = None,
    resume: str | None = None,
    **evaluation: Any,
) -> Run:
    """
    Train `task.policy` with `trainer_class` and evaluate what comes out. Its log is saved in `output_dir`.

    Args:
        trainer_class (`type`): A trainer with the constructor of TRL's `GRPOTrainer`.
        args (`TrainingArguments`): The trainer's config.
        task (`Task`): Start, data and reward.
        callbacks (`Sequence[TrainerCallback]`): Added to the trainer's own.
        loading (`Mapping[str, Any]`, *optional*): Arguments of `from_pretrained`.
        peft_config (`PeftConfig`, *optional*): Adapter to train.
        held_out (`Dataset`, *optional*): What `args.eval_strategy` evaluates during training.
        resume (`str`, *optional*): As `train` of a trainer with our services takes it.
        **evaluation: For [`evaluate`], at the end.
    """
    if peft_config is not None:
        set_seed(args.seed)  # the adapter's first weights are drawn before the trainer seeds anything
    model, tokenizer = load(task, loading)
    trainer = trainer_class(
        model=model,
        reward_funcs=task.reward,
        args=args,
        train_dataset=task.train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **({} if peft_config is None else {"peft_config": peft_config}),
    )
    # It would print every log record as a dict between the progress bars; the records are returned and saved.
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - start
    trainer.save_state()
    log = [record for record in trainer.state.log_history if "reward" in record]
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return Run(log, evaluate(policy, tokenizer, task, **{"seed": args.seed, **evaluation}), seconds)


def load(task: Task, loading: Mapping[str, Any] | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The task's policy and its tokenizer, with the arguments that `loading` holds for `from_pretrained`."""
    if loading is None:
        return load_policy(task)
    given = {name: value for name, value in loading.items() if value is not None}
    tokenizer = AutoTokenizer.from_pretrained(task.policy, revision=loading.get("revision"), padding_side="left")
    return AutoModelForCausalLM.from_pretrained(task.policy, **given), tokenizer
