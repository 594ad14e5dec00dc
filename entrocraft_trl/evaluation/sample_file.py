"""Samples of an evaluation on disk: a JSON-lines file that survives being killed and refuses to mix settings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_atomically


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def resume_samples(path: str | os.PathLike, settings: Mapping[str, Any], block: int = 1) -> list[dict[str, Any]]:
    """
    Records of the prompts that are finished; starts the file if there is none.

    The first line holds the settings, every other line one finished prompt, in order. What a killed run wrote in part
    (a line without its end, or the first records of a block) is taken out of the file.

    Args:
        path (`str` or `PathLike`): The file.
        settings (`Mapping[str, Any]`): What the samples depend on, in JSON types.
        block (`int`, *optional*, defaults to `1`): Prompts that are sampled together. Records count in whole blocks;
            `settings["prompts"]` says how many there are in all, for the last block may be shorter.

    Raises:
        `ValueError`: if the file holds samples of other settings, or is not such a file.
    """
    path = Path(path)
    header = _line({"settings": settings})
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda stream: stream.write(header))
        return []
    *lines, _ = path.read_bytes().split(b"\n")  # what follows the last line's end is empty, or torn
    try:
        first, *records = [json.loads(line) for line in lines]
        saved = first["settings"]
        ordered = [record["index"] for record in records] == list(range(len(records)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is not a file of samples: {type(error).__name__}: {error}") from error
    if not ordered:
        raise ValueError(f"{str(path)!r} is not a file of samples: its prompts are not in order")
    wanted = json.loads(header)["settings"]
    differences = [
        f"{name} was {saved.get(name)!r} and is now {wanted.get(name)!r}"
        for name in sorted(wanted.keys() | saved.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError(f"{str(path)!r} holds samples of other settings: {'; '.join(differences)}")
    if len(records) < settings["prompts"]:
        records = records[: len(records) // block * block]
    complete = header + b"".join(_line(record) for record in records)
    if complete != path.read_bytes():
        write_atomically(path, lambda stream: stream.write(complete))
    return records


def append_samples(path: str | os.PathLike, records: Sequence[Mapping[str, Any]]) -> None:
    """Append the records of a block; they are on the disk when this returns."""
    with Path(path).open("ab") as file:
        file.write(b"".join(_line(record) for record in records))
        file.flush()
        os.fsync(file.fileno())
