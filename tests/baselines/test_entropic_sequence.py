"""EntroPIC, sequence-level: advantages and controller by their formulas, and without a controller plain GRPO."""

import loss_probe
import pytest
import tiny
from loss_probe import OFF_POLICY

from entrocraft_trl.baselines.entropic_sequence import EntroPICSequenceConfig, EntroPICSequenceTrainer
from entrocraft_trl.policy.tokens import loss_mask


SIGNS = [1.0, -1.0, -1.0, 1.0, -1.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("steps_per_generation", [1, 2])  # 2: TRL's pass of the old policy is listened to
@pytest.mark.parametrize(("target", "integral"), [(2.0, 0.0), (3.0, 5.0)])
def test_right_and_wrong_rollouts_are_weighed_by_the_controller(target, integral, steps_per_generation):
    size = 8 // steps_per_generation
    trainer = loss_probe.build(
        EntroPICSequenceTrainer,
        SIGNS,
        entropic_target=target,
        per_device_train_batch_size=size,
        steps_per_generation=steps_per_generation,
    )
    trainer.numbers["integral"] = integral
    batch = loss_probe.loss_inputs(trainer)
    _, entropies = loss_probe.loss_pass(trainer, batch)
    error = entropies[loss_mask(batch).bool()].mean().item() - target
    alpha = error + 0.01 * integral
    expected = [1 + alpha if sign > 0 else -(1 - alpha) for sign in SIGNS]
    assert batch["advantages"].tolist() == pytest.approx(expected, rel=1e-5)
    assert list(trainer._logs["advantages"]) == batch["advantages"].tolist()
    assert trainer.numbers["integral"] == pytest.approx(integral + error, rel=1e-5)


def test_rewards_have_to_be_right_or_wrong():
    trainer = loss_probe.build(EntroPICSequenceTrainer, [0.5, *SIGNS[1:]])
    with pytest.raises(ValueError, match="needs rewards of exactly 1 or -1, got 0.5"):
        loss_probe.loss_inputs(trainer)


def test_without_a_controller_and_with_balanced_groups_it_is_grpo():
    balanced = [1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0]  # group means of 0
    settings = {**OFF_POLICY, "entropic_kp": 0.0, "entropic_ki": 0.0, "scale_rewards": "none"}
    loss_probe.assert_trains_as_plain_grpo(EntroPICSequenceTrainer, settings, rewards=balanced)


def test_evaluation_does_not_move_the_controller():
    trainer = loss_probe.build(EntroPICSequenceTrainer, SIGNS)
    trainer.model.eval()
    batch = trainer._generate_and_score_completions(tiny.generation_inputs(trainer))
    assert trainer.numbers == {"integral": 0.0}
    assert batch["advantages"].tolist() == pytest.approx([1.0, -1.0, -1.0, 1.0, 0, 0, 0, 0])  # TRL's, not scaled


def test_settings_are_refused():
    for settings, message in (
        ({"entropic_target": -0.5}, "entropic_target must be finite and at least 0, got -0.5"),
        ({"scale_rewards": "group"}, "scale_rewards='group' is not for EntroPICSequenceConfig"),
    ):
        with pytest.raises(ValueError, match=message):
            EntroPICSequenceConfig("run", use_cpu=True, bf16=False, **settings)
