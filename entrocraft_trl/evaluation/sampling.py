"""Sampling from a policy outside training: many completions for each prompt, with transformers' `generate`."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head

from ..policy.eval_mode import eval_mode


# `generate` fills what a `GenerationConfig` leaves open from the model's own, which no figure would mention.
PLAIN_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}

Prompt = str | list[dict[str, str]]  # text, or chat messages


class Sample(NamedTuple):
    """
    One completion: its text without special tokens, its token ids `(T,)` up to and with the end-of-sequence token,
    whether the length limit cut it off, and the sum over its tokens of the policy's entropy at temperature 1 (nats).
    """

    text: str
    ids: list[int]
    truncated: bool
    entropy_sum: float | None = None


# Samples (B, n) of B prompts of token ids, the first of which is the prompt of this number in the data set.
Sampler = Callable[[list[list[int]], int], list[list[Sample]]]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, **chat_template_kwargs: Any) -> list[int]:
    """Token ids of a prompt as TRL's trainers make them: text as it is, messages through the chat template."""
    if isinstance(prompt, list):
        return tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, **chat_template_kwargs
        )["input_ids"]
    return tokenizer(prompt)["input_ids"]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a completion: the tokenizer's and those that the model declares (an end of turn, say)."""
    declared = model.generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else declared or []
    return sorted({tokenizer.eos_token_id, *declared})


def sampling_settings(generation_config: GenerationConfig) -> GenerationConfig:
    """
    A copy in which plain sampling stands where `generation_config` says nothing: temperature 1, nothing cut off.

    Raises:
        `ValueError`: if `max_new_tokens` is not set, the temperature is not positive, or `do_sample` is off.
    """
    settings = copy.deepcopy(generation_config)
    for name, value in PLAIN_SAMPLING.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    if settings.max_new_tokens is None:
        raise ValueError("`generation_config` must set `max_new_tokens`, got None.")
    if not settings.temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {settings.temperature}.")
    if not settings.do_sample:
        raise ValueError(f"`do_sample` must be on, got {settings.do_sample}: greedy completions would be all alike.")
    return settings


@contextmanager
def _entropy_head(model: PreTrainedModel) -> Iterator[None]:
    """
    Inside, `model(..., labels=..., fused_lm_head=True)` returns token entropies at temperature 1 through TRL's chunked
    kernel: the `(B, T, V)` logits of a long completion would not fit on a GPU.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    patched = vars(base).get("forward")
    add_fused_lm_head(base, outputs=("log_probs", "entropy"))
    try:
        yield
    finally:
        if patched is None:
            del base.forward
        else:
            base.forward = patched


def _positions(model: PreTrainedModel, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    `position_ids` `(B, T)` as `generate` hands them over, if the model takes any. Without them, models with absolute
    positions (GPT-2) count padding on the left as text.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if "position_ids" not in inspect.signature(type(base).forward).parameters:
        return {}
    return {"position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0)}


def _sample_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    settings: GenerationConfig,
    measure_entropy: bool,
) -> list[Sample]:
    """One completion for each of the `B` rows of token ids, as one batch."""
    tensors = [torch.tensor(row, device=model.device) for row in rows]
    pad = settings.pad_token_id
    prompts = pad_sequence(tensors, batch_first=True, padding_value=pad, padding_side="left")  # (B, P)
    ones = [torch.ones_like(tensor) for tensor in tensors]
    attention_mask = pad_sequence(ones, batch_first=True, padding_value=0, padding_side="left")
    ids = model.generate(input_ids=prompts, attention_mask=attention_mask, generation_config=settings)
    completions = ids[:, prompts.shape[1] :]  # (B, T)
    is_end = torch.isin(completions, torch.tensor(settings.eos_token_id, device=ids.device))
    # Up to and with the first end of sequence: what follows is padding.
    mask = is_end.cumsum(dim=1) - is_end.long() == 0
    sums: list[float] | list[None] = [None] * len(rows)
    if measure_entropy:
        attention_mask = torch.cat([attention_mask, mask.long()], dim=1)
        labels = torch.cat([torch.full_like(prompts, -100), completions.masked_fill(~mask, -100)], dim=1)
        with _entropy_head(model):
            output = model(
                input_ids=ids,
                attention_mask=attention_mask,
                labels=labels,
                fused_lm_head=True,
                **_positions(model, attention_mask),
            )
        # Zero where the label is -100. Summed here, since not every device has float64 (Apple's MPS).
        sums = [math.fsum(row) for row in output.entropy.tolist()]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    kept = [row[row_mask].tolist() for row, row_mask in zip(completions, mask, strict=True)]
    ended = is_end.any(dim=1).tolist()
    return [Sample(text, row, not end, total) for text, row, end, total in zip(texts, kept, ended, sums, strict=True)]


@torch.no_grad()
def sample_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    n: int,
    generation_config: GenerationConfig,
    *,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
    measure_entropy: bool = False,
) -> list[list[Sample]]:
    """
    `n` samples `(P, n)` for each of `P` prompts of token ids, with `model.generate` on the model's device.

    The mode (training or evaluation) of each of the model's modules and the global random state are as before
    afterwards. The samples depend on the seed and on `batch_size`.

    Args:
        model (`PreTrainedModel`): Causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with an end-of-sequence token. Prompts are padded on the
            left.
        prompts (`Sequence[list[int]]`): Token ids, `(P,)` prompts of any length.
        n (`int`): Completions for each prompt.
        generation_config (`GenerationConfig`): Temperature, top-p, length limit and so on; see
            [`sampling_settings`]. Its pad and end tokens do not count: they are those of tokenizer and model.
        batch_size (`int`, *optional*, defaults to `64`): Completions generated at once.
        seed (`int`, *optional*, defaults to `0`): Seed of the sampling.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.
        measure_entropy (`bool`, *optional*, defaults to `False`): Whether to fill `entropy_sum`, by one forward pass
            more for each batch.

    Raises:
        `ValueError`: if `n` or `batch_size` is below 1, or as [`sampling_settings`] does.
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"`n` and `batch_size` must be at least 1, got {n} and {batch_size}.")
    settings = sampling_settings(generation_config)
    settings.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings.eos_token_id = end_tokens(model, tokenizer)
    rows = [prompt for prompt in prompts for _ in range(n)]
    samples: list[Sample] = []
    device = model.device
    # The generator of the current device is forked too, so that an evaluation during training changes no rollout.
    with eval_mode(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        bar = tqdm(total=len(rows), desc="Sampling", unit="completion", disable=not progress)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            samples += _sample_rows(model, tokenizer, batch, settings, measure_entropy)
            bar.update(len(batch))
        bar.close()
    return [samples[start : start + n] for start in range(0, len(samples), n)]


def transformers_sampler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    generation_config: GenerationConfig,
    *,
    batch_size: int,
    seed: int,
    progress: bool = False,
) -> Sampler:
    """[`sample_prompts`] with entropies. Each block of prompts has a seed of its own: `seed` plus its `start`."""

    def sample(prompts: list[list[int]], start: int) -> list[list[Sample]]:
        # With a seed for each block, a continued evaluation draws what an undisturbed one would.
        more = {"batch_size": batch_size, "seed": seed + start, "progress": progress, "measure_entropy": True}
        return sample_prompts(model, tokenizer, prompts, n, generation_config, **more)

    return sample
