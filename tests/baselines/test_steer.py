"""STEER against its formula, and with all weights 1 against plain GRPO."""

import math
import warnings

import loss_probe
import pytest
import tiny
import torch
from loss_probe import OFF_POLICY
from torch.testing import assert_close

from entrocraft_trl.baselines.steer import OLD_ENTROPIES, STEERConfig, STEERTrainer, token_weights
from entrocraft_trl.policy.tokens import loss_mask


def by_the_formula(trainer, batch):
    """Ratios, advantages, mask and `|Omega|` `(B, T)`, with probabilities, as the official code has it."""
    logps, entropies = loss_probe.loss_pass(trainer, batch)
    old = batch.get("old_per_token_logps", logps.detach())
    advantages, p = batch["advantages"][:, None], logps.detach().exp()
    omega = advantages / old.exp() * p * (1 - p) * (p.log() + batch.get(OLD_ENTROPIES, entropies.detach()))
    return torch.exp(logps - old), advantages, loss_mask(batch).bool(), omega.abs()


@pytest.mark.parametrize("form", ["exp", "linear"])
@pytest.mark.parametrize("on_policy", [False, True])
def test_the_loss_is_weighed_by_the_predicted_change(form, on_policy):
    high = 1.0 if form == "exp" else 1.5
    trainer = loss_probe.build(STEERTrainer, steer_min=0.5, steer_max=high, steer_form=form)
    batch = loss_probe.loss_inputs(trainer, shift=0.0 if on_policy else 0.3)
    if not on_policy:  # entropies of another policy than the current one, so that mixing them up shows
        batch[OLD_ENTROPIES] = 0.8 * loss_probe.loss_pass(trainer, batch)[1].detach()
    ratios, advantages, mask, omega = by_the_formula(trainer, batch)
    least, most = omega[mask].min(), omega[mask].max()
    if form == "exp":
        weights = torch.exp(math.log(0.5) / most * omega)
    else:
        weights = 1.5 - (omega - least) / (most - least)
    assert weights[mask].min().item() == pytest.approx(0.5, abs=1e-5) and weights[mask].max() > 0.9 * high
    # The dual clip of 10 is reached by no ratio here.
    losses = weights * torch.maximum(-advantages * ratios, -advantages * ratios.clamp(0.8, 1.28))
    loss_probe.assert_same_step(trainer, batch, losses[mask].sum() / mask.sum())
    assert trainer._metrics["train"]["steer/mean_weight"] == [pytest.approx(weights[mask].mean().item(), rel=1e-4)]
    assert trainer._metrics["train"]["steer/largest_change"] == [pytest.approx(most.item(), rel=1e-4)]


def config(**settings):
    return STEERConfig("run", use_cpu=True, bf16=False, **settings)


def test_weights_of_small_and_of_equal_changes():
    changes = torch.tensor([0.0, 0.005, 0.01])
    # All small: measured by 0.02, so that nothing gets the least weight.
    weights = token_weights(changes, 0.0, 0.01, config(steer_min=0.5))
    assert_close(weights, torch.tensor([1.0, 0.5**0.25, 0.5**0.5]))
    linear = config(steer_form="linear", steer_min=0.8, steer_max=1.2)
    assert_close(token_weights(torch.full((3,), 0.3), 0.3, 0.3, linear), torch.ones(3))


def test_the_largest_change_is_damped_most_whatever_its_sign():
    trainer = loss_probe.build(STEERTrainer)
    batch = loss_probe.loss_inputs(trainer)
    mirrored = {**batch, "advantages": -batch["advantages"]}
    logps, entropies = loss_probe.loss_pass(trainer, batch)
    weighed = trainer.token_advantages(logps, entropies, batch)
    assert torch.equal(trainer.token_advantages(logps, entropies, mirrored), -weighed)
    weights = weighed / batch["advantages"][:, None]
    assert weights.min().item() == pytest.approx(0.8, abs=1e-6)
    assert (weights[~loss_mask(batch).bool()] == 1.0).all()  # padding decides nothing


@pytest.mark.parametrize("form", ["exp", "linear"])
def test_with_weights_of_1_it_is_grpo(form):
    settings = {"steer_form": form, "steer_min": 1.0, "steer_max": 1.0, "epsilon_high": 0.2, "delta": None}
    loss_probe.assert_trains_as_plain_grpo(STEERTrainer, {**OFF_POLICY, **settings})


def test_the_entropies_of_the_old_policy_go_with_their_rows():
    """Of two steps on one generation, the second has a policy that has moved on."""
    trainer = loss_probe.build(STEERTrainer, **{**OFF_POLICY, "learning_rate": 0.3, "max_steps": 2})
    seen, weigh = [], trainer.token_advantages

    def listen(logps, entropies, inputs):
        seen.append((inputs[OLD_ENTROPIES], entropies.detach(), loss_mask(inputs).bool()))
        return weigh(logps, entropies, inputs)

    trainer.token_advantages = listen
    trainer.train()
    (first_old, first_now, mask), (second_old, second_now, later_mask) = seen
    assert_close(first_old[mask], first_now[mask], rtol=1e-4, atol=1e-4)
    assert (second_old - second_now)[later_mask].abs().max() > 1e-2


def test_evaluation_is_plain():
    trainer = loss_probe.build(STEERTrainer)
    batch = loss_probe.loss_inputs(trainer)
    trainer.model.eval()
    loss = trainer._compute_loss(trainer.model, batch)
    _, advantages, mask, _ = by_the_formula(trainer, batch)
    assert_close(loss, -advantages.expand_as(mask)[mask].sum() / mask.sum())
    assert "steer/mean_weight" not in trainer._metrics["train"]


def test_a_run_logs_the_weights_and_the_card_says_the_method():
    trainer = loss_probe.build(STEERTrainer, **OFF_POLICY)
    trainer.train()
    weights = tiny.history(trainer, "steer/mean_weight")
    assert len(weights) == 4 and all(0.8 < weight < 1.0 for weight in weights)
    assert "a weight between 0.8 and 1 in the loss, the less (exp)" in "\n".join(trainer.card_section())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steer_form": "square"}, "steer_form must be one of 'exp', 'linear', got 'square'"),
        ({"steer_min": 0.0}, "steer_min must be above 0 and not exceed steer_max, got 0.0 and 1.0"),
        ({"steer_form": "linear", "steer_min": 1.1}, "not exceed steer_max, got 1.1 and 1.0"),
        ({"steer_max": 1.2}, "steer_max=1.2 is not for STEERConfig: weights of steer_form='exp' end at 1"),
        ({"steer_min": "low"}, "steer_min must be a number, got 'low'"),
        ({"entropy_coef": 0.01}, "entropy_coef=0.01 is not for STEERConfig"),
        ({"loss_type": "sapo"}, "loss_type='sapo' is not for STEERConfig"),
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
        assert config(steer_min="0.9").steer_min == 0.9
