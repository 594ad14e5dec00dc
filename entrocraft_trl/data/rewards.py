"""Reward functions by name: TRL's own, or any function of the user's as `module:function`."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..printable import printable


# Their verifier is math-verify. Names and values are those of `trl grpo --reward_funcs`.
TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
OVERLONG_VALUES = {"max_completion_len": 1280, "soft_punish_cache": 256}

# What TRL's trainer passes to a reward function besides the columns of the data set.
_TRAINER_ARGUMENTS = {
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
}


def load_reward(name: str) -> Callable:
    """
    Reward function of a name.

    Args:
        name (`str`):
            One of [`TRL_REWARDS`], or `module:function` (also `module.function`). The current directory is importable.

    Returns:
        `Callable` in TRL's signature. TRL's own take plain-text completions too.

    Raises:
        `ValueError`: if there is no such reward, module or function, or the module fails to import.
    """
    if name in TRL_REWARDS:
        reward = getattr(importlib.import_module("trl.rewards"), name)
        return _accept_text(reward(**OVERLONG_VALUES) if name.startswith("get_") else reward)
    module_name, _, function_name = name.partition(":") if ":" in name else name.rpartition(".")
    if not module_name or not function_name:
        raise ValueError(
            f"unknown reward {name!r}; choose one of {', '.join(TRL_REWARDS)}, or name your own as 'module:function'"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module can fail to import in any way
        raise ValueError(f"reward {name!r}: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    reward = getattr(module, function_name, None)
    if reward is None:
        raise ValueError(f"reward {name!r}: module {module_name!r} has no function {function_name!r}")
    if not callable(reward):
        raise ValueError(f"reward {name!r} is not callable, it is of type {type(reward).__name__}")
    return reward


def reward_name(reward: Any) -> str:
    """
    The name under which TRL logs a reward: a function's or a class's, also through `functools.partial`; of a reward
    model, the last part of its id. A model that is still only a name keeps that.
    """
    import torch
    from trl.trainer.utils import get_callable_name, get_config_model_id

    if isinstance(reward, str):
        return reward
    if isinstance(reward, torch.nn.Module):
        return get_config_model_id(reward.config).split("/")[-1]
    return get_callable_name(reward)


def _accept_text(reward: Callable) -> Callable:
    """TRL's rewards read chat messages. Plain-text completions reach them as one message of the assistant."""

    @functools.wraps(reward)  # keeps `__name__`, under which TRL logs the reward
    def reward_of_text_or_messages(completions: list, **kwargs) -> list[float | None]:
        messages = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions]
        return reward(completions=messages, **kwargs)

    # Our own, since what this one cannot do without is what TRL's cannot; `__wrapped__` alone promises no such thing.
    reward_of_text_or_messages.__signature__ = inspect.signature(reward)
    return reward_of_text_or_messages


def check_reward_columns(rewards: Sequence[Callable | str], columns: Sequence[str]) -> None:
    """
    Check that the data set has every column that a reward function cannot do without.

    Args:
        rewards (`Sequence[Callable | str]`):
            Reward functions. Reward models and their names are passed over, as is a function that shows no parameters.
            Of a decorated one, the decorator's parameters count: it may bring what the function in it needs.
        columns (`Sequence[str]`):
            Columns of the data set.

    Raises:
        `ValueError`: naming the reward, the missing column and the columns there are.
    """
    import torch

    for reward in rewards:
        if isinstance(reward, (str, torch.nn.Module)):
            continue
        try:
            parameters = inspect.signature(reward, follow_wrapped=False).parameters.values()
        except (ValueError, TypeError):  # compiled code need not show them; TRL calls it all the same
            continue
        for parameter in parameters:
            optional = parameter.default is not parameter.empty or parameter.kind in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            )
            if optional or parameter.name in _TRAINER_ARGUMENTS or parameter.name in columns:
                continue
            hint = ""
            if parameter.name == "solution":
                hint = "; give the answers' column that name (on the command line: --answer_column)"
            raise ValueError(
                f"reward {reward_name(reward)!r} reads the column {parameter.name!r}, which the data "
                f"set does not have (columns: {printable(', '.join(columns))}){hint}"
            )
