"""Files and folders that are there in one piece or not at all, whenever the process is killed."""

import os
import shutil
import tempfile
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


def make_folder_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """
    Unless it is there, call `fill` on an empty folder and give it the name `folder` when that is done.

    Of two processes that make one folder, the first one's stays. A process that is killed leaves its half-made one
    under a name that begins with a dot.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the final place, since a rename is atomic only within one file system.
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fill(scratch)
        try:
            os.replace(scratch, folder)
        except OSError:
            # Another process finished first: its folder is complete.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
