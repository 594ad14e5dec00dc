"""Options of `entrocraft eval`, and which evaluations they ask for."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ..evaluation.benchmarks import ANSWER_TEMPLATE, BENCHMARKS, PROMPT_TEMPLATE, parse_benchmarks
from . import CommandError, CommandParser


# Completions sampled at once: what fits beside a model of a few billion parameters, and what keeps vLLM busy.
BATCH_SIZE, VLLM_BATCH_SIZE = 32, 1024


def make_parser() -> argparse.ArgumentParser:
    """The options of this command. Data and rewards are named as for `entrocraft train`."""
    parser = CommandParser(
        prog="entrocraft eval",
        description="Sample n completions for every prompt of a data set, score them, and write samples.jsonl, "
        "summary.json and pass_at_k.png; with --benchmarks in a folder for each, beside benchmarks.md, their table. "
        "Started again with the same settings, it continues after the finished prompts.",
        epilog="The sampling defaults (32 samples at temperature 0.6, top-p 0.95, top-k 20, up to 3072 tokens) are "
        "those of the paper's evaluation. A completion is right if its reward is above 0.5.",
        allow_abbrev=False,
    )

    def option(name: str, help: str, to: Any = parser, **settings: Any) -> None:
        to.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), help=help, **settings)

    option("model", "Hub name or folder of a model, or of a LoRA adapter", required=True)
    option("model_revision", "branch, tag or commit of the model", default="main")
    option("trust_remote_code", "run model code from the Hub", action="store_true")
    option("dtype", "weights' type: auto (as saved), bfloat16, float16, float32", default="auto")
    data = parser.add_mutually_exclusive_group(required=True)
    option("dataset", "Hub name, or local file or folder", to=data)
    option(
        "benchmarks",
        f"the paper's, on the Hub ({', '.join(BENCHMARKS)}); NAME=FILE reads local rows in place of the Hub's. The "
        "model loads once, and a table shows them together",
        to=data,
        nargs="+",
    )
    option("dataset_config", "configuration of a data set on the Hub")
    option("dataset_split", "split, also with a slice (default: test, or train for a local file)")
    option("prompt_column", "column of the question: text or chat messages (default: prompt; of a benchmark its own)")
    option(
        "answer_column",
        "column of the reference answer, which accuracy rewards read as `solution` (default: of a benchmark its own)",
    )
    option("answer_after", "keep what follows the last occurrence of this text in the answer ('####' for GSM8K)")
    option(
        "answer_template",
        "text with {answer} where the answer goes: '${answer}$' for LaTeX without delimiters, which accuracy rewards "
        "misread (default: for benchmarks that)",
    )
    option("system_prompt", "system message")
    option(
        "prompt_template", "text with {prompt} where the question goes (default: for benchmarks the official code's)"
    )
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


def parse(argv: list[str]) -> argparse.Namespace:
    """
    The options of a command line, checked.

    Raises:
        `CommandError`: for an unknown option, a value out of range, or a launcher around the command.
    """
    args = make_parser().parse_args(argv)
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
    return args


def runs_of(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """
    The options of each evaluation by its name. A benchmark's are those of an evaluation of its data set alone, in a
    folder of its own, so that its samples are too, and stay when other benchmarks join.

    Raises:
        `CommandError`, `ValueError`: for a benchmark that is unknown or named twice, or options that do not go with
            benchmarks.
    """
    if not args.benchmarks:
        args.prompt_column = args.prompt_column or "prompt"
        return {Path(args.dataset).stem: args}
    for name in ("dataset_config", "dataset_split"):
        if getattr(args, name) is not None:
            raise CommandError(f"--{name} goes with --dataset, and not with --benchmarks, which have their own")
    runs = {}
    for name, file in parse_benchmarks(args.benchmarks).items():
        benchmark = BENCHMARKS[name]
        run = runs[name] = argparse.Namespace(**vars(args))
        run.output_dir = str(Path(args.output_dir) / name)
        run.dataset = file or benchmark.dataset
        if file is None:
            run.dataset_config, run.dataset_split = benchmark.config, benchmark.split
        run.prompt_column = args.prompt_column or benchmark.prompt_column
        run.answer_column = args.answer_column or benchmark.answer_column
        run.answer_template = args.answer_template or ANSWER_TEMPLATE
        run.prompt_template = args.prompt_template or PROMPT_TEMPLATE
    return runs
