"""Where a JSON-lines file is broken. For when loading has failed: the loader names neither the file nor the line."""

import codecs
import json
from collections.abc import Sequence
from typing import Any


def find_broken_line(files: Sequence[str]) -> str | None:
    """The first broken line in those of `files` that are JSON lines, as `"file, line 7: what"`; `None` without one."""
    for path in files:
        if not path.lower().endswith(".jsonl"):
            continue
        kinds: dict[str, str] = {}
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    _check_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, kinds)
                except ValueError as error:
                    return f"{path}, line {number}: {error}"
    return None


def _check_line(line: bytes, kinds: dict[str, str]) -> None:
    """Raises `ValueError` for a line that is no row. `kinds` holds each column's kind so far."""
    if not line.strip():
        return
    try:
        row = json.loads(line.decode(), object_pairs_hook=_columns)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair parses, but is no text
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason}: {line[error.start : error.start + 1]!r})") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg}, column {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object with the row's columns is needed, got {_kind(row)}")
    for name, value in row.items():
        kind = _kind(value)
        if value is not None and kinds.setdefault(name, kind) != kind:
            raise ValueError(f"column {name!r} holds {kind}, but {kinds[name]} in the lines before")


def _columns(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return columns


def _kind(value: Any) -> str:
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), "null")
