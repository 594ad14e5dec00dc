"""A curve that grows while the run does: a figure in a notebook, one line in a terminal."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import is_in_notebook, logging

from ..metric_names import ACCEPTED, ENTROPY, HIGH, LOW
from .log import Record, newest_reading


logger = logging.get_logger(__name__)

PAUSE_PER_SECOND_OF_DRAWING = 100.0  # a figure of a long run is slow to draw: drawing stays below 1% of the run
SCREEN_DPI = 80


class EntropyCurveCallback(TrainerCallback):
    """
    Shows the measured entropy inside its band, with the reward below, while training runs.

    In a notebook it redraws one figure in the output of the cell; elsewhere it prints a line above the progress bar.
    It reads the trainer's log only, works on the main process only, and never ends a run: where it cannot draw it says
    so once and prints lines instead.

    Args:
        every (`float`, defaults to `5.0`):
            Least seconds between two updates. The end of the training is always shown.

    Raises:
        ValueError: If `every` is negative or not a number.

    Example:

    ```python
    trainer = EntrocraftGRPOTrainer(..., callbacks=[EntropyCurveCallback()])
    ```
    """

    def __init__(self, every: float = 5.0):
        if not every >= 0:
            raise ValueError(f"every must be a number of seconds, 0 or more, got {every!r}.")
        self.every = every
        self._show: Callable[[Any], None] | None = None
        self._handle = None
        self._due = 0.0
        self._shown: Record | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._show = self._draw if is_in_notebook() else self._print
        self._handle, self._shown, self._due = None, None, monotonic()

    def on_log(self, args, state, control, **kwargs):
        if monotonic() >= self._due:
            self._update(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._update(state)

    def _update(self, state) -> None:
        newest = newest_reading(state.log_history)
        if not state.is_world_process_zero or self._show is None or newest is self._shown:
            return
        start = monotonic()
        try:
            self._show(state)
        except Exception as error:  # whatever a display, a plotting library or a closed pipe raises: training goes on
            lines_left = self._show == self._draw
            self._show = self._print if lines_left else None
            logger.warning(
                f"The live entropy curve failed with {type(error).__name__}: {error}. Training goes on "
                + ("with a line of text instead." if lines_left else "without it.")
            )
        end = monotonic()
        seconds = 0.0 if self._shown is None else end - start  # the first update imports the plotting library
        self._shown = newest
        self._due = end + max(self.every, PAUSE_PER_SECOND_OF_DRAWING * seconds)

    def _draw(self, state) -> None:
        from IPython.display import Image, display

        from .plots import plot_run

        title = status_line(state.log_history, state.max_steps).replace(" · ", "\n", 1)  # too wide for one line
        buffer = io.BytesIO()
        plot_run(state.log_history, title).savefig(buffer, format="png", dpi=SCREEN_DPI)
        image = Image(data=buffer.getvalue(), format="png")
        if self._handle is None:
            self._handle = display(image, display_id=True)
        else:
            self._handle.update(image)

    @staticmethod
    def _print(state) -> None:
        # Above the bars that are running, transformers' own among them: a plain print would tear them.
        tqdm.write(status_line(state.log_history, state.max_steps))


def status_line(log: Sequence[Record], max_steps: int) -> str:
    """
    One line on the newest reading, entropies in nats.

    Example: `step 20/300: entropy 0.712, in its band 0.650 to 0.801 nats · reward 0.42 · accepted 88%`
    """
    record = newest_reading(log)
    entropy, low, high = record[ENTROPY], record[LOW], record[HIGH]
    place = "below" if entropy < low else "above" if entropy > high else "in"
    step = f"step {record['step']}/{max_steps}"
    parts = [f"{step}: entropy {entropy:.3f}, {place} its band {low:.3f} to {high:.3f} nats"]
    if "reward" in record:
        parts.append(f"reward {record['reward']:.2f}")
    if ACCEPTED in record:
        parts.append(f"accepted {record[ACCEPTED]:.0%}")
    return " · ".join(parts)
