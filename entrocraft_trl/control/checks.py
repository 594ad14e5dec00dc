"""Values of the band's fields as Python, YAML or the command line give them."""

import math
from typing import Any

from ..config_values import number


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
