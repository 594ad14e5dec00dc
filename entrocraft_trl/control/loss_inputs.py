"""From loss inputs and a keep mask to loss inputs: the only place where a rejection takes effect."""

from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from ..policy.tokens import loss_mask as loss_mask


# Values of `rejected_rollouts`, and what the model card says of them.
REJECTED = {
    "drop": "They left the loss and its denominator.",
    "zero_advantage": "They stayed in the loss with advantage 0.",
}

# Keys that ride with the loss inputs through TRL's shuffle and split, to be read by `micro_batch_weight`.
KEPT = "entrocraft_kept"
ROW_SCALE = "entrocraft_row_scale"

# What the loss reads of a rejected row in place of its values, so that its terms stay finite however far the policy
# moves: an infinite term times a mask or an advantage of 0 is NaN. Log-probs are at most 0, hence importance ratios at
# most 1; the KL term exp(r - l) - (r - l) - 1 is finite for all l above r.
HARMLESS = {
    "old_per_token_logps": 0.0,
    "old_logps": 0.0,
    "importance_sampling_ratio": 1.0,
    "ref_per_token_logps": -1e30,
}

# What a loss divides the sum over its tokens by, in the words of a trainer's `loss_normaliser`.
NORMALISERS = {
    "tokens": "by inputs['num_items_in_batch']",
    "rows": "by the rows of the micro-batch, rejected ones included",
    "row_means": "by the tokens of each row, and the means by the rows",
    "local_tokens": "by the loss tokens of the micro-batch",
    "loss_type": "as TRL's loss of that loss_type does",
}
TRL_LOSSES = {GRPOTrainer: "loss_type", RLOOTrainer: "rows"}
LOSS_TYPES = {
    "dapo": "tokens",
    "cispo": "tokens",
    "vespo": "tokens",
    "grpo": "row_means",
    "sapo": "row_means",
    "dr_grpo": "rows",
    "luspo": "rows",
    "bnpo": "local_tokens",
}


def loss_normaliser(trainer_class: type, args: GRPOConfig | RLOOConfig) -> str:
    """
    What the loss of `trainer_class` divides by: `"tokens"`, `"rows"`, `"row_means"` or `"local_tokens"`.

    The class that defines `_compute_loss`, or one before it in the order of inheritance, says so in a class attribute
    `loss_normaliser`, one of `NORMALISERS`; TRL's own losses are known. A declaration further up does not count: it is
    about a loss that was replaced.

    Args:
        trainer_class (`type`): Class of the trainer.
        args (`GRPOConfig` or `RLOOConfig`): Its `loss_type` is read where the loss is that of TRL's `GRPOTrainer`.

    Raises:
        TypeError: If the loss is of someone's own and nobody declares its normaliser.
        ValueError: If the declared normaliser or the `loss_type` is unknown.
    """
    for cls in trainer_class.__mro__:
        declared = vars(cls).get("loss_normaliser", TRL_LOSSES.get(cls))
        if declared is not None:
            break
        if "_compute_loss" in vars(cls):
            choices = "; ".join(f"{name!r}: {meaning}" for name, meaning in NORMALISERS.items())
            raise TypeError(
                f"{cls.__name__} computes a loss of its own, and entropy control has to know what it divides by. Add "
                f'to {trainer_class.__name__} the line\n    loss_normaliser = "row_means"\nor what is right of '
                f"{choices}. "
                "Only rejection_rule='advantage_sign' with rejected_rollouts='zero_advantage' does without."
            )
    if declared not in NORMALISERS:
        raise ValueError(
            f"{trainer_class.__name__}.loss_normaliser must be one of {', '.join(map(repr, NORMALISERS))}, got "
            f"{declared!r}."
        )
    if declared != "loss_type":
        return declared
    loss_type = getattr(args, "loss_type", None)
    if loss_type not in LOSS_TYPES:
        raise ValueError(
            f"entropy control has to know what the loss divides by, got loss_type={loss_type!r}; known are "
            f"{', '.join(map(repr, LOSS_TYPES))}."
        )
    return LOSS_TYPES[loss_type]


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

    Rows are masked rather than deleted, so that all ranks and all micro-batches keep their shapes: ranks with
    different row counts abort or hang in TRL's metric gathers. `micro_batch_weight` corrects the row means.

    The mask is `tool_mask`, which GRPO's loss reads and the model does not. Multimodal models place images by the
    attention mask: without a rejected row's images the next row would take their shapes. RLOO's loss reads no mask but
    the model's; there the advantage of 0 alone rejects, and the KL penalty is part of it.

    Args:
        inputs (`dict`): Loss inputs of this rank, `B` rows. Not modified.
        keep (`torch.Tensor` of shape `(B,)`): Boolean keep mask of this rank's rows.
        token_normaliser (`float`): Loss tokens that the accepted rollouts of all ranks hold.
        row_normaliser_share (`float`): Share of all ranks' rollouts by which row means are normalised; 0 if none is
            accepted and no floor is set, which leaves a loss of 0 for any scale.

    Returns:
        `dict`: New loss inputs; a rejected row adds exactly 0 to the loss and to its gradient.
    """
    dropped = zero_advantages(inputs, keep)
    tool_mask = inputs.get("tool_mask", torch.ones_like(inputs["completion_mask"]))
    dropped["tool_mask"] = tool_mask * keep.unsqueeze(1).to(tool_mask.dtype)
    if "num_items_in_batch" in inputs:
        # A float: TRL's count is an integer, and a floor on the accepted share is not.
        dropped["num_items_in_batch"] = torch.tensor(float(token_normaliser), device=keep.device)
    for key in HARMLESS.keys() & inputs.keys():
        dropped[key] = inputs[key].clone()
        dropped[key][~keep] = HARMLESS[key]
    dropped[KEPT] = keep
    scale = 1.0 / row_normaliser_share if row_normaliser_share > 0 else 1.0
    dropped[ROW_SCALE] = torch.tensor(scale, device=keep.device)
    return dropped


def micro_batch_weight(inputs: dict[str, Any], normaliser: str) -> torch.Tensor | float:
    """
    Factor above 0 for a micro-batch's loss after `drop_rollouts`, so that rows weigh as in a batch of accepted
    rollouts. Where none is left the loss is 0 for any factor.

    Row means run over the `B` rows of the micro-batch, rejected ones included, so they are too small by the accepted
    share of the generation batch. Means over the tokens left in the micro-batch count for as many rows as it has left.
    Sums over `num_items_in_batch` are right already: `drop_rollouts` has recounted it.

    Args:
        inputs (`dict`): Loss inputs of the micro-batch.
        normaliser (`str`): What `loss_normaliser` returns.
    """
    if normaliser == "tokens":
        return 1.0
    if normaliser == "local_tokens":
        kept = inputs[KEPT]
        return inputs[ROW_SCALE] * kept.sum().clamp(min=1) / len(kept)
    return inputs[ROW_SCALE]
