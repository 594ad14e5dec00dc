"""KL-Cov against its formula, in value and gradient; on-policy, and without penalised tokens, against plain GRPO."""

import warnings

import loss_probe
import pytest
import tiny
from loss_probe import OFF_POLICY

from entrocraft_trl.baselines.kl_cov import KLCovConfig, KLCovTrainer
from entrocraft_trl.policy.tokens import loss_mask


ON_POLICY_WARNING = "ignore:KL-Cov does nothing here"


@pytest.mark.filterwarnings(ON_POLICY_WARNING)  # the inputs are shifted by hand
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_the_tokens_of_highest_covariance_are_penalised(loss_type):
    trainer = loss_probe.build(KLCovTrainer, kl_cov_ratio=0.2, kl_cov_coef=0.7, loss_type=loss_type)
    batch = loss_probe.loss_inputs(trainer, shift=0.6)
    logps, _ = loss_probe.loss_pass(trainer, batch)
    mask = loss_mask(batch).bool()
    advantages = batch["advantages"][:, None].expand_as(logps)
    values = logps.detach()
    covariances = (values - values[mask].mean()) * (advantages - advantages[mask].mean())
    highest = covariances[mask].topk(int(0.2 * mask.sum())).values.min()
    chosen = mask & (covariances >= highest)
    moved = logps - batch["old_per_token_logps"]
    ratios = moved.exp()
    assert ((ratios > 1.2) & mask).any(), "a clipped loss would be the same"
    losses = (-advantages * ratios + 0.7 * moved.abs() * chosen) * mask
    expected = {
        "dapo": losses.sum() / mask.sum(),
        "bnpo": losses.sum() / mask.sum(),
        "grpo": (losses.sum(1) / mask.sum(1)).mean(),
        "dr_grpo": losses.sum() / (len(losses) * trainer.max_completion_length),
    }[loss_type]
    loss_probe.assert_same_step(trainer, batch, expected)


@pytest.mark.filterwarnings(ON_POLICY_WARNING)
def test_on_policy_it_is_grpo():
    """Two optimizer steps, each on rollouts of its own: the ratio is 1, where its clip does nothing either."""
    loss_probe.assert_trains_as_plain_grpo(KLCovTrainer, {"max_steps": 2, "kl_cov_ratio": 1.0})


def test_without_penalised_tokens_it_is_grpo_without_a_clip():
    unclipped = {"epsilon": 1e9, "epsilon_high": 1e9}
    loss_probe.assert_trains_as_plain_grpo(KLCovTrainer, {**OFF_POLICY, "kl_cov_ratio": 0.0}, plain_settings=unclipped)


def test_on_policy_it_warns():
    with pytest.warns(UserWarning, match="KL-Cov does nothing here: each generation serves one optimizer step"):
        KLCovConfig("run", use_cpu=True, bf16=False, gradient_accumulation_steps=2, steps_per_generation=2)
    for off_policy in ({"steps_per_generation": 4, "gradient_accumulation_steps": 2}, {"num_iterations": 2}):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            KLCovConfig("run", use_cpu=True, bf16=False, **off_policy)


def test_a_run_logs_share_and_penalty_and_the_card_says_the_method():
    trainer = loss_probe.build(KLCovTrainer, kl_cov_ratio=0.25, **OFF_POLICY)
    trainer.train()
    shares, penalties = (tiny.history(trainer, f"kl_cov/{name}") for name in ("penalised_tokens", "penalty"))
    assert len(shares) == 4 and all(0.15 < share <= 0.25 for share in shares)  # rounded down to whole tokens
    # The first step of each generation is the old policy's own; in the second it has moved.
    assert penalties[0] < 1e-5 < penalties[1] and penalties[2] < 1e-5 < penalties[3]
    assert "the share of 0.25 of the tokens" in "\n".join(trainer.card_section())


@pytest.mark.filterwarnings(ON_POLICY_WARNING)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 0.1}, "epsilon=0.1 is not for KLCovConfig: ratios are not clipped; set epsilon=0.2"),
        ({"epsilon_high": 0.28}, "epsilon_high=0.28 is not for KLCovConfig"),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold=0.1 is not for KLCovConfig"),
        ({"delta": 3.0}, "delta=3.0 is not for KLCovConfig"),
        ({"kl_cov_ratio": 20}, "kl_cov_ratio must be finite and in 0..1, got 20.0"),
        ({"kl_cov_coef": -1}, "kl_cov_coef must be finite and at least 0, got -1.0"),
        ({"loss_type": "cispo"}, "loss_type='cispo' is not for KLCovConfig"),
        ({"entropy_coef": 0.01}, "entropy_coef=0.01 is not for KLCovConfig"),
    ],
)
def test_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KLCovConfig("run", use_cpu=True, bf16=False, **settings)
