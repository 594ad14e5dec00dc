"""Tables of results."""

from collections.abc import Sequence


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """Rows of cells, headings first, as a Markdown table that also reads well in a terminal."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
