"""AEnt against its formulas: the clamped entropy, the bonus, the coefficient; without a bonus against plain GRPO."""

import math

import loss_probe
import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from entrocraft_trl.baselines import clamped_entropy as module
from entrocraft_trl.baselines.aent import AEntConfig, AEntTrainer, next_coefficient
from entrocraft_trl.baselines.clamped_entropy import clamped_entropy
from entrocraft_trl.policy.tokens import loss_mask


LOGITS = torch.randn(5, 10, generator=torch.Generator().manual_seed(0)) * 2


# ------------------------------------------------------------------------------------------------- the clamped entropy


def renormalised_entropy(logits: torch.Tensor, dropped: int) -> torch.Tensor:
    """Of one token: the entropy of the softmax over all but the `dropped` lowest logits."""
    kept = logits.sort().values[dropped:]
    p = kept.softmax(-1)
    return -(p * p.log()).sum()


@pytest.mark.parametrize(("clamp", "dropped"), [(0.0, 0), (0.3, 3), (0.39, 3), (0.95, 9)])
def test_it_is_the_entropy_of_the_renormalised_rest(clamp, dropped):
    expected = torch.stack([renormalised_entropy(row, dropped) for row in LOGITS])
    torch.testing.assert_close(clamped_entropy(LOGITS, clamp), expected, rtol=1e-5, atol=1e-6)


def test_its_gradient_is_that_of_the_rest_and_finite():
    logits = LOGITS.clone().requires_grad_()
    clamped_entropy(logits, 0.3).sum().backward()
    copy = LOGITS.clone().requires_grad_()
    torch.stack([renormalised_entropy(row, 3) for row in copy]).sum().backward()
    torch.testing.assert_close(logits.grad, copy.grad, rtol=1e-4, atol=1e-6)
    assert (logits.grad == 0).sum(dim=1).tolist() == [3] * 5  # what is left out is not moved


