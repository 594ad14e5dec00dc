"""
What a loss divides by, and what a micro-batch's loss is multiplied with when its rows are not those that TRL put into
it: some were dropped, or others are computed. The only place that knows it.
"""

from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer


# Keys that ride with the loss inputs. The first two go through TRL's shuffle and split after rows were dropped; the
# third replaces them where a micro-batch was made up anew, and is the weight itself.
KEPT = "entrocraft_kept"
ROW_SCALE = "entrocraft_row_scale"
WEIGHT = "entrocraft_weight"

# What the loss reads of a row that is to leave no trace in it, in place of its values, so that its terms stay finite
# however far the policy moves: an infinite term times a mask or an advantage of 0 is NaN. Log-probs are at most 0,
# hence importance ratios at most 1; the KL term exp(r - l) - (r - l) - 1 is finite for all l above r.
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
                f"{cls.__name__} computes a loss of its own, and this package has to know what it divides by. Add "
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
            f"this package has to know what the loss divides by, got loss_type={loss_type!r}; known are "
            f"{', '.join(map(repr, LOSS_TYPES))}."
        )
    return LOSS_TYPES[loss_type]


def zero_advantage_is_inert(trainer_class: type) -> bool:
    """
    Whether each row's loss reads that row alone, is proportional to the size of its advantage, and is 0 with its
    gradient where the advantage is 0, but for a KL term: so that such a row need not be computed.

    It is so for TRL's losses. A loss of one's own may take statistics over all rows, or have a term without advantage;
    the class that defines `_compute_loss` or `compute_loss`, or one before it, says `zero_advantage_is_inert = True`
    where it does not. A second dimension of a tensor among its inputs that is as long as the completions is then taken
    for their tokens.
    """
    for cls in trainer_class.__mro__:
        if "zero_advantage_is_inert" in vars(cls):
            return bool(vars(cls)["zero_advantage_is_inert"])
        # What this package does in `compute_loss` is to weigh what comes out.
        is_ours = cls.__module__.split(".")[0] == "entrocraft_trl"
        if "_compute_loss" in vars(cls) or ("compute_loss" in vars(cls) and not is_ours):
            return cls in TRL_LOSSES
    return False


def micro_batch_weight(inputs: dict[str, Any], normaliser: str) -> torch.Tensor | float:
    """
    Factor above 0 for a micro-batch's loss, so that rows weigh as in a batch of the rows that were kept. Where none is
    left the loss is 0 for any factor.

    Row means run over the `B` rows of the micro-batch, rejected ones included, so they are too small by the accepted
    share of the generation batch. Means over the tokens left in the micro-batch count for as many rows as it has left.
    Sums over `num_items_in_batch` are right already: whoever drops rows recounts it.

    Args:
        inputs (`dict`): Loss inputs of the micro-batch.
        normaliser (`str`): What `loss_normaliser` returns.
    """
    if WEIGHT in inputs:
        return inputs[WEIGHT]
    if normaliser == "tokens" or KEPT not in inputs:
        return 1.0
    if normaliser == "local_tokens":
        kept = inputs[KEPT]
        return inputs[ROW_SCALE] * kept.sum().clamp(min=1) / len(kept)
    return inputs[ROW_SCALE]


def repacked_weight(weight: torch.Tensor | float, rows: int, rows_before: int, normaliser: str) -> float:
    """
    Factor for the loss of a micro-batch of `rows` rows, taken from micro-batches of `rows_before` rows each that had
    the factor `weight`.

    A mean over `rows` rows counts each of them as `rows_before / rows` of what it counted for. What divides by tokens
    needs nothing here: those of the whole batch stay the same, for those of the micro-batch see `advantage_factors`.
    """
    return float(weight) * rows / rows_before if normaliser in ("rows", "row_means") else 1.0


def advantage_factors(weights: torch.Tensor, tokens_before: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    What the advantages `(B,)` of a micro-batch are multiplied with where the loss divides by the micro-batch's own
    tokens: each row weighs as among the tokens that it shared a micro-batch with before.

    Args:
        weights (`torch.Tensor` of shape `(B,)`): Factor of the micro-batch that each row comes from.
        tokens_before (`torch.Tensor` of shape `(B,)`): Loss tokens of that micro-batch.
        tokens (`torch.Tensor` of shape `()`): Loss tokens of this one.
    """
    return weights * tokens.clamp(min=1) / tokens_before.clamp(min=1)


def without_trace(inputs: dict[str, Any], keep: torch.Tensor) -> dict[str, Any]:
    """
    New loss inputs to whose loss and gradient rows outside of `keep` `(B,)` add exactly 0.

    The mask is `tool_mask`, which GRPO's loss reads and the model does not. RLOO's loss reads no mask but the model's;
    there the advantage of 0 alone does it, and the KL penalty is part of the advantage.
    """
    silenced = dict(inputs)
    advantages = inputs["advantages"]
    silenced["advantages"] = advantages.masked_fill(~keep.view(-1, *[1] * (advantages.ndim - 1)), 0.0)
    tool_mask = inputs.get("tool_mask", torch.ones_like(inputs["completion_mask"]))
    silenced["tool_mask"] = tool_mask * keep.unsqueeze(1).to(tool_mask.dtype)
    for key in HARMLESS.keys() & inputs.keys():
        if inputs[key] is not None:
            silenced[key] = inputs[key].clone()
            silenced[key][~keep] = HARMLESS[key]
    return silenced
