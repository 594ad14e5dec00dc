"""
When a checkpoint folder is complete, and which is the newest that is.

`trainer_state.json` is the commit record. transformers writes it last, `resume.py` lets the main process reach it when
all processes have written their files, and a half-written JSON file does not parse. What it vouches for is listed in
`entrocraft_files.json`, which also shows what a copy or a crash of the machine has lost.
"""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .atomic import write_atomically


MANIFEST_NAME = "entrocraft_files.json"
RANK_FILE = "entrocraft_rank_{}.pt"
ASIDE = "_incomplete-"  # transformers pushes no name that starts with "_"

_FOLDER = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_TENSOR_FILES = (".safetensors", ".bin", ".pt", ".pth", ".distcp")


def write_manifest(folder: Path) -> None:
    """List the weights, optimizer and random states in `folder` with their sizes in bytes."""
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _tensor_files(folder)}
    write_atomically(folder / MANIFEST_NAME, lambda stream: stream.write(json.dumps(files, indent=1).encode()))


def uncommit(folder: Path) -> None:
    """Before a folder is written again: until that is done, it is not complete, whatever it held."""
    for name in (TRAINER_STATE_NAME, MANIFEST_NAME):
        (folder / name).unlink(missing_ok=True)


def why_incomplete(folder: Path) -> str | None:
    """
    What is missing for resuming from the checkpoint in `folder`, or `None` if it is complete.

    Checkpoints of plain TRL have no list of files: a readable `trainer_state.json` beside weights is all they show.
    """
    state = _read_json(folder / TRAINER_STATE_NAME)
    if isinstance(state, str):
        return state
    if (reason := _why_unreadable(state)) is not None:
        return f"{TRAINER_STATE_NAME} {reason}"
    match = _FOLDER.fullmatch(folder.name)
    if match and state["global_step"] != int(match[1]):
        return f"{TRAINER_STATE_NAME} is of step {state['global_step']}"
    if not (folder / MANIFEST_NAME).exists():
        return None if _tensor_files(folder) else "no weights are there"
    files = _read_json(folder / MANIFEST_NAME)
    if isinstance(files, str):
        return files
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def _why_unreadable(state: dict) -> str | None:
    """What transformers, without naming the file, would stumble over in the content of `trainer_state.json`."""
    unknown = state.keys() - {field.name for field in fields(TrainerState)}
    if unknown:
        return f"holds the unknown field {sorted(unknown)[0]!r}: another version of transformers wrote it"
    for name, kinds in (
        ("global_step", int),
        ("max_steps", int),
        ("epoch", (int, float, type(None))),
        ("log_history", list),
        ("stateful_callbacks", dict),
    ):
        if name not in state:
            return f"has no field {name!r}"
        if not isinstance(state[name], kinds) or isinstance(state[name], bool):
            return f"holds {name}={state[name]!r}"
    return None if "TrainerControl" in state["stateful_callbacks"] else "has no 'TrainerControl' among its callbacks"


def _tensor_files(folder: Path) -> list[Path]:
    """Weights, optimizer and random states; without the files of `resume.py`, which a run can do without."""
    ours = RANK_FILE.partition("{")[0]
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in _TENSOR_FILES and not path.name.startswith((".", ours)) and path.name != TRAINING_ARGS_NAME
    ]


def _read_json(path: Path) -> dict | str:
    """The object in a JSON file, or what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{path.name} is missing"
    except ValueError:  # not JSON, or not UTF-8
        return f"{path.name} cannot be read"
    return content if isinstance(content, dict) else f"{path.name} holds no object"


def list_checkpoints(run: Path) -> dict[int, str | None]:
    """Step of each checkpoint folder in `run`, newest first, and why it is incomplete (`None` if it is not)."""
    folders = [(int(match[1]), path) for path in run.glob("*") if (match := _FOLDER.fullmatch(path.name))]
    return {step: why_incomplete(path) for step, path in sorted(folders, reverse=True) if path.is_dir()}


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def set_aside(folder: Path) -> Path:
    """
    Rename a half-written checkpoint, so that neither rotation nor another tool takes it for the newest, and no push
    for a part of the model. The last one is kept: with every kill, a large model would fill the disk.
    """
    for old in folder.parent.glob(f"{ASIDE}{PREFIX_CHECKPOINT_DIR}-*"):
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink()
    return folder.rename(folder.with_name(ASIDE + folder.name))
