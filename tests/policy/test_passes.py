"""Which pass is the policy's, and that each number of a pass is exact: log p, H, and N from the same hidden states."""

import inspect

import pytest
import tiny
import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer
from trl.trainer import utils

from entrocraft_trl import EntropyControlMixin
from entrocraft_trl.policy import hidden_states, passes
from entrocraft_trl.policy.hidden_states import expected_terms
from entrocraft_trl.policy.tokens import TokenReading


def a_pass(seed):
    generator = torch.Generator().manual_seed(seed)
    return TokenReading(torch.randn(2, 3, generator=generator), torch.rand(2, 3, generator=generator))


MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def test_the_pass_is_found_by_identity_for_grpo():
    first, second = a_pass(0), a_pass(1)
    batch = {"old_per_token_logps": second.logps}
    assert passes.find_policy_pass([first, second], batch, MASK) is second
    assert passes.find_policy_pass([second, first], batch, MASK) is second


def test_the_pass_is_found_by_its_masked_sum_for_rloo():
    first, second = a_pass(0), a_pass(1)
    batch = {"old_logps": (first.logps * MASK).sum(1)}
    assert passes.find_policy_pass([second, first], batch, MASK) is first


@pytest.mark.parametrize("batch", [{}, {"old_per_token_logps": None}, {"old_logps": torch.zeros(2)}])
def test_a_reference_pass_alone_is_not_taken(batch):
    assert passes.find_policy_pass([a_pass(0)], batch, MASK) is None
    assert passes.find_policy_pass([], batch, MASK) is None


# --------------------------------------------------------------------------------------------------- what a pass says


def loss_batch(trainer):
    """The trainer's loss inputs, on forced rollouts, and what was heard while they were made."""
    tiny.force_rollouts(trainer, tiny.random_rollouts(8))
    trainer.model.train()
    trainer.state.max_steps = 1
    with trainer.listening_to_policy() as heard:
        batch = GRPOTrainer._generate_and_score_completions(trainer, tiny.generation_inputs(trainer))
    return batch, heard


def from_logits(logits, batch, temperature):
    """log p, H and N in float64, by their definitions."""
    log_p = (logits[:, batch["prompt_ids"].size(1) - 1 : -1].double() / temperature).log_softmax(-1)
    p, sampled = log_p.exp(), log_p.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    h = -(p * log_p).sum(-1)
    return TokenReading(sampled, h, (p**2 * (log_p + h.unsqueeze(-1))).sum(-1))


def whole_rows(batch):
    return {
        "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
    }


def assert_equal_readings(found, expected, mask):
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[mask].double(), exact[mask], rtol=1e-4, atol=1e-5)
        assert not ours.requires_grad


@pytest.mark.parametrize("batch_size", [1, 3, 8])  # 3 does not divide the 8 rows
@pytest.mark.parametrize("lora", [False, True])
def test_a_pass_of_our_own_is_exact(batch_size, lora):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False) if lora else None
    args = tiny.build_config(temperature=0.7, rejection_rule="entropy_change", **tiny.WIDE_OPEN)
    trainer = tiny.build_trainer(args=args, peft_config=config)
    batch, heard = loss_batch(trainer)
    assert heard.passes == []  # TRL runs no pass here
    trainer.args.per_device_train_batch_size = batch_size
    found, source = trainer.read_policy(batch, batch["completion_mask"], heard)
    assert source == "own_pass"  # forced rollouts are not sampled
    with torch.no_grad():
        logits = trainer.model.eval()(**whole_rows(batch)).logits
    assert_equal_readings(found, from_logits(logits, batch, 0.7), batch["completion_mask"].bool())


@pytest.mark.parametrize("dropout", ["none", "LoRA", "attention"])
def test_trls_pass_says_all_of_one_model(dropout):
    """
    S of a pass with dropout against N of one without would judge by the difference of two models: up to 13% of the
    rollouts with LoRA's usual 0.05, N up to 4.8 where it is at most 0.5. Here both are those of the pass's own hidden
    states.
    """
    rate = 0.0 if dropout == "none" else 0.5  # large, so that another model's numbers are far off
    args = tiny.build_config(rejection_rule="entropy_change", num_iterations=2, temperature=0.7, **tiny.WIDE_OPEN)
    torch.manual_seed(0)
    trainer = tiny.build_trainer(
        model=tiny.build_model(attention_dropout=rate if dropout == "attention" else 0.0),
        args=args,
        peft_config=LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], lora_dropout=rate, init_lora_weights=False
        ) if dropout == "LoRA" else None,
    )  # fmt: skip
    trainer._why_not_recorded = lambda: "as where an engine samples"
    states = []
    causal_lm = trainer._causal_lm()
    causal_lm.base_model.register_forward_hook(lambda module, inputs, output: states.append(output.last_hidden_state))
    batch, heard = loss_batch(trainer)
    assert len(heard.passes) == len(states) == 1 and heard.passes[0].logps is batch["old_per_token_logps"]
    exact = from_logits(causal_lm.lm_head(states[0]), batch, 0.7)
    found, source = trainer.read_policy(batch, batch["completion_mask"], heard)
    assert source == "old_policy_pass"
    assert_equal_readings(found, exact, batch["completion_mask"].bool())
    with torch.no_grad():
        without = from_logits(trainer.model.eval()(**whole_rows(batch)).logits, batch, 0.7)
    mask = batch["completion_mask"].bool()
    apart = (heard.passes[0].entropies - without.entropies)[mask].abs().max()
    assert (apart > 0.05) == (dropout != "none"), "the case cannot tell the models apart"


