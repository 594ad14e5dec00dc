"""Text of others (prompts, column names, errors) for a terminal, which takes control characters as orders."""


def printable(text: str) -> str:
    """
    `text` with every character that does not print escaped, as `repr` does: the terminal's orders (`\\x1b`), line
    ends, marks that turn the direction of writing (`\\u202e`), halves of surrogate pairs, which cannot be encoded.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
