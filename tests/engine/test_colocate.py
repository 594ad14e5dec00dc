"""Training on the rollouts of a colocated vLLM engine: what is read is the policy's, and all else is plain TRL."""

import math
import random

import engine
import numpy as np
import pytest
import tiny
import torch
from engine import BAND
from equality import LORA
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftGRPOTrainer, EntrocraftRLOOConfig, EntrocraftRLOOTrainer


ENGINE = {"use_vllm": True, "vllm_mode": "colocate"}


def build(
    trainer_class, model_folder, *, config_class=EntrocraftGRPOConfig, peft_config=None, tokenizer=None, **settings
):
    """Adapters and first draws alike for all; the engine seeds torch too."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    args = tiny.build_config(config_class, **ENGINE, **settings)
    tokenizer = tokenizer or tiny.build_tokenizer()
    return tiny.build_trainer(trainer_class, model_folder, args, peft_config=peft_config, processing_class=tokenizer)


# ------------------------------------------------------------------------------------------------ reading and steering


@pytest.mark.parametrize("rule", ["advantage_sign", "entropy_change"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_entropy_is_the_policys_and_steers(engines, model_folder, lora, rule):
    """The engine is the learner in each batch, hence weights and adapters reach it after each step."""
    trainer = build(
        engine.with_memory(EntrocraftGRPOTrainer),
        model_folder,
        peft_config=LoraConfig(**LORA) if lora else None,
        rejection_rule=rule,
        max_steps=3,
        temperature=0.7,
        **BAND,
    )
    trainer.train()
    engine.assert_read_from_the_policy(trainer)
    assert tiny.history(trainer, "entrocraft/own_pass") == [0.0] * 3, "TRL's own pass says all"
    batch, before = trainer.batches[-1]
    after = engine.log_probs_of(trainer.accelerator.unwrap_model(trainer.model), batch, 0.7)
    assert (after - before).abs().max() > 0.01, "an engine that is a step behind could not be told apart"
    low, high = (np.array(tiny.history(trainer, f"entrocraft/entropy_{edge}")) for edge in ("low", "high"))
    initial = tiny.history(trainer, "entrocraft/entropy")[0]
    np.testing.assert_allclose(low, initial * np.interp([0, 1 / 3, 2 / 3], [0, 1], BAND["entropy_low"]), rtol=1e-6)
    np.testing.assert_allclose(high, initial * np.interp([0, 1 / 3, 2 / 3], [0, 1], BAND["entropy_high"]), rtol=1e-6)
    assert tiny.history(trainer, "entrocraft/direction")[0] == 1.0  # the first entropy is above 0.95 of itself
    kept = tiny.history(trainer, "entrocraft/accepted_rollouts")
    assert 0 < min(kept) < 1
    for share, (batch, _) in zip(kept, trainer.batches, strict=True):
        assert share == (batch.get("tool_mask", batch["completion_mask"]).any(dim=1)).float().mean()


def test_without_its_correction_a_pass_of_our_own_reads_the_policy(engines, model_folder):
    """TRL then asks for no log-probs of the old policy; the influence rule needs passes of its own in any case."""
    settings = {"vllm_importance_sampling_correction": False, "rejection_rule": "influence", "max_steps": 2, **BAND}
    trainer = build(engine.with_memory(EntrocraftGRPOTrainer), model_folder, **settings)
    trainer.train()
    engine.assert_read_from_the_policy(trainer)
    assert tiny.history(trainer, "entrocraft/own_pass") == [1.0, 1.0]
    assert min(tiny.history(trainer, "entrocraft/accepted_rollouts")) < 1


def test_rloo_reads_the_policy_too(engines, model_folder):
    settings = {"config_class": EntrocraftRLOOConfig, "max_steps": 2, **BAND}
    trainer = build(engine.with_memory(EntrocraftRLOOTrainer), model_folder, **settings)
    trainer.train()
    engine.assert_read_from_the_policy(trainer)


def test_log_probs_of_the_engine_estimate_the_entropy_without_bias(engines, model_folder):
    """
    `entropy_source="sampling"` against the exact entropy of the same contexts, over batches of a policy that stands
    still. The variance of -log p follows from the log-probs, so that the errors are known in standard deviations.
    """
    batches = 24
    trainer = build(
        engine.with_memory(EntrocraftGRPOTrainer),
        model_folder,
        entropy_source="sampling",
        max_steps=batches,
        learning_rate=0.0,
        per_device_train_batch_size=32,
        **tiny.WIDE_OPEN,
    )
    trainer.train()
    errors, predicted = [], []
    for read, (batch, log_probs) in zip(tiny.history(trainer, "entrocraft/entropy"), trainer.batches, strict=True):
        mask = batch["completion_mask"].bool()
        assert read == pytest.approx(-batch["sampling_per_token_logps"][mask].mean().item(), rel=1e-6)
        exact, square = (engine.moment(log_probs, power)[mask] for power in (1, 2))
        errors.append(read - exact.mean().item())
        predicted.append((square - exact**2).sum().sqrt().item() / len(exact))
    in_deviations = np.array(errors) / predicted
    assert abs(in_deviations.mean()) < 3 / math.sqrt(batches)
    assert 0.65 < in_deviations.std(ddof=1) < 1.4  # 99% of samples of this size


def test_the_real_model_in_two_number_formats(engines, the_real_model):
    """A learner in float32 and an engine in bfloat16, which vLLM makes of it by itself, and LoRA: the common case."""
    engines["dtype"] = "auto"
    trainer = build(
        engine.with_memory(EntrocraftGRPOTrainer),
        str(the_real_model),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
        tokenizer=AutoTokenizer.from_pretrained(the_real_model),
        rejection_rule="entropy_change",
        vllm_max_model_length=64,  # or its cache has to hold 8,192 tokens
        max_completion_length=16,
        max_steps=2,
        **BAND,
    )
    trainer.train()
    logged = tiny.history(trainer, "entrocraft/entropy")
    for entropy, (batch, log_probs) in zip(logged, trainer.batches, strict=True):
        mask = batch["completion_mask"].bool()
        assert entropy == pytest.approx(engine.moment(log_probs, 1)[mask].mean().item(), rel=1e-4)
        apart = (batch["sampling_per_token_logps"].double() - engine.sampled(log_probs, batch))[mask].abs()
        assert 1e-4 < apart.mean() < 0.1  # 0.04 nats as measured
    assert min(tiny.history(trainer, "entrocraft/accepted_rollouts")) < 1
    assert min(tiny.history(trainer, "sampling/importance_sampling_ratio/min")) != 1


# ------------------------------------------------------------------------------------------------- all else is TRL's


def trained(trainer_class, model_folder, **settings):
    with engine.forgotten():
        trainer = build(trainer_class, model_folder, **settings)
        trainer.train()
        return trainer, tiny.rng_states()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_band_never_left_is_plain_grpo_on_the_engines_rollouts(engines, model_folder, dtype):
    """Bit for bit, random draws too; in bfloat16, what vLLM takes by itself, with importance-sampling ratios."""
    engines["dtype"] = dtype
    settings = {"max_steps": 3, "num_iterations": 1}
    plain, plain_states = trained(GRPOTrainer, model_folder, config_class=GRPOConfig, **settings)
    ours, our_states = trained(
        engine.with_memory(EntrocraftGRPOTrainer), model_folder, compute_all_rows=True, **tiny.WIDE_OPEN, **settings
    )
    ratios = tiny.history(ours, "sampling/importance_sampling_ratio/min")
    assert ratios == tiny.history(plain, "sampling/importance_sampling_ratio/min") and len(ratios) == 3
    if dtype == "bfloat16":
        apart = tiny.history(ours, "sampling/sampling_logp_difference/mean")
        assert min(ratios) < 0.999 and 1e-4 < max(apart) < 0.05
        for batch, log_probs in ours.batches:
            mask, learner = batch["completion_mask"], engine.sampled(log_probs, batch)
            exact = ((learner - batch["sampling_per_token_logps"]).masked_fill(mask == 0, 0)).sum(1, keepdim=True)
            torch.testing.assert_close(batch["importance_sampling_ratio"].double(), exact.exp(), rtol=1e-4, atol=0)
    for key in ("loss", "reward", "grad_norm"):
        assert tiny.history(ours, key) == tiny.history(plain, key)
    tiny.assert_same_parameters(ours.model, plain.model)
    assert our_states[0] == plain_states[0] and our_states[2] == plain_states[2]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_resumed_run_is_the_whole_run(engines, model_folder, lora):
    """
    On a CPU the engine draws from torch's generator, which checkpoints hold: even the rollouts are the same. For the
    engine, TRL merges adapters into their model and takes them out again, which rounds the model's own weights each
    time; a checkpoint of adapters does not hold those.
    """
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "rejection_rule": "entropy_change", **BAND}
    settings["peft_config"] = LoraConfig(**LORA) if lora else None
    whole, _ = trained(EntrocraftGRPOTrainer, model_folder, **settings)
    with engine.forgotten():
        resumed = build(engine.with_memory(EntrocraftGRPOTrainer), model_folder, **settings)
        resumed.train(resume_from_checkpoint="run/checkpoint-2")
    batch, log_probs = resumed.batches[0]
    mask = batch["completion_mask"].bool()
    of_engine = batch["sampling_per_token_logps"][mask].double()
    torch.testing.assert_close(of_engine, engine.sampled(log_probs, batch)[mask], rtol=0, atol=1e-4)
    rounding = 1e-5 if lora else 0.0
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding, msg=name)
    assert resumed.control_memory.initial_entropy == whole.control_memory.initial_entropy
    assert resumed.control_memory.empty_steps == whole.control_memory.empty_steps
    for key in ("loss", "num_tokens", "entrocraft/entropy", "entrocraft/entropy_low", "entrocraft/accepted_rollouts"):
        assert tiny.history(resumed, key) == pytest.approx(tiny.history(whole, key), rel=rounding, abs=rounding)
