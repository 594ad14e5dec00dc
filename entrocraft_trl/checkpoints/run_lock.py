"""One process at a time: a lock that the system releases when its holder ends, however it ends."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.get_logger(__name__)

# With "_" in front they are not pushed. An evaluation may write into the folder of a run that goes on.
TRAINING, EVALUATION = "_training.lock", "_evaluation.lock"


@contextmanager
def only_process(folder: Path, name: str) -> Iterator[None]:
    """
    Within, no other process can be in here with the same `folder`, which is made if missing, and lock `name`.

    A POSIX record lock (`lockf`), for three reasons: it works on network disks too, and between machines; it ends with
    the process, so that no killed run blocks its restart; and forked children, which may outlive a killed parent, do
    not inherit it, as they would one of `flock`. The file stays, since its removal would let in two at once.

    Raises:
        ValueError: If another process is; names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a+") as file:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows both
            file.seek(0)
            raise ValueError(
                f"{str(folder)!r} is in use by {file.read().strip() or 'another process'}, and two would mix their "
                "files. Wait for it, or choose another output_dir."
            ) from None
        except OSError as error:
            logger.warning(f"No lock on {str(folder)!r} ({error.strerror}): do not start a second run there.")
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
