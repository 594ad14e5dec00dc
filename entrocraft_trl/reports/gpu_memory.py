"""
Memory of a training run on one GPU, computed before any weight is loaded.

The formulas are small functions of numbers, in bytes; `estimate` puts them together for TRL's trainers. Parameters are
counted on a model without storage (PyTorch's meta device). Activations follow Llama-like decoder layers (Qwen, Llama,
Mistral). What no formula knows (CUDA context, fragmentation, kernels' work space) is a flat allowance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch


if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedConfig

GIB = 2**30

# Bytes that one decoder layer keeps for its backward pass, for each token and each unit of (hidden size, intermediate
# size, query width, key width): counted from the tensors that autograd saves (tests/test_memory.py counts again).
# Keys: 16-bit compute (else float32), and frozen weights with LoRA on every linear layer (else all weights train).
SAVED_BYTES = {
    (True, True): (18, 8, 10, 8),
    (True, False): (26, 8, 10, 10),
    (False, True): (16, 16, 12, 12),
    (False, False): (24, 16, 16, 16),
}
# LoRA dropout keeps a mask and a copy for each adapted layer: five read the hidden state, one the attention's output,
# one the intermediate activations.
DROPOUT_BYTES = (20, 4, 4, 0)

# A layer at work holds what it saves and the gradients in flight: so many times the former at its peak, with LoRA and
# without, by the bytes alive on a CPU while tiny layers of the usual proportions train (1.5 to 1.9, and 1.1 to 1.5).
PEAK_OVER_SAVED = {True: 1.8, False: 1.4}

# TRL's fused head works on tiles of this many tokens and vocabulary entries instead of the whole logits.
HEAD_TOKENS, HEAD_VOCABULARY = 4096, 32768

# Float32 copies of the last logits that sampling with transformers holds at once: logits, scores, probabilities, ...
SAMPLING_COPIES = 5

# An allowance, not a formula: CUDA context and libraries, and the share lost to fragmentation.
CONTEXT_BYTES, FRAGMENTATION = 1 * GIB, 0.1
# Work space of a vLLM engine beside its weights and its KV cache.
VLLM_WORKSPACE_BYTES = 1 * GIB


class Parameters(NamedTuple):
    """Numbers of parameters: in linear layers (which quantization packs), in all else, and in the adapter."""

    linear: int
    other: int
    adapter: int = 0

    @property
    def base(self) -> int:
        return self.linear + self.other


class Shape(NamedTuple):
    """Sizes of a Llama-like decoder; `query` and `key` are the widths of all heads together."""

    layers: int
    hidden: int
    intermediate: int
    query: int
    key: int
    vocabulary: int


def decoder_shape(config: PreTrainedConfig) -> Shape:
    """
    Sizes of the decoder that a model config describes.

    Raises:
        `ValueError`: if the config does not describe a Llama-like decoder.
    """
    text = config.get_text_config()
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [name for name in needed if not isinstance(getattr(text, name, None), int)]
    if missing:
        raise ValueError(
            f"no estimate for models of type {config.model_type!r}: no {', '.join(missing)} in the config"
        )
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    widths = (text.num_attention_heads * head, key_heads * head)
    return Shape(text.num_hidden_layers, text.hidden_size, text.intermediate_size, *widths, text.vocab_size)


def count_parameters(config: PreTrainedConfig, peft_config: PeftConfig | None = None) -> Parameters:
    """Parameters of the model that a config describes, and of the adapter on it, counted without allocating them."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    in_linear = sum(weight.numel() for weight in linear)
    base = sum(parameter.numel() for parameter in model.parameters())  # tied weights count once
    adapter = 0
    if peft_config is not None:
        adapted = get_peft_model(model, peft_config, low_cpu_mem_usage=True)
        adapter = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    return Parameters(in_linear, base - in_linear, adapter)


