"""N of each token from the hidden states of a pass that runs anyway: TRL's fused head, asked a second time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from trl.trainer.utils import add_fused_lm_head

from .tokens import expected_entropy_term


class _BackboneHasRun:
    """Stands in for a model whose backbone has run: all that TRL's fused head asks of a model, and no computation."""

    def __init__(self, model: torch.nn.Module):
        self.config = model.config
        self.get_output_embeddings = model.get_output_embeddings
        self.output: Any = None

    def base_model(self, *args, **kwargs) -> Any:
        return self.output

    def forward(self, *args, **kwargs):
        raise NotImplementedError("replaced by TRL's fused head")


@contextmanager
def expected_terms(model: torch.nn.Module, temperature: float, cast_lm_head_to_fp32: bool) -> Iterator[list]:
    """
    Inside, each call of `model` with TRL's fused head adds `N` of its tokens, of the shape of its log-probs, to the
    list that this yields. No-grad calls only.

    The head at half the temperature sees `p^2 / sum p^2`, which is what `expected_entropy_term` needs. It gets the
    hidden states of the very call, so that both belong to one policy, dropout or not; softcap, logit scale and sharded
    heads are TRL's matter, as are the chunks that keep the `(B, T, V)` logits out of memory.

    Args:
        model (`torch.nn.Module`): The causal LM that TRL has given its fused head, unwrapped.
        temperature (`float`): The sampling temperature.
        cast_lm_head_to_fp32 (`bool`): As the trainer's own head does.
    """
    half = _BackboneHasRun(model)
    add_fused_lm_head(
        half, temperature=temperature / 2, cast_lm_head_to_fp32=cast_lm_head_to_fp32, outputs=("log_probs", "entropy")
    )
    terms: list[torch.Tensor] = []
    fused = model.forward

    def forward(*args, fused_lm_head: bool = False, **kwargs):
        output = fused(*args, fused_lm_head=fused_lm_head, **kwargs)
        if fused_lm_head:
            at_half = half.forward(*args, fused_lm_head=True, **kwargs)
            terms.append(expected_entropy_term(output.log_probs, output.entropy, at_half.log_probs, at_half.entropy))
        return output

    def keep_output(module, arguments, output) -> None:
        half.output = output

    hook = model.base_model.register_forward_hook(keep_output)
    model.forward = forward
    try:
        yield terms
    finally:
        model.forward = fused
        hook.remove()
