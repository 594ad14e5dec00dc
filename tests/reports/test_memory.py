"""Memory estimate: counts against real models, bytes against what tensors hold and against what is alive on a CPU."""

import weakref

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, Qwen3Config, Qwen3ForCausalLM
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE, ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from entrocraft_trl.reports import gpu_memory as memory
from entrocraft_trl.reports.gpu_memory import Parameters, Shape


ROWS, TOKENS = 8, 96  # enough tokens that activations outweigh the weights of a tiny layer


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made inside, now and at their peak; the storages in `known` do not count."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, key)
        return out

    def free(self, key):
        self.now -= self.alive.pop(key)


def build(layers=4, hidden=80, intermediate=304, heads=8, key_heads=2, dtype=torch.float32, vocabulary=64, tied=True):
    """A Qwen3 with the proportions of the 4B model, and its config."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=16,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,  # so that generation goes on to the limit
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).to(dtype), config


def adapt(model, dropout=0.0):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=dropout))
    adapted.enable_input_require_grads()  # as TRL does
    return adapted


# -------------------------------------------------------------------------------------------------- counts and weights


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "v_proj"]], ids=["full", "all-linear", "q-v"])
def test_counts_equal_those_of_a_real_model(tied, targets):
    model, config = build(tied=tied)
    peft_config = targets and LoraConfig(r=3, target_modules=targets)
    counted = memory.count_parameters(config, peft_config)
    assert counted.base == model.num_parameters()
    layer = model.model.layers[0]
    linear = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj]
    linear += [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    assert counted.linear == 4 * sum(module.weight.numel() for module in linear)
    adapted = linear if targets == "all-linear" else [linear[0], linear[2]] if targets else []
    assert counted.adapter == 4 * sum(3 * (module.in_features + module.out_features) for module in adapted)
    if targets:
        trainable = get_peft_model(model, peft_config).get_nb_trainable_parameters()[0]
        assert counted.adapter == trainable


def test_counts_of_the_real_sizes():
    # Qwen/Qwen3-0.6B, whose model card says 0.6B parameters, 0.44B of them outside the embeddings.
    sizes = {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
    counted = memory.count_parameters(Qwen3Config(**sizes, **heads))
    assert round(counted.base / 1e9, 1) == 0.6
    assert round(counted.linear / 1e9, 2) == 0.44


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_bytes_equal_what_a_loaded_model_holds(dtype):
    model, config = build(dtype=dtype, tied=False)
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert memory.weight_bytes(memory.count_parameters(config), dtype.itemsize) == held


def test_quantized_weights_by_hand():
    # 16384 = 64 * 256 weights: 8192 bytes, and 256 float32 scales, or 256 scale bytes and one float32.
    assert memory.weight_bytes(Parameters(16384, 10), 2, bits=4) == 8192 + 4 * 256 + 20
    assert memory.weight_bytes(Parameters(16384, 10), 2, bits=4, nested=True) == 8192 + 256 + 4 + 20
    assert memory.weight_bytes(Parameters(16384, 10), 2, bits=8) == 16384 + 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapter_gradients_and_optimizer_equal_a_real_step(dtype):
    model, config = build(dtype=dtype)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.arange(8)[None]
    with torch.autocast("cpu", torch.bfloat16):
        adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    count = memory.count_parameters(config, LoraConfig(r=2, target_modules="all-linear"))
    # PEFT makes float32 adapters on a bfloat16 base as well.
    result = memory.estimate(count, memory.decoder_shape(config), **WORKLOAD | {"dtype_bytes": dtype.itemsize})
    assert result.parts["adapter"] == sum(parameter.nbytes for parameter in trained)
    assert result.parts["gradients"] == sum(parameter.grad.nbytes for parameter in trained)
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert result.parts["optimizer"] == sum(value.nbytes for value in states)


def test_optimizer_kinds():
    assert memory.optimizer_bytes(100, 4, "adamw_torch_fused") == 800
    assert memory.optimizer_bytes(100, 2, "adamw_torch") == 400
    assert memory.optimizer_bytes(100, 4, "paged_adamw_8bit") == 200
    assert memory.optimizer_bytes(100, 4, "sgd") == 0


# --------------------------------------------------------------------------------------- activations, head, generation


@pytest.mark.parametrize(
    ("half", "lora", "dropout"),
    [(True, True, 0.0), (True, True, 0.05), (True, False, 0.0), (False, True, 0.0), (False, False, 0.0)],
)
def test_layer_bytes_are_what_autograd_saves(half, lora, dropout):
    def saved(rows, layers):
        model, _ = build(layers)
        base = model
        if lora:
            model = adapt(model, dropout)
        model.train()
        known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
        kept = {}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in known:
                kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used twice
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=half),
        ):
            output = base.model(input_ids=torch.ones(rows, 32, dtype=torch.long))
        assert output.last_hidden_state.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    # Differences leave one layer, and of it what grows with the tokens (not the 16-bit copies of weights).
    counted = (saved(4, 3) - saved(4, 2)) - (saved(2, 3) - saved(2, 2))
    shape = memory.decoder_shape(build()[1])
    # 5%: what a layer keeps for each head and for each rank of the adapter is left out.
    assert memory.layer_bytes(shape, 2 * 32, half, lora, dropout > 0) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
@pytest.mark.parametrize(
    ("dtype", "half", "lora"),
    [
        (torch.bfloat16, True, True),
        (torch.float32, True, True),
        (torch.float32, True, False),
        (torch.float32, False, False),
    ],
    ids=["lora bf16", "lora fp32 base", "full mixed", "full fp32"],
)
def test_activations_against_bytes_alive_in_a_step(dtype, half, lora, checkpointing):
    model, config = build(dtype=dtype)
    base = model
    if lora:
        model = adapt(model)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # padding, as in every batch
    with LiveBytes(model.parameters()) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = base.model(input_ids=ids, attention_mask=mask).last_hidden_state
        output.float().sum().backward()
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    shape = memory.decoder_shape(config)
    tokens = ROWS * TOKENS
    guess = memory.activation_bytes(shape, tokens, dtype.itemsize, half, lora, False, checkpointing)
    if half:
        counted = memory.count_parameters(config, LoraConfig(r=2, target_modules="all-linear") if lora else None)
        guess += memory.cast_bytes(counted, shape.layers, 4, dtype.itemsize, checkpointing)
    # Rather too much than too little: one formula for all proportions of a model.
    assert 0.9 < guess / (live.peak - gradients) < 1.4


@pytest.mark.parametrize("head_trains", [False, True])
def test_head_against_bytes_alive(head_trains):
    assert (memory.HEAD_TOKENS, memory.HEAD_VOCABULARY) == (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)
    hidden = torch.randn(300, 64, requires_grad=True)
    weight = torch.randn(200, 64, requires_grad=head_trains)
    with LiveBytes([hidden, weight]) as live:
        outputs = ChunkedLogProbFunction.apply(
            hidden, weight, None, torch.zeros(300, dtype=torch.long), 1.0, 32768, None, 1.0, ("log_probs", "entropy")
        )
        outputs[0].sum().backward()
    guess = memory.head_bytes(Shape(1, 64, 1, 1, 1, 200), 300, 4, 4, head_trains)
    assert guess == pytest.approx(live.peak, rel=0.05)


@pytest.mark.parametrize(
    ("rows", "prompt", "completion", "vocabulary"), [(8, 16, 48, 64), (16, 8, 24, 512), (8, 64, 4, 64)]
)
def test_generation_against_bytes_alive(rows, prompt, completion, vocabulary):
    model, config = build(hidden=32, intermediate=96, heads=4, key_heads=2, vocabulary=vocabulary)
    ids = torch.ones(rows, prompt, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with LiveBytes(model.parameters()) as live, torch.no_grad():
        model.eval().generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=completion, pad_token_id=0
        )
    shape = memory.decoder_shape(config)
    guess = memory.generation_bytes(shape, rows, prompt, completion, 4)
    assert 0.75 < guess / live.peak < 1.4


def test_kv_cache_equals_a_real_one():
    model, config = build()
    with torch.no_grad():
        cache = model(input_ids=torch.ones(3, 7, dtype=torch.long), use_cache=True).past_key_values
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert memory.kv_cache_bytes(memory.decoder_shape(config), 3 * 7, 4) == held


# ---------------------------------------------------------------------------------------------------- putting together

PARAMETERS = Parameters(linear=4000, other=1000, adapter=100)
SHAPE = Shape(layers=4, hidden=8, intermediate=24, query=8, key=4, vocabulary=50)
WORKLOAD = {"rows": 2, "generated_rows": 8, "prompt_tokens": 5, "completion_tokens": 7, "dtype_bytes": 2, "half": True}


def without_allowance(needed: float) -> float:
    return (needed - memory.CONTEXT_BYTES) / (1 + memory.FRAGMENTATION)


def test_the_larger_of_update_and_generation_counts():
    for rows in (8, 8000):
        result = memory.estimate(PARAMETERS, SHAPE, **WORKLOAD | {"generated_rows": rows})
        parts = dict(result.parts)
        update = parts.pop("update: activations") + parts.pop("update: logits")
        generation = parts.pop("generation")
        assert (update > generation) == (rows == 8)
        allowance = parts.pop("allowance")
        assert without_allowance(result.needed) == pytest.approx(sum(parts.values()) + max(update, generation))
        assert result.needed == pytest.approx(sum(parts.values()) + max(update, generation) + allowance)


def test_vllm_gets_its_share_and_training_the_rest():
    alone = memory.estimate(PARAMETERS, SHAPE, **WORKLOAD | {"generated_rows": 0})
    for share in (0.001, 0.5, 0.999):
        result = memory.estimate(PARAMETERS, SHAPE, **WORKLOAD, vllm_share=share)
        engine = 5000 * 2 + memory.kv_cache_bytes(SHAPE, 8 * 12, 2) + memory.VLLM_WORKSPACE_BYTES
        assert "generation" not in result.parts
        assert result.needed == pytest.approx(max(alone.needed / (1 - share), engine / share))


def test_what_trains_decides_gradients_and_reference():
    full = memory.estimate(PARAMETERS._replace(adapter=0), SHAPE, **WORKLOAD | {"dtype_bytes": 4}, reference=True)
    assert full.parts["weights"] == 2 * 4 * 5000
    assert full.parts["gradients"] == 4 * 5000 and full.parts["optimizer"] == 8 * 5000
    packed = memory.estimate(PARAMETERS, SHAPE, **WORKLOAD, bits=4)
    assert packed.parts["adapter"] == 2 * 100  # TRL turns the adapter of a quantized model into bfloat16
    assert memory.estimate(PARAMETERS, SHAPE, **WORKLOAD).parts["adapter"] == 4 * 100


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match="no estimate for models of type 'gpt2': no intermediate_size"):
        memory.decoder_shape(GPT2Config())


def test_head_width_from_the_number_of_heads():
    shape = memory.decoder_shape(tiny.build_model(family="qwen2").config)  # Qwen2 has no head_dim of its own
    assert (shape.query, shape.key) == (32, 16)
