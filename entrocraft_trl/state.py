"""What entropy control remembers between steps, saved in each checkpoint's `trainer_state.json`."""

import math
from dataclasses import asdict, dataclass, fields

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging


logger = logging.get_logger(__name__)


@dataclass
class ControlMemory:
    """Plain numbers, identical on all ranks. Units: nats for entropies, optimizer steps for the horizon."""

    initial_entropy: float | None = None
    horizon: int | None = None
    empty_steps: int = 0
    change_offset: float = 0.0
    last_entropy: float | None = None
    last_direction: int = 0
    steps_outside: int = 0
    distance_at_exit: float = 0.0
    failure_reported: bool = False


class EntropyControlState(TrainerCallback, ExportableState):
    """
    Carries a [`ControlMemory`] into and out of `trainer_state.json`, the file that also holds the optimizer step.

    Being part of that file, the memory always belongs to the step that it is loaded with.
    """

    def __init__(self, memory: dict | None = None):
        self.memory = ControlMemory(**(memory or {}))

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
            self.memory = self._read(saved)
            if self.memory.horizon not in (None, state.max_steps) and args.entropy_schedule_steps is None:
                logger.warning(
                    f"max_steps is now {state.max_steps}, but the entropy schedule keeps the horizon of "
                    f"{self.memory.horizon} steps that it started with; set entropy_schedule_steps to change it."
                )
        # transformers reads this key when it saves; a checkpoint of a plain TRL run does not have it.
        state.stateful_callbacks[name] = self.state()

    @staticmethod
    def _read(saved: dict) -> ControlMemory:
        """
        Raises:
            ValueError: If the saved numbers are missing, foreign, or not finite.
        """
        try:
            memory = ControlMemory(**saved["args"]["memory"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"trainer_state.json holds an unreadable entropy-control state: {error}") from None
        for field in fields(memory):
            value = getattr(memory, field.name)
            if value is None and field.default is None:
                continue
            if not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise ValueError(f"trainer_state.json holds {field.name}={value!r} in the entropy-control state.")
        return memory
