"""Bad rewards end the run on all ranks together, with a message that names the function and its rollouts."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from trl.trainer.utils import is_async_callable

from ..printable import printable


# The standard deviation of a group squares its rewards, and the square of more than 1.8e19 is infinite in float32.
LARGEST_REWARD = 1e18
# Generation batches in a row without any reward that end a run. It sits out a judge that is away for some batches; by
# chance it is not met: with half of the prompts never scored and two prompts a batch, once in a million batches.
MOST_UNSCORABLE_BATCHES = 10


class Failure(NamedTuple):
    """What went wrong in one call. `row` counts this rank's rollouts, `None` if it is not tied to one."""

    function: str
    what: str
    row: int | None = None
    cause: Exception | None = None


class RewardGuard:
    """
    Stands in for the reward functions while TRL calls them.

    TRL gathers all ranks' rewards right after. A rank that raised before that would leave the others waiting in the
    gather, so a failing function returns infinite rewards instead, which nothing else may contain: after the gather
    every rank sees them and raises. A run without failures has no collective more than TRL's.
    """

    def __init__(self):
        self._failures: list[Failure] = []
        self._unscorable_batches = 0
        self._warned: set[str] = set()

    def wrap(self, functions: Sequence[Callable], names: Sequence[str]) -> list[Callable]:
        """Replacements for `functions`, for one call of TRL's `_calculate_rewards`. Reward models stay as they are."""
        self._failures = []
        return [
            function if isinstance(function, torch.nn.Module) else self._wrap(function, name)
            for function, name in zip(functions, names, strict=True)
        ]

    def _wrap(self, function: Callable, name: str) -> Callable:
        def outcome(output: Any, count: int) -> list:
            checked = check_rewards(name, output, count)
            if isinstance(checked, Failure):
                return failed(checked, count)
            self._warn_of_nan(name, checked)
            return checked

        def failed(failure: Failure, count: int) -> list[float]:
            self._failures.append(failure)
            return [math.inf] * count

        def raised(error: Exception, count: int) -> list[float]:
            # On which of the rollouts, only another call could tell; and a judge may be paid by the call.
            return failed(Failure(name, f"raised {type(error).__name__}: {printable(str(error))}", cause=error), count)

        def guarded(completions: list, **kwargs) -> list:
            try:
                return outcome(function(completions=completions, **kwargs), len(completions))
            except Exception as error:
                return raised(error, len(completions))

        async def guarded_async(completions: list, **kwargs) -> list:
            try:
                return outcome(await function(completions=completions, **kwargs), len(completions))
            except Exception as error:
                return raised(error, len(completions))

        return guarded_async if is_async_callable(function) else guarded

    def _warn_of_nan(self, name: str, rewards: list) -> None:
        row = next((i for i, reward in enumerate(rewards) if reward is not None and reward != reward), None)
        if row is None or name in self._warned:
            return
        self._warned.add(name)
        warnings.warn(
            f"The reward function {name!r} returned NaN (first for rollout {row} of this process). TRL reads NaN as "
            "None: this function does not apply to the rollout. Return None if that is meant.",
            stacklevel=2,
        )

    def refuse(self, rewards: torch.Tensor, names: Sequence[str], rank: int, prompts: list, completions: list) -> None:
        """
        Raise on every rank if any rank's rewards are bad.

        Args:
            rewards (`torch.Tensor` of shape `(B * ranks, functions)`): As gathered, the same on all ranks.
            names (`Sequence[str]`): Names of the functions.
            rank (`int`): Of this process.
            prompts, completions (`list` of length `B`): This rank's, to be quoted.

        Raises:
            ValueError: Naming function, value or exception, and rollout. An exception of a reward function is the
                `__cause__` on the rank where it was raised.
        """
        bad = rewards.abs() > LARGEST_REWARD
        if not bad.any():
            return
        rows = len(prompts)
        texts = [describe(failure, rank * rows, prompts, completions) for failure in self._failures]
        # All ranks are here, since all have seen the same rewards.
        everywhere = gather_object(texts)
        if not everywhere:  # no function failed, so the number itself is bad: a reward model's
            row, column = bad.nonzero()[0].tolist()
            what = _too_large(rewards[row, column].item())
            everywhere = [f"The reward function {names[column]!r} {what} for rollout {row} of the batch"]
        cause = next((failure.cause for failure in self._failures if failure.cause is not None), None)
        raise ValueError("; ".join(everywhere)) from cause

    def end_without_rewards(self, rewards: torch.Tensor, names: Sequence[str]) -> None:
        """
        End a training in which nothing is scored any more: its gradients are zero, and it would go on to the end as if
        all were well. Not saved in checkpoints: who resumes such a run has mended its rewards, or is told again.

        Args:
            rewards (`torch.Tensor` of shape `(B * ranks, functions)`): Of a generation batch, as gathered, the same on
                all ranks; NaN for None.
            names (`Sequence[str]`): Names of the functions.

        Raises:
            ValueError: For the last of `MOST_UNSCORABLE_BATCHES` in a row in which no function scored any rollout.
        """
        self._unscorable_batches = self._unscorable_batches + 1 if rewards.isnan().all() else 0
        if self._unscorable_batches == MOST_UNSCORABLE_BATCHES:
            self._unscorable_batches = 0
            raise ValueError(
                f"In {MOST_UNSCORABLE_BATCHES} generation batches in a row no rollout got a reward: "
                f"{' and '.join(map(repr, names))} returned None or NaN for each. There is nothing to learn from; do "
                "the rows hold what the reward reads, in the form that it reads?"
            )


def check_rewards(name: str, output: Any, count: int) -> list | Failure:
    """`output` of a reward function as a list that TRL can read, or what is wrong with it."""
    if isinstance(output, (str, bytes, dict, set)) or not hasattr(output, "__iter__"):
        return Failure(name, f"returned {_quote(output)} in place of a list with one number per completion")
    rewards = list(output)
    if len(rewards) != count:
        return Failure(name, f"returned {len(rewards)} rewards for {count} completions")
    for row, reward in enumerate(rewards):
        if reward is None:
            continue
        try:
            value = torch.tensor([reward], dtype=torch.float32)  # TRL's own conversion
        except (TypeError, ValueError, RuntimeError, OverflowError):
            value = None
        if value is None or value.dim() != 1:
            return Failure(name, f"returned {_quote(reward)}, of type {type(reward).__name__}, not a number,", row)
        if value.abs() > LARGEST_REWARD:
            return Failure(name, _too_large(reward), row)
    return rewards


def _too_large(reward: Any) -> str:
    return f"returned {_quote(reward)}, where rewards must be finite and at most {LARGEST_REWARD:g} in size,"


def describe(failure: Failure, first_row: int, prompts: list, completions: list) -> str:
    """One sentence on a failure. Rollouts are counted over all ranks, in the order of the generation batch."""
    start = f"The reward function {failure.function!r} {failure.what}"
    if failure.row is None:
        return f"{start} (rollouts {first_row} to {first_row + len(prompts) - 1} of the batch)"
    prompt, completion = _quote(prompts[failure.row]), _quote(completions[failure.row])
    return f"{start} for rollout {first_row + failure.row} of the batch (prompt {prompt}, completion {completion})"


def _quote(value: Any, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
