"""Files that are there in one piece or not at all, whenever the process is killed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO
from uuid import uuid4


PARTIAL = ".partial"


def write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """
    Call `write` on a new file and give it the name `path` once it is on the disk: never half there.

    Until then its name begins with an underscore, as the names of all that a push to the Hub leaves out, and is its
    own: of two processes that write one file, the last one's whole file stays. A process that is killed leaves it.
    """
    partial = path.with_name(f"_{path.name}.{uuid4().hex[:8]}{PARTIAL}")
    try:
        with partial.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # after an error, which a full disk may be
