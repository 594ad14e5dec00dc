"""Passes without dropout, and whether there is any."""

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


def active_dropout(model: torch.nn.Module) -> str | None:
    """
    Name and rate of a dropout that acts in the model's present mode, as in `"layers.0.self_attn.attention_dropout =
    0.1"`; `None` if there is none.

    Modules of dropout are looked at, and numbers called after it: attention takes its rate as an argument.
    """
    for name, module in model.named_modules():
        if not module.training:
            continue
        is_dropout = "Dropout" in type(module).__name__
        for key, value in vars(module).items():
            if isinstance(value, float) and value > 0 and ("drop" in key or (is_dropout and key == "p")):
                return f"{name}.{key} = {value}"
    return None
