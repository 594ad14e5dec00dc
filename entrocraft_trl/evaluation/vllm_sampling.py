"""Sampling with vLLM: the same samples' form as with transformers, without their entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peft import LoraConfig
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .sampling import Sample, Sampler, sampling_settings


if TYPE_CHECKING:
    from vllm import LLM

# What vLLM takes as `max_lora_rank`; its newer versions also take 1.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def lora_rank(adapter: LoraConfig) -> int:
    """
    `max_lora_rank` of a vLLM engine for an adapter: the smallest of its sizes that fits the largest rank of any layer.

    Raises:
        `ValueError`: if none of them does.
    """
    rank = max([adapter.r, *adapter.rank_pattern.values()])
    size = next((size for size in LORA_RANKS if size >= rank), None)
    if size is None:
        raise ValueError(
            f"vLLM serves adapters up to rank {LORA_RANKS[-1]}, this one has {rank}: merge it into its model, or "
            "sample without vLLM"
        )
    return size


def sample_prompts_with_vllm(
    llm: LLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    n: int,
    generation_config: GenerationConfig,
    *,
    seed: int,
    adapter: str | None = None,
) -> list[list[Sample]]:
    """
    `n` samples `(P, n)` for each of `P` prompts of token ids, from a vLLM engine. No entropy: vLLM returns
    log-probabilities of a few tokens, and the entropy is over all of them.

    Of `generation_config`, temperature, top-p, top-k and the length limit count. `adapter` is the folder of a LoRA
    adapter to sample with. Sample `j` of prompt `i` is drawn from the random stream `seed + i * n + j`, which no other
    sample has.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    settings = sampling_settings(generation_config)
    parameters = [
        SamplingParams(
            n=n,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k or -1,
            max_tokens=settings.max_new_tokens,
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


def vllm_sampler(
    llm: LLM,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    generation_config: GenerationConfig,
    *,
    seed: int,
    adapter: str | None = None,
) -> Sampler:
    """[`sample_prompts_with_vllm`], with random streams that go on from block to block of the prompts."""

    def sample(prompts: list[list[int]], start: int) -> list[list[Sample]]:
        return sample_prompts_with_vllm(
            llm, tokenizer, prompts, n, generation_config, seed=seed + start * n, adapter=adapter
        )

    return sample
