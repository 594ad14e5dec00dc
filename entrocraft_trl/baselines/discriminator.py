"""The entropy discriminator of a token, and tokens that leave the loss because of it (arXiv 2602.03392)."""

import textwrap
from typing import Any

import torch
from accelerate import Accelerator


PAPER = {
    "title": "On the Entropy Dynamics in Reinforcement Fine-Tuning of Large Language Models",
    "id": "2602.03392",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{wang2026entropy,
            title  = {{On the Entropy Dynamics in Reinforcement Fine-Tuning of Large Language Models}},
            author = {Shumin Wang and Yuexiang Xie and Wenhao Zhang and Yuchang Sun and Yanxi Chen and Yaliang Li and Yanyong Zhang},
            year   = 2026,
            eprint = {arXiv:2602.03392},
        }"""),  # noqa: E501
}


def mean_and_deviation(values: torch.Tensor, mask: torch.Tensor, accelerator: Accelerator) -> tuple[float, float, int]:
    """
    Mean and population standard deviation of `values` over the loss tokens of all ranks, and how many these are.

    Args:
        values, mask (`torch.Tensor` of shape `(B, T)`): Of this rank.
        accelerator (`Accelerator`): Of all ranks, each of which has to call this.
    """
    values = values[mask.bool()].float()
    sums = torch.stack([values.sum(), torch.tensor(float(len(values)), device=values.device)])
    total, tokens = accelerator.reduce(sums, reduction="sum").tolist()
    mean = total / max(tokens, 1.0)
    # From distances to the mean: a difference of two large sums would lose a small deviation.
    squares = accelerator.reduce(((values - mean) ** 2).sum(), reduction="sum").item()
    return mean, (squares / max(tokens, 1.0)) ** 0.5, int(tokens)


def without_tokens(batch: dict[str, Any], leaving: torch.Tensor, accelerator: Accelerator) -> tuple[dict, int]:
    """
    Loss inputs of this rank in which the tokens `leaving` `(B, T)`, a boolean mask of loss tokens, have left the loss,
    its denominator and its KL term; and how many these are on all ranks, each of which has to call this.

    They leave `tool_mask`, which the loss reads and the model does not: contexts stay as they were sampled.
    """
    total = int(accelerator.reduce(leaving.sum(), reduction="sum").item())
    tool_mask = batch.get("tool_mask", torch.ones_like(batch["completion_mask"]))
    changed = {**batch, "tool_mask": tool_mask * (~leaving).to(tool_mask.dtype)}
    if "num_items_in_batch" in batch:
        changed["num_items_in_batch"] = batch["num_items_in_batch"] - total
    return changed, total
