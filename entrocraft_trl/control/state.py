"""What entropy control remembers between steps, saved in each checkpoint's `trainer_state.json`."""

import sys
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging


logger = logging.get_logger(__name__)


@dataclass
class ControlMemory:
    """
    Plain numbers, identical on all ranks. Units: nats for entropies, their scatter and distances; optimizer steps for
    the horizon and for `empty_steps`; generation batches for `steps_outside`, which keeps the name that checkpoints
    hold.
    """

    initial_entropy: float | None = None
    horizon: int | None = None
    empty_steps: int = 0
    change_offset: float = 0.0
    reading_scatter: float | None = None
    last_entropy: float | None = None
    last_direction: int = 0
    steps_outside: int = 0
    distance_at_exit: float = 0.0
    failure_reported: bool = False


# What a field may hold, in words and as a check. A batch's entropy can be a rounding error below zero.
_ENTROPY = ("an entropy in nats", lambda value: value is None or (_is_number(value) and value > -1e-3))
_COUNT = ("a whole number of at least 0", lambda value: _is_whole(value) and value >= 0)
_RULES = {
    "initial_entropy": _ENTROPY,
    "horizon": ("a number of steps of at least 1", lambda value: value is None or (_is_whole(value) and value >= 1)),
    "empty_steps": _COUNT,
    "change_offset": ("a number in -1..1", lambda value: _is_number(value) and -1 <= value <= 1),
    "reading_scatter": (
        "a scatter in nats",
        lambda value: value is None or (_is_number(value) and value >= 0),
    ),
    "last_entropy": _ENTROPY,
    "last_direction": ("-1, 0 or 1", lambda value: _is_whole(value) and value in (-1, 0, 1)),
    "steps_outside": _COUNT,
    "distance_at_exit": ("a distance in nats", lambda value: _is_number(value) and value >= 0),
    "failure_reported": ("true or false", lambda value: isinstance(value, bool)),
}
# Not in the checkpoints of 0.1.0: the first batch after the resumption measures it.
_ADDED_LATER = {"reading_scatter"}


def _is_number(value: Any) -> bool:
    # JSON knows no limit to whole numbers; beyond that of floats, arithmetic raises OverflowError.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_whole(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int)


def read_memory(numbers: Any) -> ControlMemory:
    """
    The memory that `trainer_state.json` holds.

    Raises:
        ValueError: Naming the field that is foreign, missing, or holds what this package never writes there. A run
            that took a default in its place would go on in another band.
    """
    if not isinstance(numbers, dict):
        raise ValueError(f"trainer_state.json holds an unreadable entropy-control state: {numbers!r}")
    for name, value in numbers.items():
        if name not in _RULES:
            raise ValueError(
                f"trainer_state.json holds the unknown field {name}={value!r} in the entropy-control state; another "
                "version of entrocraft_trl wrote it."
            )
        wanted, is_right = _RULES[name]
        if not is_right(value):
            raise ValueError(
                f"trainer_state.json holds {name}={value!r} in the entropy-control state, where {wanted} is needed."
            )
    for name in _RULES:
        if name not in numbers and name not in _ADDED_LATER:
            raise ValueError(
                f"trainer_state.json holds no {name} in the entropy-control state; another version of entrocraft_trl "
                "wrote it."
            )
    return ControlMemory(**numbers)


class EntropyControlState(TrainerCallback, ExportableState):
    """
    Carries a [`ControlMemory`] into and out of `trainer_state.json`, the file that also holds the optimizer step.

    Being part of that file, the memory always belongs to the step that it is loaded with.
    """

    def __init__(self, memory: dict | None = None):
        self.memory = ControlMemory() if memory is None else read_memory(memory)

    def state(self) -> dict:
        return {"args": {"memory": asdict(self.memory)}, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name)
        if state.global_step == 0:
            self.memory = ControlMemory()
        elif saved is None:
            logger.warning(
                f"The checkpoint at step {state.global_step} holds no entropy-control state (a plain TRL run, "
                "perhaps): the initial entropy is measured now and the schedule's horizon is this run's."
            )
        else:
            try:
                numbers = saved["args"]["memory"]
            except (KeyError, TypeError) as error:
                raise ValueError(f"trainer_state.json holds an unreadable entropy-control state: {error}") from None
            self.memory = read_memory(numbers)
            if self.memory.horizon not in (None, state.max_steps) and args.entropy_schedule_steps is None:
                logger.warning(
                    f"max_steps is now {state.max_steps}, but the entropy schedule keeps the horizon of "
                    f"{self.memory.horizon} steps that it started with; set entropy_schedule_steps to change it."
                )
        # transformers reads this key when it saves; a checkpoint of a plain TRL run does not have it.
        state.stateful_callbacks[name] = self.state()
