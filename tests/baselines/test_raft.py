"""RAFT++ against its formula, and against plain GRPO where both have the same advantages."""

import loss_probe
import pytest
import torch
from loss_probe import OFF_POLICY

from entrocraft_trl.baselines.raft import RAFTPlusPlusConfig, RAFTPlusPlusTrainer
from entrocraft_trl.policy.tokens import loss_mask


SIGNS = [1.0, -1.0, -1.0, 1.0, -1.0, -1.0, -1.0, -1.0]


def test_right_rollouts_count_one_and_wrong_ones_only_in_the_denominator():
    trainer = loss_probe.build(RAFTPlusPlusTrainer, SIGNS)
    batch = loss_probe.loss_inputs(trainer, shift=0.3)
    logps, _ = loss_probe.loss_pass(trainer, batch)
    mask = loss_mask(batch).bool()
    ratios = torch.exp(logps - batch["old_per_token_logps"])
    right = torch.tensor(SIGNS)[:, None] > 0
    losses = -torch.minimum(ratios, ratios.clamp(0.8, 1.2)) * right
    assert ((ratios > 1.2) & right & mask).any(), "the clip makes RAFT into RAFT++"
    loss_probe.assert_same_step(trainer, batch, losses[mask].sum() / mask.sum())


def test_two_right_rollouts_of_a_group_are_grpos_with_a_floor_of_zero():
    """Group mean 0, advantages +1 and -1: plain GRPO whose negative advantages are 0 takes the same step."""
    balanced = [1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0]

    class PositiveGRPO(loss_probe.GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            return {**batch, "advantages": batch["advantages"].clamp(min=0)}

    settings = {**OFF_POLICY, "scale_rewards": "none"}
    loss_probe.assert_trains_as_plain_grpo(RAFTPlusPlusTrainer, settings, rewards=balanced, plain_class=PositiveGRPO)


def test_settings_are_refused_and_the_card_says_the_method():
    with pytest.raises(ValueError, match="scale_rewards='batch' is not for RAFTPlusPlusConfig"):
        RAFTPlusPlusConfig("run", use_cpu=True, bf16=False, scale_rewards="batch")
    trainer = loss_probe.build(RAFTPlusPlusTrainer, SIGNS, beta=0.0)
    assert trainer.card_section()[0] == "## RAFT++"
