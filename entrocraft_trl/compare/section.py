"""Mappings of a YAML file, whose keys are taken one by one; an error names the file and the key."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


_MISSING = object()


class Section:
    """
    A mapping that is being read. What was not taken stays in `rest`.

    Args:
        content: What the file holds; anything but a mapping is refused.
        where (`str`): File, and path of the key within it.
    """

    def __init__(self, content: Any, where: str):
        self.where = where
        if not isinstance(content, dict):
            raise ValueError(f"{where}: must be a mapping, got {content!r}")
        self.rest = {**content}

    def refuse(self, key: str, problem: str, close: tuple[str, Iterable[str]] | None = None) -> NoReturn:
        """Raise a `ValueError` about `key`; `close` is a word that is wrong and those that would be right."""
        found = difflib.get_close_matches(str(close[0]), list(map(str, close[1])), n=1) if close else []
        raise ValueError(f"{self.where}: {key}: {problem}" + (f"; did you mean {found[0]!r}?" if found else ""))

    @contextmanager
    def naming(self, key: str, before: str = "") -> Iterator[None]:
        """Put file and key before what is raised within."""
        try:
            yield
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.where}: {key}: {before}{error}") from error

    def value(self, key: str, kinds: type | tuple[type, ...], default: Any = _MISSING) -> Any:
        """Take the value of `key`, which must be one of `kinds`; without a default it must be there."""
        if key not in self.rest:
            if default is _MISSING:
                raise ValueError(f"{self.where}: the key {key!r} is missing")
            return default
        value = self.rest.pop(key)
        if not isinstance(value, kinds) or isinstance(value, bool):
            kinds = kinds if isinstance(kinds, tuple) else (kinds,)
            self.refuse(key, f"must be {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")
        return value

    def mapping(self, key: str, default: Any = _MISSING) -> dict[Any, Any]:
        return self.value(key, dict, default)

    def sequence(self, key: str, kind: type) -> list[Any]:
        """Take a list that is not empty, whose items are all of one kind."""
        values = self.value(key, list)
        if not values or not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
            self.refuse(key, f"must be a list of {kind.__name__}, got {values!r}")
        return values

    def end(self) -> None:
        """Refuse what was not taken."""
        if self.rest:
            raise ValueError(f"{self.where}: unknown keys: {', '.join(map(str, self.rest))}")
