"""`entrocraft eval`: mean@k, pass@k, distinct right answers and token entropy of a model or an adapter."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..printable import printable
from . import CommandError, user_errors
from .eval_options import parse, runs_of
from .eval_results import write_results, write_table


if TYPE_CHECKING:
    from datasets import Dataset

    from ..evaluation.sampling import Sampler

# Where results go, what is thrown away and which other data sets there are: every other option is part of the settings
# that samples depend on.
OUTPUT_OPTIONS = ("output_dir", "overwrite", "benchmarks")


class _Evaluation(NamedTuple):
    """One data set: options, rows `(P,)`, the reward of a completion, and what the samples depend on."""

    args: argparse.Namespace
    rows: Dataset
    reward: Callable
    settings: dict[str, Any]

    @property
    def file(self) -> Path:
        return Path(self.args.output_dir) / "samples.jsonl"

    @property
    def block(self) -> int:
        """Prompts that are sampled together."""
        return max(1, self.args.batch_size // self.args.n)


def main(argv: list[str]) -> None:
    """Run the command: sample what is missing, score it, and write the results."""
    with ExitStack() as stack:
        with user_errors():
            args = parse(argv)
            runs = runs_of(args)
            from ..checkpoints.run_lock import EVALUATION, only_process

            stack.enter_context(only_process(Path(args.output_dir), EVALUATION))
        _evaluate(args, runs)


def _evaluate(args: argparse.Namespace, runs: Mapping[str, argparse.Namespace]) -> None:
    with user_errors():
        tokenizer, adapter = _load_tokenizer(args)
        # Of every data set, before the first file is touched and the model loads.
        evaluations = {name: _prepare(name, run, tokenizer) for name, run in runs.items()}
        finished = {name: _finished(evaluation) for name, evaluation in evaluations.items()}

    @cache
    def sampler() -> Sampler:
        with user_errors():
            return (_vllm_sampler if args.use_vllm else _transformers_sampler)(args, tokenizer, adapter)

    figures = {}
    for name, evaluation in evaluations.items():
        records = _sample(evaluation, finished.pop(name), tokenizer, sampler)
        figures[name] = write_results(name, evaluation.args, evaluation.settings, records)
    if args.benchmarks:
        write_table(args, figures)


def _sample(
    evaluation: _Evaluation, records: list[dict[str, Any]], tokenizer, sampler: Callable[[], Sampler]
) -> list[dict[str, Any]]:
    """The records of all prompts: the finished ones, and those that are missing, for which the model loads."""
    from ..evaluation.evaluate import evaluate_blocks
    from ..evaluation.sample_file import append_samples

    prompts = len(evaluation.rows)
    if records:
        print(f"continuing after {len(records)} of {prompts} prompts in {printable(str(evaluation.file))}", flush=True)
    if len(records) == prompts:
        return records
    return evaluate_blocks(
        evaluation.rows,
        tokenizer,
        sampler(),
        evaluation.reward,
        block=evaluation.block,
        records=records,
        save=partial(append_samples, evaluation.file),
        chat_template_kwargs=evaluation.args.chat_template_kwargs,
        progress=True,
    )


def _prepare(name: str, args: argparse.Namespace, tokenizer) -> _Evaluation:
    try:
        rows, reward = _data(args, tokenizer)
    except ValueError as error:
        if not args.benchmarks:
            raise
        local = (
            "" if f"{name}={args.dataset}" in args.benchmarks else f". A local file stands in for it as {name}=FILE"
        )
        raise CommandError(f"benchmark {name!r}: {error}{local}") from error
    return _Evaluation(args, rows, reward, _settings(args, rows))


def _finished(evaluation: _Evaluation) -> list[dict[str, Any]]:
    from ..evaluation.sample_file import resume_samples

    if evaluation.args.overwrite:
        evaluation.file.unlink(missing_ok=True)
    try:
        return resume_samples(evaluation.file, evaluation.settings, evaluation.block)
    except ValueError as error:
        raise CommandError(f"{error}. Choose another --output_dir, or start anew with --overwrite") from error


# ------------------------------------------------------------------------------------------------------ model and data


def _load_tokenizer(args: argparse.Namespace):
    """The tokenizer, and the adapter's config if the model is an adapter."""
    from peft import PeftConfig
    from transformers import AutoTokenizer
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        adapter = None
        if find_adapter_config_file(args.model, revision=args.model_revision):
            adapter = PeftConfig.from_pretrained(args.model, revision=args.model_revision)
        try:
            options = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
            return AutoTokenizer.from_pretrained(args.model, **options), adapter
        except (OSError, ValueError):
            if adapter is None:
                raise
            # Adapters are often saved without a tokenizer: it is the base model's.
            options["revision"] = adapter.revision
            return AutoTokenizer.from_pretrained(adapter.base_model_name_or_path, **options), adapter
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer of model {args.model!r}: {error}") from error


