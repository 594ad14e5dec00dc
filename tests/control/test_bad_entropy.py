"""
Numbers that are no entropy: a step whose entropy cannot be read is refused before anything remembers it, and rejecting
rollouts never makes a gradient infinite that plain GRPO keeps finite.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
import torch
from soak import SOAK

from entrocraft_trl import EntrocraftGRPOTrainer
from entrocraft_trl.control import loss_inputs
from entrocraft_trl.policy.batch_entropy import unreadable_counts


ROLLOUTS = tiny.random_rollouts(8)


class BrokenModel:
    """Puts `value` into the hidden states of some rows from a step on, as an overflow inside the model would."""

    def __init__(self, trainer, value, rows, from_step):
        self.trainer, self.value, self.rows, self.from_step = trainer, value, rows, from_step
        trainer.model.model.norm.register_forward_hook(self.spoil)

    def spoil(self, module, inputs, output):
        if self.trainer.state.global_step >= self.from_step:
            output = output.clone()
            output[self.rows] = self.value
        return output


def build(steps=4, sampled=False, **settings):
    settings = {"max_steps": steps, "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 1, **settings}
    arguments = {} if sampled else {"rollout_func": tiny.rollout_function(ROLLOUTS)}
    return tiny.build_trainer(args=tiny.build_config(**settings), **arguments)


VALUES = {"nan": math.nan, "inf": math.inf, "overflow": 3e38}  # the last one is finite, its logits are not
ROWS = {"one row": [3], "all rows": slice(None)}


@pytest.mark.parametrize("from_step", [0, 2])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("value", VALUES)
def test_broken_logits_refuse_the_step(value, rows, from_step):
    reference = build(from_step, output_dir="reference")
    if from_step:
        reference.train()
    trainer = build(output_dir="broken")
    BrokenModel(trainer, VALUES[value], ROWS[rows], from_step)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    count = 1 if rows == "one row" else 8
    assert f"at step {from_step} is not finite" in str(error.value)
    assert f"NaN or infinite logits in {count} of 8 rollouts" in str(error.value)

    assert trainer.state.global_step == from_step
    tiny.assert_same_parameters(trainer.model, reference.model)
    assert trainer.control_memory.initial_entropy == reference.control_memory.initial_entropy
    assert trainer.control_memory.last_entropy == reference.control_memory.last_entropy
    name = "entrocraft/entropy"
    assert tiny.history(trainer, name) == tiny.history(reference, name)
    assert all(math.isfinite(entropy) for entropy in tiny.history(trainer, name))
    if from_step:
        saved = json.loads(Path("broken/checkpoint-2/trainer_state.json").read_text())
        memory = saved["stateful_callbacks"]["EntropyControlState"]["args"]["memory"]
        assert memory["initial_entropy"] == reference.control_memory.initial_entropy
        assert all(value is None or math.isfinite(value) for value in memory.values())
        # The last checkpoint is sound: a healthy model goes on from it.
        again = build(output_dir="again")
        again.train(resume_from_checkpoint="broken/checkpoint-2")
        assert again.state.global_step == 4
    else:
        assert not Path("broken").exists() or not list(Path("broken").glob("checkpoint-*"))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2},  # the entropy is read from TRL's own old-policy pass
        {"rejection_rule": "entropy_change"},
        {"rejection_rule": "influence"},
        {"entropy_aggregation": "sequence"},
    ],
    ids=lambda settings: ",".join(map(str, settings.values())),
)
def test_each_way_of_reading_refuses(settings):
    trainer = build(output_dir="broken", **settings)
    BrokenModel(trainer, math.nan, [5], from_step=0)
    with pytest.raises(FloatingPointError, match="at step 0 is not finite.* in 1 of 8 rollouts"):
        trainer.train()
    assert asdict(trainer.control_memory) == asdict(build().control_memory)  # as new


def test_broken_logits_while_sampling_end_the_step():
    """torch refuses to sample from them, before any rollout exists."""
    reference = build(2, sampled=True, output_dir="reference")
    reference.train()
    trainer = build(sampled=True, output_dir="broken")
    BrokenModel(trainer, math.nan, [3], from_step=2)
    with pytest.raises(RuntimeError, match="probability tensor contains either `inf`, `nan`"):
        trainer.train()
    tiny.assert_same_parameters(trainer.model, reference.model)
    assert trainer.control_memory.last_entropy == reference.control_memory.last_entropy


# -------------------------------------------------------------------------------------------------- the rollout engine


def train_on_log_probs(change):
    logps = [[-0.5] * len(ids) for ids in ROLLOUTS]
    change(logps)
    trainer = tiny.build_trainer(
        args=tiny.build_config(entropy_source="sampling", learning_rate=0.01),
        rollout_func=tiny.rollout_function(ROLLOUTS, logprobs=logps),
    )
    trainer.train()
    return tiny.history(trainer, "entrocraft/entropy")


def test_infinite_log_probs_are_refused():
    def change(logps):
        logps[1][0] = logps[6][1] = -math.inf

    with pytest.raises(FloatingPointError, match="the rollout engine returned infinite log-probs in 2 of 8 rollouts"):
        train_on_log_probs(change)


def test_log_probs_that_are_all_missing_are_refused():
    """Else a broken engine would look like a batch without tokens, which passes."""
    tokens = sum(map(len, ROLLOUTS))

    def change(logps):
        for row in logps:
            row[:] = [None] * len(row)  # as TRL gets vLLM's NaN

    with pytest.raises(FloatingPointError, match=f"returned NaN as the log-prob of all {tokens} loss tokens"):
        train_on_log_probs(change)


def test_a_reading_from_a_small_part_of_the_tokens_is_refused():
    """With nearly all log-probs missing, the entropy would be that of a handful of tokens, and steer the whole run."""
    tokens = sum(map(len, ROLLOUTS))

    def change(logps):
        for row in logps[1:]:
            row[:] = [None] * len(row)

    missing = tokens - len(ROLLOUTS[0])
    with pytest.raises(FloatingPointError, match=f"no log-prob .NaN. for {missing} of {tokens} loss tokens.*90%"):
        train_on_log_probs(change)


def test_single_missing_log_probs_are_left_out():
    def change(logps):
        logps[0][0] = None
        logps[1] = [-2.0] * len(logps[1])

    tokens = sum(map(len, ROLLOUTS)) - 1
    expected = (0.5 * (tokens - len(ROLLOUTS[1])) + 2.0 * len(ROLLOUTS[1])) / tokens
    assert train_on_log_probs(change) == pytest.approx([expected])


def test_unreadable_counts():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]])
    nan, inf = math.nan, math.inf
    readings = torch.tensor([[0.1, 0.2, nan], [0.1, nan, inf], [nan, inf, -inf], [-inf, 0.0, 0.0]])
    # Rows 1 and 3; what the mask hides, as in rows 0 and 2, is nobody's reading.
    assert unreadable_counts(readings, mask).tolist() == [2.0, 4.0, 6.0]


# ---------------------------------------------------------------------------------------------- little to nothing read


def test_truncated_completions_are_not_read():
    """Completions of the full length without an end are masked; the entropy is that of the others."""
    longest = 8
    endless = [[2 + index + place for place in range(longest)] for index in range(4)]
    rollouts = [*endless, *tiny.random_rollouts(4, longest=longest)]
    settings = {"mask_truncated_completions": True, "max_completion_length": longest, "learning_rate": 0.01}
    trainer = tiny.build_trainer(args=tiny.build_config(**settings), rollout_func=tiny.rollout_function(rollouts))
    model = trainer.model
    prompts = trainer.processing_class([row["prompt"] for row in tiny.generation_inputs(trainer)])["input_ids"]
    entropies = []
    for prompt, ids in zip(prompts[4:], rollouts[4:], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        entropies += torch.distributions.Categorical(logits=logits).entropy().tolist()
    trainer.train()
    expected = sum(entropies) / len(entropies)
    assert tiny.history(trainer, "entrocraft/entropy") == pytest.approx([expected], rel=1e-5)


def test_a_batch_without_tokens_is_counted_out_not_refused():
    endless = [[2 + index + place for place in range(8)] for index in range(8)]
    args = tiny.build_config(mask_truncated_completions=True, max_steps=2)
    trainer = tiny.build_trainer(args=args, rollout_func=tiny.rollout_function(endless))
    before = tiny.parameters_of(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 2
    tiny.assert_same_parameters(trainer.model, before)
    assert tiny.history(trainer, "entrocraft/entropy") == []
    assert trainer.control_memory.initial_entropy is None


@pytest.mark.parametrize("rule", ["advantage_sign", "entropy_change", "influence"])
@pytest.mark.parametrize("unit", ["initial", "nats"])
def test_a_vocabulary_of_one(rule, unit):
    """The only distribution there is has no entropy: a relative band is [0, 0], and entropy never leaves it."""
    model = tiny.build_model(vocab_size=1, pad_token_id=0, eos_token_id=0)
    rollouts = [[0] * length for length in range(1, 9)]
    trainer = tiny.build_trainer(
        model=model,
        args=tiny.build_config(max_steps=2, entropy_unit=unit, rejection_rule=rule),
        rollout_func=lambda prompts, trainer: {
            "prompt_ids": [[0, 0]] * len(prompts),
            "completion_ids": rollouts[: len(prompts)],
            "logprobs": None,
        },
        reward_funcs=lambda completion_ids, **kwargs: [float(len(ids)) for ids in completion_ids],
    )
    trainer.train()
    assert tiny.history(trainer, "entrocraft/entropy") == [0.0, 0.0]
    direction = 0.0 if unit == "initial" else -1.0  # 0.9 nats are out of reach
    assert tiny.history(trainer, "entrocraft/direction") == [direction] * 2
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


# -------------------------------------------------------------------------------------------------------- the gradient

LOSSES = [
    *({"loss_type": name} for name in ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo")),
    {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "off_policy_mask_threshold": 0.5},
    {"loss_type": "dapo", "delta": 4.0},
]


@pytest.mark.parametrize("with_kl", [False, True], ids=["", "kl"])
@pytest.mark.parametrize("settings", LOSSES, ids=lambda settings: ",".join(map(str, settings.values())))
def test_rejecting_never_makes_a_finite_gradient_infinite(settings, with_kl):
    """Importance ratios up to and beyond the largest float32 (exp(88.7)), the worst that a stale policy can bring."""
    rows, length, trials = 4, 3, 60 if SOAK else 30
    trainer = tiny.build_trainer(args=tiny.build_config(**settings))
    trainer.beta = 0.1 if with_kl else 0.0
    trainer.current_gradient_accumulation_steps = 1  # set by transformers at each step
    log_ratios = torch.tensor([-200.0, -50.0, 0.0, 0.0, 0.0, 50.0, 80.0, 87.0, 100.0, 200.0])
    plain_finite = 0
    for trial in range(trials):
        source = torch.Generator().manual_seed(trial)
        logps = -3 * torch.rand(rows, length, generator=source)
        ratios = log_ratios[torch.randint(len(log_ratios), (rows, length), generator=source)]
        if trial % 2:
            ratios = ratios.clamp(max=85.0)  # so that plain GRPO is often finite
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, 2] = 0
        inputs = {
            "prompt_ids": torch.ones(rows, 2, dtype=torch.long),
            "prompt_mask": torch.ones(rows, 2, dtype=torch.long),
            "completion_ids": torch.ones(rows, length, dtype=torch.long),
            "completion_mask": mask,
            "advantages": torch.randn(rows, generator=source) * (1000.0 if trial % 3 == 0 else 1.0),
            "old_per_token_logps": logps - ratios,
            "ref_per_token_logps": logps + torch.randn(rows, length, generator=source),
            "num_items_in_batch": mask.sum(),
        }
        keep = torch.rand(rows, generator=source) > 0.5
        if not is_finite(trainer, logps, inputs):
            continue
        plain_finite += 1
        share = keep.float().mean().item()
        tokens = float(mask[keep].sum())
        dropped = loss_inputs.drop_rollouts(inputs, keep, token_normaliser=tokens, row_normaliser_share=share)
        assert is_finite(trainer, logps, dropped), trial
        assert is_finite(trainer, logps, loss_inputs.zero_advantages(inputs, keep)), trial
    assert plain_finite >= trials // 5  # else nothing was compared


def is_finite(trainer: EntrocraftGRPOTrainer, logps, inputs) -> bool:
    """Whether loss and gradient are, with `logps` in place of the model's."""
    leaf = logps.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (leaf, torch.ones_like(leaf), None)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return bool(torch.isfinite(loss) and torch.isfinite(leaf.grad).all())
