"""Clip-Cov against its formula, and without a candidate against plain GRPO."""

import warnings

import loss_probe
import pytest
import tiny
import torch
from loss_probe import OFF_POLICY

from entrocraft_trl.baselines.clip_cov import ClipCovConfig, ClipCovTrainer
from entrocraft_trl.policy.tokens import loss_mask


ALL = {"clip_cov_low": -1e9, "clip_cov_high": 1e9}


def pieces(trainer, batch):
    """Log-probs, ratios, advantages `(B, T)`, mask and covariances, by the formulas."""
    logps, _ = loss_probe.loss_pass(trainer, batch)
    mask = loss_mask(batch).bool()
    advantages = batch["advantages"][:, None].expand_as(logps)
    ratios = torch.exp(logps - batch.get("old_per_token_logps", logps.detach()))
    values = logps.detach()
    covariances = (values - values[mask].mean()) * (advantages - advantages[mask].mean())
    return ratios, advantages, mask, covariances


def test_tokens_that_are_drawn_give_no_gradient():
    trainer = loss_probe.build(ClipCovTrainer, clip_cov_ratio=1.0, clip_cov_low=0.2, clip_cov_high=1.5, epsilon=0.2)
    batch = loss_probe.loss_inputs(trainer, shift=0.3)
    ratios, advantages, mask, covariances = pieces(trainer, batch)
    clipped = (ratios > 1.2) & (advantages > 0) | (ratios < 0.8) & (advantages < 0)
    # With a share of 1 every candidate is drawn.
    drawn = mask & (covariances > 0.2) & (covariances < 1.5) & ~clipped
    assert 0 < drawn.sum() < mask.sum() and (clipped & mask).any()
    losses = torch.maximum(-advantages * ratios, -advantages * ratios.clamp(0.8, 1.2))
    losses = losses.masked_fill(drawn, 0.0)
    loss_probe.assert_same_step(trainer, batch, losses[mask].sum() / mask.sum())


@pytest.mark.parametrize(("share", "count"), [(0.5, "half"), (1e-6, "one")])
def test_as_many_are_drawn_as_the_share_says(share, count):
    trainer = loss_probe.build(ClipCovTrainer, clip_cov_ratio=share, **ALL)
    batch = loss_probe.loss_inputs(trainer, shift=0.1)
    logps, entropies = loss_probe.loss_pass(trainer, batch)
    advantages = trainer.token_advantages(logps, entropies, batch)
    mask = loss_mask(batch).bool()
    zeros = (advantages[mask] == 0).sum()
    assert zeros == (int(0.5 * mask.sum()) if count == "half" else 1)
    # The rest has what it had, and padding was not drawn.
    kept = advantages != 0
    assert torch.equal(advantages[kept], batch["advantages"][:, None].expand_as(advantages)[kept])
    assert kept[~mask].all()


def test_lots_differ_between_steps_and_repeat_for_a_seed():
    trainer = loss_probe.build(ClipCovTrainer, clip_cov_ratio=0.3, **ALL)
    like = torch.zeros(8, 8)
    state = torch.get_rng_state()
    first = trainer._draw_lots(like)
    assert torch.equal(first, trainer._draw_lots(like))
    trainer._step += 1
    assert not torch.equal(first, trainer._draw_lots(like))
    assert torch.equal(state, torch.get_rng_state())  # TRL's own random numbers go on as without the method


@pytest.mark.parametrize("settings", [{"clip_cov_ratio": 0.0}, {"clip_cov_low": 1e8, "clip_cov_high": 1e9}])
def test_without_a_candidate_it_is_grpo(settings):
    loss_probe.assert_trains_as_plain_grpo(ClipCovTrainer, {**OFF_POLICY, "epsilon": 0.2, **settings})


def test_evaluation_is_plain():
    trainer = loss_probe.build(ClipCovTrainer, clip_cov_ratio=1.0, **ALL)
    batch = loss_probe.loss_inputs(trainer, shift=0.1)
    trainer.model.eval()
    loss = trainer._compute_loss(trainer.model, batch)
    ratios, advantages, mask, _ = pieces(trainer, batch)
    expected = (-advantages * ratios)[mask].sum() / mask.sum()  # epsilon is 1: nothing is clipped here
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_the_inputs_are_left_as_they_are_for_the_next_iteration():
    trainer = loss_probe.build(ClipCovTrainer, clip_cov_ratio=1.0, **ALL)
    batch = loss_probe.loss_inputs(trainer, shift=0.1)
    before = batch["advantages"].clone()
    trainer._compute_loss(trainer.model, batch)
    assert torch.equal(batch["advantages"], before)


def test_a_run_logs_the_share_and_the_card_says_the_method():
    trainer = loss_probe.build(ClipCovTrainer, clip_cov_ratio=0.25, **ALL, **OFF_POLICY)
    trainer.train()
    shares = tiny.history(trainer, "clip_cov/clipped_tokens")
    assert len(shares) == 4 and all(0.15 < share <= 0.25 for share in shares)  # rounded down to whole tokens
    assert "a share of 0.25 of the tokens" in "\n".join(trainer.card_section())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_cov_ratio": -0.1}, "clip_cov_ratio must be finite and in 0..1, got -0.1"),
        ({"clip_cov_ratio": "much"}, "clip_cov_ratio must be a number, got 'much'"),
        ({"clip_cov_low": 5.0, "clip_cov_high": 5.0}, "clip_cov_low must be below clip_cov_high, got 5.0 and 5.0"),
        ({"entropy_coef": 0.01}, "entropy_coef=0.01 is not for ClipCovConfig: the bonus would steer"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy=True is not for ClipCovConfig"),
        ({"loss_type": "sapo"}, "loss_type='sapo' is not for ClipCovConfig"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' is not for"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5 is not for"),
    ],
)
def test_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ClipCovConfig("run", use_cpu=True, bf16=False, **settings)


def test_numbers_are_read_from_text_as_yaml_has_them():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # on-policy is fine: zeroed tokens are not a matter of ratios
        assert ClipCovConfig("run", use_cpu=True, bf16=False, clip_cov_ratio="1e-3").clip_cov_ratio == 1e-3


def test_another_config_is_refused():
    with pytest.raises(TypeError, match="ClipCovTrainer needs args of type ClipCovConfig, got GRPOConfig"):
        tiny.build_trainer(ClipCovTrainer, args=tiny.build_config(tiny.GRPOConfig))
