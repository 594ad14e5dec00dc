"""Groups of equal rewards have no advantage, although float32 gives them one; a trainer's rules go by that."""

import pytest
import tiny
import torch

from entrocraft_trl import EntrocraftRLOOTrainer
from entrocraft_trl.control.advantages import without_rounding


NAN = float("nan")


def trls_advantages(rewards, num_generations):
    """TRL's `scale_rewards="group"`, in float32."""
    rows = torch.tensor(rewards).view(-1, num_generations)
    return ((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-4)).flatten()


@pytest.mark.parametrize("reward", [0.3, 0.9, -0.7, 12345.678, 0.1 + 0.2])
def test_equal_rewards_have_no_advantage(reward):
    advantages = trls_advantages([reward] * 8, 8)
    assert advantages.abs().max() > 0, "rounding does not show with this reward"
    cleaned = without_rounding(advantages, torch.full((8, 1), reward), 0, 8)
    assert cleaned.tolist() == [0.0] * 8


def test_a_group_with_a_difference_keeps_its_advantages_to_the_bit():
    rewards = [0.3] * 4 + [0.3, 0.3, 0.3, 0.31]
    advantages = trls_advantages(rewards, 4)
    cleaned = without_rounding(advantages, torch.tensor(rewards).unsqueeze(1), 0, 4)
    assert cleaned[:4].tolist() == [0.0] * 4
    assert torch.equal(cleaned[4:], advantages[4:])


def test_each_rank_cleans_its_own_part_of_a_group():
    rewards = torch.tensor([0.3] * 8 + [0.0, 1.0] * 4).unsqueeze(1)
    whole = trls_advantages(rewards.flatten().tolist(), 8)
    parts = [without_rounding(whole[first : first + 4], rewards, first, 8) for first in (0, 4, 8, 12)]
    assert torch.equal(torch.cat(parts), without_rounding(whole, rewards, 0, 8))
    assert torch.cat(parts)[:8].abs().max() == 0 and torch.cat(parts)[8:].abs().min() > 0


def test_an_estimator_that_sees_more_than_rewards_is_left_alone():
    advantages = torch.tensor([0.5, -0.5, 0.02, -0.02])
    assert torch.equal(without_rounding(advantages, torch.ones(4, 1), 0, 4), advantages)


def test_unscored_rollouts_make_no_difference():
    rewards = torch.tensor([[0.3, NAN], [NAN, NAN], [0.3, 1.0], [0.3, 1.0]])
    assert without_rounding(torch.tensor([1e-4, 0.0, 1e-4, -1e-4]), rewards, 0, 4).tolist() == [0.0] * 4
    differing = torch.tensor([[0.3, 1.0], [0.3, 0.0]])  # one function differs
    advantages = torch.tensor([1e-3, -1e-3])
    assert torch.equal(without_rounding(advantages, differing, 0, 2), advantages)


def test_rounding_that_is_scaled_over_the_batch_is_rounding_only_if_no_group_has_a_signal():
    advantages = torch.tensor([0.9, -0.7, 0.8, -1.0])
    dead = torch.full((4, 1), 0.3)
    assert without_rounding(advantages, dead, 0, 2, scaled_over_batch=True).tolist() == [0.0] * 4
    half = torch.tensor([[0.3], [0.3], [0.0], [1.0]])
    assert torch.equal(without_rounding(advantages, half, 0, 2, scaled_over_batch=True), advantages)


# ------------------------------------------------------------------------------------------------------ in the trainer


SETTINGS = {
    "sign rule": {},
    "entropy change": {"rejection_rule": "entropy_change"},
    "influence": {"rejection_rule": "influence"},
    "not scaled": {"scale_rewards": "none"},
    "scaled over the batch": {"scale_rewards": "batch"},
    "by function": {"multi_objective_aggregation": "normalize_then_sum"},
}


def train(rewards, trainer_class=None, **settings):
    rollouts = tiny.random_rollouts(len(rewards))
    classes = [trainer_class] if trainer_class else []
    config = [trainer_class._config_class] if trainer_class else []
    args = tiny.build_config(*config, **{"num_generations": 8, **tiny.TOO_LOW, **settings})
    trainer = tiny.build_trainer(*classes, args=args, reward_funcs=tiny.table_reward(rollouts, rewards))
    tiny.force_rollouts(trainer, rollouts)
    trainer.train()
    return trainer


@pytest.mark.parametrize("band", [tiny.TOO_LOW, tiny.TOO_HIGH], ids=["too low", "too high"])
@pytest.mark.parametrize("reward", [0.3, 0.9])  # rounding makes +3e-4 of the one and -6e-4 of the other
@pytest.mark.parametrize("case", SETTINGS)
def test_a_group_of_equal_rewards_is_accepted_and_counted_as_neither_side(case, reward, band):
    trainer = train([reward] * 8, **SETTINGS[case], **band)
    assert tiny.history(trainer, "entrocraft/accepted_rollouts") == [1.0]
    assert tiny.history(trainer, "entrocraft/rejected_positive") == [0.0]
    assert tiny.history(trainer, "entrocraft/rejected_negative") == [0.0]
    assert not tiny.history(trainer, "entrocraft/margin_positive")


def test_a_dead_group_does_not_change_the_normaliser_of_the_others():
    """Dropped by rounding, the group of 0.3 would leave its tokens out of the denominator."""
    lively = [0.0, 1.0, 1.0, 0.0]
    norms = [tiny.history(train([*lively, *[reward] * 4], num_generations=4), "grad_norm") for reward in (0.3, 0.0)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)  # what is left of rounding in the loss: 3e-4 of an advantage


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"beta": 0.0, "normalize_advantages": True}])
def test_rloo_too(settings):
    trainer = train([0.3] * 8, EntrocraftRLOOTrainer, **settings)
    assert tiny.history(trainer, "entrocraft/accepted_rollouts") == [1.0]


def test_rewards_that_rloo_clips_to_one_value_are_equal():
    trainer = train([2.0, 3.0] * 4, EntrocraftRLOOTrainer, beta=0.0, reward_clip_range=(-0.7, 0.7))
    assert tiny.history(trainer, "entrocraft/accepted_rollouts") == [1.0]


def test_rloos_kl_penalty_is_a_signal(reference_folder):
    model = tiny.build_model()
    model.config._name_or_path = str(reference_folder)
    rollouts = tiny.random_rollouts(8)
    # A small penalty, so that the advantages that it makes lie below the bound for rounding.
    args = tiny.build_config(EntrocraftRLOOTrainer._config_class, num_generations=8, beta=1e-4, **tiny.TOO_LOW)
    trainer = tiny.build_trainer(
        EntrocraftRLOOTrainer, model, args, reward_funcs=tiny.table_reward(rollouts, [1.0] * 8)
    )
    tiny.force_rollouts(trainer, rollouts)
    with torch.no_grad():
        model.lm_head.weight += 0.01 * torch.randn(model.lm_head.weight.shape, generator=torch.manual_seed(0))
    trainer.train()
    assert 0 < tiny.history(trainer, "entrocraft/accepted_rollouts")[0] < 1
