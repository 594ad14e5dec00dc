"""Numbers of sampled tokens. Pure functions on tensors."""

from typing import Any, NamedTuple

import torch


# Logits that are worked on at once. On a CPU they stay in its cache, which takes a quarter of the time; on an
# accelerator the copies of a chunk stay small beside what a model needs anyway.
CPU_CHUNK, CHUNK = 200_000, 10_000_000


class TokenReading(NamedTuple):
    """
    What the policy says of each sampled token, all `(B, T)`, at the sampling temperature over the full vocabulary:
    log-probs, entropies H in nats, and, where it was read, `N = sum_v p_v^2 (log p_v + H)` of `entropy_moments`.
    """

    logps: torch.Tensor
    entropies: torch.Tensor
    expected: torch.Tensor | None = None


def loss_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """Mask `(B, T)` of the tokens that TRL's loss reads: the completion mask, without tool and environment tokens."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def entropy_moments(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Log-normaliser, entropy H (nats) and `N = sum_v p_v^2 (log p_v + H)` of `softmax(logits / temperature)`.

    With `u` the distance to the largest logit and `e = exp u`, all follow from four sums: `Z = sum e`, `A = sum e u`,
    `B = sum e^2` and `C = sum e^2 u` give `H = log Z - A / Z` and `N = (C - A B / Z) / Z^2`.

    Args:
        logits (`torch.Tensor` of shape `(B, V)`): As the model returns them, of any floating-point type.
        temperature (`float`): Of the sampling.

    Returns:
        Three `torch.Tensor` of shape `(B,)`, float32.
    """
    parts = []
    at_once = CPU_CHUNK if logits.device.type == "cpu" else CHUNK
    for chunk in logits.split(max(at_once // logits.size(-1), 1)):
        u = chunk.float() / temperature
        largest = u.amax(dim=-1, keepdim=True)
        u = u - largest
        e = u.exp()
        eu = e * u
        z, a, b, c = e.sum(dim=-1), eu.sum(dim=-1), (e * e).sum(dim=-1), (e * eu).sum(dim=-1)
        parts.append((z.log() + largest.squeeze(-1), z.log() - a / z, (c - a * b / z) / z**2))
    log_normaliser, entropy, expected = (torch.cat(part) for part in zip(*parts, strict=True))
    return log_normaliser, entropy, expected


def sampled_entropy_term(logps: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
    """
    `S = p (log p + H)` of each sampled token, `(B, T)`. Large for confident tokens, negative for unlikely ones.

    Under a softmax whose logits follow the policy gradient, one token changes its distribution's entropy by
    `-eta * A * (S - N)` at first order (arXiv 2602.03392), where N is the policy's own mean of S.

    Args:
        logps (`torch.Tensor` of shape `(B, T)`): Log-probs of the sampled tokens.
        entropies (`torch.Tensor` of shape `(B, T)`): Token entropies in nats.
    """
    return logps.exp() * (logps + entropies)
