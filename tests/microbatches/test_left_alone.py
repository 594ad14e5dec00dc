"""Where a step over some rows would be another one, all are computed, in TRL's order, and the reason is said once."""

from dataclasses import dataclass

import pytest
import tiny
import torch
from peft import LoraConfig
from test_equality import REWARDS, ROLLOUTS, SPLITS, compare, computed_rows, train
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, Qwen3Config
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from entrocraft_trl import EntrocraftGRPOTrainer, EntropyControlMixin, Services
from entrocraft_trl.baselines.aent import AEntTrainer
from entrocraft_trl.baselines.base import BaselineConfig, BaselineTrainer
from entrocraft_trl.baselines.clip_cov import ClipCovTrainer
from entrocraft_trl.baselines.entropic import EntroPICTrainer
from entrocraft_trl.baselines.kl_cov import KLCovTrainer
from entrocraft_trl.baselines.repo_r import REPORTrainer
from entrocraft_trl.baselines.stare import STARETrainer
from entrocraft_trl.baselines.steer import STEERTrainer
from entrocraft_trl.control.config import EntropyControlConfig
from entrocraft_trl.methods import METHODS
from entrocraft_trl.microbatches.config import MicroBatchConfig
from entrocraft_trl.microbatches.exactness import what_can_be_cropped
from entrocraft_trl.normalisation import zero_advantage_is_inert


SAID = "Rows without gradient are computed too: "


@dataclass
class PlainConfig(MicroBatchConfig, GRPOConfig):
    """Without the refusals of rival methods."""


class Plain(Services, GRPOTrainer):
    _config_class = PlainConfig


def bit_for_bit(some, every):
    (trainer, steps), (_, expected) = some, every
    for (_, gradients), (_, all_of_them) in zip(steps, expected, strict=True):
        assert all(torch.equal(gradients[name], all_of_them[name]) for name in gradients)
    assert set(computed_rows(trainer)) == {1.0}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"entropy_coef": 0.1}, "the entropy bonus acts on all rows"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5 chooses tokens among those of a micro-batch"),
        ({"loss_type": "bnpo", "beta": 0.1}, "its loss divides by the tokens of a micro-batch"),
        (
            {"steps_per_generation": 6, "gradient_accumulation_steps": 4, "num_iterations": 2},
            "steps_per_generation=6 and gradient_accumulation_steps=4 do not divide one another",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings(settings, reason, reference_folder, caplog):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 2, **settings}
    some = train(Plain, reference_folder, **settings)
    assert caplog.text.count(SAID) == caplog.text.count(SAID + reason) == 1
    caplog.clear()
    bit_for_bit(some, train(Plain, reference_folder, **settings, compute_all_rows=True))
    assert SAID not in caplog.text


STATISTICS = {
    ClipCovTrainer: {"clip_cov_ratio": 0.2, "clip_cov_low": 0.01},
    KLCovTrainer: {"kl_cov_ratio": 0.25},
    EntroPICTrainer: {"entropic_target": 2.3, "entropic_threshold": 0.1},
    AEntTrainer: {"aent_coef": 0.1, "aent_coef_max": 1.0, "aent_entropy_low": 0.0},
    STEERTrainer: {},
    STARETrainer: {"stare_target_entropy": 9.0, "stare_positive_weight": 2.0},
}


@pytest.mark.parametrize("trainer_class", STATISTICS, ids=lambda kind: kind.__name__)
def test_losses_that_look_at_all_rows(trainer_class, caplog):
    settings = {**SPLITS["two windows"], **STATISTICS[trainer_class]}
    some = train(trainer_class, **settings)
    assert f"{SAID}the loss of {trainer_class.__name__} may read other rows" in caplog.text
    bit_for_bit(some, train(trainer_class, **settings, compute_all_rows=True))


def test_which_methods_leave_rows_out():
    inert = {trainer for trainer, _ in METHODS.values() if zero_advantage_is_inert(trainer)}
    assert {trainer for trainer, _ in METHODS.values()} - inert == set(STATISTICS)
    assert {EntrocraftGRPOTrainer, BaselineTrainer, REPORTrainer} <= inert


@dataclass
class GMPOWithBandConfig(EntropyControlConfig, MicroBatchConfig, GMPOConfig):
    pass


class GMPOWithBand(EntropyControlMixin, Services, GMPOTrainer):
    _config_class = GMPOWithBandConfig
    loss_normaliser = "row_means"


class DeclaredGMPO(GMPOWithBand):
    zero_advantage_is_inert = True  # each row's loss is the geometric mean of its ratios, times its advantage


