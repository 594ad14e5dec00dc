"""
After `drop`, the optimizer step is the step that plain GRPO takes on the accepted rollouts alone.

How it is checked: an Entrocraft trainer trains on forced rollouts, and its accumulated gradient is recorded before
each optimizer step. The reference never sees Entrocraft's code: a *plain* TRL trainer prepares the same rollouts, rows
are accepted by the literal rule, physically selected, and given to plain TRL's `_compute_loss` as one micro-batch.

What a step is normalised by, where one generation batch spans several optimizer steps (`steps_per_generation` above
`gradient_accumulation_steps`): each step counts an equal part of what the *generation batch* accepted, as TRL's own
dapo does with tokens. The step over a window is the sum over the window's accepted rows, divided by
`accepted * gradient_accumulation_steps / steps_per_generation`. With one window per generation batch this is the plain
mean over the accepted rows.

`bnpo` averages over the tokens of each micro-batch, so its step depends on the split even in plain TRL. Here each
micro-batch's token mean weighs as many rows as it accepted; one micro-batch gives plain bnpo on the accepted rows.
"""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from entrocraft_trl import EntrocraftGRPOTrainer, EntrocraftRLOOTrainer
from entrocraft_trl.control import loss_inputs


TOKEN_LOSSES = ["dapo", "cispo", "vespo"]
ROW_LOSSES = ["grpo", "dr_grpo", "sapo", "luspo"]
LOSSES = [*TOKEN_LOSSES, *ROW_LOSSES, "bnpo"]

SPLITS = {
    "1x8": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "2x4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "4x2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    # Two optimizer steps per generation batch: TRL also runs the old-policy pass, and the second step is off-policy.
    "2x4, two windows": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "max_steps": 2,
    },
    "1x4, two windows": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "max_steps": 2,
    },
}
# Rewards that give groups of 4 with unequal numbers of either sign, so that micro-batches accept unequal numbers.
REWARDS = [1.0, 0.0, 0.0, 0.2, 0.9, 0.8, 1.0, 0.0, 0.0, 0.1, 0.0, 0.7, 0.5, 0.6, 0.4, 0.5]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}


class Recorder(TrainerCallback):
    """Parameters and gradients right before each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        weights = {name: p.detach().clone() for name, p in named}
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}
        self.steps.append((weights, gradients))


def build(trainer_class, config_class, settings, rollouts, reference_folder, lora=False, env_mask=None, **band):
    settings = {"learning_rate": 0.05, **settings}  # the second step's ratios leave 1, few are clipped
    args = tiny.build_config(config_class, **settings, **band)
    model = tiny.build_model()
    model.config._name_or_path = str(reference_folder)  # where TRL loads the reference model from when beta > 0
    arguments = {}
    if lora:
        torch.manual_seed(5)  # random adapters, equal in both trainers
        arguments["peft_config"] = LoraConfig(**LORA)
    if env_mask is not None:
        arguments["rollout_func"] = tiny.rollout_function(rollouts, env_mask=env_mask)
    reward = tiny.table_reward(rollouts, REWARDS[: len(rollouts)])
    trainer = tiny.build_trainer(trainer_class, model, args, reward_funcs=reward, **arguments)
    if env_mask is None:
        tiny.force_rollouts(trainer, rollouts)
    return trainer


def row_key(batch, row):
    """What identifies a forced rollout whatever the padding: its completion, which masks do not change."""
    ids = batch["completion_ids"][row].tolist()
    return tuple(ids[: ids.index(tiny.EOS) + 1])


def select(batch, rows):
    return {
        key: value[rows] if isinstance(value, torch.Tensor) and value.ndim else value for key, value in batch.items()
    }


def loss_tokens(batch) -> torch.Tensor:
    mask = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).sum()


def plain_gradient(plain, weights, batch, rows, loss_tokens_counted=None):
    """Gradient of plain TRL's loss on the selected rows as one micro-batch and one accumulation step."""
    named = {name: p for name, p in plain.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
            parameter.grad = None
    if rows:
        inputs = select(batch, rows)
        if loss_tokens_counted is not None:
            inputs["num_items_in_batch"] = loss_tokens_counted
        plain.current_gradient_accumulation_steps = 1
        plain.args.steps_per_generation = 1
        plain._compute_loss(plain.model, inputs).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named.items()}


