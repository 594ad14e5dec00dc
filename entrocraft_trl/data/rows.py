"""The rows that a trainer is given, checked before its model loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .loading import check_column


if TYPE_CHECKING:
    import pyarrow

# TRL passes arguments of these names to the reward functions; a column of that name makes each call fail.
_TAKEN_COLUMNS = ("prompts", "completions")


def check_training_rows(rows: Any, batch_prompts: int, needs_prompts: bool = True) -> None:
    """
    Check the rows that a trainer is given, before its model loads. TRL would end such a run without a step and without
    an error, or with an obscure one in the middle of a step.

    Args:
        rows (`Any`):
            Data set in TRL's format. Streams, whose rows are not there yet, and other types are left to TRL.
        batch_prompts (`int`):
            Different prompts of one generation batch.
        needs_prompts (`bool`, *optional*, defaults to `True`):
            Whether a column `prompt` is a must; not where an environment gives the prompts.

    Raises:
        `ValueError`: for fewer rows than one batch takes, a missing or unusable column, or an empty prompt.
    """
    from datasets import Dataset

    if not isinstance(rows, Dataset):
        return
    if len(rows) < batch_prompts:
        raise ValueError(
            f"the data set has {len(rows)} rows, but one generation batch takes {batch_prompts} different prompts "
            "(generation_batch_size / num_generations), and TRL drops incomplete batches: no step would be made. Add "
            "rows, lower per_device_train_batch_size or gradient_accumulation_steps, or raise num_generations"
        )
    columns = list(rows[0])  # of a row, since a transform may make columns
    if needs_prompts:
        check_column("prompt", columns)
    for name in _TAKEN_COLUMNS:
        if name in columns:
            raise ValueError(f"rename the column {name!r}: TRL gives reward functions an argument of that name")
    if "prompt" in rows.column_names and rows.format["type"] != "custom":
        _check_prompts(rows.with_format("arrow").select_columns("prompt")[:]["prompt"])


def _check_prompts(prompts: pyarrow.ChunkedArray) -> None:
    import pyarrow
    import pyarrow.compute as compute

    kind = prompts.type
    if pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_boolean(kind):
        raise ValueError(f"row 0, column 'prompt': a prompt is text or a list of messages, got {prompts[0].as_py()!r}")
    empty = compute.is_null(prompts)
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        empty = compute.or_kleene(empty, compute.equal(compute.utf8_length(prompts), 0))
    elif pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        empty = compute.or_kleene(empty, compute.equal(compute.list_value_length(prompts), 0))
    row = compute.index(empty, True).as_py()
    if row >= 0:
        raise ValueError(
            f"row {row}, column 'prompt': the prompt is empty ({prompts[row].as_py()!r}); to sample from nothing, "
            "give the beginning-of-sequence token as text"
        )
