"""After `drop`, the step is the one that plain GRPO takes on the accepted rollouts alone: `equality.py` says how."""

import pytest
import tiny
import torch
from equality import (
    GRPO,
    LOSSES,
    REWARDS,
    RLOO,
    SPLITS,
    Recorder,
    assert_same_gradients,
    build,
    check,
    loss_tokens,
    plain_gradient,
    select,
)
from trl import GRPOConfig, GRPOTrainer

from entrocraft_trl import EntrocraftGRPOTrainer
from entrocraft_trl.control import loss_inputs


# Every split with the KL term of the rejected rollouts, which leaves with them. Without that term the loss has one
# summand less, whatever the split: one with two windows shows it.
@pytest.mark.parametrize(("split", "beta"), [*((split, 0.2) for split in SPLITS), ("2x4, two windows", 0.0)])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_and_split(loss_type, split, beta, reference_folder):
    check(loss_type, {**SPLITS[split], "beta": beta}, -1, reference_folder)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_keeping_the_positive_rollouts(loss_type, reference_folder):
    check(loss_type, SPLITS["2x4"], +1, reference_folder)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_two_iterations_over_one_generation_batch(loss_type, reference_folder):
    settings = {**SPLITS["2x4"], "num_iterations": 2, "max_steps": 2, "beta": 0.1}
    _, recorder, *_ = check(loss_type, settings, -1, reference_folder)
    first, second = (weights for weights, _ in recorder.steps)
    assert any(not torch.equal(first[name], second[name]) for name in first)  # the second iteration is off-policy


@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_lora(loss_type, beta, reference_folder):
    check(loss_type, {**SPLITS["2x4"], "beta": beta}, -1, reference_folder, lora=True)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"])
def test_sequence_level_importance_sampling(loss_type, reference_folder):
    settings = {**SPLITS["2x4, two windows"], "importance_sampling_level": "sequence", "beta": 0.1}
    check(loss_type, settings, -1, reference_folder)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_environment_tokens_count_nowhere(loss_type, reference_folder):
    # Every third token comes from the environment.
    check(loss_type, SPLITS["4x2"], -1, reference_folder, env_mask=lambda position: int(position % 3 != 1))


@pytest.mark.parametrize("split", SPLITS)
def test_rloo(split, reference_folder):
    # A smaller step than elsewhere: a ratio of whole sequences leaves the clip range soon, and then nothing is left.
    check(None, {**SPLITS[split], "learning_rate": 0.002}, -1, reference_folder, classes=RLOO)


def test_rloo_keeps_its_kl_penalty_in_the_reward(reference_folder):
    check(None, {**SPLITS["2x4"], "beta": 0.1}, +1, reference_folder, classes=RLOO)


def test_the_parameters_move_by_the_gradient(reference_folder):
    ours, recorder, *_ = check("dapo", SPLITS["2x4"], -1, reference_folder)
    weights, gradients = recorder.steps[0]
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name] - 0.05 * gradients[name])