def weight_bytes(parameters: Parameters, dtype_bytes: int, bits: int = 0, nested: bool = False) -> float:
    """
    Weights of the base model.

    Args:
        parameters ([`Parameters`]): Counts.
        dtype_bytes (`int`): Bytes of a weight that is not quantized: 4 or 2.
        bits (`int`, *optional*, defaults to `0`): 4 or 8 for bitsandbytes, 0 for none. Embeddings, the head and norms
            stay as they are.
        nested (`bool`, *optional*, defaults to `False`): Whether the 4-bit scales are quantized as well.
    """
    if bits == 4:
        # One float32 scale for 64 weights; nested, one byte for 64 weights and a float32 for 256 such scales.
        packed = 0.5 + (1 / 64 + 4 / (64 * 256) if nested else 4 / 64)
    else:
        packed = 1 if bits == 8 else dtype_bytes
    return parameters.linear * packed + parameters.other * dtype_bytes


def optimizer_bytes(trainable: int, dtype_bytes: int, optimizer: str = "adamw_torch") -> int:
    """State of the optimizer: Adam's two moments in the parameters' type, or in one byte (8-bit); none for SGD."""
    if optimizer == "sgd":
        return 0
    return 2 * trainable * (1 if "8bit" in optimizer else dtype_bytes)


def layer_bytes(shape: Shape, tokens: int, half: bool, lora: bool, dropout: bool = False) -> int:
    """What one decoder layer keeps for its backward pass on `tokens` tokens; `half`: 16-bit compute."""
    sizes = (shape.hidden, shape.intermediate, shape.query, shape.key)
    coefficients = SAVED_BYTES[half, lora]
    if lora and dropout:
        coefficients = tuple(c + d for c, d in zip(coefficients, DROPOUT_BYTES, strict=True))
    return tokens * sum(c * size for c, size in zip(coefficients, sizes, strict=True))


def activation_bytes(
    shape: Shape, tokens: int, stream_bytes: int, half: bool, lora: bool, dropout: bool, checkpointing: bool
) -> int:
    """
    Activations of a training step on `tokens` tokens at their peak, in the last layer's backward pass. With gradient
    checkpointing, the other layers have kept their input only, in `stream_bytes` a number.
    """
    saved = layer_bytes(shape, tokens, half, lora, dropout)
    kept = tokens * shape.hidden * stream_bytes if checkpointing else saved
    return int((shape.layers - 1) * kept + PEAK_OVER_SAVED[lora] * saved)


def cast_bytes(parameters: Parameters, layers: int, trained_bytes: int, base_bytes: int, checkpointing: bool) -> int:
    """
    16-bit copies that autocast makes of float32 weights: it keeps those of trainable weights, and those of frozen ones
    live as long as their layer's activations. `trained_bytes`, `base_bytes`: those of a trainable and a base weight.
    """
    copies = 2 * (parameters.adapter or parameters.base) if trained_bytes == 4 else 0
    if parameters.adapter and base_bytes == 4:
        copies += 2 * parameters.linear // (layers if checkpointing else 1)
    return copies


def head_bytes(shape: Shape, scored_tokens: int, compute_bytes: int, weight_bytes: int, head_trains: bool) -> int:
    """TRL's fused head in its backward pass: a tile of logits, its weights if cast, and float32 gradients."""
    tile = min(scored_tokens, HEAD_TOKENS) * HEAD_VOCABULARY * compute_bytes
    cast = min(shape.vocabulary, HEAD_VOCABULARY) * shape.hidden * compute_bytes if compute_bytes < weight_bytes else 0
    hidden = scored_tokens * shape.hidden * (4 + weight_bytes)
    return tile + cast + hidden + (shape.vocabulary * shape.hidden * 4 if head_trains else 0)


def kv_cache_bytes(shape: Shape, tokens: int, dtype_bytes: int) -> int:
    """Keys and values of `tokens` tokens in all layers."""
    return 2 * shape.layers * shape.key * tokens * dtype_bytes


def generation_bytes(shape: Shape, rows: int, prompt_tokens: int, completion_tokens: int, dtype_bytes: int) -> int:
    """
    Sampling `rows` completions at once with transformers: the KV cache, and the largest of what steps need beside it:
    one layer's keys and values repeated for every query head, copies of the last logits, or, while the prompts are
    read, the widest activations.
    """
    tokens = rows * (prompt_tokens + completion_tokens)
    repeated = 2 * tokens * shape.query * dtype_bytes
    logits = rows * shape.vocabulary * 4 * SAMPLING_COPIES
    prefill = rows * prompt_tokens * (3 * shape.intermediate + 2 * shape.hidden) * dtype_bytes
    return kv_cache_bytes(shape, tokens, dtype_bytes) + max(repeated, logits, prefill)


