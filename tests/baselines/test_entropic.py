"""EntroPIC, token-level: its loss term, its controller, and without a controller plain GRPO."""

import loss_probe
import pytest
import tiny
import torch

from entrocraft_trl.baselines.entropic import EntroPICConfig, EntroPICTrainer, pi_output
from entrocraft_trl.policy.tokens import loss_mask


LOW_THRESHOLD = {"entropic_threshold": 0.1}  # random rollouts of a random model have few tokens that are likelier


def pieces(trainer, batch):
    """Ratios, advantages `(B, 1)`, mask, confident tokens and the mean entropy, by the formulas."""
    logps, entropies = loss_probe.loss_pass(trainer, batch)
    mask = loss_mask(batch).bool()
    ratios = torch.exp(logps - batch["old_per_token_logps"])
    confident = mask & (logps.detach().exp() > trainer.args.entropic_threshold)
    return ratios, batch["advantages"][:, None], mask, confident, entropies[mask].mean().item()


@pytest.mark.parametrize(
    ("target", "integral"),
    [(2.0, 0.0), (3.0, 0.0), (2.5, -40.0), (0.0, 0.0), (9.0, 0.0)],  # above, below, by the integral, and both clips
)
def test_confident_tokens_are_weighed_by_the_controller(target, integral):
    trainer = loss_probe.build(EntroPICTrainer, entropic_target=target, **LOW_THRESHOLD)
    trainer.numbers["integral"] = integral
    batch = loss_probe.loss_inputs(trainer, shift=0.4)
    ratios, advantages, mask, confident, entropy = pieces(trainer, batch)
    assert confident.sum() > 3 and 2.0 < entropy < 3.0
    error = entropy - target
    alpha = min(max(1.0 * error + 0.01 * integral, -1.0), 1.0)
    surrogate = torch.minimum(ratios, torch.tensor(3.0)) * advantages  # the dual clip; it acts on negative ones
    losses = -torch.minimum(surrogate, ratios.clamp(0.8, 1.2) * advantages)
    pushed = (ratios * advantages.abs())[confident].mean()
    loss_probe.assert_same_step(trainer, batch, losses[mask].sum() / mask.sum() - alpha * pushed)
    assert trainer.numbers["integral"] == pytest.approx(integral + error, rel=1e-5)
    assert trainer._metrics["train"]["entropic/alpha"] == [pytest.approx(alpha, rel=1e-4)]


def test_the_sign_of_the_push():
    args = EntroPICConfig("run", use_cpu=True, bf16=False)
    assert pi_output(0.3, 0.0, args) > 0 > pi_output(-0.3, 0.0, args)
    assert pi_output(0.0, 0.0, args) == 0.0
    assert pi_output(0.2, 7.0, args) == pytest.approx(0.2 + 0.07)


def test_a_step_adds_the_mean_error_of_its_micro_batches():
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.01}
    trainer = loss_probe.build(EntroPICTrainer, entropic_target=2.0, max_steps=1, **settings, **LOW_THRESHOLD)
    errors = []
    loss_term = trainer.loss_term

    def listen(logps, entropies, inputs):
        errors.append(entropies[loss_mask(inputs).bool()].mean().item() - 2.0)
        return loss_term(logps, entropies, inputs)

    trainer.loss_term = listen
    trainer.train()
    assert len(errors) == 2 and errors[0] != errors[1]
    assert trainer.numbers["integral"] == pytest.approx(sum(errors) / 2, rel=1e-5)


def test_without_a_confident_token_the_loss_is_grpos():
    settings = {**loss_probe.OFF_POLICY, "entropic_threshold": 1.0, "delta": None}
    loss_probe.assert_trains_as_plain_grpo(EntroPICTrainer, settings)


def test_without_a_controller_it_is_grpo():
    settings = {**loss_probe.OFF_POLICY, "entropic_kp": 0.0, "entropic_ki": 0.0, "delta": 3.0, **LOW_THRESHOLD}
    loss_probe.assert_trains_as_plain_grpo(EntroPICTrainer, settings)


def test_evaluation_does_not_move_the_controller():
    trainer = loss_probe.build(EntroPICTrainer, **LOW_THRESHOLD)
    batch = loss_probe.loss_inputs(trainer, shift=0.1)
    trainer.model.eval()
    trainer._compute_loss(trainer.model, batch)
    assert trainer.numbers == {"integral": 0.0}


def test_the_target_decides_where_the_entropy_goes():
    """What the method is for: on rollouts of the policy's own, over 30 steps, in both directions."""
    settings = {"max_steps": 30, "learning_rate": 0.3, "temperature": 1.0}
    ends = {}
    for target in (0.5, 2.8):
        args = tiny.build_config(EntroPICConfig, entropic_target=target, entropic_threshold=0.2, **settings)
        trainer = tiny.build_trainer(EntroPICTrainer, args=args, train_dataset=tiny.build_dataset(64))
        trainer.train()
        ends[target] = tiny.history(trainer, "entropy")[-1]
    assert ends[0.5] < ends[2.8] - 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropic_target": -1}, "entropic_target must be finite and at least 0, got -1.0"),
        ({"entropic_threshold": 95}, "entropic_threshold must be finite and in 0..1, got 95.0"),
        ({"entropic_ki": "x"}, "entropic_ki must be a number, got 'x'"),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold=0.1 is not for EntroPICConfig"),
        ({"loss_type": "cispo"}, "loss_type='cispo' is not for EntroPICConfig"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' is not for EntroPICConfig"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy=True is not for EntroPICConfig"),
    ],
)
def test_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EntroPICConfig("run", use_cpu=True, bf16=False, **settings)
