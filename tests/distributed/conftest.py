"""One launch a backend for all tests that need it: a launch costs ten seconds, nearly all of them imports."""

from pathlib import Path

import pytest
from launching import launch


RANKS = Path(__file__).with_name("ranks.py")


class Launches:
    """
    Launches a backend when it is first asked for, with every part that tests of this run want of it, and keeps what
    its ranks said.

    Args:
        parts: For each backend (`None`: one process), seconds until a part counts as hung, by the part's name.
    """

    def __init__(self, folder: Path, reference: Path, parts: dict[str | None, dict[str, float]]):
        self.folder, self.reference, self.parts = folder, reference, parts
        self.launched: dict[str | None, list[dict]] = {}

    def results(self, backend: str | None, part: str) -> list[dict]:
        if backend not in self.launched:
            parts, folder = self.parts[backend], self.folder / str(backend)
            self.launched[backend] = launch(
                backend, RANKS, str(backend), self.reference, *parts, folder=folder, limit=sum(parts.values())
            )
        return [rank[part] for rank in self.launched[backend]]

    def folder_of(self, backend: str | None, part: str) -> Path:
        return self.folder / str(backend) / part


@pytest.fixture(scope="session")
def launches(request, tmp_path_factory, reference_folder):
    """A module that uses it names its `PART`, the `BACKENDS` that it wants it of, and its time `LIMIT` in seconds."""
    parts: dict[str | None, dict[str, float]] = {}
    for module in dict.fromkeys(item.module for item in request.session.items if "launches" in item.fixturenames):
        for backend in module.BACKENDS:
            parts.setdefault(backend, {})[module.PART] = module.LIMIT
    return Launches(tmp_path_factory.mktemp("launches"), reference_folder, parts)