class Estimate(NamedTuple):
    """
    Bytes by part, the memory that the GPU must have, and the part of it that is vLLM's. `update` and `generation` do
    not happen at once, so only the larger one of them counts.
    """

    parts: dict[str, float]
    needed: float
    vllm_share: float


def estimate(
    parameters: Parameters,
    shape: Shape,
    *,
    rows: int,
    generated_rows: int,
    prompt_tokens: int,
    completion_tokens: int,
    dtype_bytes: int,
    half: bool,
    bits: int = 0,
    nested: bool = False,
    dropout: bool = False,
    checkpointing: bool = True,
    optimizer: str = "adamw_torch",
    reference: bool = False,
    vllm_share: float = 0.0,
) -> Estimate:
    """
    Memory of a GRPO run on one GPU, nothing sharded.

    Args:
        parameters ([`Parameters`]), shape ([`Shape`]): The model's and the adapter's.
        rows (`int`): Rollouts in one forward and backward pass (`per_device_train_batch_size`).
        generated_rows (`int`): Rollouts that this GPU generates at once (`generation_batch_size` on one GPU).
        prompt_tokens, completion_tokens (`int`): Longest prompt and longest completion.
        dtype_bytes (`int`): Bytes of a loaded weight: 4 or 2.
        half (`bool`): 16-bit compute (`bf16` or `fp16`).
        bits, nested: Quantization, see [`weight_bytes`].
        dropout (`bool`): Whether the adapter has dropout.
        checkpointing (`bool`): Gradient checkpointing.
        optimizer (`str`): Name, as `optim` has it.
        reference (`bool`): Whether a reference model is loaded (`beta` above 0 without an adapter).
        vllm_share (`float`): Share of the GPU that a colocated vLLM engine takes, 0 without one.
    """
    lora = parameters.adapter > 0
    trainable = parameters.adapter or parameters.base
    # PEFT trains adapters in float32, TRL those of quantized models in bfloat16.
    trained_bytes = (2 if bits else 4) if lora else dtype_bytes
    tokens = rows * (prompt_tokens + completion_tokens)
    scored = rows * completion_tokens
    compute_bytes = 2 if half else 4
    weights = weight_bytes(parameters, dtype_bytes, bits, nested)
    casts = (
        cast_bytes(parameters, shape.layers, trained_bytes, 0 if bits else dtype_bytes, checkpointing) if half else 0
    )
    activations = activation_bytes(shape, tokens, dtype_bytes, half, lora, dropout, checkpointing)
    head = head_bytes(shape, scored, compute_bytes, dtype_bytes, head_trains=not lora)
    parts: dict[str, float] = {
        "weights": weights + (weights if reference else 0),
        "adapter": parameters.adapter * trained_bytes,
        "gradients": trainable * trained_bytes,
        "optimizer": optimizer_bytes(trainable, trained_bytes, optimizer),
        "update: activations": activations + casts,
        "update: logits": head,
    }
    if not vllm_share:
        parts["generation"] = generation_bytes(shape, generated_rows, prompt_tokens, completion_tokens, dtype_bytes)
    static = sum(parts[name] for name in ("weights", "adapter", "gradients", "optimizer"))
    update = parts["update: activations"] + parts["update: logits"]
    training = (static + max(update, parts.get("generation", 0))) * (1 + FRAGMENTATION) + CONTEXT_BYTES
    parts["allowance"] = training - static - max(update, parts.get("generation", 0))
    if not vllm_share:
        return Estimate(parts, training, 0.0)
    cache = kv_cache_bytes(shape, generated_rows * (prompt_tokens + completion_tokens), 2)
    parts["vLLM: weights"] = weight_bytes(parameters, 2, bits, nested)
    parts["vLLM: KV cache, work space"] = cache + VLLM_WORKSPACE_BYTES
    engine = parts["vLLM: weights"] + parts["vLLM: KV cache, work space"]
    return Estimate(parts, max(training / (1 - vllm_share), engine / vllm_share), vllm_share)
