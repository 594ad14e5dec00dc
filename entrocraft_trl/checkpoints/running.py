"""The life of a run, which is longer than its training: nobody else in its folder, and SIGTERM is heeded in time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from .run_lock import TRAINING, only_process
from .sigterm import EXIT_CODE, noting_sigterm


logger = get_logger(__name__)


class RunningMixin:
    """For trainers: `running`, and what all ranks do together within."""

    _is_running = False
    sigterm_received = False  # by this process, since `running` was opened

    @contextmanager
    def running(self) -> Iterator[None]:
        """
        The life of a run: within, no other process can have one with the same `output_dir`, and SIGTERM ends nothing
        half done. `train` opens it; open it earlier, on all ranks, around what belongs to the run besides training.

        Raises:
            ValueError: If another process has; on all ranks together.
            SystemExit: With code 143, on leaving, if SIGTERM came and nothing else acted on it.
        """
        if self._is_running:
            yield
            return
        with ExitStack() as stack:
            problem = None
            if self.is_world_process_zero():
                try:
                    stack.enter_context(only_process(Path(self.args.output_dir), TRAINING))
                except (ValueError, OSError) as error:
                    problem = str(error)
            self._raise_together(problem)
            self._is_running, self.sigterm_received = True, False
            try:
                with noting_sigterm(self._note_sigterm):
                    yield
            finally:
                self._is_running = False
        if self.sigterm_received:
            raise SystemExit(EXIT_CODE)

    def _note_sigterm(self) -> None:
        self.sigterm_received = True

    def exit_on_sigterm(self, done: str) -> None:
        """
        On all ranks: end the process with code 143 if SIGTERM came to any of them, having logged what is `done`.

        Raises:
            SystemExit: On all ranks together.
        """
        if self._any_rank(self.sigterm_received):
            logger.warning(f"SIGTERM: {done}")
            # A launcher ends all ranks when the first one exits; the main one may still be writing.
            self.accelerator.wait_for_everyone()
            raise SystemExit(EXIT_CODE)

    def _any_rank(self, flag: bool) -> bool:
        return self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum").item() > 0

    @staticmethod
    def _raise_together(problem: str | None) -> None:
        """Raise on all ranks what one rank found: one that fails alone leaves the others waiting."""
        problems = [found for found in gather_object([problem]) if found]
        if problems:
            raise ValueError(problems[0])
