"""Passes without dropout."""

from contextlib import contextmanager

import torch


@contextmanager
def eval_mode(model: torch.nn.Module):
    """
    Dropout off inside, every module's own mode restored after. Without it a measuring pass would draw random numbers,
    and a run whose band is never left would not be plain GRPO's run.

    Only flags are set: with `use_kernels=True`, transformers' `eval()` also swaps the kernels of the Hub for those of
    inference, and flags alone do not swap them back, so that the loss would be computed with them.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
