"""Numbers of sampled tokens. Pure functions on tensors."""

from typing import Any, NamedTuple

import torch


class TokenReading(NamedTuple):
    """
    What the policy says of each sampled token, all `(B, T)`, at the sampling temperature over the full vocabulary:
    log-probs, entropies H in nats, and, where it was asked for, N of `expected_entropy_term`.
    """

    logps: torch.Tensor
    entropies: torch.Tensor
    expected: torch.Tensor | None = None


def loss_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """Mask `(B, T)` of the tokens that TRL's loss reads: the completion mask, without tool and environment tokens."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


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


def expected_entropy_term(
    logps: torch.Tensor, entropies: torch.Tensor, half_logps: torch.Tensor, half_entropies: torch.Tensor
) -> torch.Tensor:
    """
    `N = sum_v p_v^2 (log p_v + H)` of each token, exact, from two temperatures and without any logits.

    At half the temperature the distribution is `q = p^2 / Z` with `Z = sum_v p_v^2`. So `log Z = 2 log p_k - log q_k`
    for any token k, and q's entropy `H_q = log Z - 2 sum_v q_v log p_v` yields the second moment:
    `N = Z (H + (log Z - H_q) / 2)`.

    Args:
        logps, entropies (`torch.Tensor` of shape `(B, T)`): At the sampling temperature, as in `sampled_entropy_term`.
        half_logps, half_entropies (`torch.Tensor` of shape `(B, T)`): The same tokens at half that temperature.
    """
    log_z = 2 * logps - half_logps
    return log_z.exp() * (entropies + (log_z - half_entropies) / 2)
