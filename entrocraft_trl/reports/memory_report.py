"""From the arguments of a run to the memory that it needs, in words; only the model's config is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .gpu_memory import GIB, Estimate, count_parameters, decoder_shape, estimate


if TYPE_CHECKING:
    from ..config import EntrocraftGRPOConfig

ASSUMED_PROMPT_TOKENS = 512  # when max_prompt_length does not say


def estimate_run(args: EntrocraftGRPOConfig, inputs: dict[str, Any], prompt_tokens: int) -> Estimate:
    """
    The estimate for the arguments of a trainer, per process and with nothing sharded.

    Args:
        args ([`EntrocraftGRPOConfig`]): Arguments of the run, with `model_init_kwargs`.
        inputs (`dict`): `model` (name or folder), `peft_config` and `quantization_config`, as the trainer gets them.
        prompt_tokens (`int`): Longest prompt.

    Raises:
        `ValueError`: if the model is not Llama-like.
        `OSError`: if the model has no config.
    """
    import torch
    from transformers import AutoConfig

    loading = args.model_init_kwargs or {}
    config = AutoConfig.from_pretrained(
        inputs["model"], revision=loading.get("revision"), trust_remote_code=args.trust_remote_code
    )
    shape = decoder_shape(config)
    dtype = loading.get("dtype") or "float32"
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    peft_config, quantization = inputs["peft_config"], inputs["quantization_config"]
    return estimate(
        count_parameters(config, peft_config),
        shape,
        rows=args.per_device_train_batch_size,
        generated_rows=args.per_device_train_batch_size * args.steps_per_generation,
        prompt_tokens=prompt_tokens,
        completion_tokens=args.max_completion_length,
        dtype_bytes=dtype.itemsize,
        half=args.bf16 or args.fp16,
        bits=0 if quantization is None else 4 if quantization.load_in_4bit else 8,
        nested=quantization is not None and quantization.bnb_4bit_use_double_quant,
        dropout=getattr(peft_config, "lora_dropout", 0) > 0,
        checkpointing=args.gradient_checkpointing,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        reference=args.beta != 0 and peft_config is None,
        vllm_share=args.vllm_gpu_memory_utilization if args.use_vllm and args.vllm_mode == "colocate" else 0.0,
    )


def report(result: Estimate) -> list[str]:
    """Lines of the estimate, in GiB."""
    note = "the update and the generation alternate: the larger one counts"
    if result.vllm_share:
        note = f"vLLM takes {result.vllm_share:.0%} of the GPU; the rest has to hold the training"
    return [
        *(f"  {name:<28} {size / GIB:6.2f}" for name, size in result.parts.items()),
        f"  {'needed of one GPU':<28} {result.needed / GIB:6.1f}  ({note})",
    ]


def describe_memory(args: EntrocraftGRPOConfig, inputs: dict[str, Any], max_prompt_length: int | None) -> str:
    """The part of a dry run about memory. Models that the formulas do not know get one line that says so."""
    prompt_tokens = max_prompt_length or ASSUMED_PROMPT_TOKENS
    try:
        lines = report(estimate_run(args, inputs, prompt_tokens))
    except ValueError as error:
        return f"memory           {error}"
    assumed = "" if max_prompt_length else ", assumed: set max_prompt_length"
    head = (
        f"memory           GiB, computed and not measured, for prompts of up to {prompt_tokens} tokens{assumed}; "
        "per process, nothing sharded"
    )
    return "\n".join([head, *lines])
