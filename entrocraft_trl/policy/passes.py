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


def run_policy_pass(
    read: Callable[..., tuple[TokenReading, Any]], model: torch.nn.Module, batch: dict[str, Any], batch_size: int
) -> TokenReading:
    """
    One no-grad pass of `model` over the rollouts of `batch`, in eval mode.

    `batch_size` rows at a time, those of like length together and without the padding behind the longest: each row is
    computed once, and little else. Left padding stays, since models with absolute positions count it.

    Args:
        read (`Callable`): Takes what TRL's `_get_per_token_logps_and_entropies` takes, and returns a [`TokenReading`]
            and a router loss.

    Returns:
        `TokenReading`: Of the completions, `(B, T)`; 0 behind their ends.
    """
    with torch.no_grad(), eval_mode(model):
        if any(key in batch for key in MULTIMODAL_KEYS):  # some lie along the whole width
            return pass_of_rows(read, model, batch, batch_size)
        mask = batch["completion_mask"]
        lengths = (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(dim=1)
        parts = []
        # As many chunks on every rank, whatever the lengths: sharded models gather their weights in each.
        for rows in lengths.argsort(stable=True).split(batch_size):
            chunk, width = select_rows(batch, rows.tolist()), max(int(lengths[rows].max()), 1)
            chunk |= {key: chunk[key][:, :width] for key in ("completion_ids", "completion_mask")}
            parts.append((rows, pass_of_rows(read, model, chunk, batch_size)))
    whole = []
    for values in zip(*(reading for _, reading in parts), strict=True):
        if values[0] is not None:
            whole.append(values[0].new_zeros(mask.shape))
            for (rows, _), value in zip(parts, values, strict=True):
                whole[-1][rows, : value.size(1)] = value
    return TokenReading(*whole)


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
