"""What an evaluation keeps of each prompt, and the figures that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

from .accuracy import default_ks, right_by_prompt, summarise
from .sampling import Sample
from .scoring import score_samples


def score_block(
    rows: Dataset, start: int, samples: list[list[Sample]], reward: Callable, n: int
) -> list[dict[str, Any]]:
    """
    One record, of JSON types, for each prompt of a block.

    Args:
        rows (`datasets.Dataset`): `B` rows with a `prompt` column; the other columns go to the reward function.
        start (`int`): Index of the first row in the whole data set.
        samples (`list[list[Sample]]`): Samples of each row, `(B, n)`.
        reward (`Callable`): Reward function in TRL's signature.
        n (`int`): Samples for each prompt.

    Raises:
        `ValueError`: if the reward function returns a wrong number of rewards.
    """
    rewards = score_samples(reward, rows, samples)
    return [
        {
            "index": start + row,
            "prompt": rows[row]["prompt"],
            "completions": [sample.text for sample in texts],
            "rewards": rewards[row * n : (row + 1) * n],
            "tokens": [len(sample.ids) for sample in texts],
            "truncated": [sample.truncated for sample in texts],
            "entropy_sums": [sample.entropy_sum for sample in texts],
        }
        for row, texts in enumerate(samples)
    ]


def summarise_records(records: Sequence[dict[str, Any]], n: int) -> dict[str, float | None]:
    """
    The figures of an evaluation: `mean@n`, `pass@k`, `distinct_correct` (mean number of different right completions a
    prompt), `entropy` (nats at temperature 1, mean over sampled tokens; `None` with vLLM), `mean_tokens` and
    `truncated`, the share of completions that the length limit cut off.
    """
    correct = right_by_prompt([value for record in records for value in record["rewards"]], n)
    answers = [[text.strip() for text in record["completions"]] for record in records]
    tokens = sum(sum(record["tokens"]) for record in records)
    sums = [value for record in records for value in record["entropy_sums"]]
    return {
        **summarise(correct, answers, default_ks(n)),
        "entropy": None if None in sums else sum(sums) / tokens,
        "mean_tokens": tokens / len(sums),
        "truncated": sum(sum(record["truncated"]) for record in records) / len(sums),
    }
