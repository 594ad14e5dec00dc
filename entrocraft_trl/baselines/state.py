"""What a method remembers between steps, saved in each checkpoint's `trainer_state.json`."""

import math
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging


logger = logging.get_logger(__name__)


class MethodState(TrainerCallback, ExportableState):
    """
    Carries plain numbers, identical on all ranks, into and out of `trainer_state.json`, the file that also holds the
    optimizer step: so they always belong to the step that they are loaded with.

    Args:
        method (`str`): Whose numbers they are; those of another method are refused.
        start (`dict[str, float]`): The numbers at step 0.
        numbers (`dict[str, float]`, *optional*): The numbers now.
    """

    def __init__(self, method: str, start: dict[str, float], numbers: dict[str, float] | None = None):
        self.method, self.start = method, start
        self.numbers = dict(start if numbers is None else numbers)

    def state(self) -> dict:
        numbers = {"method": self.method, "start": dict(self.start), "numbers": dict(self.numbers)}
        return {"args": numbers, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name)
        if state.global_step == 0:
            self.numbers = dict(self.start)
        elif saved is None:
            logger.warning(
                f"The checkpoint at step {state.global_step} holds no state of {self.method} (a run of another "
                f"method, perhaps): it begins with {self.start}."
            )
        else:
            self.numbers = self._read(saved)
        # transformers reads this key when it saves; a checkpoint of another method does not have it.
        state.stateful_callbacks[name] = self.state()

    def _read(self, saved: Any) -> dict[str, float]:
        try:
            method, numbers = saved["args"]["method"], saved["args"]["numbers"]
            good = set(numbers) == set(self.start) and all(map(_is_number, numbers.values()))
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"trainer_state.json holds an unreadable state of {self.method}: {saved!r}") from None
        if method != self.method or not good:
            raise ValueError(
                f"trainer_state.json holds {numbers!r} of {method}, where {self.method} needs numbers named "
                f"{', '.join(self.start)}."
            )
        return dict(numbers)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class StatefulMethodMixin:
    """For trainers whose method has numbers that go on from step to step: before the trainer among the bases."""

    def starting_numbers(self) -> dict[str, float]:
        """The numbers at step 0, by name."""
        raise NotImplementedError

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(MethodState(self._name, self.starting_numbers()))

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers now; what is written here is saved in checkpoints."""
        # Looked up, because transformers may replace callbacks when it restores them from a checkpoint.
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, MethodState)).numbers
