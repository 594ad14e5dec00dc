"""Passes of the policy over the rollouts of a batch: TRL's own, found again, or one that is run for the reading."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .eval_mode import eval_mode
from .tokens import TokenReading


def find_policy_pass(
    passes: Sequence[TokenReading], batch: dict[str, Any], completion_mask: torch.Tensor
) -> TokenReading | None:
    """
    The pass among `passes` whose log-probs TRL put into the loss inputs as the old policy's, or `None`.

    GRPO keeps the tensor itself (`old_per_token_logps`), RLOO its masked sum (`old_logps`). Matching the values that
    came out, instead of repeating TRL's condition for running the pass, cannot pick the reference model's pass.
    """
    old_sums = batch.get("old_logps")
    for candidate in passes:
        if candidate.logps is batch.get("old_per_token_logps"):
            return candidate
        if old_sums is not None and torch.equal((candidate.logps * completion_mask).sum(1), old_sums):
            return candidate
    return None


def run_policy_pass(read: Callable[..., tuple[TokenReading, Any]], model, batch: dict[str, Any], batch_size: int):
    """
    One no-grad pass of `model` over the rollouts of `batch`, in eval mode and chunks of `batch_size` rows.

    Args:
        read (`Callable`): Takes what TRL's `_get_per_token_logps_and_entropies` takes, and returns a [`TokenReading`]
            and a router loss.

    Returns:
        `TokenReading`: Of the completions, `(B, T)`.
    """
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    multimodal = {key: batch[key] for key in MULTIMODAL_KEYS if key in batch}
    with torch.no_grad(), eval_mode(model):
        width = batch["completion_ids"].size(1)
        reading, _ = read(model, input_ids, attention_mask, width, batch_size=batch_size, **multimodal)
    return reading


MULTIMODAL_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
