"""REPO-R: its advantages, its controller of two sides, and with a coefficient of 0 plain GRPO."""

import warnings

import loss_probe
import pytest
import tiny
import torch
from loss_probe import OFF_POLICY

from entrocraft_trl.baselines.repo_r import REPORConfig, REPORTrainer, next_zeta
from entrocraft_trl.policy.tokens import loss_mask


def config(**settings):
    return REPORConfig("run", use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize("zeta", [0.05, -0.05, 0.7, -0.7])  # the large ones make factors below 0, which are cut
def test_tokens_are_weighed_by_their_log_probs(zeta):
    trainer = loss_probe.build(REPORTrainer, repo_zeta=zeta, repo_zeta_max=1.0, repo_factor=1.0)
    batch = loss_probe.loss_inputs(trainer, shift=0.3)
    logps, _ = loss_probe.loss_pass(trainer, batch)
    mask, advantages = loss_mask(batch).bool(), batch["advantages"][:, None]
    ratios, now = torch.exp(logps - batch["old_per_token_logps"]), logps.detach()
    right = (advantages * (1 - zeta * now)).clamp(min=0)
    wrong = (advantages * (1 + zeta * now)).clamp(max=0)
    weighed = torch.where(advantages > 0, right, wrong)
    assert ((weighed == 0) & mask).any() == (abs(zeta) > 0.1)
    losses = torch.maximum(-weighed * ratios, -weighed * ratios.clamp(0.8, 1.2))
    loss_probe.assert_same_step(trainer, batch, losses[mask].sum() / mask.sum())


def test_a_positive_coefficient_favours_rare_tokens():
    trainer = loss_probe.build(REPORTrainer, repo_zeta=0.05)
    logps, inputs = torch.tensor([[-0.1, -4.0]] * 2), {"advantages": torch.tensor([1.0, -1.0])}
    right, wrong = trainer.token_advantages(logps, None, inputs).tolist()
    assert 1.0 < right[0] < right[1] and -1.0 < wrong[0] < wrong[1] < 0.0
    trainer.numbers["zeta"] = -0.05
    right, wrong = trainer.token_advantages(logps, None, inputs).tolist()
    assert 1.0 > right[0] > right[1] > 0.0 and -1.0 > wrong[0] > wrong[1]


@pytest.mark.parametrize(
    ("zeta", "entropy", "expected"),
    [
        (0.01, 0.2, 0.02),  # below the target, pushed up: harder
        (0.04, 0.2, 0.05),  # up to the bound
        (0.01, 0.4, 0.005),  # above: less
        (1.5e-4, 0.4, -1e-4),  # below the lower bound: the other side
        (-1e-4, 0.4, -2e-4),  # above, pushed down: harder
        (-0.04, 0.4, -0.05),
        (-0.01, 0.2, -0.005),
        (-1e-4, 0.2, 1e-4),
        (0.01, 0.3, 0.01),  # at the target
    ],
)
def test_the_controller_has_two_sides(zeta, entropy, expected):
    assert next_zeta(zeta, entropy, 0.3, config()) == pytest.approx(expected)
    assert next_zeta(zeta, entropy, 0.3, config(repo_factor=1.0)) == zeta


def test_the_entropy_of_the_batch_moves_the_coefficient_and_the_first_is_the_target():
    trainer = loss_probe.build(REPORTrainer, repo_zeta=0.01)
    batch = loss_probe.loss_inputs(trainer)
    _, entropies = loss_probe.loss_pass(trainer, batch)
    entropy = entropies[loss_mask(batch).bool()].mean().item()
    assert trainer.numbers == {"zeta": 0.01, "target": pytest.approx(entropy, rel=1e-5)}
    trainer = loss_probe.build(REPORTrainer, repo_zeta=0.01, repo_target_entropy=entropy + 0.1)
    loss_probe.loss_inputs(trainer)
    assert trainer.numbers == {"zeta": 0.02, "target": entropy + 0.1}
    assert trainer._metrics["train"]["repo/zeta"] == [0.02]


def test_evaluation_moves_and_weighs_nothing():
    trainer = loss_probe.build(REPORTrainer, repo_zeta=0.05, repo_target_entropy=0.0)
    batch = loss_probe.loss_inputs(trainer)
    before = dict(trainer.numbers)
    inputs = tiny.generation_inputs(trainer)
    trainer.model.eval()
    trainer._generate_and_score_completions(inputs)
    loss = trainer._compute_loss(trainer.model, batch)
    mask = loss_mask(batch).bool()
    torch.testing.assert_close(loss, -batch["advantages"][:, None].expand_as(mask)[mask].sum() / mask.sum())
    assert trainer.numbers == before


def test_with_a_coefficient_of_0_it_is_grpo():
    loss_probe.assert_trains_as_plain_grpo(REPORTrainer, {**OFF_POLICY, "repo_zeta": 0.0})


def test_the_target_decides_where_the_entropy_goes():
    """What the method is for: on rollouts of the policy's own, in both directions, from one start."""
    settings = {"max_steps": 30, "learning_rate": 0.3, "repo_zeta": 0.1, "repo_zeta_min": 0.1, "repo_zeta_max": 1.0}
    ends, coefficients = {}, {}
    for target in (0.5, 3.1):
        args = tiny.build_config(REPORConfig, repo_target_entropy=target, **settings)
        trainer = tiny.build_trainer(REPORTrainer, args=args, train_dataset=tiny.build_dataset(64))
        trainer.train()
        ends[target] = tiny.history(trainer, "entropy")[-1]
        coefficients[target] = tiny.history(trainer, "repo/zeta")
    assert ends[0.5] < ends[3.1] - 0.3
    assert coefficients[0.5][0] < 0 < coefficients[3.1][0]  # the policy starts between


def test_the_card_says_the_method_and_where_it_ended():
    trainer = loss_probe.build(REPORTrainer, repo_target_entropy=3.1, **OFF_POLICY)
    trainer.train()
    assert tiny.history(trainer, "repo/zeta") == [0.002, 0.004]  # each serves two steps, and is logged once
    said = "\n".join(trainer.card_section())
    assert "to keep the entropy at 3.1 nats, and was 0.004 last" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repo_zeta": 0.1}, "repo_zeta=0.1 must lie between repo_zeta_min=0.0001, above 0, and repo_zeta_max=0.05"),
        ({"repo_zeta_min": 0}, "repo_zeta_min=0.0, above 0"),
        ({"repo_factor": 0.5}, "repo_factor must be finite and at least 1, got 0.5"),
        ({"repo_target_entropy": -1}, "repo_target_entropy must be finite and at least 0, got -1.0"),
        ({"repo_zeta": "x"}, "repo_zeta must be a number, got 'x'"),
        ({"entropy_coef": 0.01}, "entropy_coef=0.01 is not for REPORConfig"),
        ({"loss_type": "sapo"}, "loss_type='sapo' is not for REPORConfig"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' is not for"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5 is not for"),
    ],
)
def test_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_on_policy_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # weights act there too
        assert config(repo_zeta="-1e-3").repo_zeta == -1e-3
