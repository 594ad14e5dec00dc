"""Where a local data file is broken. For when loading has failed: its own message often names no file and no line."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def find_fault(files: Sequence[str]) -> str | None:
    """The first fault in `files` as `"file, line 7: what"`; `None` if each of them can be read."""
    empty = None
    for path in files:
        try:
            _check_file(path)
        except _NoRows as fault:  # no fault beside files that have rows
            empty = empty or f"{path}: {fault}"
        except _Fault as fault:
            line = f", line {fault.line}" if fault.line else ""
            return f"{path}{line}: {fault}"
    return empty


def check_csv_headers(files: Sequence[str]) -> None:
    """
    Refuse a column name that stands twice in a header; the loader would quietly rename the second one.

    Raises:
        `ValueError`: naming the file and the column.
    """
    for path in files:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            header = next(csv.reader(file), [])
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{path}, line 1: the column {twice!r} stands twice in the header")


class _Fault(Exception):
    def __init__(self, what: str, line: int | None = None):
        super().__init__(what)
        self.line = line


class _NoRows(_Fault):
    pass


def _check_file(path: str) -> None:
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        _check_parquet(path)
        return
    raw = Path(path).read_bytes()
    if not raw.strip():
        raise _NoRows("the file is empty")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise _Fault(f"not UTF-8 text ({error.reason}: {raw[error.start : error.start + 1]!r})", line) from None
    if suffix == ".csv":
        _check_csv(text)
    elif suffix == ".json" and text.lstrip().startswith("["):
        if _parse_json(text, first_line=1) == []:
            raise _NoRows("the file holds no rows")
    else:
        _check_json_lines(text)


def _check_parquet(path: str) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _Fault(str(error)) from None


def _check_csv(text: str) -> None:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        header = next(reader)
        for row in reader:
            if len(row) > len(header):
                raise _Fault(f"{len(row)} fields, but the header has {len(header)}", line + 1)
            line = reader.line_num
        if line == 1:
            raise _NoRows("the file holds no rows below its header")
    except csv.Error as error:
        raise _Fault(f"{error} (a quote that is not closed, perhaps)", line + 1) from None


def _check_json_lines(text: str) -> None:
    kinds: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse_json(line, first_line=number)
        if not isinstance(row, dict):
            raise _Fault(f"a JSON object with the row's columns is needed, got {_kind(row)}", number)
        for name, value in row.items():
            kind = _kind(value)
            if value is not None and kinds.setdefault(name, kind) != kind:
                raise _Fault(f"column {name!r} holds {kind}, but {kinds[name]} in the lines before", number)


def _parse_json(text: str, first_line: int) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_columns)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair parses, but is no text
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise _Fault(f"not valid JSON: {error.msg}, column {error.colno}", line) from None
    except UnicodeEncodeError as error:
        raise _Fault(f"not valid Unicode: {error.reason}", first_line) from None
    except _Fault as fault:
        raise _Fault(str(fault), first_line) from None
    return value


def _columns(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Fault(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
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
