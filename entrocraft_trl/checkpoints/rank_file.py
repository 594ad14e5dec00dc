"""What a rank's file in a checkpoint must hold: a wrong value would fail steps later, or be trained on."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


# Of the tables that TRL prints and stores with `log_completions`; the fifth, images, are no plain data.
TABLE_COLUMNS = ("prompt", "completion", "advantages", "rewards", "extra")
# What each micro-batch of TRL's GRPO and RLOO trainers holds, one row a rollout.
ROW_TENSORS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")


def read_rank_file(path: Path) -> dict[str, Any] | None:
    """
    One rank's file, on the CPU; `None` if there is none.

    Raises:
        ValueError: If the file is cut off, corrupted, not one of ours, or holds what this package never writes there.
    """
    if not path.exists():
        return None
    try:
        # Not to the accelerator's device: that of a rank on CPU is "cpu:0", which torch.load does not know.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling garbage raises almost anything, IndexError and KeyError among them
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} cannot be read ({reason}); without this file, resuming is only less exact."
        ) from None
    if not isinstance(state, dict) or set(state) != set(_RULES):
        raise ValueError(f"{path} is not a file of this package: it holds {describe(state)}.")
    for name, (wanted, is_right) in _RULES.items():
        if not is_right(state[name]):
            raise ValueError(f"{path} holds {name}={describe(state[name])}, where {wanted} is needed.")
    batches, saved = state["buffered_inputs"], state["geometry"].get("steps_per_generation")
    if batches is not None and len(batches) != saved:
        raise ValueError(f"{path} holds {len(batches)} micro-batches of a generation batch of {saved}.")
    return state


def describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict of {sorted(map(str, value))}"
    if isinstance(value, torch.Tensor) and value.ndim:
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value) if isinstance(value, (int, float, torch.Tensor)) else f"a {type(value).__name__}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_dict_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and all(isinstance(name, str) and is_right(item) for name, item in value.items())
    )


def _is_list_of_numbers(value: Any) -> bool:
    """NaN included: the metric of a reward that scored no rollout."""
    return isinstance(value, list) and all(map(_is_number, value))


def _is_loss(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 0 and math.isfinite(value)


def _is_micro_batch(batch: Any) -> bool:
    if batch == {}:
        return True  # a spare: its rows are computed with others
    if not isinstance(batch, dict) or not all(isinstance(batch.get(name), torch.Tensor) for name in ROW_TENSORS):
        return False
    rows = {batch[name].size(0) if batch[name].ndim else None for name in ROW_TENSORS}
    advantages = batch["advantages"]
    return len(rows) == 1 and advantages.is_floating_point() and bool(torch.isfinite(advantages).all())


def _is_table(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == set(TABLE_COLUMNS)
        and all(isinstance(value[name], list) for name in ("prompt", "completion", "advantages"))
        and all(_is_dict_of(lambda rows: isinstance(rows, list))(value[name]) for name in ("rewards", "extra"))
    )


# What each entry holds, in words and as a check.
_COUNT = ("a whole number of at least 0", _is_count)
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "global_step": _COUNT,
    "geometry": ("a dict of whole numbers", _is_dict_of(_is_count)),
    "micro_step": _COUNT,
    "buffered_inputs": (
        "nothing or a list of micro-batches with finite advantages",
        lambda value: value is None or (isinstance(value, list) and all(map(_is_micro_batch, value))),
    ),
    "metrics": ("a dict of lists of numbers", _is_dict_of(_is_list_of_numbers)),
    "loss_sum": ("a finite number as a tensor", _is_loss),
    "last_logged_step": _COUNT,
    "table": ("nothing or the columns of the completions table", lambda value: value is None or _is_table(value)),
}
