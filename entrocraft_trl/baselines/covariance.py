"""Covariance of a token's log-prob and advantage, and the choice among the tokens of all ranks (arXiv 2505.22617)."""

import textwrap

import torch
from accelerate import Accelerator


PAPER = {
    "title": "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models",
    "id": "2505.22617",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{cui2025entropy,
            title  = {{The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models}},
            author = {Ganqu Cui and Yuchen Zhang and Jiacheng Chen and Lifan Yuan and Zhi Wang and Yuxin Zuo and Haozhan Li and Yuchen Fan and Huayu Chen and Weize Chen and Zhiyuan Liu and Hao Peng and Lei Bai and Wanli Ouyang and Yu Cheng and Bowen Zhou and Ning Ding},
            year   = 2025,
            eprint = {arXiv:2505.22617},
        }"""),  # noqa: E501
}


def token_covariances(
    logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, accelerator: Accelerator
) -> tuple[torch.Tensor, int]:
    """
    `Cov = (log p - mean log p) (A - mean A)` of each loss token, and how many there are.

    The means run over the tokens of one micro-batch of every rank, where the paper has those of the batch of an
    optimizer step. Both agree without gradient accumulation; with it, the rest of the step has not been computed yet.

    Args:
        logps, advantages (`torch.Tensor` of shape `(B, T)`): Of this rank's tokens, without gradient.
        mask (`torch.Tensor` of shape `(B, T)`): 1 on loss tokens.
        accelerator (`Accelerator`): Of all ranks, each of which has to call this.

    Returns:
        `tuple[torch.Tensor, int]`: `(B, T)`, minus infinity outside of the loss; and the loss tokens of all ranks.
    """
    mask = mask.bool()
    sums = torch.stack([logps[mask].sum(), advantages[mask].sum(), mask.sum()]).float()
    logp_sum, advantage_sum, tokens = accelerator.reduce(sums, reduction="sum")
    count = tokens.clamp(min=1)
    covariances = (logps - logp_sum / count) * (advantages - advantage_sum / count)
    return covariances.masked_fill(~mask, -torch.inf), int(tokens.item())


def highest_of_all_ranks(scores: torch.Tensor, count: int, accelerator: Accelerator) -> torch.Tensor:
    """
    Mask of the `count` highest finite scores among those of all ranks, or of all that are finite if they are fewer.

    Args:
        scores (`torch.Tensor` of shape `(B, T)`): This rank's; the shapes of ranks may differ.
        count (`int`): The same on all ranks.
        accelerator (`Accelerator`): Of all ranks, each of which has to call this.

    Returns:
        `torch.Tensor` of shape `(B, T)`: Boolean.
    """
    own = scores.flatten()
    padded = accelerator.pad_across_processes(own, dim=0, pad_index=-torch.inf)
    everyones = accelerator.gather(padded)
    # A stable order: ranks that broke ties differently would choose another number of tokens than `count`.
    order = everyones.sort(descending=True, stable=True).indices[:count]
    chosen = torch.zeros_like(everyones, dtype=torch.bool)
    chosen[order] = True
    chosen &= torch.isfinite(everyones)
    first = accelerator.process_index * len(padded)
    return chosen[first : first + len(own)].view_as(scores)


def share_as_count(share: float, tokens: int) -> int:
    """`share` of the tokens, rounded down, but at least one, as the official code has it; none for a share of 0."""
    return max(1, int(share * tokens)) if share else 0