@pytest.mark.parametrize("share", [0.25, 0.75, 1.0])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_min_accepted_share_caps_the_step(loss_type, share, reference_folder):
    """Below the floor the step shrinks as if the floor's share had been accepted; above it nothing changes."""
    rollouts = tiny.random_rollouts(8)
    gradients = {}
    for floor in (0.0, share):
        settings = {**SPLITS["2x4"], "loss_type": loss_type, "min_accepted_share": floor}
        ours = build(EntrocraftGRPOTrainer, EntrocraftGRPOTrainer._config_class, settings, rollouts, reference_folder,
                     **tiny.TOO_LOW)  # fmt: skip
        recorder = Recorder()
        ours.add_callback(recorder)
        ours.train()
        gradients[floor] = recorder.steps[0][1]
    (rows,) = tiny.history(ours, "entrocraft/accepted_rollouts")
    (tokens,) = tiny.history(ours, "entrocraft/accepted_tokens")
    accepted = tokens if loss_type == "dapo" else rows
    factor = accepted / max(accepted, share)
    assert share < 0.5 or factor < 1
    for name, gradient in gradients[share].items():
        torch.testing.assert_close(gradient, gradients[0.0][name] * factor, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_logged_loss_when_a_rejected_rollout_holds_a_very_unlikely_token(loss_type, reference_folder):
    """The ratio against the old policy overflows where one of the two log-probs is gone: exp(89) is no float32."""
    rollouts = tiny.random_rollouts(8)
    settings = {**SPLITS["1x8"], "loss_type": loss_type, "num_iterations": 2}  # TRL runs the old-policy pass
    ours, plain = (
        build(trainer_class, config_class, settings, rollouts, reference_folder, **band)
        for trainer_class, config_class, band in (
            (EntrocraftGRPOTrainer, EntrocraftGRPOTrainer._config_class, tiny.TOO_LOW),
            (GRPOTrainer, GRPOConfig, {}),
        )
    )
    for trainer in (ours, plain):
        trainer.model.lm_head.weight.data.mul_(60.0)  # from nearly uniform to nearly deterministic
    recorder = Recorder()
    ours.add_callback(recorder)
    ours.train()

    plain.model.train()
    batch = plain._generate_and_score_completions(tiny.generation_inputs(plain))
    rejected = batch["advantages"] > 0
    assert batch["old_per_token_logps"][rejected].min() < -89, "the case needs a token of probability exp(-89)"
    rows = (~rejected).nonzero().flatten().tolist()
    ((weights, gradients),) = recorder.steps
    tokens = loss_tokens(select(batch, rows))
    assert_same_gradients(gradients, plain_gradient(plain, weights, batch, rows, tokens))
    inputs = {**select(batch, rows), "num_items_in_batch": tokens}
    expected = plain._compute_loss(plain.model, inputs).item()
    assert tiny.history(ours, "loss") == [pytest.approx(expected, rel=1e-5)]


def loss_and_gradient(trainer, inputs, logps):
    """Of the log-probs, with `logps` in place of the model's."""
    leaf = logps.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (leaf, torch.ones_like(leaf), None)
    trainer.current_gradient_accumulation_steps = 1  # set by transformers at each step
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize(
    ("settings", "classes"),
    [
        *(({"loss_type": name}, GRPO) for name in LOSSES),
        ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, GRPO),
        ({"loss_type": "grpo", "use_bias_correction_kl": True}, GRPO),
        ({"loss_type": "dapo", "off_policy_mask_threshold": 0.5}, GRPO),
        ({}, RLOO),
    ],
)
def test_nothing_of_a_rejected_rollout_reaches_loss_or_gradient(settings, classes):
    """Log-probs that differ from the old policy's, the reference's and the engine's by more than float32 can hold."""
    *_, trainer_class = classes
    args = tiny.build_config(trainer_class._config_class, **{"beta": 0.0, **settings})
    trainer = tiny.build_trainer(trainer_class, args=args)
    trainer.beta = 0.1  # of GRPO's loss; the tensors below take the place of a reference model
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = classes is GRPO
    keep = torch.tensor([True, False, True, False])
    results = []
    for rejected_logps, others in ((-1.0, -1.0), (-1.0, -1e4), (-1e4, -1.0)):
        values = torch.linspace(-2.0, -1.0, 12).view(4, 3)
        logps, others = (torch.where(keep.unsqueeze(1), values, value) for value in (rejected_logps, others))
        inputs = {
            "prompt_ids": torch.ones(4, 2, dtype=torch.long),
            "prompt_mask": torch.ones(4, 2, dtype=torch.long),
            "completion_ids": torch.ones(4, 3, dtype=torch.long),
            "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 1]]),
            "advantages": torch.tensor([1.0, 2.0, -1.0, -2.0]),
        }
        if classes is RLOO:
            inputs["old_logps"] = (others * inputs["completion_mask"]).sum(1)
        else:
            inputs |= {
                "num_items_in_batch": torch.tensor(10),
                "old_per_token_logps": others,
                "ref_per_token_logps": others,
                "sampling_per_token_logps": others,
                "importance_sampling_ratio": torch.where(keep.unsqueeze(1), 1.0, (others + 1).abs().exp()),
            }
        edited = loss_inputs.drop_rollouts(inputs, keep, token_normaliser=5.0, row_normaliser_share=0.5)
        results.append(loss_and_gradient(trainer, edited, logps))
    for loss, gradient in results:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1]) and gradient[keep].any() and not gradient[~keep].any()


@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_zero_advantage_is_plain_grpo_with_zeroed_advantages(loss_type, beta, reference_folder):
    """The official code: rejected rollouts stay in the denominator and keep their KL term."""
    settings = {**SPLITS["2x4"], "loss_type": loss_type, "beta": beta}
    rollouts = tiny.random_rollouts(8)

    class Zeroed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            return {**batch, "advantages": batch["advantages"].clamp(max=0.0)}  # direction -1 keeps A <= 0

    recorders = []
    for trainer_class, config_class, extra in (
        (Zeroed, GRPOConfig, {}),
        (EntrocraftGRPOTrainer, EntrocraftGRPOTrainer._config_class,
         {**tiny.TOO_LOW, "rejected_rollouts": "zero_advantage", "compute_all_rows": True}),
    ):  # fmt: skip
        trainer = build(trainer_class, config_class, settings, rollouts, reference_folder, **extra)
        recorders.append(Recorder())
        trainer.add_callback(recorders[-1])
        trainer.train()
    (_, plain), (_, ours) = recorders[0].steps[0], recorders[1].steps[0]
    for name, gradient in ours.items():
        assert torch.equal(gradient, plain[name]), name


@pytest.mark.parametrize("coding", ["plus_minus_one", "zero_one"])
def test_out_of_band_rewards_replace_the_advantages(coding, reference_folder):
    """The official code's rule: below the band every wrong rollout pushes with -1, whatever its group did."""
    wrong = -1.0 if coding == "plus_minus_one" else 0.0
    rewards = [wrong, wrong, wrong, wrong, 1.0, wrong, 1.0, 1.0]  # the first group is all wrong: its advantage is 0
    rollouts = tiny.random_rollouts(8)
    args = tiny.build_config(out_of_band_advantages="reward", reward_coding=coding, **tiny.TOO_LOW)
    ours = tiny.build_trainer(args=args, reward_funcs=tiny.table_reward(rollouts, rewards))
    tiny.force_rollouts(ours, rollouts)
    ours.model.train()
    ours.state.max_steps = 1
    batch = ours._generate_and_score_completions(tiny.generation_inputs(ours))
    assert batch["advantages"].tolist() == [-1.0, -1.0, -1.0, -1.0, 0.0, -1.0, 0.0, 0.0]
    assert batch["tool_mask"].sum(1).bool().tolist() == [True] * 4 + [False, True, False, False]


def test_out_of_band_rewards_refuse_other_rewards(reference_folder):
    rollouts = tiny.random_rollouts(8)
    args = tiny.build_config(out_of_band_advantages="reward", **tiny.TOO_LOW)
    ours = tiny.build_trainer(args=args, reward_funcs=tiny.table_reward(rollouts, REWARDS[:8]))
    tiny.force_rollouts(ours, rollouts)
    with pytest.raises(ValueError, match="needs rewards of exactly 1 or -1, got 0"):
        ours.train()
