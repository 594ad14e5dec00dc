"""
How rollouts' log-probs move with the entropy, against float64 gradients of raw logits, one rollout at a time.

The reference shares nothing with the code under test: not TRL's fused head, not the difference, not the row selection.
"""

import copy

import pytest
import tiny
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import GRPOTrainer

from entrocraft_trl.policy import influence
from entrocraft_trl.policy.mixin import Heard
from entrocraft_trl.policy.passes import select_rows


ROWS = 16
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
# The difference's own error, by curvature, is 0.4 to 0.9% on these models; an inner product of float32 gradients has
# none. A wrong weight, mask or row makes more than 20%.
BY_DIFFERENCE, BY_GRADIENTS = 0.02, 1e-4


def prepared(model=None, lora=None, **settings):
    """A trainer, and loss inputs of 16 forced rollouts."""
    torch.manual_seed(0)
    args = tiny.build_config(
        **{"per_device_train_batch_size": ROWS, "temperature": 0.7, **settings}, rejection_rule="influence"
    )
    trainer = tiny.build_trainer(model=model, args=args, peft_config=LoraConfig(**lora) if lora else None)
    tiny.force_rollouts(trainer, tiny.random_rollouts(ROWS))
    trainer.model.train()
    trainer.state.max_steps = 1
    return trainer, GRPOTrainer._generate_and_score_completions(trainer, tiny.generation_inputs(trainer))


def checkpoint_layers(trainer):
    """As `train` does before its first step."""
    trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)


def holes(mask):
    """A loss mask with tool tokens inside: every third token of a rollout trains nothing."""
    return mask * (torch.arange(mask.size(1)) % 3 != 1)


def derivatives(trainer, batch, mask, aggregation="token", logps=None, entropy=None):
    """What the trainer says; without an `entropy`, given the one that it would have measured."""
    if entropy is None:
        with torch.no_grad():
            _, entropies = from_logits(trainer.model.eval(), batch, trainer.temperature)
        trainer.model.train()
        entropy = mean_entropy(entropies, mask, aggregation).item()
    every = torch.ones(len(mask), dtype=torch.bool)
    return trainer.log_prob_derivatives(batch, mask, every, entropy=entropy, aggregation=aggregation, logps=logps)


def from_logits(model, batch, temperature):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = model(input_ids=ids, attention_mask=attention_mask).logits[:, batch["prompt_ids"].size(1) - 1 : -1]
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def mean_entropy(entropies, mask, aggregation):
    if aggregation == "token":
        return (entropies * mask).sum() / mask.sum()
    return ((entropies * mask).sum(1) / mask.sum(1)).mean()


def flat_gradient(value, parameters):
    gradient = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in gradient])


def exact_derivatives(trainer, batch, mask, aggregation="token"):
    """`<G, grad log pi(y_i)> / |G|` in float64, G over all rollouts."""
    model = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).double().eval()
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    del causal_lm.forward  # TRL's fused head, which in the copy would run the trainer's own weights
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    logps, entropies = from_logits(model, batch, trainer.temperature)
    g = flat_gradient(mean_entropy(entropies, mask, aggregation), parameters)
    products = [flat_gradient((logps * mask)[row].sum(), parameters) @ g / g.norm() for row in range(len(mask))]
    return torch.stack(products).float()


def error(found, exact) -> float:
    return ((found - exact).norm() / exact.norm()).item()


# ----------------------------------------------------------------------------------------------------- the derivatives


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("lora", [None, LORA, {**LORA, "init_lora_weights": True}], ids=["full", "LoRA", "new LoRA"])
@pytest.mark.parametrize("batch_size", [16, 3])  # 3 does not divide the 16 rows
def test_the_difference_is_the_inner_product_of_the_gradients(lora, aggregation, batch_size):
    trainer, batch = prepared(lora=lora)
    trainer.args.per_device_train_batch_size = batch_size
    mask = holes(batch["completion_mask"])
    exact = exact_derivatives(trainer, batch, mask, aggregation)
    assert (exact > 0).any() and (exact < 0).any()
    assert error(derivatives(trainer, batch, mask, aggregation), exact) < BY_DIFFERENCE


def test_log_probs_that_were_read_already_spare_a_pass(monkeypatch):
    trainer, batch = prepared()
    mask = batch["completion_mask"]
    without = derivatives(trainer, batch, mask)
    logps = trainer.read_policy(batch, mask, Heard(not_recorded="rollouts are forced"))[0].logps
    passes = []
    original = influence.run_policy_pass
    monkeypatch.setattr(influence, "run_policy_pass", lambda *args: passes.append(1) or original(*args))
    assert torch.equal(derivatives(trainer, batch, mask, logps=logps), without)
    assert len(passes) == 1


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
def test_gradients_of_single_rollouts_say_the_same_without_its_error(lora, monkeypatch):
    trainer, batch = prepared(lora=lora)
    mask = holes(batch["completion_mask"])
    monkeypatch.setattr(influence, "resolves_small_steps", lambda model: False)
    assert error(derivatives(trainer, batch, mask), exact_derivatives(trainer, batch, mask)) < BY_GRADIENTS


