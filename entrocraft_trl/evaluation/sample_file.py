"""Samples of an evaluation on disk: a JSON-lines file that survives being killed and refuses to mix settings."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_atomically


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


# Of each prompt's n samples, in lists: field, and what one value of it may be.
_SAMPLE_FIELDS = {
    "completions": lambda value: isinstance(value, str),
    "rewards": lambda value: value is None or _is_number(value),
    "tokens": lambda value: _is_number(value) and isinstance(value, int) and value >= 0,
    "truncated": lambda value: isinstance(value, bool),
    "entropy_sums": lambda value: value is None or _is_number(value),
}


def _why_foreign(record: Any, index: int, n: int) -> str | None:
    """Why a line of the file is not what `evaluation_records.score_block` makes of a prompt."""
    if not isinstance(record, dict):
        return "holds no object"
    if record.get("index") != index:
        return f"is of prompt {record.get('index')!r}, where prompt {index} is next"
    for name, is_right in _SAMPLE_FIELDS.items():
        values = record.get(name)
        if not isinstance(values, list) or len(values) != n or not all(map(is_right, values)):
            return f"holds {name}={str(values)[:80]}, where {n} values are needed"
    return None


def resume_samples(path: str | os.PathLike, settings: Mapping[str, Any], block: int = 1) -> list[dict[str, Any]]:
    """
    Records of the prompts that are finished; starts the file if there is none.

    The first line holds the settings, every other line one finished prompt, in order. What a killed run wrote in part
    (a line without its end, or the first records of a block) is taken out of the file.

    Args:
        path (`str` or `PathLike`): The file.
        settings (`Mapping[str, Any]`): What the samples depend on, in JSON types.
        block (`int`, *optional*, defaults to `1`): Prompts that are sampled together. Records count in whole blocks;
            `settings["prompts"]` says how many there are in all, for the last block may be shorter, and
            `settings["n"]` how many samples each has.

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
        saved = dict(first["settings"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not a file of samples: {type(error).__name__}: {error}") from error
    wanted = json.loads(header)["settings"]
    differences = [
        f"{name} was {saved.get(name)!r} and is now {wanted.get(name)!r}"
        for name in sorted(wanted.keys() | saved.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError(f"{str(path)!r} holds samples of other settings: {'; '.join(differences)}")
    for index, record in enumerate(records):
        if reason := _why_foreign(record, index, settings["n"]):
            raise ValueError(f"{str(path)!r} is not a file of samples: line {index + 2} {reason}")
    if len(records) > settings["prompts"]:
        raise ValueError(f"{str(path)!r} holds {len(records)} prompts, where there are {settings['prompts']}")
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
