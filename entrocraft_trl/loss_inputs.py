"""From loss inputs and a keep mask to loss inputs: the only place where a rejection takes effect."""

from typing import Any

import torch


# Keys that ride with the loss inputs through TRL's shuffle and split, to be read by `micro_batch_weight`.
KEPT = "entrocraft_kept"
ROW_SCALE = "entrocraft_row_scale"

# How TRL normalises each loss. Token losses divide by `num_items_in_batch`; row losses average over all rows of a
# micro-batch, rejected ones included; `bnpo` averages over the unmasked tokens of the micro-batch.
TOKEN_NORMALISED_LOSSES = ("dapo", "cispo", "vespo")
ROW_NORMALISED_LOSSES = ("grpo", "dr_grpo", "sapo", "luspo", "rloo")
LOCAL_TOKEN_NORMALISED_LOSSES = ("bnpo",)
LOSS_TYPES = TOKEN_NORMALISED_LOSSES + ROW_NORMALISED_LOSSES + LOCAL_TOKEN_NORMALISED_LOSSES


def loss_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """Mask `(B, T)` of the tokens that TRL's loss reads: the completion mask, without tool and environment tokens."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def zero_advantages(inputs: dict[str, Any], keep: torch.Tensor) -> dict[str, Any]:
    """
    Give rejected rollouts advantage 0 and leave the rest (official code): they keep their place in the denominator and
    their KL term.

    Args:
        inputs (`dict`): Loss inputs with `advantages` of shape `(B,)`.
        keep (`torch.Tensor` of shape `(B,)`): Boolean keep mask.
    """
    return {**inputs, "advantages": inputs["advantages"].masked_fill(~keep, 0.0)}


def drop_rollouts(
    inputs: dict[str, Any], keep: torch.Tensor, *, token_normaliser: float, row_normaliser_share: float
) -> dict[str, Any]:
    """
    Take rejected rollouts out of the loss, its denominator and its KL term (arXiv 2604.26326, Eq. 5).

    Rows are masked rather than deleted, so that all ranks and all micro-batches keep their shapes: ranks with
    different row counts abort or hang in TRL's metric gathers. `micro_batch_weight` corrects the row means.

    Args:
        inputs (`dict`): Loss inputs of this rank, `B` rows. Not modified.
        keep (`torch.Tensor` of shape `(B,)`): Boolean keep mask of this rank's rows.
        token_normaliser (`float`): Loss tokens that the accepted rollouts of all ranks hold.
        row_normaliser_share (`float`): Share of all ranks' rollouts by which row means are normalised; 0 if none.

    Returns:
        `dict`: New loss inputs; a rejected row adds exactly 0 to the loss and to its gradient.
    """
    dropped = zero_advantages(inputs, keep)
    mask = inputs["completion_mask"]
    dropped["completion_mask"] = mask * keep.unsqueeze(1).to(mask.dtype)
    if "num_items_in_batch" in inputs:
        # A float: TRL's count is an integer, and a floor on the accepted share is not.
        dropped["num_items_in_batch"] = torch.tensor(float(token_normaliser), device=keep.device)
    if "old_logps" in inputs:
        # RLOO sums log-probs over the masked row, which is now 0; against the old sum the ratio could overflow to inf,
        # and inf times the zero advantage is NaN.
        dropped["old_logps"] = inputs["old_logps"].masked_fill(~keep, 0.0)
    dropped[KEPT] = keep
    scale = 1.0 / row_normaliser_share if row_normaliser_share > 0 else 0.0
    dropped[ROW_SCALE] = torch.tensor(scale, device=keep.device)
    return dropped


def micro_batch_weight(inputs: dict[str, Any], loss_type: str) -> torch.Tensor | float:
    """
    Factor for a micro-batch's loss after `drop_rollouts`, so that rows weigh as in a batch of accepted rollouts.

    TRL's row means run over the `B` rows of the micro-batch, rejected ones included, so they are too small by the
    accepted share of the generation batch. `bnpo` averages over the tokens left in the micro-batch, and counts for as
    many rows as it has left.

    Args:
        inputs (`dict`): Loss inputs of the micro-batch.
        loss_type (`str`): One of `LOSS_TYPES`.
    """
    if ROW_SCALE not in inputs or loss_type in TOKEN_NORMALISED_LOSSES:
        return 1.0
    if loss_type in LOCAL_TOKEN_NORMALISED_LOSSES:
        return inputs[ROW_SCALE] * inputs[KEPT].float().mean()
    return inputs[ROW_SCALE]