def _data(args: argparse.Namespace, tokenizer) -> tuple[Dataset, Callable]:
    from ..data.loading import BUILDERS, load_rows, prepare_rows, prompt_format
    from ..data.rewards import check_reward_columns, load_reward
    from ..evaluation.scoring import check_reward

    form = prompt_format(args, tokenizer, args.model)
    is_file = Path(args.dataset).suffix.lower() in BUILDERS  # a file has one split, "train"
    split = args.dataset_split or ("train" if is_file else "test")
    rows = prepare_rows(load_rows(args.dataset, split, args.dataset_config), form, args.max_samples)
    reward = load_reward(args.reward)
    check_reward_columns([reward], rows.column_names)
    check_reward(reward, rows.column_names)
    return rows, reward


def _settings(args: argparse.Namespace, rows: Dataset) -> dict[str, Any]:
    """What the samples depend on: the options, the rows, and the weights in a local folder."""
    settings = {name: value for name, value in vars(args).items() if name not in OUTPUT_OPTIONS}
    content = json.dumps([rows[name] for name in ("prompt", "solution") if name in rows.column_names], default=str)
    settings["prompts"] = len(rows)
    settings["data_digest"] = hashlib.sha256(content.encode()).hexdigest()[:16]
    folder = Path(args.model)
    if folder.is_dir():
        # By size and time, since reading gigabytes of weights would take longer than some evaluations.
        files = sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
        state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        settings["weights_digest"] = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    return settings


def _sampling(args: argparse.Namespace):
    from transformers import GenerationConfig

    names = ("temperature", "top_p", "top_k", "max_new_tokens")
    return GenerationConfig(do_sample=True, **{name: getattr(args, name) for name in names})


def _transformers_sampler(args: argparse.Namespace, tokenizer, adapter) -> Sampler:
    import torch
    import transformers

    from ..evaluation.sampling import transformers_sampler

    model = transformers.AutoModelForCausalLM.from_pretrained(  # an adapter's base model is found and loaded too
        args.model,
        revision=args.model_revision,
        trust_remote_code=args.trust_remote_code,
        dtype=args.dtype,
        device_map="auto" if torch.accelerator.is_available() else None,
    )
    # Shifted, since the blocks count on from there: the seeds of two evaluations do not meet.
    seed = args.seed << 32
    return transformers_sampler(model, tokenizer, args.n, _sampling(args), batch_size=args.batch_size, seed=seed)


def _vllm_sampler(args: argparse.Namespace, tokenizer, adapter) -> Sampler:
    from ..evaluation.vllm_sampling import lora_rank, vllm_sampler

    try:
        from vllm import LLM
    except ImportError as error:
        raise CommandError("--use_vllm needs vLLM: pip install 'trl[vllm]', or leave the option out") from error
    options = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code, "seed": args.seed}
    if adapter is None:
        llm = LLM(model=args.model, revision=args.model_revision, **options)
    else:
        base = adapter.base_model_name_or_path
        rank = lora_rank(adapter)
        llm = LLM(model=base, revision=adapter.revision, enable_lora=True, max_lora_rank=rank, **options)
    path = args.model if adapter is not None else None
    return vllm_sampler(llm, tokenizer, args.n, _sampling(args), seed=args.seed << 32, adapter=path)
