"""Passes of the policy over the rollouts of a batch: TRL's own, found again, or one that is run for the reading."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

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
    with torch.no_grad(), eval_mode(model):
        return pass_of_rows(read, model, batch, batch_size)


def pass_of_rows(
    read: Callable[..., tuple[TokenReading, Any]], model, batch: dict[str, Any], batch_size: int
) -> TokenReading:
    """As `run_policy_pass`, with the gradients and in the mode of the caller."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    multimodal = {key: batch[key] for key in MULTIMODAL_KEYS if key in batch}
    width = batch["completion_ids"].size(1)
    reading, _ = read(model, input_ids, attention_mask, width, batch_size=batch_size, **multimodal)
    return reading


def select_rows(batch: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """What a pass reads of some rows of `batch`, images included; what it does not read is left out."""
    read = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", *MULTIMODAL_KEYS}
    # Images lie end to end; TRL splits them by rollout before it shuffles or splits a batch, and so do we.
    whole = split_pixel_values_by_grid({key: value for key, value in batch.items() if key in read})
    rows = list(rows)
    return unsplit_pixel_values_by_grid(
        {
            key: [value[row] for row in rows] if isinstance(value, list) else value[rows]
            for key, value in whole.items()
            if value is not None
        }
    )


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
