"""What an evaluation keeps of each prompt, and the figures that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset

from .accuracy import default_ks, right_by_prompt, summarise
from .sampling import Sample
from .scoring import score_samples


def score_block(rows: Dataset, start: int, samples: list[list[Sample]], reward: Callable) -> list[dict[str, Any]]:
    """
    One record, of JSON types, for each prompt of a block.

    Args:
        rows (`datasets.Dataset`): `B` rows with a `prompt` column; the other columns go to the reward function.
        start (`int`): Index of the first row in the whole data set.
        samples (`list[list[Sample]]`): Samples of each row, `(B, n)`.
        reward (`Callable`): Reward function in TRL's signature.

    Raises:
        `ValueError`: if the reward function returns a wrong number of rewards.
    """
    rewards = iter(score_samples(reward, rows, samples))
    return [
        {
            "index": start + row,
            "prompt": rows[row]["prompt"],
            "completions": [sample.text for sample in texts],
            "rewards": list(islice(rewards, len(texts))),
            "tokens": [len(sample.ids) for sample in texts],
            "truncated": [sample.truncated for sample in texts],
            "entropy_sums": [sample.entropy_sum for sample in texts],
        }
        for row, texts in enumerate(samples)
    ]


def summarise_records(
    records: Sequence[dict[str, Any]],
    ks: Sequence[int] | None = None,
    threshold: float = 0.5,
    canonical: Callable[[str], str] = str.strip,
) -> dict[str, float | None]:
    """
    The figures of an evaluation.

    Args:
        records (`Sequence[dict]`): Records of `P` prompts with `n` samples each, as [`score_block`] makes them.
        ks (`Sequence[int]`, *optional*): Values of `k` for pass@k. Defaults to the powers of two below `n`, and `n`.
        threshold (`float`, *optional*, defaults to `0.5`): A completion is right if its reward is above this.
        canonical (`Callable[[str], str]`, *optional*, defaults to `str.strip`): Maps a completion to the answer that
            is compared when counting distinct right answers.

    Returns:
        `dict[str, float | None]`: `mean@<n>`, `pass@<k>` and `distinct_correct` as [`summarise`] gives them;
        `entropy`, the mean over the sampled tokens of the entropy of the policy's full distribution at temperature 1,
        in nats (`None` with vLLM); `mean_tokens` of a completion; and `truncated`, the share of completions that the
        length limit cut off.

    Raises:
        `ValueError`: if there are no records, or a `k` is out of range.
    """
    if not records:
        raise ValueError("there is no prompt to evaluate")
    n = len(records[0]["rewards"])
    correct = right_by_prompt([value for record in records for value in record["rewards"]], n, threshold)
    answers = [[canonical(text) for text in record["completions"]] for record in records]
    tokens = sum(sum(record["tokens"]) for record in records)
    sums = [value for record in records for value in record["entropy_sums"]]
    return {
        **summarise(correct, answers, default_ks(n) if ks is None else ks),
        "entropy": None if None in sums else sum(sums) / tokens,
        "mean_tokens": tokens / len(sums),
        "truncated": sum(sum(record["truncated"]) for record in records) / len(sums),
    }
