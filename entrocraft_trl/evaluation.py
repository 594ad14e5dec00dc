"""Evaluation by repeated sampling: mean@n, pass@k, distinct right answers and the token entropy of a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


@torch.no_grad()
def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    n: int,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    progress: bool,
    measure_entropy: bool,
) -> tuple[list[list[str]], float | None]:
    """Completions `(P, n)` and, on demand, the mean token entropy at temperature 1 in nats."""
    if n < 1 or batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"`n`, `batch_size` and `max_new_tokens` must be at least 1, got {n}, {batch_size} and {max_new_tokens}."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    device = model.device
    eos = torch.tensor(tokenizer.eos_token_id, device=device)
    rows = [prompt for prompt in prompts for _ in range(n)]
    texts: list[str] = []
    entropy_sum, token_count = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        # The generator of the current device is forked too, so that an evaluation during training changes no rollout.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            bar = tqdm(total=len(rows), desc="Sampling", unit="completion", disable=not progress)
            for start in range(0, len(rows), batch_size):
                batch = tokenizer(
                    rows[start : start + batch_size], padding=True, padding_side="left", return_tensors="pt"
                ).to(device)
                prompt_length = batch["input_ids"].shape[1]
                ids = model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    do_sample=True,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=top_k,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
                completions = ids[:, prompt_length:]  # (B, T)
                texts.extend(tokenizer.batch_decode(completions, skip_special_tokens=True))
                if measure_entropy:
                    # Up to and with the first end of sequence: what follows is padding.
                    ended = (completions == eos).cumsum(dim=1)
                    mask = (ended - (completions == eos).long()) == 0  # (B, T)
                    attention_mask = torch.cat([batch["attention_mask"], mask.long()], dim=1)
                    logits = model(input_ids=ids, attention_mask=attention_mask).logits
                    logps = logits[:, prompt_length - 1 : -1].float().log_softmax(dim=-1)  # (B, T, V)
                    entropies = -(logps.exp() * logps).sum(dim=-1)  # (B, T)
                    entropy_sum += entropies[mask].sum().item()
                    token_count += int(mask.sum())
                bar.update(len(batch["input_ids"]))
            bar.close()
    finally:
        model.train(was_training)
    completions_by_prompt = [texts[i : i + n] for i in range(0, len(texts), n)]
    return completions_by_prompt, entropy_sum / token_count if token_count else None


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    n: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> list[list[str]]:
    """
    Sample `n` completions for each prompt with `model.generate`, on the model's device.

    The model's mode (training or evaluation) and the global random state are as before afterwards. The completions
    depend on the seed and on `batch_size`.

    Args:
        model (`PreTrainedModel`): Causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a pad and an end-of-sequence token. Prompts are
            padded on the left.
        prompts (`Sequence[str]`): Prompts, `(P,)`.
        n (`int`): Completions for each prompt.
        temperature (`float`, *optional*, defaults to `1.0`): Sampling temperature, above zero.
        top_p (`float`, *optional*, defaults to `1.0`): Nucleus sampling; `1.0` is off.
        top_k (`int`, *optional*, defaults to `0`): Top-k sampling; `0` is off.
        max_new_tokens (`int`): Longest completion, in tokens.
        batch_size (`int`, *optional*, defaults to `64`): Completions generated at once.
        seed (`int`, *optional*, defaults to `0`): Seed of the sampling.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `list[list[str]]`: completions without special tokens, `(P, n)`.

    Raises:
        `ValueError`: if `n`, `batch_size` or `max_new_tokens` is below 1, or the temperature is not positive.
    """
    completions, _ = _generate(
        model,
        tokenizer,
        prompts,
        n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        measure_entropy=False,
    )
    return completions


def evaluate_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward_func: Callable[..., list[float]],
    n: int = 32,
    *,
    ks: Sequence[int] | None = None,
    threshold: float = 0.5,
    canonical: Callable[[str], str] = str.strip,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """
    Sample `n` completions for every prompt of a dataset, score them and summarise.

    Args:
        model (`PreTrainedModel`): Causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        dataset (`datasets.Dataset`): `P` rows with a `prompt` column of strings; the other columns go to the reward
            function.
        reward_func (`Callable`): Reward function in TRL's signature: called once with `prompts=`, `completions=` and
            every other column as lists of length `P * n`; returns as many rewards. A reward of `None` counts as wrong.
        n (`int`, *optional*, defaults to `32`): Completions for each prompt.
        ks (`Sequence[int]`, *optional*): Values of `k` for pass@k. Defaults to `(n,)`.
        threshold (`float`, *optional*, defaults to `0.5`): A completion is right if its reward is above this.
        canonical (`Callable[[str], str]`, *optional*, defaults to `str.strip`): Maps a completion to the answer that
            is compared when counting distinct right answers.
        temperature, top_p, top_k, max_new_tokens, batch_size, seed, progress:
            See [`sample_completions`].

    Returns:
        `dict[str, float]`: the keys of [`summarise`], and `"entropy"`: the mean over the sampled completion tokens of
        the entropy of the policy's full distribution at temperature 1, in nats.

    Raises:
        `ValueError`: for sampling arguments or a `k` out of range, or if the reward function returns a wrong number of
        rewards.
    """
    ks = (n,) if ks is None else ks
    prompts = list(dataset["prompt"])
    completions, entropy = _generate(
        model,
        tokenizer,
        prompts,
        n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        measure_entropy=True,
    )
    columns = {
        name: [value for value in dataset[name] for _ in range(n)] for name in dataset.column_names if name != "prompt"
    }
    flat = [text for texts in completions for text in texts]
    rewards = reward_func(prompts=[prompt for prompt in prompts for _ in range(n)], completions=flat, **columns)
    if len(rewards) != len(flat):
        raise ValueError(f"The reward function returned {len(rewards)} rewards for {len(flat)} completions.")
    right = [reward is not None and reward > threshold for reward in rewards]
    correct = [right[i : i + n] for i in range(0, len(right), n)]
    answers = [[canonical(text) for text in texts] for texts in completions]
    return {**summarise(correct, answers, ks), "entropy": entropy}
