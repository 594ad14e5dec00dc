"""Entropy over the likelier tokens of the vocabulary, and a stand-in for TRL's fused head that computes it."""

from types import SimpleNamespace

import torch
from torch.utils.checkpoint import checkpoint


TOKENS_AT_ONCE = 1024  # whose float32 copies of the logits exist at one time, here and in the backward pass


def clamped_entropy(logits: torch.Tensor, clamp: float) -> torch.Tensor:
    """
    Entropy in nats of the policy renormalised without the `floor(clamp * V)` tokens of lowest logit, `(N,)`.

    Which tokens those are carries no gradient; the logits of the others do (arXiv 2509.03493).

    Args:
        logits (`torch.Tensor` of shape `(N, V)`): Float32, divided by the temperature.
        clamp (`float`): In 0..1; 0 gives the ordinary entropy.
    """
    count = int(clamp * logits.size(-1))
    with torch.no_grad():
        lowest = logits.topk(count, dim=-1, largest=False).indices
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, lowest, True)
    kept = logits.masked_fill(dropped, -torch.inf)
    # The product takes 0 in place of minus infinity, which times a probability of 0 is NaN.
    return kept.logsumexp(-1) - (kept.softmax(-1) * logits.masked_fill(dropped, 0.0)).sum(-1)


def _token_numbers(logits: torch.Tensor, targets: torch.Tensor, temperature: float, clamp: float):
    """Log-prob, entropy (without gradient) and clamped entropy `(N,)` of tokens whose logits are `(N, V)`."""
    logits = logits.float() / temperature
    logps = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    with torch.no_grad():
        entropies = clamped_entropy(logits, 0.0)
    return logps, entropies, clamped_entropy(logits, clamp)


class LogitsHead:
    """
    Stands in for a model in TRL's pass: called as with its fused head, it answers from the model's ordinary logits,
    and keeps the clamped entropies `(B, T)` of each call in `clamped`.

    One forward pass, as before. But the logits `(B, T, V)` of the completions exist, with their gradient, where the
    fused head computes them in tiles.

    Args:
        model (`torch.nn.Module`): The policy, with its wrappers.
        tokens (`int`): T, completion tokens of a row.
        temperature (`float`): Sampling temperature.
        clamp (`float`): As for `clamped_entropy`.
    """

    def __init__(self, model: torch.nn.Module, tokens: int, temperature: float, clamp: float):
        self.model, self.tokens, self.temperature, self.clamp = model, tokens, temperature, clamp
        self.clamped: list[torch.Tensor] = []

    def __call__(self, *, labels: torch.Tensor, fused_lm_head: bool, **inputs) -> SimpleNamespace:
        output = self.model(**inputs, use_cache=False, logits_to_keep=self.tokens + 1)
        logits = output.logits[:, -self.tokens - 1 : -1]
        labels = labels[:, -self.tokens :].to(logits.device)
        padding = labels == -100
        rows, targets = logits.reshape(-1, logits.size(-1)), labels.masked_fill(padding, 0).reshape(-1)
        chunks = [
            checkpoint(_token_numbers, *chunk, self.temperature, self.clamp, use_reentrant=False)
            for chunk in zip(rows.split(TOKENS_AT_ONCE), targets.split(TOKENS_AT_ONCE), strict=True)
        ]
        logps, entropies, clamped = (
            torch.cat(values).view_as(labels).masked_fill(padding, 0.0) for values in zip(*chunks, strict=True)
        )
        self.clamped.append(clamped)
        return SimpleNamespace(log_probs=logps, entropy=entropies, aux_loss=getattr(output, "aux_loss", None))
