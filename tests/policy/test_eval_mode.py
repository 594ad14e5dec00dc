"""Passes without dropout leave the model's modes as they were."""

import pytest
import torch

from entrocraft_trl.policy.eval_mode import eval_mode


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
