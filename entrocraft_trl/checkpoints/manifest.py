"""
When a checkpoint folder is complete, and which is the newest that is.

`trainer_state.json` is the commit record. transformers writes it last, `resume.py` lets the main process reach it when
all processes have written their files, and a half-written JSON file does not parse. What it vouches for is listed in
`entrocraft_files.json`, which also shows what a copy or a crash of the machine has lost.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import NoneType

from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..atomic import PARTIAL, write_atomically


MANIFEST_NAME = "entrocraft_files.json"
RANK_FILE = "entrocraft_rank_{}.pt"
ASIDE = "_incomplete-"  # transformers pushes no name that starts with "_"

_FOLDER = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(0|[1-9][0-9]*)")  # as transformers writes it: no "checkpoint-010"
_TENSOR_FILES = (".safetensors", ".bin", ".pt", ".pth", ".distcp")


def write_manifest(folder: Path, run_id: str) -> None:
    """List the weights, optimizer and random states in `folder` with their sizes in bytes, and the run they are of."""
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _tensor_files(folder)}
    content = json.dumps({"run": run_id, "files": files}, indent=1).encode()
    write_atomically(folder / MANIFEST_NAME, lambda stream: stream.write(content))


def _read_manifest(folder: Path) -> tuple[str | None, dict] | str:
    """Run and files of a checkpoint's list, or what is wrong with it. Older lists hold files only, and no run."""
    content = _read_json(folder / MANIFEST_NAME)
    if isinstance(content, str):
        return content
    run_id, files = (content.get("run"), content["files"]) if "files" in content else (None, content)
    if not isinstance(run_id, (str, NoneType)) or not isinstance(files, dict):
        return f"{MANIFEST_NAME} is no list of files"
    return run_id, files


def run_of(folder: Path) -> str | None:
    """The run that a checkpoint says it is of; `None` for those of plain TRL and of older versions."""
    manifest = _read_manifest(folder)
    return None if isinstance(manifest, str) else manifest[0]


def why_not_here(run: Path, resumed: Path | None) -> str | None:
    """
    Why a run that continues the checkpoint `resumed` (`None`: that starts) must not save in the folder `run`; or
    `None`. Where two runs share a folder, a restart takes whichever checkpoint is further on, and rotation deletes
    whichever is older.
    """
    complete = [step for step, reason in list_checkpoints(run).items() if reason is None]
    if resumed is None:
        if not complete:
            return None
        return (
            f"output_dir={str(run)!r} holds {checkpoint_folder(run, complete[0]).name} of an earlier run, and a new "
            "one would mix with it: go on with that run (resume_from_checkpoint=auto), choose another output_dir, or "
            "remove its checkpoints"
        )
    of_others = [step for step in complete if run_of(checkpoint_folder(run, step)) not in (None, run_of(resumed))]
    if not of_others:
        return None
    return (
        f"output_dir={str(run)!r} holds {checkpoint_folder(run, of_others[0]).name} of another run than "
        f"{str(resumed)!r} is of: move the checkpoints of one of them to a folder of their own, or choose another "
        "output_dir"
    )


def uncommit(folder: Path) -> None:
    """
    Before a folder is written again: until that is done, it is not complete, whatever it held. What a killed process
    left of files that it was writing goes too.
    """
    for path in (folder / TRAINER_STATE_NAME, folder / MANIFEST_NAME, *folder.glob(f"_*{PARTIAL}")):
        _remove(path)


def why_incomplete(folder: Path) -> str | None:
    """
    What is missing for resuming from the checkpoint in `folder`, or `None` if it is complete.

    Checkpoints of plain TRL have no list of files: a readable `trainer_state.json` beside weights is all they show.
    """
    step = read_step(folder / TRAINER_STATE_NAME)
    if isinstance(step, str):
        return step
    named = step_of_folder(folder.name)
    if named not in (None, step):
        return f"{TRAINER_STATE_NAME} is of step {step}"
    if not (folder / MANIFEST_NAME).exists():
        return None if _tensor_files(folder) else "no weights are there"
    manifest = _read_manifest(folder)
    if isinstance(manifest, str):
        return manifest
    _, files = manifest
    found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    for name, size in files.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]} bytes instead of {size!r}"
    return None


def step_of_folder(name: str) -> int | None:
    """`N` of `checkpoint-N`; `None` of another name."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def read_step(path: Path) -> int | str:
    """The optimizer step that a `trainer_state.json` is of, or why transformers could not resume from the file."""
    state = _read_json(path)
    if isinstance(state, str):
        return state
    reason = _why_unreadable(state)
    return f"{path.name} {reason}" if reason else state["global_step"]


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
    if state["global_step"] < 0:
        return f"holds global_step={state['global_step']}"
    if strange := [entry for entry in state["log_history"] if not isinstance(entry, dict)]:
        return f"holds {strange[0]!r} in its log_history"
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
    except OSError as error:  # a directory, a file where the folder should be, no permission
        return f"{path.name} cannot be read: {error.strerror}"
    except (ValueError, RecursionError):  # not JSON, or not UTF-8; nested thousands of levels deep
        return f"{path.name} cannot be read"
    return content if isinstance(content, dict) else f"{path.name} holds no object"


def list_checkpoints(run: Path) -> dict[int, str | None]:
    """Step of each checkpoint folder in `run`, newest first, and why it is incomplete (`None` if it is not)."""
    folders = [(step, path) for path in run.glob("*") if (step := step_of_folder(path.name)) is not None]
    return {step: why_incomplete(path) for step, path in sorted(folders, reverse=True) if path.is_dir()}


def what_is_kept(run: Path) -> str:
    """The sentence that ends a message on a run that failed: from where it can be resumed."""
    complete = [step for step, reason in list_checkpoints(run).items() if reason is None]
    if not complete:
        return f"There is no complete checkpoint in {str(run)!r}."
    return f"The last complete checkpoint is {str(checkpoint_folder(run, complete[0]))!r}; resume from it."


@contextmanager
def telling_what_is_kept(run: Path, written: str) -> Iterator[None]:
    """
    What fails while `written` is says what is kept of the run, and where. A full disk comes as `OSError`, as
    torch's `RuntimeError` or as safetensors' own error: each keeps its type, and the sentence follows its message.
    """
    try:
        yield
    except Exception as error:
        error.add_note(
            f"This happened while the {written} was written, which is therefore incomplete. {what_is_kept(run)} If "
            "the disk is full, make room first: half-written checkpoints can go, and save_total_limit keeps fewer."
        )
        raise


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def set_aside(folder: Path) -> Path:
    """
    Rename a half-written checkpoint, so that neither rotation nor another tool takes it for the newest, and no push
    for a part of the model. The last one is kept: with every kill, a large model would fill the disk.
    """
    for old in folder.parent.glob(f"{ASIDE}{PREFIX_CHECKPOINT_DIR}-*"):
        _remove(old)
    return folder.rename(folder.with_name(ASIDE + folder.name))


def _remove(path: Path) -> None:
    """A file, a folder, or a link, of which the target stays; nothing is fine too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
