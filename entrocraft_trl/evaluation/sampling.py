"""Sampling from a policy outside training: many completions for each prompt, with transformers or with vLLM."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head

from ..policy.modes import eval_mode


if TYPE_CHECKING:
    from vllm import LLM

# What vLLM takes as `max_lora_rank`; its newer versions also take 1.
VLLM_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

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
    *,
    measure_entropy: bool,
    **generation: Any,
) -> list[Sample]:
    """One completion for each of the `B` rows of token ids, as one batch."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tensors = [torch.tensor(row, device=model.device) for row in rows]
    prompts = pad_sequence(tensors, batch_first=True, padding_value=pad, padding_side="left")  # (B, P)
    ones = [torch.ones_like(tensor) for tensor in tensors]
    attention_mask = pad_sequence(ones, batch_first=True, padding_value=0, padding_side="left")
    ends = end_tokens(model, tokenizer)
    ids = model.generate(
        input_ids=prompts,
        attention_mask=attention_mask,
        do_sample=True,
        repetition_penalty=1.0,  # some models' own generation config has another, which no figure would mention
        pad_token_id=pad,
        eos_token_id=ends,
        **generation,
    )
    completions = ids[:, prompts.shape[1] :]  # (B, T)
    is_end = torch.isin(completions, torch.tensor(ends, device=ids.device))
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
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
    measure_entropy: bool = False,
) -> list[list[Sample]]:
    """
    `n` samples `(P, n)` for each of `P` prompts of token ids, with `model.generate` on the model's device.

    The arguments are those of [`sample_completions`]; `measure_entropy` adds one forward pass for each batch.

    Raises:
        `ValueError`: as [`sample_completions`] does.
    """
    if n < 1 or batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"`n`, `batch_size` and `max_new_tokens` must be at least 1, got {n}, {batch_size} and {max_new_tokens}."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    rows = [prompt for prompt in prompts for _ in range(n)]
    samples: list[Sample] = []
    device = model.device
    # The generator of the current device is forked too, so that an evaluation during training changes no rollout.
    with eval_mode(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        bar = tqdm(total=len(rows), desc="Sampling", unit="completion", disable=not progress)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            samples += _sample_rows(
                model,
                tokenizer,
                batch,
                measure_entropy=measure_entropy,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                max_new_tokens=max_new_tokens,
            )
            bar.update(len(batch))
        bar.close()
    return [samples[start : start + n] for start in range(0, len(samples), n)]


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
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

    The mode (training or evaluation) of each of the model's modules and the global random state are as before
    afterwards. The completions depend on the seed and on `batch_size`.

    Args:
        model (`PreTrainedModel`): Causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with an end-of-sequence token. Prompts are padded on the
            left.
        prompts (`Sequence[str | list[dict]]`): Prompts, text or chat messages, `(P,)`.
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
    samples = sample_prompts(
        model,
        tokenizer,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    return [[sample.text for sample in row] for row in samples]


def vllm_lora_rank(adapter: LoraConfig) -> int:
    """
    `max_lora_rank` of a vLLM engine for an adapter: the smallest of its sizes that fits the largest rank of any layer.

    Raises:
        `ValueError`: if none of them does.
    """
    rank = max([adapter.r, *adapter.rank_pattern.values()])
    size = next((size for size in VLLM_LORA_RANKS if size >= rank), None)
    if size is None:
        raise ValueError(
            f"vLLM serves adapters up to rank {VLLM_LORA_RANKS[-1]}, this one has {rank}: merge it into its model, or "
            "sample without vLLM"
        )
    return size


def sample_prompts_with_vllm(
    llm: LLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    n: int,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
    seed: int,
    adapter: str | None = None,
) -> list[list[Sample]]:
    """
    `n` samples `(P, n)` for each of `P` prompts of token ids, from a vLLM engine. No entropy: vLLM returns
    log-probabilities of a few tokens, and the entropy is over all of them.

    `adapter` is the folder of a LoRA adapter to sample with. Sample `j` of prompt `i` is
    drawn from the random stream `seed + i * n + j`, which no other sample has.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    parameters = [
        SamplingParams(
            n=n,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k or -1,
            max_tokens=max_new_tokens,
            seed=seed + index * n,  # vLLM adds the sample's number to the seed of its request
        )
        for index in range(len(prompts))
    ]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        sampling_params=parameters,
        lora_request=LoRARequest("adapter", 1, adapter) if adapter else None,
        use_tqdm=False,
    )
    return [
        [
            Sample(
                tokenizer.decode(completion.token_ids, skip_special_tokens=True),
                list(completion.token_ids),
                completion.finish_reason == "length",
            )
            for completion in output.outputs
        ]
        for output in outputs
    ]
