"""Reading entropy from token tensors and finding the policy's pass. The trainer's own reading: test_trainer.py."""

import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import OPTConfig, OPTForCausalLM

from entrocraft_trl.policy import entropy
from entrocraft_trl.policy.entropy import PolicyPass
from entrocraft_trl.policy.half_temperature import half_temperature_head


tables = st.lists(
    st.lists(st.tuples(st.floats(0.0, 10.0, width=32), st.booleans()), min_size=4, max_size=4), min_size=1, max_size=6
)


def as_tensors(table):
    values = torch.tensor([[value for value, _ in row] for row in table])
    mask = torch.tensor([[int(on) for _, on in row] for row in table])
    return values, mask


@given(table=tables)
def test_token_aggregation_is_the_mean_over_all_loss_tokens(table):
    values, mask = as_tensors(table)
    total, count = entropy.entropy_sums(values, mask, "token").tolist()
    chosen = [value for row in table for value, on in row if on]
    assert count == len(chosen)
    assert total == pytest.approx(sum(chosen), rel=1e-5, abs=1e-5)


@given(table=tables)
def test_sequence_aggregation_is_the_mean_of_the_rollouts_means(table):
    values, mask = as_tensors(table)
    total, count = entropy.entropy_sums(values, mask, "sequence").tolist()
    rows = [[value for value, on in row if on] for row in table]
    means = [np.mean(row) for row in rows if row]
    assert count == len(means)
    assert total == pytest.approx(sum(means), rel=1e-5, abs=1e-5)


@given(table=tables, split=st.integers(0, 6), aggregation=st.sampled_from(["token", "sequence"]))
def test_sums_of_ranks_add_up_to_the_sums_of_the_whole(table, split, aggregation):
    values, mask = as_tensors(table)
    parts = [
        entropy.entropy_sums(values[rows], mask[rows], aggregation) for rows in (slice(split), slice(split, None))
    ]
    torch.testing.assert_close(sum(parts), entropy.entropy_sums(values, mask, aggregation))


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_padding_may_hold_nan_but_loss_tokens_may_not(aggregation):
    values = torch.tensor([[1.0, math.nan], [3.0, 5.0]])
    mask = torch.tensor([[1, 0], [1, 1]])
    total, count = entropy.entropy_sums(values, mask, aggregation).tolist()
    assert total / count == pytest.approx(3.0 if aggregation == "token" else (1 + 4) / 2)
    assert math.isnan(entropy.entropy_sums(values, torch.ones(2, 2), aggregation)[0])


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_an_empty_batch_counts_nothing(aggregation):
    assert entropy.entropy_sums(torch.ones(2, 3), torch.zeros(2, 3), aggregation).tolist() == [0.0, 0.0]


def test_half_precision_is_summed_in_float32():
    values = torch.full((8, 1024), 1.001, dtype=torch.bfloat16)
    total, count = entropy.entropy_sums(values, torch.ones(8, 1024), "token").tolist()
    assert total / count == float(values[0, 0])  # bfloat16 sums would stall at 256


