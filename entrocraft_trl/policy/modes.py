"""Dropout: whether a model has any that is active, and passes without it."""

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


def has_dropout(model: torch.nn.Module) -> bool:
    """
    Whether a pass in training mode drops anything: dropout modules (LoRA's too), and the rates that attention and some
    older models hand to a function.
    """

    def drops(module: torch.nn.Module) -> bool:
        kind = type(module).__name__.lower()
        return any(
            isinstance(value, float) and value > 0 and "drop" in (kind if name == "p" else name.lower())
            for name, value in vars(module).items()
        )

    return any(module.training and drops(module) for module in model.modules())
