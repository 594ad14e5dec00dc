"""PSR, NSR and W-REINFORCE against their formula; with equal weights and balanced groups, against plain GRPO."""

import loss_probe
import pytest
import tiny
import torch
from loss_probe import OFF_POLICY

from entrocraft_trl.baselines.reinforce import (
    NSRConfig,
    NSRTrainer,
    PSRConfig,
    PSRTrainer,
    WReinforceConfig,
    WReinforceTrainer,
)
from entrocraft_trl.policy.tokens import loss_mask


SIGNS = [1.0, -1.0, -1.0, 1.0, -1.0, -1.0, -1.0, -1.0]  # the second group is all wrong: GRPO's advantages there are 0
ZERO_ONE = [max(sign, 0.0) for sign in SIGNS]


def expected_loss(trainer, batch, advantages, kept) -> torch.Tensor:
    """The clipped loss with the mean over the tokens of the rollouts that are kept."""
    logps, _ = loss_probe.loss_pass(trainer, batch)
    mask = loss_mask(batch).bool()
    ratios = torch.exp(logps - batch["old_per_token_logps"])
    advantages = torch.tensor(advantages)[:, None]
    losses = torch.maximum(-advantages * ratios, -advantages * ratios.clamp(0.8, 1.2))
    return losses[mask].sum() / mask[torch.tensor(kept)].sum()


@pytest.mark.parametrize(
    ("trainer_class", "weights", "dropped"),
    [(PSRTrainer, (1.0, 0.0), -1.0), (NSRTrainer, (0.0, 1.0), 1.0), (WReinforceTrainer, (0.1, 1.0), None)],
)
@pytest.mark.parametrize("rejected", ["drop", "zero_advantage"])
def test_the_loss_of_each_sign(trainer_class, weights, dropped, rejected):
    trainer = loss_probe.build(trainer_class, SIGNS, rejected_rollouts=rejected)
    batch = loss_probe.loss_inputs(trainer, shift=0.3)
    advantages = [weights[0] if sign > 0 else -weights[1] for sign in SIGNS]
    assert batch["advantages"].tolist() == pytest.approx(advantages)
    assert list(trainer._logs["advantages"]) == batch["advantages"].tolist()  # what the table of completions shows
    kept = [rejected == "zero_advantage" or sign != dropped for sign in SIGNS]
    loss_probe.assert_same_step(trainer, batch, expected_loss(trainer, batch, advantages, kept))


def test_rewards_of_zero_and_one():
    trainer = loss_probe.build(NSRTrainer, ZERO_ONE, reward_coding="zero_one")
    assert loss_probe.loss_inputs(trainer)["advantages"].tolist() == [min(sign, 0.0) for sign in SIGNS]


def test_rewards_of_zero_and_one_are_not_read_as_signs():
    trainer = loss_probe.build(NSRTrainer, ZERO_ONE)
    with pytest.raises(ValueError, match="reward_coding='plus_minus_one' needs rewards of exactly 1 or -1, got 0"):
        loss_probe.loss_inputs(trainer)


def test_a_rollout_without_a_reward_teaches_nothing_and_leaves_the_denominator():
    trainer = loss_probe.build(NSRTrainer, [None, *SIGNS[1:]])
    batch = loss_probe.loss_inputs(trainer)
    assert batch["advantages"].tolist() == [0.0, *(min(sign, 0.0) for sign in SIGNS[1:])]
    assert batch["num_items_in_batch"] == loss_mask(batch)[batch["advantages"] != 0].sum()


def test_with_equal_weights_and_balanced_groups_it_is_grpo():
    """The group mean is exactly 0 then, and plain GRPO without scaling has the same advantages."""
    balanced = [1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0]
    settings = {**OFF_POLICY, "positive_weight": 1.0, "scale_rewards": "none"}
    loss_probe.assert_trains_as_plain_grpo(WReinforceTrainer, settings, rewards=balanced)


def test_a_run_logs_what_is_kept_and_the_card_says_the_weights():
    trainer = loss_probe.build(PSRTrainer, SIGNS, max_steps=2)
    trainer.train()
    assert tiny.history(trainer, "reinforce/kept_rollouts") == [0.25, 0.25]
    card = "\n".join(trainer.card_section())
    assert card.startswith("## PSR") and "right rollout was 1, that of a wrong one 0, whatever" in card
    assert "left the denominator" in card


def test_evaluation_keeps_trls_advantages():
    trainer = loss_probe.build(NSRTrainer, SIGNS, num_generations_eval=4)
    trainer.model.eval()
    batch = trainer._generate_and_score_completions(tiny.generation_inputs(trainer))
    # Not scaled, but centred: the mean of the first group is 0, that of the second -1.
    assert batch["advantages"].tolist() == [*SIGNS[:4], 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (NSRConfig, {"scale_rewards": "group"}, "scale_rewards='group' is not for NSRConfig: raw rewards are neither"),
        (NSRConfig, {"loss_type": "grpo"}, "loss_type='grpo' is not for NSRConfig: rejected_rollouts='drop' recounts"),
        (PSRConfig, {"beta": 0.1}, "beta=0.1 is not for PSRConfig"),
        (WReinforceConfig, {"loss_type": "vespo"}, "loss_type='vespo' is not for WReinforceConfig"),
        (WReinforceConfig, {"positive_weight": 0, "negative_weight": 0}, "are both 0"),
        (WReinforceConfig, {"positive_weight": -0.1}, "positive_weight must be finite and at least 0, got -0.1"),
        (WReinforceConfig, {"reward_coding": "percent"}, "reward_coding must be one of .*, got 'percent'"),
        (WReinforceConfig, {"rejected_rollouts": "keep"}, "rejected_rollouts must be one of .*, got 'keep'"),
        (WReinforceConfig, {"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation="),
    ],
)
def test_settings_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config("run", use_cpu=True, bf16=False, **settings)


def test_where_nothing_is_dropped_any_clipped_loss_and_a_kl_term_are_fine():
    WReinforceConfig("run", use_cpu=True, bf16=False, loss_type="grpo", beta=0.1)
    NSRConfig("run", use_cpu=True, bf16=False, loss_type="grpo", beta=0.1, rejected_rollouts="zero_advantage")