def test_sampling_estimate_leaves_out_unscored_tokens():
    logps = torch.tensor([[-1.0, -2.0, math.nan], [-4.0, math.nan, -100.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert entropy.sampling_entropy_sums(logps, mask, "token").tolist() == [7.0, 3.0]
    assert entropy.sampling_entropy_sums(logps, mask, "sequence").tolist() == [1.5 + 4.0, 2.0]


def test_sampling_estimate_converges_to_the_exact_entropy():
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(20, generator=generator).log_softmax(-1)
    tokens = torch.multinomial(log_p.exp(), 100_000, replacement=True, generator=generator)
    total, count = entropy.sampling_entropy_sums(log_p[tokens].view(100, -1), torch.ones(100, 1000), "token").tolist()
    assert total / count == pytest.approx(-(log_p.exp() * log_p).sum().item(), abs=0.01)  # 3 standard errors


# ----------------------------------------------------------------------------------------------- the policy's own pass


def a_pass(seed):
    generator = torch.Generator().manual_seed(seed)
    return PolicyPass(torch.randn(2, 3, generator=generator), torch.rand(2, 3, generator=generator))


MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def test_the_pass_is_found_by_identity_for_grpo():
    first, second = a_pass(0), a_pass(1)
    batch = {"old_per_token_logps": second.logps}
    assert entropy.find_policy_pass([first, second], batch, MASK) is second
    assert entropy.find_policy_pass([second, first], batch, MASK) is second


def test_the_pass_is_found_by_its_masked_sum_for_rloo():
    first, second = a_pass(0), a_pass(1)
    batch = {"old_logps": (first.logps * MASK).sum(1)}
    assert entropy.find_policy_pass([second, first], batch, MASK) is first


@pytest.mark.parametrize("batch", [{}, {"old_per_token_logps": None}, {"old_logps": torch.zeros(2)}])
def test_a_reference_pass_alone_is_not_taken(batch):
    assert entropy.find_policy_pass([a_pass(0)], batch, MASK) is None
    assert entropy.find_policy_pass([], batch, MASK) is None


def test_eval_mode_restores_each_modules_own_mode():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model.train()
    model[1].eval()  # a frozen part that the user keeps in eval mode
    with entropy.eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False, False]
    with pytest.raises(KeyError), entropy.eval_mode(model):
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_eval_mode_sets_flags_alone_since_train_of_a_model_may_swap_its_kernels():
    """transformers swaps a model's Hub kernels in `train`, whenever the mode changes; both directions must be even."""

    class Kernelized(torch.nn.Linear):
        def train(self, mode=True):
            calls.append(mode)
            return super().train(mode)

    calls = []
    model = torch.nn.Sequential(Kernelized(2, 2))
    with entropy.eval_mode(model):
        assert not model[0].training
    assert model[0].training and calls == []


def loss_batch(trainer):
    tiny.force_rollouts(trainer, tiny.random_rollouts(8))
    trainer.model.train()
    trainer.state.max_steps = 1
    return trainer._generate_and_score_completions(tiny.generation_inputs(trainer))


def exact_pass(model, batch, temperature):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention_mask).logits
    log_p = (logits[:, batch["prompt_ids"].size(1) - 1 : -1].double() / temperature).log_softmax(-1)
    sampled = log_p.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    return sampled, -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("batch_size", [1, 3, 8])  # 3 does not divide the 8 rows
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_policy_pass_and_half_temperature_pass_are_exact(batch_size, half, lora):
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False) if lora else None
    trainer = tiny.build_trainer(args=tiny.build_config(temperature=0.7, **tiny.WIDE_OPEN), peft_config=config)
    batch = loss_batch(trainer)
    read = trainer._get_per_token_logps_and_entropies
    if half:
        with half_temperature_head(trainer):
            found = entropy.run_policy_pass(read, trainer.model, batch, batch_size)
    else:
        found = entropy.run_policy_pass(read, trainer.model, batch, batch_size)
    mask = batch["completion_mask"].bool()
    logps, entropies = exact_pass(trainer.model.eval(), batch, 0.35 if half else 0.7)
    torch.testing.assert_close(found.logps[mask].double(), logps[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.entropies[mask].double(), entropies[mask], rtol=1e-4, atol=1e-5)
    assert not found.logps.requires_grad


def test_half_temperature_head_is_undone_even_after_an_error():
    trainer = tiny.build_trainer(args=tiny.build_config(temperature=0.7, **tiny.WIDE_OPEN))
    batch = loss_batch(trainer)
    read = trainer._get_per_token_logps_and_entropies
    before = entropy.run_policy_pass(read, trainer.model, batch, 8)
    with pytest.raises(KeyError), half_temperature_head(trainer):
        raise KeyError
    after = entropy.run_policy_pass(read, trainer.model, batch, 8)
    assert torch.equal(before.logps, after.logps) and torch.equal(before.entropies, after.entropies)


def test_multimodal_keys_are_all_parameters_of_trls_pass():
    import inspect

    from trl import GRPOTrainer, RLOOTrainer

    for trainer in (GRPOTrainer, RLOOTrainer):
        parameters = inspect.signature(trainer._get_per_token_logps_and_entropies).parameters
        assert set(entropy.MULTIMODAL_KEYS) <= set(parameters)


# ------------------------------------------------------------------------------------------------------------ dropout


def with_lora(dropout):
    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=dropout)
    return get_peft_model(tiny.build_model(), lora)


@pytest.mark.parametrize(
    ("build", "drops"),
    [
        (tiny.build_model, False),
        (lambda: tiny.build_model(attention_dropout=0.1), True),  # functional: no dropout module
        (lambda: with_lora(0.0), False),
        (lambda: with_lora(0.05), True),
        (lambda: OPTForCausalLM(OPTConfig(vocab_size=16, hidden_size=8, ffn_dim=8, num_hidden_layers=1,
                                          num_attention_heads=1, word_embed_proj_dim=8, dropout=0.1)), True),
    ],
    ids=["none", "attention", "LoRA without", "LoRA", "OPT's own"],
)  # fmt: skip
def test_dropout_is_seen_wherever_a_model_keeps_it(build, drops):
    model = build().train()
    assert entropy.has_dropout(model) == drops
    assert not entropy.has_dropout(model.eval())


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "attention"])
def test_exact_scores_are_those_of_one_model_under_dropout(lora):
    """S from a pass with dropout against N from one without gives scores of no model at all; N is at most 0.5 nats."""
    rollouts = tiny.random_rollouts(8)
    # Two steps per generation: TRL runs an old-policy pass of its own, in training mode.
    args = tiny.build_config(rejection_rule="entropy_change", steps_per_generation=2, per_device_train_batch_size=4)
    dropout = 0.5  # large, so that another model's scores are far off
    trainer = tiny.build_trainer(
        model=tiny.build_model(attention_dropout=0.0 if lora else dropout),
        args=args,
        reward_funcs=tiny.table_reward(rollouts, [0.0, 1.0] * 4),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout) if lora else None,
    )
    with torch.no_grad():  # a new adapter is zero, and dropping zeros shows nothing
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    tiny.force_rollouts(trainer, rollouts)
    seen = {}
    judge = trainer._entropy_change_scores

    def noting(batch, advantages, reading):
        seen.update(batch=batch, advantages=advantages, scores=judge(batch, advantages, reading))
        return seen["scores"]

    trainer._entropy_change_scores = noting
    trainer._entropy_band = lambda progress: (5.0, 6.0)  # far above: the rule has to judge
    trainer.model.train()
    trainer.state.max_steps = 1
    trainer._generate_and_score_completions(tiny.generation_inputs(trainer))
    batch = seen["batch"]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=ids, attention_mask=attention_mask).logits
    logp = logits[:, batch["prompt_ids"].size(1) - 1 : -1].double().log_softmax(-1)
    h = -(logp.exp() * logp).sum(-1)
    term = logp.exp() * (logp + h.unsqueeze(-1))  # p (log p + H) of the whole vocabulary
    margin = term.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1) - (logp.exp() * term).sum(-1)
    expected = seen["advantages"] * (margin * batch["completion_mask"]).sum(1)
    assert torch.allclose(seen["scores"].double(), expected, atol=1e-5)
