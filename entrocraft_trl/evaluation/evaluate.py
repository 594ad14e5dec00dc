"""The one way from prompts, text or chat, to figures: sample, score, keep a record of each prompt, summarise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .accuracy import right_by_prompt
from .records import score_block, summarise_records
from .sampling import Sampler, encode_prompt, transformers_sampler
from .scoring import check_reward


def evaluate_blocks(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler,
    reward_func: Callable,
    *,
    block: int,
    records: Sequence[dict[str, Any]] = (),
    save: Callable[[Sequence[dict[str, Any]]], None] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """
    Sample and score the prompts block by block.

    Args:
        dataset (`datasets.Dataset`): `P` rows with a `prompt` column of text or chat messages; the other columns go to
            the reward function.
        tokenizer (`PreTrainedTokenizerBase`): The policy's, which makes token ids of the prompts.
        sampler (`Sampler`): Draws the samples of a block, given its prompts and the number of its first row.
        reward_func (`Callable`): Reward function in TRL's signature, called once for each block.
        block (`int`): Prompts that are sampled together.
        records (`Sequence[dict]`, *optional*): Records of the first prompts, from a run that stopped: whole blocks.
        save (`Callable`, *optional*): Called with the records of each block before the next one begins.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*): For the chat template.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Returns:
        `list[dict]`: the given records and those of the other prompts, `(P,)`; see [`score_block`].
    """
    records = list(records)
    with tqdm(total=len(dataset), initial=len(records), desc="Evaluating", unit="prompt", disable=not progress) as bar:
        for start in range(len(records), len(dataset), block):
            rows = dataset.select(range(start, min(start + block, len(dataset))))
            prompts = [encode_prompt(tokenizer, prompt, **(chat_template_kwargs or {})) for prompt in rows["prompt"]]
            new = score_block(rows, start, sampler(prompts, start), reward_func)
            if save is not None:
                save(new)
            records += new
            bar.update(len(new))
            rewards = [value for record in records for value in record["rewards"]]
            right = right_by_prompt(rewards, len(rewards))[0]
            bar.set_postfix({f"mean@{len(new[0]['rewards'])}": f"{sum(right) / len(right):.3f}"})
    return records


def sample_and_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward_func: Callable,
    n: int = 32,
    *,
    generation_config: GenerationConfig,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """
    `n` completions of every prompt with their rewards: what [`evaluate_policy`] summarises. The arguments are its.

    Returns:
        `list[dict]`: a record for each prompt, `(P,)`, with its `prompt`, its `completions` and `rewards` `(n,)`, and
        more; see [`score_block`].
    """
    check_reward(reward_func, dataset.column_names)
    sampler = transformers_sampler(
        model, tokenizer, n, generation_config, batch_size=batch_size, seed=seed, progress=progress
    )
    # One block: all completions are batched together, and the reward function is called once.
    return evaluate_blocks(
        dataset,
        tokenizer,
        sampler,
        reward_func,
        block=max(1, len(dataset)),
        chat_template_kwargs=chat_template_kwargs,
    )


def evaluate_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward_func: Callable,
    n: int = 32,
    *,
    generation_config: GenerationConfig,
    ks: Sequence[int] | None = None,
    threshold: float = 0.5,
    canonical: Callable[[str], str] = str.strip,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """
    Sample `n` completions for every prompt of a dataset, score them and summarise.

    Args:
        model (`PreTrainedModel`): Causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        dataset (`datasets.Dataset`): `P` rows with a `prompt` column of text or chat messages; the other columns go to
            the reward function.
        reward_func (`Callable`): Reward function in TRL's signature, async or not: called once with `prompts=`,
            `completions=`, `completion_ids=` and every other column as lists of length `P * n`, with `trainer_state=`
            (that of a run that has ended), `log_extra=` and `log_metric=` (which go nowhere); returns as many rewards.
            A reward of `None` counts as wrong.
        n (`int`, *optional*, defaults to `32`): Completions for each prompt.
        generation_config (`GenerationConfig`): How to sample, for instance
            `GenerationConfig(do_sample=True, temperature=0.6, max_new_tokens=512)`. The temperature, top-p, top-k and
            repetition penalty that it leaves open are off, whatever the model's own generation config says.
        ks (`Sequence[int]`, *optional*): Values of `k` for pass@k. Defaults to the powers of two below `n`, and `n`.
        threshold (`float`, *optional*, defaults to `0.5`): A completion is right if its reward is above this.
        canonical (`Callable[[str], str]`, *optional*, defaults to `str.strip`): Maps a completion to the answer that
            is compared when counting distinct right answers.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*): For the chat template, such as
            `{"enable_thinking": False}`.
        batch_size (`int`, *optional*, defaults to `64`): Completions generated at once.
        seed (`int`, *optional*, defaults to `0`): Seed of the sampling, which also depends on `batch_size`.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `dict[str, float]`: `mean@<n>`, `pass@<k>`, `distinct_correct`, `entropy` (nats, at temperature 1),
        `mean_tokens` and `truncated`; see [`summarise_records`].

    Raises:
        `ValueError`: for sampling settings or a `k` out of range; if the reward function does not take the arguments
        above, before anything is sampled; or if it returns a wrong number of rewards.
    """
    records = sample_and_score(
        model,
        tokenizer,
        dataset,
        reward_func,
        n,
        generation_config=generation_config,
        chat_template_kwargs=chat_template_kwargs,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    return summarise_records(records, ks, threshold, canonical)
