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
    prompt_ids, prompt_mask = batch["prompt_ids"], batch["prompt_mask"]
    completion_ids, completion_mask = batch["completion_ids"], batch["completion_mask"]
    multimodal = {key: batch[key] for key in MULTIMODAL_KEYS if key in batch}

    def read_rows(rows: torch.Tensor | slice, width: int) -> TokenReading:
        ids = torch.cat([prompt_ids[rows], completion_ids[rows, :width]], dim=1)
        attention_mask = torch.cat([prompt_mask[rows], completion_mask[rows, :width]], dim=1)
        return read(model, ids, attention_mask, width, batch_size=batch_size, **multimodal)[0]

    with torch.no_grad(), eval_mode(model):
        if multimodal:  # images are not laid out in rows
            return read_rows(slice(None), completion_ids.size(1))
        columns = torch.arange(1, completion_ids.size(1) + 1, device=completion_mask.device)
        lengths = (completion_mask * columns).amax(dim=1)
        parts = []
        # As many chunks on every rank, whatever the lengths: sharded models gather their weights in each.
        for rows in lengths.argsort(stable=True).split(batch_size):
            width = max(int(lengths[rows].max()), 1)
            parts.append((rows, read_rows(rows, width)))
    fields = [values for values in zip(*(reading for _, reading in parts), strict=True) if values[0] is not None]
    whole = []
    for values in fields:
        placed = values[0].new_zeros(completion_ids.shape)
        for (rows, _), part in zip(parts, values, strict=True):
            placed[rows, : part.size(1)] = part
        whole.append(placed)
    return TokenReading(*whole)


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
