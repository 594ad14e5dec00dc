"""Values of config fields as Python, YAML or the command line give them; a refusal names the field and the value."""

from numbers import Real
from typing import Any


def number(name: str, value: Any) -> float:
    """A float, also from text: YAML reads `1e-1` as a string. Booleans, which would pass as 1 and 0, are refused."""
    if isinstance(value, (Real, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):  # no number; an integer beyond any float
            pass
    raise ValueError(f"{name} must be a number, got {value!r}.")


def whole_number(name: str, value: Any) -> int:
    """An int, also from text. Not from a float: the command line refuses `100.0` too."""
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return int(value)
        except ValueError:
            pass
    raise ValueError(f"{name} must be a whole number, got {value!r}.")