@pytest.mark.parametrize("low", ["autocast", "weights", "frozen weights"])
def test_in_bf16_it_is_the_gradients_that_are_asked(low, monkeypatch):
    """bf16 has 8 bits: activations are off by 0.4%, and products by a few times that, but a small step is lost."""
    model = tiny.build_model()
    if low != "autocast":
        model = model.bfloat16()
    trainer, batch = prepared(model, LORA if low == "frozen weights" else None, bf16=low == "autocast")
    mask = batch["completion_mask"]
    exact = exact_derivatives(trainer, batch, mask)
    assert error(derivatives(trainer, batch, mask), exact) < 0.05
    monkeypatch.setattr(Accelerator, "mixed_precision", "no")
    monkeypatch.setattr(influence, "resolves_small_steps", lambda model: True)
    assert error(derivatives(trainer, batch, mask), exact) > 0.3


def test_rounded_products_are_no_better(monkeypatch):
    """`set_float32_matmul_precision("medium")`: bfloat16 inside, on the processors that have it."""
    trainer, batch = prepared()
    mask = batch["completion_mask"]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        monkeypatch.setattr(
            influence, "derivatives_by_difference", lambda *args, **kwargs: pytest.fail("a difference")
        )
        assert influence.rounds_products()
        assert error(derivatives(trainer, batch, mask), exact_derivatives(trainer, batch, mask)) < 0.05
    finally:
        torch.set_float32_matmul_precision(precision)
    assert not influence.rounds_products()


@pytest.mark.parametrize("precise", [True, False])
def test_a_gradient_of_zero_moves_nothing(precise, monkeypatch):
    trainer, batch = prepared()
    monkeypatch.setattr(influence, "resolves_small_steps", lambda model: precise)
    mask = torch.zeros_like(batch["completion_mask"])
    assert torch.equal(derivatives(trainer, batch, mask, entropy=1.0), torch.zeros(ROWS))


def test_a_gradient_that_is_not_finite_is_refused():
    trainer, batch = prepared()
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="gradient of the policy's entropy at step 0 is not finite"):
        derivatives(trainer, batch, batch["completion_mask"], entropy=1.0)


# -------------------------------------------------------------------------------------------------- nothing is touched


def state_of(trainer):
    named = list(trainer.model.named_parameters())
    return (
        {name: (p.detach().clone(), p.data_ptr(), p.requires_grad) for name, p in named},
        {name: (id(p.grad), p.grad.clone()) for name, p in named if p.grad is not None},
        {name: module.training for name, module in trainer.model.named_modules()},
        {name: vars(module).get("forward") for name, module in trainer.model.named_modules()},
        tiny.rng_states(),
    )


def assert_same_state(before, after):
    for name, (value, place, trained) in before[0].items():
        now, its_place, its_trained = after[0][name]
        assert torch.equal(now.view(torch.int32), value.view(torch.int32)), name  # bits: -0.0 is not 0.0
        assert (its_place, its_trained) == (place, trained), name
    assert before[1].keys() == after[1].keys()
    for name, (place, value) in before[1].items():
        assert after[1][name][0] == place and torch.equal(after[1][name][1], value), name
    assert before[2:] == after[2:]


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("lora", [None, {**LORA, "lora_dropout": 0.5}], ids=["full", "LoRA"])
@pytest.mark.parametrize("fails", [False, True])
def test_parameters_gradients_modes_and_random_states_are_as_before(precise, lora, fails, monkeypatch):
    model = tiny.build_model(attention_dropout=0.5)
    trainer, batch = prepared(model, lora, gradient_checkpointing=True)
    checkpoint_layers(trainer)
    monkeypatch.setattr(influence, "resolves_small_steps", lambda model: precise)
    for number, parameter in enumerate(trainer.model.parameters()):
        if parameter.requires_grad and number % 2:
            parameter.grad = torch.full_like(parameter, 0.5)
    passes, original = [], trainer._read_pass

    def failing(*args, **kwargs):
        passes.append(1)
        if len(passes) == 3:  # of the difference: the pass at the moved parameters; else in a rollout's own gradient
            raise KeyError
        return original(*args, **kwargs)

    mask = batch["completion_mask"]
    before = state_of(trainer)
    if fails:
        monkeypatch.setattr(trainer, "_read_pass", failing)
        with pytest.raises(KeyError):
            derivatives(trainer, batch, mask, entropy=1.0)
    else:
        first, second = (derivatives(trainer, batch, mask, entropy=1.0) for _ in range(2))
        assert torch.equal(first, second) and first.all() and not first.requires_grad
    assert_same_state(before, state_of(trainer))


