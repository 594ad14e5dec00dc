"""The trainer end to end: a wide-open band changes nothing, the measured entropy is right, edge cases are harmless."""

import math

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from datasets import IterableDataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftGRPOTrainer, EntrocraftRLOOTrainer, EntropyControlMixin


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}


def model_with_reference(folder):
    def build():
        model = tiny.build_model()
        model.config._name_or_path = str(folder)
        return model

    return build


# --------------------------------------------------------------------------------------------------------- bit for bit


BIT_FOR_BIT = {
    "default": {},
    "adam and clipping": {"optim": "adamw_torch", "max_grad_norm": 0.5},
    "beta": {"beta": 0.1},
    "num_iterations": {"num_iterations": 2},
    "steps_per_generation": {"per_device_train_batch_size": 4, "steps_per_generation": 2},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "generations span windows": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
    },
    "grpo loss": {"loss_type": "grpo"},
    "bnpo loss": {"loss_type": "bnpo"},
    "sequence level": {"importance_sampling_level": "sequence"},
    "temperature": {"temperature": 0.7},
    "masked truncation": {"mask_truncated_completions": True},
}


def assert_bit_for_bit(plain, ours):
    (plain, plain_states), (ours, our_states) = plain, ours
    losses = tiny.history(ours, "loss")
    assert losses == tiny.history(plain, "loss") and len(losses) == plain.args.max_steps
    assert tiny.history(ours, "reward") == tiny.history(plain, "reward")
    assert tiny.history(ours, "grad_norm") == tiny.history(plain, "grad_norm")
    tiny.assert_same_parameters(ours.model, plain.model)
    for ours_state, plain_state, library in zip(our_states, plain_states, ("torch", "numpy", "random"), strict=True):
        assert ours_state == plain_state, f"{library} drew other random numbers"
    assert set(tiny.history(ours, "entrocraft/accepted_rollouts")) == {1.0}
    start = tiny.parameters_of(tiny.build_model())
    if all(name in start for name, _ in ours.model.named_parameters()):
        assert any(not torch.equal(p, start[name]) for name, p in ours.model.named_parameters()), "nothing was trained"


@pytest.mark.parametrize("case", BIT_FOR_BIT)
def test_a_wide_open_band_is_grpo_bit_for_bit(case, reference_folder):
    settings = {"max_steps": 3, "learning_rate": 0.02, **BIT_FOR_BIT[case]}
    assert_bit_for_bit(*tiny.run_pair(settings, model_builder=model_with_reference(reference_folder)))


def test_bit_for_bit_with_attention_dropout():
    """The measuring pass runs without dropout, and so draws no random number."""
    assert_bit_for_bit(*tiny.run_pair({"max_steps": 3}, model_builder=lambda: tiny.build_model(attention_dropout=0.3)))


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1}, {"num_iterations": 2}])
def test_bit_for_bit_with_lora_dropout(settings):
    trainers = []
    for trainer_class, config_class, extra in (
        (GRPOTrainer, GRPOConfig, {}),
        (EntrocraftGRPOTrainer, EntrocraftGRPOConfig, tiny.WIDE_OPEN),
    ):
        args = tiny.build_config(config_class, max_steps=3, **settings, **extra)
        torch.manual_seed(3)
        trainer = tiny.build_trainer(trainer_class, args=args, peft_config=LoraConfig(**LORA))
        trainer.train()
        trainers.append((trainer, tiny.rng_states()))
    assert_bit_for_bit(*trainers)
    adapters = [p for name, p in trainers[1][0].model.named_parameters() if "lora_B" in name]
    assert any(p.abs().max() > 0 for p in adapters), "the adapters did not learn"


@pytest.mark.parametrize("rule", ["entropy_change", "influence"])
def test_bit_for_bit_with_a_graded_rule(rule):
    """The middle of a wide band allows every change, and not even the scores are computed."""
    band = {**tiny.WIDE_OPEN, "rejection_rule": rule}
    assert_bit_for_bit(*tiny.run_pair({"max_steps": 3}, band=band))


