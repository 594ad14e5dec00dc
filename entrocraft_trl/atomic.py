"""Files that are there in one piece or not at all, whenever the process is killed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """
    Call `write` on a new file and give it the name `path` once it is on the disk: never half there. Until then its
    name begins with an underscore, as the names of all that a push to the Hub leaves out.
    """
    partial = path.with_name(f"_{path.name}.partial")
    with partial.open("wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
