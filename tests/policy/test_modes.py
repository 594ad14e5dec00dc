"""Passes without dropout, and knowing whether there is any."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import OPTConfig, OPTForCausalLM

from entrocraft_trl.policy.modes import eval_mode, has_dropout


def test_eval_mode_restores_each_modules_own_mode():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model.train()
    model[1].eval()  # a frozen part that the user keeps in eval mode
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False, False]
    with pytest.raises(KeyError), eval_mode(model):
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_eval_mode_sets_flags_alone_since_train_of_a_model_may_swap_its_kernels():
    """transformers swaps a model's Hub kernels in `train`, whenever the mode changes; both directions must be even."""

    class Kernelized(torch.nn.Linear):
        def train(self, mode=True):
            calls.append(mode)
            return super().train(mode)

    calls = []
    model = torch.nn.Sequential(Kernelized(2, 2))
    with eval_mode(model):
        assert not model[0].training
    assert model[0].training and calls == []


def with_lora(dropout):
    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=dropout)
    return get_peft_model(tiny.build_model(), lora)


@pytest.mark.parametrize(
    ("build", "drops"),
    [
        (tiny.build_model, False),
        (lambda: tiny.build_model(attention_dropout=0.1), True),  # functional: no dropout module
        (lambda: with_lora(0.0), False),
        (lambda: with_lora(0.05), True),
        (lambda: OPTForCausalLM(OPTConfig(vocab_size=16, hidden_size=8, ffn_dim=8, num_hidden_layers=1,
                                          num_attention_heads=1, word_embed_proj_dim=8, dropout=0.1)), True),
    ],
    ids=["none", "attention", "LoRA without", "LoRA", "OPT's own"],
)  # fmt: skip
def test_dropout_is_seen_wherever_a_model_keeps_it(build, drops):
    model = build().train()
    assert has_dropout(model) == drops
    assert not has_dropout(model.eval())
