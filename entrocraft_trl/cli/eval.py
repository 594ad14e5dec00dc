"""`entrocraft eval`: mean@k, pass@k, distinct right answers and token entropy of a model or an adapter."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..printable import printable
from . import CommandError, CommandParser, user_errors


if TYPE_CHECKING:
    from datasets import Dataset

    from ..evaluation.sampling import Sampler

# Completions sampled at once: what fits beside a model of a few billion parameters, and what keeps vLLM busy.
BATCH_SIZE, VLLM_BATCH_SIZE = 32, 1024
# Where results go and what is thrown away; every other option is part of the settings that samples depend on.
OUTPUT_OPTIONS = ("output_dir", "overwrite")


def make_parser() -> argparse.ArgumentParser:
    """The options of this command. Data and rewards are named as for `entrocraft train`."""
    parser = CommandParser(
        prog="entrocraft eval",
        description="Sample n completions for every prompt of a data set, score them, and write samples.jsonl, "
        "summary.json and pass_at_k.png. Started again with the same settings, it continues after the finished "
        "prompts.",
        epilog="The sampling defaults (32 samples at temperature 0.6, top-p 0.95, top-k 20, up to 3072 tokens) are "
        "those of the paper's evaluation. A completion is right if its reward is above 0.5.",
        allow_abbrev=False,
    )

    def option(name: str, help: str, **settings: Any) -> None:
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), help=help, **settings)

    option("model", "Hub name or folder of a model, or of a LoRA adapter", required=True)
    option("model_revision", "branch, tag or commit of the model", default="main")
    option("trust_remote_code", "run model code from the Hub", action="store_true")
    option("dtype", "weights' type: auto (as saved), bfloat16, float16, float32", default="auto")
    option("dataset", "Hub name, or local file or folder", required=True)
    option("dataset_config", "configuration of a data set on the Hub")
    option("dataset_split", "split, also with a slice (default: test, or train for a local file)")
    option("prompt_column", "column of the question: text or chat messages", default="prompt")
    option("answer_column", "column of the reference answer, which accuracy rewards read as `solution`")
    option("answer_after", "keep what follows the last occurrence of this text in the answer ('####' for GSM8K)")
    option("system_prompt", "system message")
    option("prompt_template", "text with {prompt} where the question goes")
    option(
        "prompt_format",
        "chat messages or text; auto: messages when the tokenizer has a chat template",
        default="auto",
        choices=["auto", "conversational", "text"],
    )
    option("chat_template_kwargs", "JSON for the chat template, as '{\"enable_thinking\": false}'", default="{}")
    option("max_samples", "use this many rows, from the start", type=int)
    option("reward", "one of TRL's rewards, or module:function", default="accuracy_reward")
    option("n", "completions for each prompt", type=int, default=32)
    option("temperature", "sampling temperature", type=float, default=0.6)
    option("top_p", "nucleus sampling; 1 is off", type=float, default=0.95)
    option("top_k", "top-k sampling; 0 is off", type=int, default=20)
    option("max_new_tokens", "longest completion", type=int, default=3072)
    option("seed", "seed of the sampling", type=int, default=0)
    option("batch_size", f"completions sampled at once (default: {BATCH_SIZE}, vLLM: {VLLM_BATCH_SIZE})", type=int)
    option("use_vllm", "sample with vLLM (pip install 'trl[vllm]'); it measures no entropy", action="store_true")
    option("output_dir", "folder for the results", default="runs/eval")
    option("overwrite", "start anew instead of continuing", action="store_true")
    return parser


def main(argv: list[str]) -> None:
    """Run the command: sample what is missing, score it, and write the results."""
    with ExitStack() as stack:
        with user_errors():
            args = make_parser().parse_args(argv)
            _check(args)
            from ..checkpoints.run_lock import EVALUATION, only_process

            stack.enter_context(only_process(Path(args.output_dir), EVALUATION))
        _evaluate(args)


def _evaluate(args: argparse.Namespace) -> None:
    from ..evaluation.evaluate import evaluate_blocks
    from ..evaluation.sample_file import append_samples

    with user_errors():
        tokenizer, adapter = _load_tokenizer(args)
        rows, reward = _data(args, tokenizer)
        settings = _settings(args, rows)
        block = max(1, args.batch_size // args.n)
        file = Path(args.output_dir) / "samples.jsonl"
        if args.overwrite:
            file.unlink(missing_ok=True)
        records = _finished(file, settings, block)
    if records:
        print(f"continuing after {len(records)} of {len(rows)} prompts in {printable(str(file))}", flush=True)
    if len(records) < len(rows):
        with user_errors():
            sampler = (_vllm_sampler if args.use_vllm else _transformers_sampler)(args, tokenizer, adapter)
        records = evaluate_blocks(
            rows,
            tokenizer,
            sampler,
            reward,
            block=block,
            records=records,
            save=partial(append_samples, file),
            chat_template_kwargs=args.chat_template_kwargs,
            progress=True,
        )
    _write_results(args, settings, records)


def _check(args: argparse.Namespace) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CommandError(
            "eval runs as one process; start it without a launcher (vLLM and transformers use all GPUs)"
        )
    for name in ("n", "max_new_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise CommandError(f"--{name} must be at least 1, got {value}")
    if not args.temperature > 0:
        raise CommandError(f"--temperature must be positive, got {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise CommandError(f"--top_p must lie above 0 and at most at 1, got {args.top_p}")
    if args.top_k < 0:
        raise CommandError(f"--top_k must not be negative, got {args.top_k}")
    try:
        args.chat_template_kwargs = dict(json.loads(args.chat_template_kwargs))
    except (ValueError, TypeError) as error:
        raise CommandError(f"--chat_template_kwargs must be a JSON object: {error}") from error
    args.batch_size = args.batch_size or (VLLM_BATCH_SIZE if args.use_vllm else BATCH_SIZE)


def _finished(file: Path, settings: dict[str, Any], block: int) -> list[dict[str, Any]]:
    from ..evaluation.sample_file import resume_samples

    try:
        return resume_samples(file, settings, block)
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
    from ..data.loading import BUILDERS, load_rows, prepare_rows
    from ..data.rewards import check_reward_columns, load_reward
    from ..evaluation.scoring import check_reward
    from .arguments import prompt_format

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


# -------------------------------------------------------------------------------------------------------------- report


def _write_results(args: argparse.Namespace, settings: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    from ..atomic import write_atomically
    from ..evaluation.accuracy import pass_at_k_curve
    from ..evaluation.records import summarise_records
    from ..reports.plots import plot_pass_at_k, save_figure

    metrics = summarise_records(records)
    folder = Path(args.output_dir)
    summary = {"metrics": metrics, "settings": settings}
    text = (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode()
    write_atomically(folder / "summary.json", lambda stream: stream.write(text))
    figure = plot_pass_at_k({Path(args.model).name: pass_at_k_curve(metrics)}, Path(args.dataset).stem)
    save_figure(figure, folder / "pass_at_k.png")
    print(f"{len(records)} prompts, {args.n} completions each")
    for name, value in metrics.items():
        print(f"{name:<17} {'not measured' if value is None else f'{value:.4g}'}")
    print(f"numbers: {printable(str(folder / 'summary.json'))}")
    print(f"figure:  {printable(str(folder / 'pass_at_k.png'))}")
