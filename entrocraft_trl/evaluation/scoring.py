"""Calling a reward function outside training, as TRL's trainers call it."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from transformers import TrainerState
from trl.trainer.utils import get_callable_name, is_async_callable, start_event_loop_in_daemon

from ..printable import printable
from .sampling import Sample


# Columns that reach a reward function as what was sampled, or not at all.
_REPLACED_COLUMNS = ("prompt", "completion", "completion_ids")


def _of_a_trainer() -> dict[str, Any]:
    """
    What a trainer passes besides prompts, completions and columns. The state is that of a run that has ended, since a
    reward may follow the run's progress; what a reward logs goes nowhere.
    """
    return {
        "trainer_state": TrainerState(epoch=1.0, global_step=1, max_steps=1),
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }


def check_reward(reward: Callable, columns: Sequence[str]) -> None:
    """
    Check that a reward function takes the arguments that [`score_samples`] calls it with.

    Args:
        reward (`Callable`): Reward function in TRL's signature.
        columns (`Sequence[str]`): Columns of the data set.

    Raises:
        `ValueError`: naming the reward, the arguments, and the one that does not fit.
    """
    names = ["prompts", "completions", "completion_ids", *_of_a_trainer()]
    names += [name for name in columns if name not in _REPLACED_COLUMNS]
    try:
        inspect.signature(reward).bind(**dict.fromkeys(names))
    except TypeError as error:
        raise ValueError(
            f"the reward {get_callable_name(reward)!r} cannot be called with the arguments of TRL's trainers, "
            f"{printable(', '.join(names))}: {error}"
        ) from error


def score_samples(reward: Callable, rows: Dataset, samples: Sequence[Sequence[Sample]]) -> list[float | None]:
    """
    Rewards `(B * n,)` of `n` samples for each of `B` rows, row by row; `None` where the function gives none (or NaN).

    A plain function runs in the calling thread: math-verify's time limits work in the main thread only.

    Args:
        reward (`Callable`): Reward function in TRL's signature, async or not.
        rows (`datasets.Dataset`): `B` rows with a `prompt` column of text or chat messages; the other columns go to
            the reward function. Completions of chat prompts reach it as one message of the assistant.
        samples (`Sequence[Sequence[Sample]]`): Samples of each row, `(B, n)`.

    Raises:
        `ValueError`: if the reward function returns a wrong number of rewards.
    """
    flat = [sample for row in samples for sample in row]
    repeated = {
        name: [value for value, row in zip(rows[name], samples, strict=True) for _ in row]
        for name in rows.column_names
    }
    prompts = repeated["prompt"]
    columns = {name: values for name, values in repeated.items() if name not in _REPLACED_COLUMNS}
    completions = [
        [{"role": "assistant", "content": sample.text}] if isinstance(prompt, list) else sample.text
        for prompt, sample in zip(prompts, flat, strict=True)
    ]
    output = reward(
        prompts=prompts,
        completions=completions,
        completion_ids=[sample.ids for sample in flat],
        **(columns | _of_a_trainer()),
    )
    if is_async_callable(reward):
        output = asyncio.run_coroutine_threadsafe(output, _event_loop()).result()
    if len(output) != len(flat):
        raise ValueError(
            f"the reward {get_callable_name(reward)!r} returned {len(output)} rewards for {len(flat)} completions"
        )
    return [None if value is None or value != value else float(value) for value in output]


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """
    The loop of all async rewards, on a thread of its own as in TRL's trainers. One for all calls, since a judge's
    client keeps connections that belong to their loop; not the calling thread's, which in a notebook is busy.
    """
    _, loop, ready = start_event_loop_in_daemon(name="entrocraft-rewards")
    ready.wait()
    return loop