# ------------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("at_once", [1024, 7])  # 7: several chunks, the last one smaller
def test_the_loss_has_the_bonus_and_the_log_keeps_the_true_entropy(at_once, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", at_once)
    trainer = loss_probe.build(AEntTrainer, aent_clamp=0.5, aent_coef=0.3, aent_coef_lr=0.0, temperature=0.7)
    batch = loss_probe.loss_inputs(trainer, shift=0.2)
    logps, entropies = loss_probe.loss_pass(trainer, batch)
    mask = loss_mask(batch).bool()
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = trainer.model(input_ids=input_ids, attention_mask=attention_mask).logits / 0.7
    rows = logits[:, -mask.size(1) - 1 : -1][mask]
    bonus = torch.stack([renormalised_entropy(row, tiny.VOCABULARY // 2) for row in rows]).mean()
    assert abs(bonus - entropies[mask].mean()) > 0.05, "the clamp must matter"
    ratios = torch.exp(logps - batch["old_per_token_logps"])
    advantages = batch["advantages"][:, None]
    losses = torch.maximum(-advantages * ratios, -advantages * ratios.clamp(0.8, 1.2))
    loss_probe.assert_same_step(trainer, batch, losses[mask].sum() / mask.sum() - 0.3 * bonus)
    assert trainer._metrics["train"]["entropy"][-1] == pytest.approx(entropies[mask].mean().item(), rel=1e-5)
    assert trainer._metrics["train"]["aent/clamped_entropy"][-1] == pytest.approx(bonus.item(), rel=1e-5)


# Up to rounding: log-probs from ordinary logits and from TRL's tiles differ in the last bits.


def test_without_a_clamp_it_is_trls_entropy_bonus():
    settings = {**loss_probe.OFF_POLICY, "aent_clamp": 0.0, "aent_coef": 0.1, "aent_coef_lr": 0.0}
    loss_probe.assert_trains_as_plain_grpo(AEntTrainer, settings, plain_settings={"entropy_coef": 0.1}, exact=False)


def test_without_a_bonus_it_is_grpo():
    settings = {**loss_probe.OFF_POLICY, "aent_coef": 0.0, "aent_coef_lr": 0.0}
    loss_probe.assert_trains_as_plain_grpo(AEntTrainer, settings, exact=False)


def mixture_of_experts():
    """Whose router loss TRL adds: 4 experts, 2 of which read a token."""
    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.25}
    tokens = {"pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS, "bos_token_id": None}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **tokens, **experts))


def adapter():
    return LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.mark.parametrize(("model", "peft"), [(mixture_of_experts, None), (tiny.build_model, adapter)])
def test_ordinary_logits_of_any_model_train_as_trls_head(model, peft):
    """Also the router loss comes through, and wrappers of adapters take the arguments."""
    trained = []
    for kind, settings in (
        (AEntTrainer, {"aent_clamp": 0.0, "aent_coef": 0.1, "aent_coef_lr": 0.0}),
        (loss_probe.GRPOTrainer, {"entropy_coef": 0.1}),
    ):
        rollouts = tiny.random_rollouts(8)
        config_class = getattr(kind, "_config_class", tiny.GRPOConfig)
        args = tiny.build_config(config_class, max_steps=2, learning_rate=0.02, **settings)
        reward, start = tiny.table_reward(rollouts, loss_probe.REWARDS), model()
        torch.manual_seed(0)  # the adapter's weights
        config = {"peft_config": peft()} if peft else {}
        trainer = tiny.build_trainer(kind, start, args, reward_funcs=reward, **config)
        tiny.force_rollouts(trainer, rollouts)
        trainer.train()
        trained.append(trainer)
    for (name, value), other in zip(trained[0].model.named_parameters(), trained[1].model.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=name)
    logged = [tiny.history(trainer, "aux_loss") for trainer in trained]
    assert logged[0] == pytest.approx(logged[1]) and len(logged[0]) == (0 if peft else 2)


def test_one_forward_pass_a_micro_batch():
    trainer = loss_probe.build(AEntTrainer)
    batch = loss_probe.loss_inputs(trainer)
    passes = []
    trainer.model.base_model.register_forward_hook(lambda *_: passes.append(1))
    trainer._compute_loss(trainer.model, batch)
    assert passes == [1]


# ----------------------------------------------------------------------------------------------------- the coefficient


@pytest.mark.parametrize(
    ("entropy", "expected"),
    [
        (0.05, 1e-3 + 1e-3 * 0.05),  # 0.05 below the low bound of 0.1
        (0.3, 1e-3),
        (0.7, 1e-3 - 1e-3 * 0.2),  # 0.2 above the high bound of 0.5
        (100.0, 1e-5),  # the least
        (-100.0, 1e-2),  # the largest
    ],
)
def test_the_coefficient_rises_below_the_bounds_and_falls_above(entropy, expected):
    args = AEntConfig("run", use_cpu=True, bf16=False)
    assert next_coefficient(1e-3, entropy, args) == pytest.approx(expected, rel=1e-9)


def test_it_moves_once_an_optimizer_step_from_the_mean_over_the_step_and_after_the_warm_up():
    moves = {"aent_coef": 0.5, "aent_coef_max": 1.0, "aent_coef_lr": 0.1, "aent_entropy_high": 1.0}
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3}
    trainer = loss_probe.build(AEntTrainer, aent_warmup_steps=1, learning_rate=0.01, **moves, **settings)
    clamped = []
    loss_term = trainer.loss_term

    def listen(logps, entropies, inputs):
        mask = loss_mask(inputs).bool()
        clamped.append(trainer._head.clamped[0].detach()[mask])
        return loss_term(logps, entropies, inputs)

    trainer.loss_term = listen
    trainer.train()
    means = [torch.cat(clamped[2 * step : 2 * step + 2]).mean().item() for step in range(3)]
    assert tiny.history(trainer, "aent/clamped_entropy") == pytest.approx(means, rel=1e-5)
    assert min(means) > 1.0
    coefficients = [0.5, 0.5]
    coefficients.append(coefficients[1] - 0.1 * (means[1] - 1.0))
    assert tiny.history(trainer, "aent/coef") == pytest.approx(coefficients, rel=1e-5)
    assert trainer.numbers["coef"] == pytest.approx(coefficients[2] - 0.1 * (means[2] - 1.0), rel=1e-5)
    assert f"was {trainer.numbers['coef']:.3g} last" in "\n".join(trainer.card_section())


# ---------------------------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aent_clamp": 1.0}, "aent_clamp must be below 1, got 1.0"),
        ({"aent_clamp": 30}, "aent_clamp must be finite and in 0..1, got 30.0"),
        ({"aent_coef": 0.5}, "aent_coef=0.5 must lie between aent_coef_min=1e-05 and aent_coef_max=0.01"),
        ({"aent_entropy_low": 0.6}, "aent_entropy_low must not exceed aent_entropy_high, got 0.6 and 0.5"),
        ({"aent_coef_lr": math.inf}, "aent_coef_lr must be finite and at least 0, got inf"),
        ({"aent_warmup_steps": 2.5}, "aent_warmup_steps must be a whole number, got 2.5"),
        ({"entropy_coef": 0.01}, "entropy_coef=0.01 is not for AEntConfig"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2 is not for AEntConfig"),
    ],
)
def test_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AEntConfig("run", use_cpu=True, bf16=False, **settings)
