"""From TRL's micro-batches to those that are computed. Pure functions on tensors."""

from collections.abc import Sequence
from typing import Any

import torch

from ..normalisation import (
    KEPT,
    ROW_SCALE,
    WEIGHT,
    advantage_factors,
    micro_batch_weight,
    repacked_weight,
    without_trace,
)
from ..policy.tokens import loss_mask
from .plan import MicroBatch, Row, Share


# A tensor of what [`Share`] holds, for the metrics of the micro-batch.
SHARE = "entrocraft_share"

PROMPTS = ("prompt_ids", "prompt_mask")
UNSLICEABLE = -1


def is_sliceable(inputs: dict[str, Any]) -> bool:
    """
    Whether rows can be taken out of loss inputs one by one, and tokens off their ends: images come in other numbers
    than rows, and masks over prompt and completion together in other widths.
    """
    rows, completion_width = inputs["completion_ids"].shape
    prompt_width = inputs["prompt_ids"].size(1)
    for key, value in inputs.items():
        if value is None or (isinstance(value, torch.Tensor) and value.ndim == 0):
            continue
        if not isinstance(value, torch.Tensor) or value.size(0) != rows:
            return False
        width = prompt_width if key in PROMPTS else completion_width
        if value.ndim > 1 and value.size(1) not in ((width,) if key in PROMPTS else (width, 1)):
            return False
    return True


def row_facts(inputs: dict[str, Any], *, kl_in_loss: bool) -> torch.Tensor:
    """
    What `plan` has to know of the rows of a micro-batch, `(B, 6)`: the fields of [`Row`], and the padded widths of
    prompts and completions. Where rows cannot be taken out one by one, `UNSLICEABLE` stands for whether they carry
    gradient.

    A row carries gradient if it has a loss token, and an advantage or a KL term. RLOO's loss, known by `old_logps`, is
    one of whole sequences: it reads the advantage alone, and that also where a sequence has no token.

    Args:
        inputs (`dict`): Loss inputs as TRL splits them.
        kl_in_loss (`bool`): Whether the loss has a KL term, which acts on rows without an advantage too.
    """
    advantages = inputs["advantages"]
    has_advantage = (advantages != 0).view(len(advantages), -1).any(dim=1)
    if "old_logps" in inputs:
        carries, mask = has_advantage, inputs["completion_mask"]
    else:
        mask = loss_mask(inputs)
        carries = mask.bool().any(dim=1) & (has_advantage | kl_in_loss)
    widths = [inputs["prompt_ids"].size(1), inputs["completion_ids"].size(1)]
    columns = [
        carries.long() if is_sliceable(inputs) else torch.full_like(carries, UNSLICEABLE, dtype=torch.long),
        _span(inputs["prompt_mask"].flip(1)),  # padded on the left
        _span(inputs["completion_mask"]),
        mask.sum(dim=1),
        *(torch.full_like(carries, width, dtype=torch.long) for width in widths),
    ]
    return torch.stack([column.long() for column in columns], dim=1)


def _span(mask: torch.Tensor) -> torch.Tensor:
    """Columns up to and with the last token of each row, `(B,)`: a mask may have holes."""
    return (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(dim=1)


def rows_from_facts(facts: Sequence[Sequence[int]]) -> tuple[list[Row], tuple[int, int]]:
    """Rows and padded widths from what `row_facts` says of one rank."""
    return [Row(bool(carries), *lengths) for carries, *lengths, _, _ in facts], (facts[0][4], facts[0][5])


def packed(
    window: Sequence[dict[str, Any]], plan: Sequence[MicroBatch], shares: Sequence[Share], normaliser: str
) -> list[dict[str, Any]]:
    """
    Loss inputs of the micro-batches in `plan`, weighed so that their gradients add up to those of the window's.

    Args:
        window: TRL's micro-batches of the window, `B` rows each.
        plan, shares: Of this rank, from `plan_window` and `shares`.
        normaliser (`str`): What the loss divides by, from `loss_normaliser`.
    """
    rows_before = len(window[0]["advantages"])
    joined = _joined(window)
    weights = [micro_batch_weight(inputs, normaliser) for inputs in window]
    result = []
    for micro_batch, share in zip(plan, shares, strict=True):
        inputs = _taken(joined, micro_batch)
        if micro_batch.fillers:
            keep = torch.tensor([row not in micro_batch.fillers for row in micro_batch.rows])
            inputs = without_trace(inputs, keep.to(inputs["advantages"].device))
        if normaliser == "local_tokens":
            came_from = [row // rows_before for row in micro_batch.rows]
            inputs["advantages"] = _reweighed(inputs, window, weights, came_from)
        # Those of rows are the same for all micro-batches: that of the generation batch.
        weight = repacked_weight(weights[0], len(micro_batch.rows), rows_before, normaliser)
        inputs[WEIGHT] = torch.tensor(weight, device=inputs["advantages"].device)
        inputs[SHARE] = torch.tensor(share)
        result.append(inputs)
    return result


def _joined(window: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = window[0]
    return {
        key: torch.cat([inputs[key] for inputs in window]) if isinstance(value, torch.Tensor) and value.ndim else value
        for key, value in first.items()
        if key not in (KEPT, ROW_SCALE)
    }


def _taken(joined: dict[str, Any], micro_batch: MicroBatch) -> dict[str, Any]:
    completion_ids = joined["completion_ids"]
    rows = torch.tensor(micro_batch.rows, device=completion_ids.device)
    taken = {}
    for key, value in joined.items():
        if isinstance(value, torch.Tensor) and value.ndim:
            if key in PROMPTS:  # padded on the left
                value = value[:, value.size(1) - micro_batch.prompt_width :]
            elif value.ndim > 1 and value.size(1) == completion_ids.size(1):
                value = value[:, : micro_batch.completion_width]
            value = value[rows]
        taken[key] = value
    return taken


def _reweighed(
    inputs: dict[str, Any],
    window: Sequence[dict[str, Any]],
    weights: Sequence[torch.Tensor | float],
    came_from: Sequence[int],
) -> torch.Tensor:
    """Advantages for a loss that divides by the loss tokens of the micro-batch."""
    advantages = inputs["advantages"]
    of_windows = torch.tensor([float(weight) for weight in weights], device=advantages.device)
    tokens = torch.stack([loss_mask(part).sum() for part in window])
    index = torch.tensor(came_from, device=advantages.device)
    factors = advantage_factors(of_windows[index], tokens[index], loss_mask(inputs).sum())
    return advantages * factors.view(-1, *[1] * (advantages.ndim - 1)).to(advantages.dtype)
