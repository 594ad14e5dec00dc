"""
What `resume_from_checkpoint` means. One reading for two callers: the command, which refuses what it can before a model
loads, and the trainer, all of whose ranks must see the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from .manifest import checkpoint_folder, list_checkpoints, why_incomplete, why_not_here


if TYPE_CHECKING:
    from transformers import TrainingArguments

# As YAML, the command line and Python write them, in any case.
_WORDS = {"": "none", "none": "none", "false": "none", "true": "last", "last": "last", "auto": "auto", "hub": "hub"}


def word_of(value: str | os.PathLike | bool | None) -> str | None:
    """`"none"`, `"last"`, `"auto"` or `"hub"`; `None` where `value` names a folder."""
    if value is None or isinstance(value, (str, bool)):
        return _WORDS.get(str(value).strip().lower())
    return None


def asks_the_hub(value: str | os.PathLike | bool | None, args: TrainingArguments) -> bool:
    """
    Whether `fetch_for_all` has to come first.

    Raises:
        ValueError: If it has, and `args` names no repository.
    """
    if word_of(value) != "hub":
        return False
    if not args.hub_model_id:
        raise ValueError("resume_from_checkpoint=hub needs hub_model_id, the repository that the run pushes to")
    return True


def resolve_checkpoint(
    value: str | os.PathLike | bool | None, output_dir: str, found: dict[int, str | None] | None = None
) -> str | None:
    """
    The checkpoint to resume from; nothing is changed on the disk.

    Args:
        value (`str`, `PathLike`, `bool` or `None`):
            As `ExactResumeMixin.train` takes it; `"hub"` is `"auto"`, after the fetch.
        output_dir (`str`):
            Folder of the run.
        found (`dict[int, str | None]`, *optional*):
            What is in `output_dir`, as `found_by_all_ranks` gives it. Defaults to what this process sees there.

    Returns:
        `str` or `None`: the checkpoint's folder; `None` for a start from step 0.

    Raises:
        ValueError: If there is no complete checkpoint, the one that is named is not, or `output_dir` holds checkpoints
            of another run.
    """
    run = Path(output_dir)
    word = word_of(value)
    if word is None:
        if reason := why_incomplete(Path(value)):
            raise ValueError(f"resume_from_checkpoint={str(value)!r} is no complete checkpoint: {reason}")
        resumed = os.fspath(value)
    elif word == "none":
        resumed = None
    else:
        resumed = _newest(value, run, list_checkpoints(run) if found is None else found)
    if reason := why_not_here(run, resumed and Path(resumed)):
        raise ValueError(reason)
    return resumed


def _newest(value: str | bool, run: Path, found: dict[int, str | None]) -> str | None:
    complete = [step for step, reason in found.items() if reason is None]
    if complete:
        return str(checkpoint_folder(run, max(complete)))
    # What is complete here and not on another node would be lost by a start from 0.
    if word_of(value) != "last" and None not in list_checkpoints(run).values():
        return None
    reasons = "".join(f"; checkpoint-{step}: {reason}" for step, reason in found.items())
    raise ValueError(f"resume_from_checkpoint={value}: there is no complete checkpoint in {str(run)!r}{reasons}")


def found_by_all_ranks(run: Path) -> dict[int, str | None]:
    """`list_checkpoints` for all ranks together: nodes with disks of their own can differ in what is complete."""
    seen = gather_object([list_checkpoints(run)])
    reasons = {
        step: [of_rank.get(step, "not on every node") for of_rank in seen]
        for step in sorted(set().union(*seen), reverse=True)
    }
    return {step: next(filter(None, told), None) for step, told in reasons.items()}