def test_the_parameters_are_elsewhere_inside_and_at_home_after():
    parameter = torch.nn.Parameter(torch.tensor([0.1, -0.0, 1e-30]))
    home = parameter.data_ptr()
    with pytest.raises(KeyError), influence.held_at([parameter], [torch.tensor([5.0, 6.0, 7.0])]):
        assert parameter.tolist() == [5.0, 6.0, 7.0]
        raise KeyError
    assert parameter.data_ptr() == home
    assert torch.equal(parameter.view(torch.int32), torch.tensor([0.1, -0.0, 1e-30]).view(torch.int32))


# ---------------------------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_kept_whatever_the_run_uses(reentrant, precise, monkeypatch):
    """Without it a rollout's graph would not fit where the training step does; dropout stays off all the same."""
    monkeypatch.setattr(influence, "resolves_small_steps", lambda model: precise)
    plain, batch = prepared()
    expected = derivatives(plain, batch, batch["completion_mask"])
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer, batch = prepared(tiny.build_model(attention_dropout=0.5), **settings)
    checkpoint_layers(trainer)
    layers = [module for module in trainer.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers and all(layer.gradient_checkpointing for layer in layers)
    runs = []
    layers[0].input_layernorm.register_forward_hook(lambda *args: runs.append(torch.is_grad_enabled()))
    # The same sums in the same order: equal to the last bit.
    assert torch.equal(derivatives(trainer, batch, batch["completion_mask"]), expected)
    with_gradient = 1 if precise else 1 + ROWS
    # Each pass with gradients runs its layers again on the way back; the test's own pass for the entropy runs without.
    assert sum(runs) == 2 * with_gradient


# --------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("total", "chosen"),
    [(8, 8), (16, 16), (31, 31), (32, 16), (64, 16), (128, 16), (256, 32), (1000, 125)],
)
def test_an_eighth_of_the_rollouts_but_at_least_sixteen(total, chosen):
    rows = influence.rows_for_gradient(0, total, total)
    assert len(rows) == chosen and rows[0] == 0
    gaps = {later - earlier for earlier, later in zip(rows, rows[1:], strict=False)}
    assert len(gaps) == 1  # evenly spread: with groups of eight, one of each


@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_ranks_choose_together_what_one_process_chooses(ranks):
    share = 64 // ranks
    chosen = [
        rank * share + row for rank in range(ranks) for row in influence.rows_for_gradient(rank * share, share, 64)
    ]
    assert chosen == influence.rows_for_gradient(0, 64, 64)


def test_a_rank_without_a_chosen_rollout_adds_zeros():
    trainer, batch = prepared()
    gradient, count = influence.entropy_gradient(
        trainer._read_pass, trainer.model, batch, batch["completion_mask"], [], aggregation="token", batch_size=4
    )
    assert count == 0 and len(gradient) == len(influence.trainable_parameters(trainer.model))
    assert not any(part.any() for part in gradient)


def test_only_an_adapter_moves_where_there_is_one():
    trainer, _ = prepared(lora=LORA)
    moved = {id(parameter) for parameter in influence.trainable_parameters(trainer.model)}
    names = {name for name, parameter in trainer.model.named_parameters() if id(parameter) in moved}
    assert names and all("lora_" in name for name in names)


def test_selected_rows_take_their_images_along():
    """Two images, none, one: they lie end to end, each of as many rows as its grid has cells."""
    grid = torch.tensor([[1, 2, 2], [1, 1, 2], [1, 3, 1]])
    batch = {
        "prompt_ids": torch.arange(6).view(3, 2),
        "prompt_mask": torch.ones(3, 2),
        "completion_ids": torch.arange(9).view(3, 3),
        "completion_mask": torch.ones(3, 3),
        "advantages": torch.arange(3.0),
        "pixel_values": torch.arange(9.0).unsqueeze(1),
        "image_grid_thw": grid,
        "num_images": [2, 0, 1],
        "mm_token_type_ids": torch.arange(15).view(3, 5),
    }
    part = select_rows(batch, [0, 2])
    assert part["prompt_ids"].tolist() == [[0, 1], [4, 5]]
    assert part["pixel_values"].flatten().tolist() == list(range(9))
    assert select_rows(batch, [2])["pixel_values"].flatten().tolist() == [6, 7, 8]
    assert select_rows(batch, [2])["image_grid_thw"].tolist() == [[1, 3, 1]]
    assert select_rows(batch, [2])["num_images"] == [1]
    assert select_rows(batch, [1])["pixel_values"].shape == (0, 1)
    assert select_rows(batch, [1])["mm_token_type_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert "advantages" not in part  # no pass reads it


def test_the_step_moves_the_entropy_by_a_thousandth_of_itself():
    assert influence.difference_step(entropy=2.0, slope=4.0) == pytest.approx(0.0005)  # 4 * 0.0005 is 0.1% of 2 nats
