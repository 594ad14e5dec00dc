"""The paper's benchmarks: where they lie on the Hub, how a command line names them, and the average over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Benchmark(NamedTuple):
    """
    A data set on the Hub: repository, split, columns of the question and of the reference answer, configuration.

    None of them could be loaded where this was written. What the official code (`lblaoke/entrocraft`) says: the four
    repositories (its scoring code); split and columns of AMC-23 and AIME-24 (its `scripts/data_preprocess`). From
    other public code that loads them, not from the official one: split and columns of MATH-500 and AIME-25. Not
    verified at all: that each still has a single configuration, so that none has to be named.
    """

    dataset: str
    split: str
    prompt_column: str = "problem"
    answer_column: str = "answer"
    config: str | None = None


BENCHMARKS = {
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test"),
    "amc23": Benchmark("knoveleng/AMC-23", "train"),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train"),
    "aime25": Benchmark("MathArena/aime_2025", "train"),
}

# What the official code puts behind each question of a benchmark.
PROMPT_TEMPLATE = "{prompt} Let's think step by step and output the final answer within \\boxed{}."

# The answers are LaTeX without delimiters, of which accuracy rewards would read the numbers only.
ANSWER_TEMPLATE = "${answer}$"


def parse_benchmarks(words: Sequence[str]) -> dict[str, str | None]:
    """
    Benchmarks by name, and the file that stands in for each: `["amc23", "aime24=rows.jsonl"]` becomes
    `{"amc23": None, "aime24": "rows.jsonl"}`.

    Raises:
        `ValueError`: for a name that is unknown or stands twice, or an empty file name.
    """
    files: dict[str, str | None] = {}
    for word in words:
        name, equals, file = word.partition("=")
        if name not in BENCHMARKS:
            raise ValueError(
                f"unknown benchmark {name!r}; known are: {', '.join(BENCHMARKS)}. A local file stands in for one of "
                "them as NAME=FILE"
            )
        if name in files:
            raise ValueError(f"the benchmark {name!r} is named twice")
        if equals and not file:
            raise ValueError(f"the benchmark {word!r} names no file after '='")
        files[name] = file or None
    return files


def average(figures: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """Means over benchmarks of the figures `names`: each benchmark counts once, however many prompts it has."""
    return {name: sum(figure[name] for figure in figures.values()) / len(figures) for name in names}
