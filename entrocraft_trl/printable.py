"""Text of others, such as names of models and columns, for a terminal or a figure."""


def printable(text: str) -> str:
    r"""
    `text` with every character that does not print as its escape sequence: a terminal obeys control characters (it
    clears, recolours, renames itself). Example: `"\x1b[31m"` becomes `"\\x1b[31m"`.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