def scaled(gradients, factor):
    return {name: gradient * factor for name, gradient in gradients.items()}


def added(first, second):
    return {name: gradient + second[name] for name, gradient in first.items()}


def expected_gradient(plain, loss_type, weights, batch, micro_batches, accepted, windows):
    """
    The step over one window.

    Args:
        micro_batches: Row indices of each micro-batch of the window.
        accepted: Set of the rows that the generation batch accepted.
        windows: Optimizer steps per generation batch.
    """
    rows = [row for micro_batch in micro_batches for row in micro_batch if row in accepted]
    share = len(accepted) / windows  # the window's part of what the generation batch accepted
    if loss_type in TOKEN_LOSSES:
        tokens = loss_tokens(select(batch, sorted(accepted))) / windows
        return plain_gradient(plain, weights, batch, rows, tokens)
    if loss_type == "bnpo":
        total = plain_gradient(plain, weights, batch, [])
        for micro_batch in micro_batches:
            kept = [row for row in micro_batch if row in accepted]
            total = added(total, scaled(plain_gradient(plain, weights, batch, kept), len(kept) / share))
        return total
    return scaled(plain_gradient(plain, weights, batch, rows), len(rows) / share)


GRPO = (GRPOTrainer, GRPOConfig, EntrocraftGRPOTrainer)
RLOO = (RLOOTrainer, RLOOConfig, EntrocraftRLOOTrainer)


def check(loss_type, settings, direction, reference_folder, *, lora=False, env_mask=None, classes=GRPO):
    """`loss_type` is `None` for classes whose loss is a mean over rows whatever the config says."""
    plain_class, plain_config, ours_class = classes
    if loss_type is not None:
        settings = {"loss_type": loss_type, **settings}
    per_step = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    windows = settings.get("steps_per_generation", settings["gradient_accumulation_steps"])
    windows = windows // settings["gradient_accumulation_steps"]
    rollouts = tiny.random_rollouts(per_step * windows)
    env_mask = [[env_mask(index) for index in range(len(ids))] for ids in rollouts] if env_mask else None

    ours = build(
        ours_class,
        ours_class._config_class,
        settings,
        rollouts,
        reference_folder,
        lora,
        env_mask,
        **(tiny.TOO_LOW if direction < 0 else tiny.TOO_HIGH),
    )
    recorder = Recorder()
    ours.add_callback(recorder)
    micro_keys = []
    compute_loss = ours._compute_loss

    def recording_compute_loss(model, inputs):
        micro_keys.append([row_key(inputs, row) for row in range(len(inputs["completion_ids"]))])
        return compute_loss(model, inputs)

    ours._compute_loss = recording_compute_loss
    ours.train()

    plain = build(plain_class, plain_config, settings, rollouts, reference_folder, lora, env_mask)
    plain.model.train()
    batch = plain._generate_and_score_completions(tiny.generation_inputs(plain))
    row_of = {row_key(batch, row): row for row in range(len(rollouts))}
    accepted = {row for row, advantage in enumerate(batch["advantages"].tolist()) if direction * advantage >= 0}
    assert 0 < len(accepted) < len(rollouts), "the case must reject some rollouts and not all"

    per_window = settings["gradient_accumulation_steps"]
    assert len(recorder.steps) == settings.get("max_steps", 1)
    assert len(micro_keys) == per_window * len(recorder.steps)
    for step, (weights, gradients) in enumerate(recorder.steps):
        keys = micro_keys[step * per_window : (step + 1) * per_window]
        micro_batches = [[row_of[key] for key in micro_batch] for micro_batch in keys]
        expected = expected_gradient(plain, loss_type, weights, copy.copy(batch), micro_batches, accepted, windows)
        assert any(gradient.abs().max() > 1e-4 for gradient in expected.values()), "nothing to compare"
        assert_same_gradients(gradients, expected)
    return ours, recorder, batch, accepted


def assert_same_gradients(gradients, expected):
    for name, gradient in gradients.items():
        size = max(expected[name].abs().max().item(), 1e-3)
        # float32 sums in another order: a few parts in 1e6 of the largest entry
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=2e-5 * size, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("beta", [0.0, 0.2])  # the KL term of a rejected rollout leaves with it
@pytest.mark.parametrize("split", SPLITS)
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
         {**tiny.TOO_LOW, "rejected_rollouts": "zero_advantage"}),
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
