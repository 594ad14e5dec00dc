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
        self.ranks: dict[str | None, list[dict]] = {}
        self.failures: dict[str | None, str] = {}

    def results(self, backend: str | None, part: str) -> list[dict]:
        if backend not in self.ranks and backend not in self.failures:
            self._launch(backend)
        assert backend in self.ranks, self.failures[backend]
        return [rank[part] for rank in self.ranks[backend]]

    def _launch(self, backend: str | None) -> None:
        parts = self.parts[backend]
        words = (RANKS, str(backend), self.reference, *parts)
        try:
            self.ranks[backend] = launch(backend, *words, folder=self.folder / str(backend), limit=sum(parts.values()))
        except AssertionError as error:  # once for all tests that need it, not once more for each
            self.failures[backend] = str(error)

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
