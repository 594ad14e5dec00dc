"""DCPO against its formula, its weight, and with a weight of 0 plain GRPO."""

import math
import warnings

import loss_probe
import pytest
import tiny
import torch
from loss_probe import OFF_POLICY

from entrocraft_trl.baselines.dcpo import DCPOConfig, DCPOTrainer, term_weight
from entrocraft_trl.policy.tokens import loss_mask


def config(**settings):
    return DCPOConfig("run", use_cpu=True, bf16=False, **settings)


def log_probs_at(trainer, batch, temperature: float) -> torch.Tensor:
    """Of the sampled tokens `(B, T)`, from ordinary logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].size(1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
    logps = (logits[:, -length - 1 : -1] / temperature).log_softmax(-1)
    return logps.gather(-1, batch["completion_ids"][..., None]).squeeze(-1)


@pytest.mark.parametrize(("target", "factor"), [(9.0, 1.3), (0.1, 0.7)])  # nats above and below the entropy here
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_right_rollouts_are_also_learned_at_the_other_temperature(target, factor, temperature):
    temperatures = {"dcpo_temperature_high": 1.3, "dcpo_temperature_low": 0.7, "temperature": temperature}
    rewards = [1.0, 0.0, 0.0, 0.04, 1.0, 0.06, 0.0, 0.0]  # three above 0.05
    plain = loss_probe.build(tiny.GRPOTrainer, rewards, temperature=temperature)
    plain_advantages = loss_probe.loss_inputs(plain)["advantages"][:, None]
    trainer = loss_probe.build(DCPOTrainer, rewards, dcpo_target_entropy=target, **temperatures)
    batch = loss_probe.loss_inputs(trainer, shift=0.3)
    alpha = 0.1 / (0.1 + 3 / 8)
    ratios = torch.exp(log_probs_at(trainer, batch, temperature * factor) - log_probs_at(trainer, batch, temperature))
    right = torch.tensor([[reward > 0.05] for reward in rewards])
    advantages = (1 - alpha) * plain_advantages + alpha * right * ratios
    mask = loss_mask(batch).bool()
    torch.testing.assert_close(batch["advantages"][mask], advantages[mask], rtol=1e-4, atol=1e-5)
    assert torch.isfinite(batch["advantages"]).all()
    assert trainer._metrics["train"]["dcpo/weight"] == [pytest.approx(alpha)]
    logps, _ = loss_probe.loss_pass(trainer, batch)
    importance = torch.exp(logps - batch["old_per_token_logps"])
    losses = torch.maximum(-advantages * importance, -advantages * importance.clamp(0.8, 1.2))
    loss_probe.assert_same_step(trainer, batch, losses[mask].sum() / mask.sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("entropy", "right", "weight"),
    [
        (0.45, 0.5, 0.05 / 0.55),  # within the limit, below
        (0.55, 0.5, 0.05 / 0.55),  # and above
        (0.0, 0.5, 0.1 / 0.6),  # up to the limit
        (0.5, 0.5, 0.0),  # at the target: GRPO
        (0.0, 0.0, 0.0),  # none is right, which makes the official code's loss NaN
        (math.nan, 0.5, 0.0),
    ],
)
def test_the_weight(entropy, right, weight):
    assert term_weight(entropy, right, config()) == pytest.approx(weight, abs=1e-12)


def test_without_a_right_rollout_the_batch_is_grpos():
    rewards = [-1.0, -2.0, -3.0, -3.0] * 2
    trainer = loss_probe.build(DCPOTrainer, rewards)
    assert loss_probe.loss_inputs(trainer)["advantages"].shape == (8,)


def test_with_a_limit_of_0_it_is_grpo():
    loss_probe.assert_trains_as_plain_grpo(DCPOTrainer, {**OFF_POLICY, "dcpo_limit": 0.0})


def test_rows_keep_their_advantages_of_tokens():
    """Through TRL's shuffle and split: the rollouts of a step have the advantages that they were given."""
    trainer = loss_probe.build(DCPOTrainer, dcpo_target_entropy=9.0, **OFF_POLICY)
    given, seen, prepare, compute = {}, {}, trainer._generate_and_score_completions, trainer._compute_loss

    def remember(store, batch):
        rows = zip(batch["completion_ids"], batch["advantages"], strict=True)
        store.update({tuple(ids.tolist()): tuple(advantages.tolist()) for ids, advantages in rows})
        return batch

    trainer._generate_and_score_completions = lambda inputs: remember(given, prepare(inputs))
    trainer._compute_loss = lambda model, inputs: compute(model, remember(seen, inputs))
    trainer.args.max_steps = 2
    trainer.train()
    assert len(given) == 8 and seen == given


def test_evaluation_is_plain():
    trainer = loss_probe.build(DCPOTrainer, dcpo_target_entropy=9.0)
    inputs = tiny.generation_inputs(trainer)
    trainer.model.eval()
    assert trainer._generate_and_score_completions(inputs)["advantages"].dim() == 1
    assert "dcpo/weight" not in trainer._metrics["train"]


def test_a_run_logs_the_weight_and_the_card_says_the_method():
    trainer = loss_probe.build(DCPOTrainer, **OFF_POLICY)
    trainer.train()
    assert tiny.history(trainer, "dcpo/weight") == [pytest.approx(0.1 / 0.6)] * 2  # half are right; two batches
    assert "The entropy was steered to 0.5 nats: rollouts of a reward above 0.05" in "\n".join(trainer.card_section())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dcpo_target_entropy": -1}, "dcpo_target_entropy must be finite and at least 0, got -1.0"),
        ({"dcpo_temperature_high": 0.9}, "dcpo_temperature_high must be finite and at least 1, got 0.9"),
        ({"dcpo_temperature_low": 1.1}, "dcpo_temperature_low must be finite and in 0..1, got 1.1"),
        ({"dcpo_temperature_low": 0}, "dcpo_temperature_low must be above 0, got 0.0"),
        ({"dcpo_limit": "x"}, "dcpo_limit must be a number, got 'x'"),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation=.* is not for DCPOConfig",
        ),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold=0.1 is not for DCPOConfig"),
        ({"entropy_coef": 0.01}, "entropy_coef=0.01 is not for DCPOConfig"),
        ({"loss_type": "sapo"}, "loss_type='sapo' is not for DCPOConfig"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' is not for"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5 is not for"),
    ],
)
def test_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_on_policy_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # advantages act there too
        assert config(dcpo_limit="5e-2").dcpo_limit == 0.05