def test_a_loss_of_ones_own_is_left_alone_until_it_says_that_rows_are_their_own(caplog):
    settings = {**SPLITS["two windows"], **tiny.TOO_LOW}
    some = train(GMPOWithBand, **settings)
    assert f"{SAID}the loss of GMPOWithBand may read other rows" in caplog.text
    bit_for_bit(some, train(GMPOWithBand, **settings, compute_all_rows=True))
    assert max(computed_rows(compare(DeclaredGMPO, **settings))) < 0.6


def test_a_declaration_about_a_loss_that_was_replaced_does_not_count():
    class Replaced(DeclaredGMPO):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    class Added(BaselineTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs) + inputs["completion_ids"].sum()

    assert not zero_advantage_is_inert(Added)
    assert zero_advantage_is_inert(DeclaredGMPO) and not zero_advantage_is_inert(Replaced)
    assert not zero_advantage_is_inert(GMPOTrainer) and zero_advantage_is_inert(GRPOTrainer)


def build(model, rewards=REWARDS, peft_config=None, **settings):
    args = tiny.build_config(BaselineConfig, **settings)
    reward = tiny.table_reward(ROLLOUTS, rewards)
    trainer = tiny.build_trainer(BaselineTrainer, model, args, reward_funcs=reward, peft_config=peft_config)
    tiny.force_rollouts(trainer, ROLLOUTS)
    return trainer


def test_dropout_unless_asked(caplog):
    lora = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = build(tiny.build_model(), peft_config=lora, **SPLITS["4x4"])
    trainer.train()
    assert computed_rows(trainer) == [1.0, 1.0]
    assert caplog.text.count(SAID) == 1
    assert "lora_dropout.default.p = 0.5) would draw other numbers; compute_all_rows=False accepts" in caplog.text
    trainer = build(tiny.build_model(), peft_config=lora, **SPLITS["4x4"], compute_all_rows=False)
    trainer.train()
    assert max(computed_rows(trainer)) < 1


def test_the_router_loss_of_a_mixture_of_experts(caplog):
    config = MixtralConfig(
        **{"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1},
    )
    from transformers import MixtralForCausalLM

    trainer = build(MixtralForCausalLM(config), **SPLITS["1x16"], router_aux_loss_coef=0.1)
    trainer.train()
    assert f"{SAID}the router's loss is one over all tokens" in caplog.text
    assert computed_rows(trainer) == [1.0, 1.0]


# --------------------------------------------------------------------------------------------------- what is cropped


def test_learned_positions_keep_the_padding_of_prompts():
    """GPT-2 counts positions from the first column on, padding included: without it a token has another position."""
    config = GPT2Config(
        **{"vocab_size": tiny.VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
        **{"initializer_range": 0.25, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        **{"pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS, "bos_token_id": None},
    )
    gradients = []
    for rows in (None, True):
        torch.manual_seed(0)
        trainer = build(GPT2LMHeadModel(config), **SPLITS["4x4"], compute_all_rows=rows)
        trainer.train()
        gradients.append(tiny.history(trainer, "grad_norm"))
    assert what_can_be_cropped(config) == (False, True)
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4)


def test_frequencies_that_follow_the_length():
    longrope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    by_layer = {"full_attention": longrope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}

    class Config:
        def __init__(self, rope):
            self.rope_parameters = rope

        def get_text_config(self):
            return self

    assert what_can_be_cropped(Qwen3Config()) == (True, True)
    assert what_can_be_cropped(Config(longrope)) == (False, False)
    assert what_can_be_cropped(Config(by_layer)) == (False, False)
    assert what_can_be_cropped(Config({"full_attention": by_layer["sliding_attention"]})) == (True, True)
    assert what_can_be_cropped(Config(None)) == (False, True)


# ----------------------------------------------------------------------------------------------------------- the field


@pytest.mark.parametrize("value", [None, True, False])
def test_the_field(value):
    assert BaselineConfig(compute_all_rows=value, use_cpu=True, bf16=False).compute_all_rows is value


@pytest.mark.parametrize("value", ["no", 1, 0.5])
def test_what_is_no_truth_value(value):
    with pytest.raises(ValueError, match="compute_all_rows must be true, false or unset, got"):
        BaselineConfig(compute_all_rows=value, use_cpu=True, bf16=False)


def test_a_skipped_last_micro_step_is_refused():
    """Ranks would drift apart in silence, and DeepSpeed would never step."""
    trainer = build(tiny.build_model(), **SPLITS["4x4"])
    repacked = trainer._repacked
    trainer._repacked = lambda buffer: repacked(buffer)[::-1]
    with pytest.raises(RuntimeError, match="last micro-step of an optimizer step has nothing to compute"):
        trainer.train()
