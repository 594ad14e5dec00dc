"""Values of config fields as Python, YAML or the command line give them; a refusal names the field and the value."""

import math
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


def edge_values(name: str, value: Any) -> list[float]:
    """One or two finite, non-negative floats, also from a single number."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    try:
        values = [number(name, edge) for edge in values]
    except ValueError:
        raise ValueError(f"{name} must hold numbers, one or a list of two, got {value!r}.") from None
    if len(values) not in (1, 2):
        raise ValueError(f"{name} takes one value or two (start, end), got {len(values)}: {value!r}.")
    if any(not math.isfinite(edge) or edge < 0 for edge in values):
        raise ValueError(f"{name} must be finite and not negative, got {values}.")
    return values


def knot_texts(name: str, value: Any) -> list[str] | None:
    """A list of texts, also from one text with spaces between the knots."""
    if value is None:
        return None
    texts = value.split() if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a list of texts 'progress:low:high', got {value!r}.")
    return list(texts)
