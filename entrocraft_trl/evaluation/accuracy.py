"""Figures of repeated sampling: mean@n, pass@k, distinct right answers and how alike they are, from what was right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def pass_at_k(n: int, c: int, k: int) -> float:
    """
    Unbiased estimate of the chance that at least one of `k` samples is right (Chen et al., 2021,
    https://huggingface.co/papers/2107.03374, Eq. 1): `1 - C(n - c, k) / C(n, k)`.

    Args:
        n (`int`): Number of samples drawn.
        c (`int`): Number of right ones among them.
        k (`int`): Number of samples of the estimated attempt.

    Returns:
        `float`: the estimate, between 0 and 1.

    Raises:
        `ValueError`: unless `0 <= c <= n` and `1 <= k <= n`.
    """
    if not 0 <= c <= n:
        raise ValueError(f"`c` must lie between 0 and `n`, got c={c} and n={n}.")
    if not 1 <= k <= n:
        raise ValueError(f"`k` must lie between 1 and `n`, got k={k} and n={n}.")
    if n - c < k:
        return 1.0
    # The ratio of the two binomials as a product, since the binomials themselves overflow.
    all_wrong = 1.0
    for i in range(n - c + 1, n + 1):
        all_wrong *= 1.0 - k / i
    return 1.0 - all_wrong


def summarise(
    correct: Sequence[Sequence[bool]], answers: Sequence[Sequence[str]] | None = None, ks: Sequence[int] = ()
) -> dict[str, float]:
    """
    Averages over prompts of what `n` samples a prompt say about a policy.

    Args:
        correct (`Sequence[Sequence[bool]]`): Whether each sample is right, `(P, n)` for `P` prompts.
        answers (`Sequence[Sequence[str]]`, *optional*): Answer of each sample, `(P, n)`; equal strings count as one
            answer.
        ks (`Sequence[int]`, *optional*, defaults to `()`): Values of `k` for pass@k, each between 1 and `n`.

    Returns:
        `dict[str, float]`: `"mean@<n>"`, the share of right samples; `"pass@<k>"` for each `k`; and, with `answers`,
        `"distinct_correct"`, the mean number of different right answers a prompt.

    Raises:
        `ValueError`: if there are no prompts or samples, if prompts differ in their number of samples, if the shapes
        of `correct` and `answers` differ, or if a `k` is out of range.
    """
    if len(correct) == 0 or len(correct[0]) == 0:
        raise ValueError("`correct` must hold at least one prompt with at least one sample.")
    n = len(correct[0])
    if any(len(row) != n for row in correct):
        raise ValueError(
            f"Every prompt must have {n} samples as the first, got {sorted({len(row) for row in correct})}."
        )
    if answers is not None and [len(row) for row in answers] != [n] * len(correct):
        raise ValueError(f"`answers` must have the shape of `correct`, ({len(correct)}, {n}).")

    counts = [sum(map(bool, row)) for row in correct]
    summary = {f"mean@{n}": sum(counts) / (n * len(counts))}
    for k in ks:
        summary[f"pass@{k}"] = sum(pass_at_k(n, c, k) for c in counts) / len(counts)
    if answers is not None:
        distinct = [
            len({answer for answer, right in zip(texts, row, strict=True) if right})
            for texts, row in zip(answers, correct, strict=True)
        ]
        summary["distinct_correct"] = sum(distinct) / len(distinct)
    return summary


def self_similarity(answers: Sequence[str], n: int = 4) -> float:
    """
    Share of repeated n-grams: one minus distinct-n (Li et al., 2016, https://huggingface.co/papers/1510.03055).

    Args:
        answers (`Sequence[str]`): Answers, `(A,)`, of words between blanks, such as the right ones of all prompts. It
            grows with their number: compare as many of each policy.
        n (`int`, *optional*, defaults to `4`): Words in a row.

    Returns:
        `float`: the share of n-grams, over all answers, that stand there or in an answer before already. 0 where no
        two are equal; NaN where no answer has `n` words.
    """
    texts = [answer.split() for answer in answers]
    runs = [tuple(words[start : start + n]) for words in texts for start in range(len(words) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else math.nan


def default_ks(n: int) -> list[int]:
    """Values of `k` for pass@k with `n` samples a prompt: the powers of two below `n`, and `n`."""
    return sorted({2**power for power in range(n.bit_length()) if 2**power < n} | {n})


def right_by_prompt(rewards: Sequence[float | None], n: int, threshold: float = 0.5) -> list[list[bool]]:
    """
    Which samples are right, `(P, n)`: those with a reward above `threshold`. None or NaN, no reward, counts as wrong.

    Args:
        rewards (`Sequence[float | None]`): Rewards of `P` prompts with `n` samples each, prompt by prompt, `(P * n,)`.
        n (`int`): Samples for each prompt.
        threshold (`float`, *optional*, defaults to `0.5`): What a reward has to exceed.

    Raises:
        `ValueError`: if the rewards do not make up whole prompts.
    """
    if len(rewards) % n:
        raise ValueError(f"{len(rewards)} rewards are not a whole number of prompts with n={n} samples each.")
    right = [reward is not None and reward > threshold for reward in rewards]
    return [right[start : start + n] for start in range(0, len(right), n)]


def pass_at_k_curve(figures: Mapping[str, float | None]) -> dict[int, float]:
    """The `"pass@<k>"` among an evaluation's figures by `k`, in order."""
    shares = {int(name.removeprefix("pass@")): share for name, share in figures.items() if name.startswith("pass@")}
    return dict(sorted(shares.items()))
