"""The environment of a process that takes the loopback server for the Hub."""

import os
from pathlib import Path


HELPERS = Path(__file__).parent


def client_environment(url: str, folder: Path) -> dict[str, str]:
    """`folder` gets the client's cache."""
    return {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # the server speaks the LFS protocol only
        "HF_HOME": str(folder / "home"),
        "NO_PROXY": "127.0.0.1,localhost",
        "PYTHONPATH": str(HELPERS.parents[1]),
    }
