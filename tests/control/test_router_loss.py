"""
The router loss of a mixture of experts is what plain TRL adds, whatever was rejected: it balances the load of all
tokens that the model reads, and no row's weight is its business.
"""

import pytest
import tiny
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftRLOOConfig, EntropyControlMixin


COEFFICIENT = 0.5  # so that the router loss's gradient is as large as the policy loss's
ROLLOUTS = tiny.random_rollouts(8)


def given_advantages(trainer_class):
    class Given(trainer_class):
        advantages = [0.0] * 8

        def _generate_and_score_completions(self, inputs):
            return {**super()._generate_and_score_completions(inputs), "advantages": torch.tensor(self.advantages)}

    return Given


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.last = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(trainer_class, config_class, coefficient, **settings):
    """One step in two micro-batches; its gradients, and the router loss that was logged."""
    # A tiny model of four experts, two of which read a token.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, moe_intermediate_size=24,
                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4,
                num_experts_per_tok=2, initializer_range=0.25, tie_word_embeddings=False, pad_token_id=tiny.PAD,
                eos_token_id=tiny.EOS, bos_token_id=None,
            )
        )  # fmt: skip
    args = tiny.build_config(
        config_class, per_device_train_batch_size=4, gradient_accumulation_steps=2, beta=0.0,
        router_aux_loss_coef=coefficient, **settings,
    )  # fmt: skip
    trainer = tiny.build_trainer(trainer_class, model, args)
    tiny.force_rollouts(trainer, ROLLOUTS)
    gradients = Gradients()
    trainer.add_callback(gradients)
    torch.manual_seed(1)  # one shuffle into micro-batches for all runs
    trainer.train()
    return gradients.last, tiny.history(trainer, "aux_loss")


GRPO = (GRPOTrainer, GRPOConfig, EntrocraftGRPOConfig)
RLOO = (RLOOTrainer, RLOOConfig, EntrocraftRLOOConfig)


@pytest.mark.parametrize("advantages", [[1.0] * 3 + [-0.5, -1.0, 1.0, 1.0, -2.0], [1.0] * 8], ids=["some", "none"])
@pytest.mark.parametrize(
    ("settings", "classes"),
    [*(({"loss_type": name}, GRPO) for name in ("grpo", "dr_grpo", "luspo", "bnpo", "dapo")), ({}, RLOO)],
)
def test_the_router_loss_is_plain_trls(settings, classes, advantages):
    """Below the band rollouts with A > 0 are rejected: some are left, or none."""
    trainer_class, plain_config, our_config = classes
    plain_class = given_advantages(trainer_class)
    ours = type("Ours", (EntropyControlMixin, plain_class), {"_config_class": our_config, "advantages": advantages})
    # With advantages of 0 plain TRL's loss is the router loss alone.
    expected, expected_log = run(plain_class, plain_config, COEFFICIENT, **settings)
    with_router, log = run(ours, our_config, COEFFICIENT, **settings, **tiny.TOO_LOW)
    without, _ = run(ours, our_config, 0.0, **settings, **tiny.TOO_LOW)
    assert log == expected_log
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2
    assert any(gradient.any() for gradient in without.values()) == (min(advantages) < 0)
    for name, gradient in expected.items():
        torch.testing.assert_close(with_router[name] - without[name], gradient, rtol=1e-4, atol=1e-5)
