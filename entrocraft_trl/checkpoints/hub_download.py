"""The newest checkpoint of a repository on the Hub: one commit, fetched once for all processes that share a disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from .background_uploads import SILENCE_LIMIT, limit_silence
from .hub import first_line
from .manifest import checkpoint_folder, read_step, set_aside, step_of_folder, why_incomplete


if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.get_logger(__name__)

LAST_CHECKPOINT = "last-checkpoint"  # folder in the repository, with hub_strategy="checkpoint"
DOWNLOAD_FOLDER = "_from_hub"  # never pushed, as all names that start with "_"
# Written by DeepSpeed, and by torch.distributed.checkpoint for sharded FSDP. Both are unpickled without restriction.
UNPICKLED = re.compile(r".*_(model|optim)_states\.pt|\.metadata")


@dataclass(frozen=True)
class Commit:
    """
    One commit of a repository. A run may push while another one fetches: what is listed and what is downloaded have to
    be of the same commit.
    """

    repo_id: str
    oid: str
    files: tuple[str, ...]

    def download(self, name: str, folder: Path, token: str | None) -> Path:
        return Path(hf_hub_download(self.repo_id, name, revision=self.oid, local_dir=folder, token=token))


def find_commit(repo_id: str, token: str | None = None, revision: str | None = None) -> Commit | None:
    """The newest commit of a repository, or of one of its branches; `None` if there is no such repository."""
    limit_silence(SILENCE_LIMIT)
    try:
        # Of all requests for a list of files, the only one that takes a limit; the others wait for ever.
        info = HfApi().model_info(repo_id, revision=revision, token=token, timeout=SILENCE_LIMIT)
    except RepositoryNotFoundError:
        return None
    return Commit(repo_id, info.sha, tuple(file.rfilename for file in info.siblings or ()))


def fetch_newest_checkpoint(commit: Commit, output_dir: str, token: str | None = None) -> str | None:
    """
    Bring the newest checkpoint in a commit to `output_dir/checkpoint-N`, where a run keeps its own.

    The repository was written with `hub_strategy="checkpoint"` or `"all_checkpoints"`. The folder does not keep its
    name there: what lies in `output_dir/last-checkpoint` is part of every later upload of the model, which would bring
    the old checkpoint back over the new one.

    Returns:
        `str` or `None`: Folder for `resume_from_checkpoint`; `None` if there is no complete checkpoint in the commit.
        A complete `output_dir/checkpoint-N` is not downloaded again.

    Raises:
        HfHubHTTPError, OSError: If the Hub cannot be reached or refuses.
    """
    downloads = Path(output_dir) / DOWNLOAD_FOLDER
    fetched = _fetch(commit, Path(output_dir), downloads / commit.oid, token)
    if downloads.exists():  # what an interrupted download left is of use to the next one
        shutil.rmtree(downloads)
    return fetched


def _fetch(commit: Commit, run: Path, download: Path, token: str | None) -> str | None:
    found = {folder: _step_of(commit, folder, download, token) for folder in _checkpoints(commit)}
    steps = {folder: step for folder, step in found.items() if isinstance(step, int)}
    for folder in found.keys() - steps.keys():
        logger.warning(f"{folder} of {commit.repo_id} is not complete ({found[folder]}) and is left out.")
    for folder in sorted(steps, key=steps.get, reverse=True):
        target = checkpoint_folder(run, steps[folder])
        if why_incomplete(target) is None:
            return str(target)
        names = [name for name in commit.files if name.startswith(f"{folder}/")]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: commit.download(name, download, token), names))
        if reason := why_incomplete(download / folder):
            logger.warning(f"{folder} of {commit.repo_id} is not complete ({reason}) and is left out.")
            continue
        if target.exists():
            set_aside(target)
        (download / folder).rename(target)
        if runs_code(target):
            logger.warning(
                f"{target.name} of {commit.repo_id} was written by DeepSpeed or sharded FSDP, whose loaders unpickle "
                "it: resuming runs any code that was put there. Resume from repositories that you trust only."
            )
        return str(target)
    return None


def _checkpoints(commit: Commit) -> list[str]:
    suffix = f"/{TRAINER_STATE_NAME}"
    folders = [name.removesuffix(suffix) for name in commit.files if name.endswith(suffix)]
    return [name for name in folders if name == LAST_CHECKPOINT or step_of_folder(name) is not None]


def _step_of(commit: Commit, folder: str, download: Path, token: str | None) -> int | str:
    """Optimizer step of a checkpoint, or why its state tells none."""
    if folder != LAST_CHECKPOINT:
        return step_of_folder(folder)
    return read_step(commit.download(f"{folder}/{TRAINER_STATE_NAME}", download, token))


def runs_code(folder: Path) -> bool:
    """Whether loading the checkpoint in `folder` unpickles what is in it without restriction."""
    return any(UNPICKLED.fullmatch(path.name) for path in folder.rglob("*"))


# ------------------------------------------------------------------------------------------------------- on all ranks


def fetch_for_all(args: TrainingArguments) -> None:
    """
    Bring the newest checkpoint of `args.hub_model_id` to `args.output_dir`, on all ranks together.

    Rank 0 asks the Hub and fetches. Then each node that does not see the checkpoint, because it has a disk of its own,
    fetches that of the same commit. A failure on one rank ends all of them: one that ended alone would leave the
    others waiting.

    Raises:
        OSError: The same on all ranks, if the Hub cannot be reached or refuses, or a disk does.
    """

    def find_and_fetch():
        commit = find_commit(args.hub_model_id, args.hub_token, args.hub_revision)
        return commit, commit and fetch_newest_checkpoint(commit, args.output_dir, args.hub_token)

    def fetch_what_others_have(commit, folder):
        if folder is not None and why_incomplete(Path(folder)):
            fetch_newest_checkpoint(commit, args.output_dir, args.hub_token)

    found, problem = _attempt(find_and_fetch) if args.process_index == 0 else (None, None)
    [found, problem] = broadcast_object_list([found, problem])
    if problem is None and args.process_index != 0 and args.local_process_index == 0:
        _, problem = _attempt(fetch_what_others_have, *found)
    problems = [text for text in gather_object([problem]) if text]
    if problems:
        raise OSError(f"cannot fetch a checkpoint of {args.hub_model_id}: {problems[0]}")


def _attempt(action: Callable, *args) -> tuple[Any, str | None]:
    """What `action` returns, and what went wrong. HTTP libraries have errors of their own, which are no OSError."""
    try:
        return action(*args), None
    except Exception as error:
        return None, first_line(error)
