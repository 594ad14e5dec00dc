"""Log p, H and N of each token from the hidden states of a pass: one projection, and no logits `(B, T, V)`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from trl.trainer import utils

from .tokens import TokenReading, entropy_moments


TOKENS_AT_ONCE = 1024  # whose logits exist at one time


def read_hidden_states(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TokenReading:
    """
    What a head says of the tokens `targets`, without gradients.

    Args:
        hidden (`torch.Tensor` of shape `(N, D)`): Hidden states before each token.
        weight (`torch.Tensor` of shape `(V, D)`), bias (`torch.Tensor` of shape `(V,)`, *optional*): Of the head.
        targets (`torch.Tensor` of shape `(N,)`): Token ids.
        temperature (`float`): Of the sampling.
        softcap (`float`, *optional*), logit_scale (`float`, *optional*): What the model does with its logits.

    Returns:
        `TokenReading`: `(N,)` each, float32.
    """
    parts = []
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    for states, ids in zip(hidden.split(TOKENS_AT_ONCE), targets.split(TOKENS_AT_ONCE), strict=True):
        logits = torch.nn.functional.linear(states, weight, bias)
        if logit_scale != 1.0:
            logits = logits * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_normaliser, entropies, expected = entropy_moments(logits, temperature)
        chosen = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1).float()
        parts.append(TokenReading(chosen / temperature - log_normaliser, entropies, expected))
    return TokenReading(*(torch.cat(values) for values in zip(*parts, strict=True)))


class _Kernel:
    """
    In the place of the kernel of TRL's fused head: it gets what that gets, hidden states, the gathered weight, softcap
    and logit scale, which are TRL's matter. N rides in a slot of the output for which nobody asks.
    """

    def __init__(self, log_probs_of: type[torch.autograd.Function] | None):
        self.log_probs_of = log_probs_of

    def apply(self, hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
        found = read_hidden_states(hidden, weight, bias, targets, temperature, softcap, logit_scale)
        if self.log_probs_of is None:
            return found.logps, found.entropies, found.expected, None, None
        arguments = (hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs)
        log_probs, entropies, *_ = self.log_probs_of.apply(*arguments)
        return log_probs, entropies, found.expected, None, None


@contextmanager
def expected_terms(model: torch.nn.Module, *, trls_log_probs: bool) -> Iterator[list[torch.Tensor]]:
    """
    Inside, each call of `model` with TRL's fused head adds N of its tokens, of the shape of its log-probs, to the list
    that this yields. No-grad calls only.

    All numbers are of the hidden states of one call, and so of one policy, dropout or not.

    Args:
        model (`torch.nn.Module`): The causal LM that TRL has given its fused head, unwrapped.
        trls_log_probs (`bool`): Whether log-probs and entropies are TRL's to the last bit, at the price of a second
            projection: training goes on with those of the old policy. Otherwise they come from the same logits as N.
    """
    terms: list[torch.Tensor] = []
    kernel = utils._ChunkedLogProbFunction
    hook = model.register_forward_hook(lambda module, arguments, output: terms.append(output.log_sum_sq_probs))
    utils._ChunkedLogProbFunction = _Kernel(kernel if trls_log_probs else None)
    try:
        yield terms
    finally:
        utils._ChunkedLogProbFunction = kernel
        hook.remove()