def test_n_is_not_computed_where_nobody_asks():
    trainer = tiny.build_trainer(args=tiny.build_config(num_iterations=2, **tiny.WIDE_OPEN))
    trainer._why_not_recorded = lambda: "as where an engine samples"
    batch, heard = loss_batch(trainer)
    found, source = trainer.read_policy(batch, batch["completion_mask"], heard)
    assert source == "old_policy_pass" and found.expected is None


def test_trls_pass_is_its_own_affair_where_rollouts_are_recorded():
    """It may wait until rows have left; where a record does not hold, as that of forced rollouts, a pass is run."""
    trainer = tiny.build_trainer(args=tiny.build_config(num_iterations=2, **tiny.WIDE_OPEN))
    batch, heard = loss_batch(trainer)
    assert heard.passes == []
    assert trainer.read_policy(batch, batch["completion_mask"], heard)[1] == "own_pass"


def test_the_model_and_trl_are_as_before_even_after_an_error():
    trainer = tiny.build_trainer(args=tiny.build_config(temperature=0.7, **tiny.WIDE_OPEN))
    model, kernel = trainer._causal_lm(), utils._ChunkedLogProbFunction
    hooks = len(model._forward_hooks)
    with pytest.raises(KeyError), expected_terms(model, trls_log_probs=True):
        assert utils._ChunkedLogProbFunction is not kernel
        raise KeyError
    assert utils._ChunkedLogProbFunction is kernel and len(model._forward_hooks) == hooks


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 1.0), (None, 0.3), (2.0, 3.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_head_that_caps_and_scales(softcap, scale, bias, monkeypatch):
    """Against TRL's own kernel and, for N, against the definition."""
    monkeypatch.setattr(hidden_states, "TOKENS_AT_ONCE", 4)  # 10 tokens: two parts and a half
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(10, 6, generator=generator), torch.randn(30, 6, generator=generator)
    offset = torch.randn(30, generator=generator) if bias else None
    targets = torch.randint(30, (10,), generator=generator)
    found = hidden_states.read_hidden_states(hidden, weight, offset, targets, 0.7, softcap, scale)
    arguments = (hidden, weight, offset, targets, 0.7, 16, softcap, scale, ("log_probs", "entropy"))
    logps, entropies, *_ = utils._ChunkedLogProbFunction.apply(*arguments)
    torch.testing.assert_close(found.logps, logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropies, entropies, rtol=1e-5, atol=1e-5)
    logits = scale * (hidden @ weight.T + (offset if bias else 0.0)).double()
    log_p = ((softcap * torch.tanh(logits / softcap) if softcap else logits) / 0.7).log_softmax(-1)
    expected = (log_p.exp() ** 2 * (log_p + entropies.double().unsqueeze(-1))).sum(-1)
    torch.testing.assert_close(found.expected.double(), expected, rtol=1e-5, atol=1e-5)


def test_trls_log_probs_stay_trls_to_the_last_bit(monkeypatch):
    """Training goes on with them: a band that is never left is GRPO bit for bit."""
    monkeypatch.setattr(EntropyControlMixin, "_why_not_recorded", lambda self: "as where an engine samples")
    args = tiny.build_config(num_iterations=2, rejection_rule="entropy_change", **tiny.WIDE_OPEN)
    batch, heard = loss_batch(tiny.build_trainer(args=args))
    assert heard.passes[0].expected is not None
    plain = tiny.build_trainer(GRPOTrainer, args=tiny.build_config(GRPOConfig, num_iterations=2))
    tiny.force_rollouts(plain, tiny.random_rollouts(8))
    plain.model.train()
    theirs = plain._generate_and_score_completions(tiny.generation_inputs(plain))
    assert torch.equal(batch["old_per_token_logps"], theirs["old_per_token_logps"])


def test_multimodal_keys_are_all_parameters_of_trls_pass():
    for trainer in (GRPOTrainer, RLOOTrainer):
        parameters = inspect.signature(trainer._get_per_token_logps_and_entropies).parameters
        assert set(passes.MULTIMODAL_KEYS) <= set(parameters)
