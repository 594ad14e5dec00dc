"""How much is tried: enough for each run of the tests, or all that `make soak` asks for."""

import os

from hypothesis import settings


SOAK = os.environ.get("ENTROCRAFT_SOAK") == "1"


def profile(examples: int) -> settings:
    """A run tries the same examples every time; the soak run tries eighty times as many."""
    return settings(derandomize=True, deadline=None, database=None, max_examples=80 * examples if SOAK else examples)
