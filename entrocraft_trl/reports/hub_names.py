"""What a model card may name: models and data sets of the Hub, and no place on this machine."""

import os
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..atomic import write_atomically
from ..data.loading import BUILDERS


ADAPTER_OF = "base_model:"  # PEFT's tag `base_model:adapter:NAME`


def is_hub_name(name: str) -> bool:
    """Whether `name` means a repository of the Hub, in the order of loading: files and folders go first."""
    if os.path.exists(name) or Path(name).suffix.lower() in BUILDERS:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def drop_paths(path: Path) -> None:
    """
    Take models and data sets that are no repositories of the Hub out of the card at `path`, if there is one.

    The Hub refuses an upload whose card names a path (400), and a path tells about the machine. TRL names the starting
    policy in the card of the model, PEFT in the card that it writes beside every adapter.
    """
    if not path.exists():
        return
    card = ModelCard.load(path)
    dropped = []
    for field in ("base_model", "datasets", "tags"):
        values = card.data.get(field, [])
        values = [values] if isinstance(values, str) else values
        paths = [value for value in values if _is_path(field, value)]
        if paths:
            card.data[field] = [value for value in values if value not in paths] or None
            dropped += paths
    if dropped:
        for name in dropped:
            card.text = card.text.replace(f"[{name}](https://huggingface.co/{name})", "a local model")
        # In one piece: an upload in the background may be reading the card.
        write_atomically(path, lambda stream: stream.write(str(card).encode()))


def _is_path(field: str, value: str) -> bool:
    if field == "tags":
        return value.startswith(ADAPTER_OF) and not is_hub_name(value.rpartition(":")[2])
    return not is_hub_name(value)
