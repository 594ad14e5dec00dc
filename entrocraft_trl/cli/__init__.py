"""The `entrocraft` command: picks a subcommand, and turns errors that a user can cause into one line."""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from ..printable import printable


# Command -> its line in the help. The module of the same name beside this file holds `main(argv)`, imported on use.
COMMANDS = {
    "train": "train a model while its entropy follows a band",
    "plot": "draw a run's entropy, reward and accepted share; compare runs; preview a band",
    "eval": "mean@k, pass@k, distinct right answers and entropy of a model or an adapter; resumable",
    "compare": "methods side by side from a YAML file: same start, seeds and budget; table and figures; resumable",
    "law": "fit R = -a exp(H) + b to a run's entropy and held-out accuracy; what its beginning foretold",
    "recipe": "list the recipes that come with the package, or print the path of one",
    "quickstart": "offline demonstration on CPU: plain GRPO beside Entrocraft, with a table and a figure",
}


class CommandError(Exception):
    """An error that the user can mend. [`main`] prints it as one line and exits with code 2."""


class CommandParser(argparse.ArgumentParser):
    """Parses a command's options; a wrong one is a [`CommandError`] like any other mistake."""

    def error(self, message: str):
        raise CommandError(message)


@contextmanager
def user_errors() -> Iterator[None]:
    """
    Turn what bad input raises into a [`CommandError`].

    Meant for set-up only (arguments, files, data, rewards): the same errors during training are bugs, whose traceback
    is wanted.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise CommandError(str(error) or type(error).__name__) from error


def is_main_process() -> bool:
    """Whether this process speaks for the run, by the launcher's `RANK`. True outside a launcher."""
    return os.environ.get("RANK", "0") == "0"


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: entrocraft COMMAND [options]",
            "",
            "Entropy schedules for reinforcement learning of language models with TRL.",
            "",
            "commands:",
            *lines,
            "",
            "`entrocraft COMMAND --help` lists the options of a command.",
            "Environment: ENTROCRAFT_TRACEBACK=1 shows the traceback of an error instead of one line.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """
    Run one command line.

    Args:
        argv (`list[str]`, *optional*):
            Command and options. Defaults to those of the process.

    Returns:
        `int`: exit code, 0, or 2 for an error that the user can mend.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        from .. import __version__

        print(f"entrocraft_trl {__version__}")
        return 0
    # TRL 1.16 sets a field that transformers 5.23 has renamed: nothing that a user of this command could mend.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    try:
        command, rest = argv[0], argv[1:]
        if command not in COMMANDS:
            raise CommandError(f"unknown command {command!r}; choose one of: {', '.join(COMMANDS)}")
        import_module(f".{command}", __name__).main(rest)
    except CommandError as error:
        if os.environ.get("ENTROCRAFT_TRACEBACK", "0") not in ("", "0"):
            raise
        # One line per node: every process of a launcher fails alike.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"entrocraft: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of a pipe has left, as in `entrocraft train --help | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