@pytest.mark.parametrize(
    "settings", [{}, {"beta": 0.1}, {"per_device_train_batch_size": 4, "steps_per_generation": 2}]
)
def test_bit_for_bit_with_rloo(settings, reference_folder):
    assert_bit_for_bit(
        *tiny.run_pair(
            {"max_steps": 3, **settings},
            plain_class=RLOOTrainer,
            plain_config=RLOOConfig,
            ours=EntrocraftRLOOTrainer,
            model_builder=model_with_reference(reference_folder),
        )
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_bit_for_bit_whatever_the_model_family(family):
    assert_bit_for_bit(*tiny.run_pair({"max_steps": 2}, model_builder=lambda: tiny.build_model(family=family)))


def test_a_measuring_pass_that_rejects_draws_no_random_numbers():
    """The rollouts of the first step are the same with and without rejection, whatever the rule."""
    states = []
    for extra in (tiny.WIDE_OPEN, tiny.TOO_LOW, {**tiny.TOO_LOW, "rejection_rule": "entropy_change"}):
        trainer = tiny.build_trainer(args=tiny.build_config(**extra))
        trainer.train()
        states.append(tiny.rng_states())
    assert states[0] == states[1] == states[2]


def test_graded_demands_are_logged_for_the_entropy_change_rule():
    args = tiny.build_config(rejection_rule="entropy_change", **tiny.TOO_LOW)
    trainer = tiny.build_trainer(args=args)
    trainer.train()
    assert tiny.history(trainer, "entrocraft/least_change") == [1.0]
    assert tiny.history(trainer, "entrocraft/most_change") == [1.0]


@pytest.mark.parametrize("band", [tiny.TOO_LOW, tiny.WIDE_OPEN])
def test_graded_demands_are_not_logged_for_the_sign_rule(band):
    trainer = tiny.build_trainer(args=tiny.build_config(rejection_rule="advantage_sign", **band))
    trainer.train()
    assert "entrocraft/direction" in trainer.state.log_history[0]
    assert not {"entrocraft/least_change", "entrocraft/most_change"} & set(trainer.state.log_history[0])


def test_no_metric_is_none_in_an_ordinary_step():
    """A `None` in the log makes TensorBoard's callback warn at every step, and tables show holes."""
    trainer = tiny.build_trainer(args=tiny.build_config(**tiny.TOO_LOW))
    trainer.train()
    assert [key for key, value in trainer.state.log_history[0].items() if value is None] == []


# ---------------------------------------------------------------------------------------------------------- edge cases


def forced(rewards, settings=None, rollouts=None, **arguments):
    rollouts = rollouts or tiny.random_rollouts(len(rewards))
    args = tiny.build_config(**{**tiny.TOO_LOW, **(settings or {})})
    trainer = tiny.build_trainer(args=args, reward_funcs=tiny.table_reward(rollouts, rewards), **arguments)
    tiny.force_rollouts(trainer, rollouts)
    return trainer


def fixed_advantages(trainer, advantages):
    """An estimator of the test's own, in the place where people's subclasses put theirs: before entropy control."""
    base = type(trainer)

    class Fixed(base.__bases__[-1]):  # TRL's trainer
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            return {**batch, "advantages": torch.tensor(advantages)}

    trainer.__class__ = type("FixedAdvantages", (EntropyControlMixin, Fixed), {"_config_class": base._config_class})
    return trainer


LOSSES = ["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"]


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_everything_rejected_changes_nothing(loss_type, beta, reference_folder):
    settings = {"loss_type": loss_type, "beta": beta, "max_steps": 2, "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 4}  # fmt: skip
    trainer = forced([0.0] * 8, settings, model=model_with_reference(reference_folder)())
    fixed_advantages(trainer, [1.0] * 8)  # all positive, and entropy is too low
    before = tiny.parameters_of(trainer.model)
    trainer.train()
    tiny.assert_same_parameters(trainer.model, before)
    assert tiny.history(trainer, "loss") == [0.0, 0.0]
    assert tiny.history(trainer, "entrocraft/accepted_rollouts") == [0.0, 0.0]
    assert tiny.history(trainer, "entrocraft/rejected_positive") == [8.0, 8.0]
    assert tiny.history(trainer, "entrocraft/empty_steps") == [1.0, 2.0]
    assert trainer.control_memory.empty_steps == 2


def test_everything_rejected_with_rloo():
    args = tiny.build_config(EntrocraftRLOOTrainer._config_class, max_steps=2, beta=0.0, **tiny.TOO_LOW)
    trainer = tiny.build_trainer(EntrocraftRLOOTrainer, args=args)
    fixed_advantages(trainer, [1.0] * 8)
    before = tiny.parameters_of(trainer.model)
    trainer.train()
    tiny.assert_same_parameters(trainer.model, before)
    assert tiny.history(trainer, "loss") == [0.0, 0.0]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_one_rollout_left(loss_type):
    trainer = forced([0.0] * 8, {"loss_type": loss_type})
    fixed_advantages(trainer, [1.0, 1.0, 1.0, -0.5, 1.0, 1.0, 1.0, 1.0])
    before = tiny.parameters_of(trainer.model)
    trainer.train()
    assert tiny.history(trainer, "entrocraft/effective_batch_size") == [1.0]
    assert tiny.history(trainer, "entrocraft/rejected_positive") == [7.0]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize(
    "settings", [{}, {"rejection_rule": "entropy_change"}, {"rejected_rollouts": "zero_advantage"}]
)
def test_all_advantages_zero_accepts_all_and_learns_nothing(settings):
    trainer = forced([0.5] * 8, settings)  # equal rewards within each group
    before = tiny.parameters_of(trainer.model)
    trainer.train()
    tiny.assert_same_parameters(trainer.model, before)
    assert tiny.history(trainer, "entrocraft/accepted_rollouts") == [1.0]
    assert tiny.history(trainer, "entrocraft/empty_steps") == [1.0]


def test_empty_steps_counts_the_optimizer_steps_that_a_batch_is_split_into():
    """All that is left of a batch lies in one of its two optimizer steps; the other one learns nothing."""
    settings = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "max_steps": 2}
    trainer = forced([0.0] * 8, settings)
    fixed_advantages(trainer, [1.0] * 7 + [-1.0])
    trainer.train()
    assert tiny.history(trainer, "entrocraft/accepted_rollouts") == [1 / 8]
    moved = [norm > 0 for norm in tiny.history(trainer, "grad_norm")]
    assert sorted(moved) == [False, True]
    assert tiny.history(trainer, "entrocraft/empty_steps") == ([1.0, 1.0] if moved[1] else [0.0, 1.0])


REJECTIONS = [
    {},
    {"rejected_rollouts": "zero_advantage"},
    {"rejection_rule": "entropy_change"},
    {"rejection_rule": "influence"},
    {"entropy_aggregation": "sequence"},
]


@pytest.mark.parametrize("settings", REJECTIONS)
def test_completions_that_hold_only_the_end_token(settings):
    rollouts = [[tiny.EOS]] * 8
    args = tiny.build_config(**tiny.TOO_LOW, **settings)
    rewards = iter([0.0, 1.0] * 8)
    trainer = tiny.build_trainer(
        args=args,
        reward_funcs=lambda completions, **kwargs: [next(rewards) for _ in completions],
        rollout_func=tiny.rollout_function(rollouts),
    )
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert math.isfinite(tiny.history(trainer, "entrocraft/entropy")[0])


@pytest.mark.parametrize("settings", REJECTIONS)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo"])
def test_all_completions_truncated_and_masked(settings, loss_type):
    """No loss token at all: nothing is measured, nothing is learnt, and the band does not start from it."""
    rollouts = [ids[:-1] for ids in tiny.random_rollouts(8)]  # no end token: truncated
    trainer = forced(
        [0.0, 1.0] * 4, {**settings, "loss_type": loss_type, "mask_truncated_completions": True}, rollouts
    )
    before = tiny.parameters_of(trainer.model)
    trainer.train()
    tiny.assert_same_parameters(trainer.model, before)
    assert trainer.control_memory.initial_entropy is None
    logged = {key: value for key, value in trainer.state.log_history[0].items() if key.startswith("entrocraft/")}
    of_the_update = {key for key in logged if "/seconds_" in key or "/computed_" in key}
    assert {key: logged[key] for key in logged if key not in of_the_update} == {
        "entrocraft/empty_steps": 1.0
    }  # no NaN, which TRL's log turns into None


# ------------------------------------------------------------------------------------------------ the measured entropy


def exact_entropies(model, batch, temperature):
    """Token entropies `(B, T)` in float64 from raw logits, TRL's fused head not involved."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention_mask).logits
    logits = logits[:, batch["prompt_ids"].size(1) - 1 : -1].double() / temperature
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def aggregate(entropies, mask, aggregation):
    """Literal Python: mean over tokens, or mean of the means of the rollouts that hold a token."""
    rows = [[h for h, m in zip(*row, strict=True) if m] for row in zip(entropies.tolist(), mask.tolist(), strict=True)]
    rows = [row for row in rows if row]
    if aggregation == "token":
        return np.mean([h for row in rows for h in row])
    return np.mean([np.mean(row) for row in rows])


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("steps_per_generation", [1, 2])  # 2: from TRL's own old-policy pass
@pytest.mark.parametrize("masks", ["none", "truncated", "environment"])
def test_measured_entropy_is_the_exact_one(aggregation, steps_per_generation, masks):
    temperature = 0.7
    rollouts = tiny.random_rollouts(8)
    if masks == "truncated":
        rollouts = [ids if index % 3 else ids[:-1] for index, ids in enumerate(rollouts)]
    env_mask = [[int(position % 3 != 1) for position in range(len(ids))] for ids in rollouts]
    args = tiny.build_config(
        temperature=temperature,
        entropy_aggregation=aggregation,
        per_device_train_batch_size=8 // steps_per_generation,
        steps_per_generation=steps_per_generation,
        mask_truncated_completions=masks == "truncated",
        **tiny.TOO_LOW,
    )
    extra = {"env_mask": env_mask} if masks == "environment" else {}
    trainer = tiny.build_trainer(
        args=args,
        reward_funcs=tiny.table_reward(rollouts, [0.0, 1.0] * 4),
        rollout_func=tiny.rollout_function(rollouts, **extra),
    )
    plain = tiny.build_trainer(
        GRPOTrainer,
        args=tiny.build_config(
            GRPOConfig, steps_per_generation=steps_per_generation,
            per_device_train_batch_size=8 // steps_per_generation, mask_truncated_completions=masks == "truncated",
        ),
        reward_funcs=tiny.table_reward(rollouts, [0.0, 1.0] * 4),
        rollout_func=tiny.rollout_function(rollouts, **extra),
    )  # fmt: skip
    plain.model.train()
    batch = plain._generate_and_score_completions(tiny.generation_inputs(plain))
    assert not batch["prompt_mask"].all(), "the case needs left padding"
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    if masks == "truncated":
        assert (mask.sum(1) == 0).sum() == 3
    expected = aggregate(exact_entropies(tiny.build_model(), batch, temperature), mask, aggregation)
    trainer.train()
    assert tiny.history(trainer, "entrocraft/entropy")[0] == pytest.approx(expected, rel=1e-5)
    low, high = tiny.history(trainer, "entrocraft/entropy_low")[0], tiny.history(trainer, "entrocraft/entropy_high")[0]
    assert (low, high) == (50.0, 60.0)
    assert tiny.history(trainer, "entrocraft/distance_outside_band")[0] == pytest.approx(50 - expected, rel=1e-5)


def count_passes(trainer):
    """Count TRL's log-prob passes during the preparation of loss inputs, by model."""
    counts = {"policy": 0, "reference": 0}
    base = GRPOTrainer._get_per_token_logps_and_entropies

    def counting(self, model, *args, **kwargs):
        if not torch.is_grad_enabled():
            counts["policy" if model is trainer.model else "reference"] += 1
        return base(self, model, *args, **kwargs)

    return counts, counting


@pytest.mark.parametrize(
    ("settings", "policy_passes", "reference_passes"),
    [
        ({}, 0, 0),  # recorded while the rollouts are sampled
        # TRL's old-policy pass and no other, micro-batch by micro-batch.
        ({"per_device_train_batch_size": 4, "steps_per_generation": 2}, 2, 0),
        ({"num_iterations": 2}, 1, 0),
        ({"beta": 0.1}, 0, 1),
        ({"beta": 0.1, "num_iterations": 2}, 1, 1),
        ({"rejection_rule": "entropy_change"}, 0, 0),
        ({"rejection_rule": "entropy_change", "num_iterations": 2}, 1, 0),
        ({"rejection_rule": "influence"}, 1, 0),  # a step along the entropy's gradient
        # TRL's own may have dropout: the pass that the step is compared with is one without.
        ({"rejection_rule": "influence", "num_iterations": 2}, 3, 0),
    ],
)
def test_number_of_passes_per_generation_batch(
    settings, policy_passes, reference_passes, monkeypatch, reference_folder
):
    args = tiny.build_config(max_steps=1, **tiny.TOO_LOW, **settings)
    trainer = tiny.build_trainer(model=model_with_reference(reference_folder)(), args=args)
    counts, counting = count_passes(trainer)
    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", counting)
    trainer.train()
    assert counts == {"policy": policy_passes, "reference": reference_passes}


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_the_reference_pass_of_lora_is_never_taken_for_the_policys(num_iterations):
    """With LoRA the reference is the policy's own module, adapter off: only the values tell them apart."""
    rollouts = tiny.random_rollouts(8)
    args = tiny.build_config(beta=0.1, num_iterations=num_iterations, **tiny.TOO_LOW)
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    trainer = tiny.build_trainer(
        args=args, peft_config=config, reward_funcs=tiny.table_reward(rollouts, [0.0, 1.0] * 4)
    )
    tiny.force_rollouts(trainer, rollouts)
    trainer.model.train()
    inputs = tiny.generation_inputs(trainer)
    batch = GRPOTrainer._generate_and_score_completions(trainer, inputs)  # plain, and unfiltered
    mask = batch["completion_mask"]
    trainer.model.eval()
    policy = aggregate(exact_entropies(trainer.model, batch, 1.0), mask, "token")
    with trainer.model.disable_adapter():
        reference = aggregate(exact_entropies(trainer.model, batch, 1.0), mask, "token")
    assert abs(policy - reference) > 1e-3, "the case cannot tell them apart"
    tiny.force_rollouts(trainer, rollouts)
    trainer._why_not_recorded = lambda: "as where an engine samples"
    trainer.train()
    assert tiny.history(trainer, "entrocraft/entropy")[0] == pytest.approx(policy, rel=1e-5)


def test_entropy_from_the_rollout_engines_log_probs():
    rollouts = tiny.random_rollouts(8)
    generator = torch.Generator().manual_seed(0)
    logprobs = [(-3 * torch.rand(len(ids), generator=generator)).tolist() for ids in rollouts]
    logprobs[2][0] = None  # vLLM's way to say that it could not score a token
    args = tiny.build_config(entropy_source="sampling", **tiny.TOO_LOW)
    trainer = tiny.build_trainer(
        args=args,
        reward_funcs=tiny.table_reward(rollouts, [0.0, 1.0] * 4),
        rollout_func=tiny.rollout_function(rollouts, logprobs=logprobs),
    )
    trainer.train()
    expected = -np.mean([value for row in logprobs for value in row if value is not None])
    assert tiny.history(trainer, "entrocraft/entropy")[0] == pytest.approx(expected, rel=1e-5)
    assert tiny.history(trainer, "entrocraft/accepted_rollouts") == [0.5]


def test_sampling_source_without_an_engine_is_refused_before_the_model_loads():
    args = tiny.build_config(entropy_source="sampling")
    with pytest.raises(ValueError, match="entropy_source='sampling' needs a rollout engine.*use_vllm=False"):
        EntrocraftGRPOTrainer(model="no/such-model", args=args, reward_funcs=tiny.share_of_digits)


def test_sampling_source_without_log_probs_is_refused():
    rollouts = tiny.random_rollouts(8)
    trainer = tiny.build_trainer(
        args=tiny.build_config(entropy_source="sampling"), rollout_func=tiny.rollout_function(rollouts)
    )
    with pytest.raises(ValueError, match="returned no 'logprobs'"):
        trainer.train()


def test_nan_logits_refuse_the_step_and_leave_the_parameters():
    trainer = forced([0.0, 1.0] * 4, {"max_steps": 3})

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                with torch.no_grad():
                    model.lm_head.weight[5, 0] = torch.nan  # one broken weight makes every logit row NaN
                self.after = tiny.parameters_of(model)

    poison = Poison()
    trainer.add_callback(poison)
    with pytest.raises(FloatingPointError, match="at step 1 is not finite"):
        trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(torch.nan_to_num(parameter), torch.nan_to_num(poison.after[name]))


# -------------------------------------------------------------------------------------- decisions, metrics, evaluation


def test_metrics_of_one_step_are_exact():
    rewards = [1.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5]  # second group: no advantage at all
    rollouts = tiny.random_rollouts(8)
    trainer = forced(rewards, rollouts=rollouts)
    trainer.train()
    entry = trainer.state.log_history[0]
    lengths = [len(ids) for ids in rollouts]
    assert entry["entrocraft/direction"] == -1
    assert entry["entrocraft/accepted_rollouts"] == 7 / 8
    assert entry["entrocraft/accepted_tokens"] == pytest.approx(1 - lengths[0] / sum(lengths))
    assert entry["entrocraft/effective_batch_size"] == 7
    assert (entry["entrocraft/rejected_positive"], entry["entrocraft/rejected_negative"]) == (1, 0)
    assert entry["entrocraft/empty_steps"] == 0


def test_too_much_entropy_rejects_the_negative_rollouts():
    trainer = forced([1.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5], tiny.TOO_HIGH)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["entrocraft/direction"] == 1
    assert (entry["entrocraft/rejected_positive"], entry["entrocraft/rejected_negative"]) == (0, 3)


def test_relative_band_follows_the_schedule_in_multiples_of_the_first_entropy():
    args = tiny.build_config(max_steps=4, learning_rate=0.01, entropy_low=[0.8, 0.4], entropy_high=[1.2, 0.8])
    trainer = tiny.build_trainer(args=args)
    trainer.train()
    entropies = tiny.history(trainer, "entrocraft/entropy")
    assert trainer.control_memory.initial_entropy == pytest.approx(entropies[0])
    lows, highs = tiny.history(trainer, "entrocraft/entropy_low"), tiny.history(trainer, "entrocraft/entropy_high")
    for step in range(4):  # progress is step / max_steps
        assert lows[step] == pytest.approx(entropies[0] * (0.8 - 0.4 * step / 4))
        assert highs[step] == pytest.approx(entropies[0] * (1.2 - 0.4 * step / 4))
    for entropy, low, high, direction in zip(
        entropies, lows, highs, tiny.history(trainer, "entrocraft/direction"), strict=True
    ):
        assert direction == (entropy > high) - (entropy < low)


def test_schedule_steps_shorter_than_the_run_hold_the_end_values():
    args = tiny.build_config(max_steps=4, entropy_low=[1.0, 0.5], entropy_high=[3.0, 2.5], entropy_unit="nats",
                             entropy_schedule_steps=2)  # fmt: skip
    trainer = tiny.build_trainer(args=args)
    trainer.train()
    assert tiny.history(trainer, "entrocraft/entropy_low") == pytest.approx([1.0, 0.75, 0.5, 0.5])


def test_a_callable_band_replaces_the_configs():
    args = tiny.build_config(max_steps=2, entropy_unit="nats")
    trainer = tiny.build_trainer(args=args, entropy_band=lambda progress: (2 * progress, 10.0))
    trainer.train()
    assert tiny.history(trainer, "entrocraft/entropy_low") == [0.0, 1.0]
    assert tiny.history(trainer, "entrocraft/entropy_high") == [10.0, 10.0]


def test_a_bad_callable_is_refused_before_the_model_loads():
    with pytest.raises(ValueError, match="low=1.01 > high=1.0 at progress 0.51"):
        EntrocraftGRPOTrainer(
            model="no/such-model",
            args=tiny.build_config(),
            reward_funcs=tiny.share_of_digits,
            entropy_band=lambda progress: (0.5 + progress, 1.0),
        )


def test_a_plain_config_is_refused_with_both_names():
    with pytest.raises(TypeError, match="needs args of type EntrocraftGRPOConfig, got GRPOConfig"):
        tiny.build_trainer(args=tiny.build_config(GRPOConfig))


@pytest.mark.parametrize("settings", [{}, {"entropy_unit": "nats", "entropy_width": "auto"}], ids=["unit", "width"])
def test_the_band_is_unknown_before_the_first_measurement(settings):
    trainer = tiny.build_trainer(args=tiny.build_config(**settings))
    with pytest.raises(RuntimeError, match="follows from the first batch"):
        trainer.band_at(0.0)


def test_the_logged_scatter_is_that_of_the_groups_of_the_batches_so_far():
    trainer = tiny.build_trainer(args=tiny.build_config(max_steps=3, **tiny.WIDE_OPEN))
    measure, squares = trainer._measure, []

    def measuring(batch, mask, heard):
        tokens, totals = measure(batch, mask, heard)
        groups = range(0, len(mask), trainer.num_generations)
        sums, counts = (
            [value[start : start + trainer.num_generations].double().sum().item() for start in groups]
            for value in (tokens.entropies * mask, mask)
        )
        residuals = [sum_ - totals.entropy * count for sum_, count in zip(sums, counts, strict=True)]
        squares.append(2 * sum(residual**2 for residual in residuals) / sum(counts) ** 2)  # two groups: G / (G - 1)
        return tokens, totals

    trainer._measure = measuring
    trainer.train()
    running = [squares[0]]
    for square in squares[1:]:
        running.append(0.9 * running[-1] + 0.1 * square)
    assert tiny.history(trainer, "entrocraft/reading_scatter") == pytest.approx(
        [value**0.5 for value in running], rel=1e-4
    )


@pytest.mark.parametrize("unit", ["initial", "nats"])
def test_an_automatic_width_is_four_scatters_around_the_middle(unit):
    edges = {"entropy_low": [1.0, 0.6], "entropy_high": [1.1, 0.6]}
    args = tiny.build_config(
        entropy_width="auto", entropy_unit=unit, max_steps=4, rejection_rule="entropy_change", **edges
    )
    trainer = tiny.build_trainer(args=args)
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    assert len({line["entrocraft/reading_scatter"] for line in log}) == 4
    scale = log[0]["entrocraft/entropy"] if unit == "initial" else 1.0
    for step, line in enumerate(log):
        low, high = line["entrocraft/entropy_low"], line["entrocraft/entropy_high"]
        assert high - low == pytest.approx(4 * line["entrocraft/reading_scatter"], rel=1e-6)
        assert (low + high) / 2 == pytest.approx(scale * (1.05 - 0.45 * step / 4), rel=1e-6)


def test_a_first_measurement_far_outside_an_absolute_band_warns_with_the_numbers():
    trainer = forced([0.0, 1.0] * 4)
    with pytest.warns(UserWarning, match=r"first measured entropy is 2\.\d+ nats.*50.000 to 60.000.*'initial'"):
        trainer.train()


def test_evaluation_is_not_filtered():
    losses = []
    for trainer_class, config_class, extra in (
        (GRPOTrainer, GRPOConfig, {}),
        (EntrocraftGRPOTrainer, EntrocraftGRPOConfig, tiny.TOO_LOW),
    ):
        args = tiny.build_config(config_class, per_device_eval_batch_size=8, **extra)
        trainer = tiny.build_trainer(trainer_class, args=args, eval_dataset=tiny.build_dataset(4))
        metrics = trainer.evaluate()
        assert not any("entrocraft" in key for key in metrics)
        losses.append((metrics["eval_loss"], metrics["eval_reward"], tiny.rng_states()))
    assert losses[0] == losses[1]


def read_table(step):
    return pd.read_parquet(f"run/completions/completions_{step:05d}.parquet")


@pytest.mark.parametrize("mode", ["drop", "zero_advantage"])
def test_completions_table_shows_what_was_kept_and_the_advantages_used(mode):
    rewards = [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    trainer = forced(rewards, {"log_completions": True, "rejected_rollouts": mode})
    trainer.train()
    table = read_table(1)
    assert len(table) == 8
    assert table["kept"].tolist() == [reward == 0.0 for reward in rewards]
    advantages = torch.tensor(rewards).view(2, 4)
    advantages = ((advantages - advantages.mean(1, keepdim=True)) / (advantages.std(1, keepdim=True) + 1e-4)).flatten()
    assert table["advantage"].tolist() == pytest.approx(advantages.clamp(max=0.0).tolist(), abs=1e-6)


def test_completions_table_after_an_evaluation():
    args = tiny.build_config(log_completions=True, max_steps=2, eval_strategy="steps", eval_steps=1,
                             per_device_eval_batch_size=8, **tiny.TOO_LOW)  # fmt: skip
    rollouts = tiny.random_rollouts(8)
    rewards = [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    trainer = tiny.build_trainer(
        args=args, reward_funcs=tiny.table_reward(rollouts, rewards), eval_dataset=tiny.build_dataset(2)
    )
    tiny.force_rollouts(trainer, rollouts)
    trainer.train()
    logs = trainer._logs
    lengths = {len(logs["prompt"]), len(logs["completion"]), len(logs["advantages"]), len(logs["extra"]["kept"])}
    assert lengths == {8}
    assert list(logs["extra"]["kept"]) == [True] * 8  # the last batch was an evaluation's
    assert "kept" in read_table(2)


# ------------------------------------------------------------------------------------ what users plug into the trainer


def test_iterable_dataset():
    dataset = tiny.build_dataset(16).to_iterable_dataset()
    assert isinstance(dataset, IterableDataset)
    args = tiny.build_config(max_steps=2, **tiny.TOO_LOW)
    trainer = tiny.build_trainer(args=args, train_dataset=dataset)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "entrocraft/entropy" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert entry["entrocraft/effective_batch_size"] == 8 - entry["entrocraft/rejected_positive"]
        assert entry["entrocraft/rejected_positive"] > 0


def test_several_reward_functions_with_weights_reject_by_the_weighted_sum():
    rollouts = tiny.random_rollouts(8)
    first, second = [1.0, 0, 0, 0, 1, 1, 0, 0], [0.0, 1, 0, 0, 1, 0, 1, 0]
    args = tiny.build_config(reward_weights=[1.0, -3.0], log_completions=True, **tiny.TOO_LOW)
    functions = [tiny.table_reward(rollouts, first), tiny.table_reward(rollouts, second)]
    functions[1].__name__ = "second"
    trainer = tiny.build_trainer(args=args, reward_funcs=functions)
    tiny.force_rollouts(trainer, rollouts)
    trainer.train()
    total = (torch.tensor(first) - 3 * torch.tensor(second)).view(2, 4)
    expected = ((total - total.mean(1, keepdim=True)) <= 0).flatten().tolist()
    assert read_table(1)["kept"].tolist() == expected


def test_out_of_band_reward_reads_the_weighted_sum_and_skips_unscored_rollouts():
    rollouts = tiny.random_rollouts(8)
    right, none = [1.0, -1, -1, None, 1, 1, -1, 1], [None] * 8
    args = tiny.build_config(out_of_band_advantages="reward", reward_weights=[1.0, 5.0], **tiny.TOO_LOW)
    functions = [tiny.table_reward(rollouts, right), tiny.table_reward(rollouts, none)]
    functions[1].__name__ = "silent"
    trainer = tiny.build_trainer(args=args, reward_funcs=functions)
    tiny.force_rollouts(trainer, rollouts)
    trainer.model.train()
    trainer.state.max_steps = 1
    batch = trainer._generate_and_score_completions(tiny.generation_inputs(trainer))
    assert batch["advantages"].tolist() == [0.0, -1, -1, 0, 0, 0, -1, 0]


def test_rollout_func_with_extra_fields():
    rollouts = tiny.random_rollouts(8)
    seen = []

    def reward(completions, verdict, **kwargs):
        seen.extend(verdict)
        return verdict

    base = tiny.rollout_function(rollouts)

    def rollout(prompts, trainer):
        return {**base(prompts, trainer), "verdict": [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]}

    trainer = tiny.build_trainer(args=tiny.build_config(**tiny.TOO_LOW), reward_funcs=reward, rollout_func=rollout)
    trainer.train()
    assert seen == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    assert tiny.history(trainer, "entrocraft/rejected_positive") == [3.0]


def test_mixin_on_a_users_own_trainer():
    class HalvedAdvantages(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            return {**batch, "advantages": batch["advantages"] / 2}

    class Mine(EntropyControlMixin, HalvedAdvantages):
        _config_class = EntrocraftGRPOConfig

    assert_bit_for_bit(*tiny.run_pair({"max_steps": 2}, plain_class=HalvedAdvantages, ours=Mine))
    args = tiny.build_config(**tiny.TOO_LOW)
    rollouts = tiny.random_rollouts(8)
    rewards = [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    trainer = tiny.build_trainer(Mine, args=args, reward_funcs=tiny.table_reward(rollouts, rewards))
    tiny.force_rollouts(trainer, rollouts)
    trainer.model.train()
    trainer.state.max_steps = 1
    batch = trainer._generate_and_score_completions(tiny.generation_inputs(trainer))
    # One right in four: advantage (0 - 1/4) / std = -1/2; two in four: (0 - 1/2) / std = -0.866; both halved.
    assert batch["advantages"].tolist() == pytest.approx([0, -0.25, -0.25, -0.25, -0.433, 0, 0, -0.433], abs=1e-3)


def test_entropy_change_rule_against_raw_logits():
    """Keep mask of the full rule from float64 logits: `m * A * sum(S - N) >= 0`, and 'exact' means exact."""
    temperature = 0.7
    rollouts = tiny.random_rollouts(16)
    rewards = [float(index % 3 == 0) + 0.1 * index for index in range(16)]
    settings = {
        "rejection_rule": "entropy_change",
        "temperature": temperature,
        "per_device_train_batch_size": 16,
        "log_completions": True,
    }
    trainer = forced(rewards, settings, rollouts)
    plain = tiny.build_trainer(
        GRPOTrainer,
        args=tiny.build_config(GRPOConfig, per_device_train_batch_size=16),
        reward_funcs=tiny.table_reward(rollouts, rewards),
    )
    tiny.force_rollouts(plain, rollouts)
    plain.model.train()
    batch = plain._generate_and_score_completions(tiny.generation_inputs(plain))
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = tiny.build_model()(input_ids=ids, attention_mask=attention_mask).logits
    logits = logits[:, batch["prompt_ids"].size(1) - 1 : -1].double() / temperature
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    s = p * (log_p - (p * log_p).sum(-1, keepdim=True))
    difference = s.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1) - (p * s).sum(-1)
    scores = batch["advantages"] * (difference * batch["completion_mask"]).sum(1)
    assert scores.abs().min() > 1e-4, "a score too close to zero to tell its sign in float32"
    trainer.train()
    assert read_table(1)["kept"].tolist() == (-scores >= 0).tolist()  # direction -1
    sign_rule = (batch["advantages"] <= 0).tolist()
    assert read_table(1)["kept"].tolist() != sign_rule, "the case cannot tell the two rules apart"


def test_model_card_names_the_method():
    trainer = tiny.build_trainer(args=tiny.build_config())
    trainer.create_model_card(model_name="mine")
    with open("run/README.md") as card:
        text = card.read()
    assert "Entrocraft" in text and "2604.26326" in text
