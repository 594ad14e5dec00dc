"""From loss inputs and a keep mask to loss inputs: the only place where a rejection takes effect."""

from typing import Any

import torch

from ..normalisation import KEPT, ROW_SCALE, without_trace


# Values of `rejected_rollouts`, and what the model card says of them.
REJECTED = {
    "drop": "They left the loss and its denominator.",
    "zero_advantage": "They stayed in the loss with advantage 0.",
}


def token_weights(mask: torch.Tensor, normaliser: str) -> torch.Tensor:
    """
    What each token of a rollout weighs in the loss, up to a factor of the whole batch, `(B,)`: 1, or 1 / |o| where the
    loss takes the mean of each row first.

    Args:
        mask (`torch.Tensor` of shape `(B, T)`): 1 on loss tokens.
        normaliser (`str`): What `loss_normaliser` returns.
    """
    lengths = mask.sum(dim=1).clamp(min=1).float()
    return 1.0 / lengths if normaliser == "row_means" else torch.ones_like(lengths)


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
    Take rejected rollouts out of the loss, its denominator and its KL term (after arXiv 2604.26326, Eq. 5).

    Eq. 5 divides by the accepted rollouts of each question, and then takes the mean over questions. Here the whole
    generation batch, on all ranks, has one normaliser: the accepted rollouts of all questions, or their tokens,
    whichever the loss counts. So do TRL's losses, and the step is the one that TRL takes on the accepted rollouts
    alone. Each of them weighs the same; in Eq. 5 the only one left of a question weighs as much as all that are left
    of another, and a question with none is 0 / 0. Both agree if every question has as many left.

    Rows are masked rather than deleted, so that TRL's split finds as many as it expects, on all ranks: it drops a
    remainder in silence, and ranks with different row counts abort or hang in TRL's metric gathers.
    `micro_batch_weight` corrects the row means. Which rows are computed is decided after the split.

    The mask is `tool_mask`, which GRPO's loss reads and the model does not. Multimodal models place images by the
    attention mask: without a rejected row's images the next row would take their shapes.

    Args:
        inputs (`dict`): Loss inputs of this rank, `B` rows. Not modified.
        keep (`torch.Tensor` of shape `(B,)`): Boolean keep mask of this rank's rows.
        token_normaliser (`float`): Loss tokens that the accepted rollouts of all ranks hold.
        row_normaliser_share (`float`): Share of all ranks' rollouts by which row means are normalised; 0 if none is
            accepted and no floor is set, which leaves a loss of 0 for any scale.

    Returns:
        `dict`: New loss inputs; a rejected row adds exactly 0 to the loss and to its gradient.
    """
    dropped = without_trace(inputs, keep)
    if "num_items_in_batch" in inputs:
        # A float: TRL's count is an integer, and a floor on the accepted share is not.
        dropped["num_items_in_batch"] = torch.tensor(float(token_normaliser), device=keep.device)
    dropped[KEPT] = keep
    scale = 1.0 / row_normaliser_share if row_normaliser_share > 0 else 1.0
    dropped[ROW_SCALE] = torch.tensor(scale, device=keep.device)
    return dropped
