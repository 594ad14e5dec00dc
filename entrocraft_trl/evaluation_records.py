"""What an evaluation keeps of each prompt, and the figures that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

from .evaluation import default_ks, right_by_prompt, summarise
from .sampling import Sample


def score_block(
    rows: Dataset, start: int, samples: list[list[Sample]], reward: Callable, n: int
) -> list[dict[str, Any]]:
    """
    One record, of JSON types, for each prompt of a block.

    The reward function is called as TRL's trainers call it, and in the calling thread: math-verify's time limits work
    in the main thread only.

    Args:
        rows (`datasets.Dataset`): `B` rows with a `prompt` column; the other columns go to the reward function.
        start (`int`): Index of the first row in the whole data set.
        samples (`list[list[Sample]]`): Samples of each row, `(B, n)`.
        reward (`Callable`): Reward function in TRL's signature.
        n (`int`): Samples for each prompt.

    Raises:
        `ValueError`: if the reward function returns a wrong number of rewards.
    """
    columns = {name: [value for value in rows[name] for _ in range(n)] for name in rows.column_names}
    flat = [sample for row in samples for sample in row]
    conversational = isinstance(rows[0]["prompt"], list)
    completions = [[{"role": "assistant", "content": s.text}] if conversational else s.text for s in flat]
    prompts = columns.pop("prompt")
    rewards = reward(prompts=prompts, completions=completions, completion_ids=[s.ids for s in flat], **columns)
    if len(rewards) != len(flat):
        raise ValueError(f"the reward function returned {len(rewards)} rewards for {len(flat)} completions")
    rewards = [None if value is None or value != value else float(value) for value in rewards]  # JSON has no NaN
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
