"""Text of others (prompts, names of models and columns, errors) for a terminal or a figure."""


def printable(text: str) -> str:
    """
    `text` with every character that does not print escaped, as `repr` does: the terminal's orders (`\\x1b`), line
    ends, marks that turn the direction of writing (`\\u202e`), halves of surrogate pairs, which cannot be encoded.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
