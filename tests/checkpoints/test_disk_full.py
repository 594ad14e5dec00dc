"""A full disk ends the run with what is kept, and where; what is kept is whole, and goes on when there is room."""

import errno
import traceback
from pathlib import Path

import pytest
import tiny
import torch
import transformers.modeling_utils
from safetensors import SafetensorError

from entrocraft_trl import atomic
from entrocraft_trl.checkpoints.manifest import list_checkpoints


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_for_torch(*args, **kwargs):
    raise RuntimeError("[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing file data/0")


def full_for_safetensors(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def build(max_steps=3, **settings):
    settings = {"save_strategy": "steps", "save_steps": 1, **settings}
    return tiny.build_trainer(args=tiny.build_config(max_steps=max_steps, **settings))


# Where the disk can be found full in a save, and how that is said there.
PLACES = [
    (transformers.modeling_utils, "safe_save_file", full_for_safetensors),  # the weights
    (torch, "save", full_for_torch),  # the optimizer
    (atomic.os, "fsync", full),  # our own files
    (transformers.trainer_callback.TrainerState, "save_to_json", full),  # the last file
]


@pytest.mark.parametrize(("owner", "name", "fail"), PLACES, ids=[name for _, name, _ in PLACES])
def test_what_is_kept_is_said_and_is_kept(owner, name, fail, monkeypatch):
    build(max_steps=1).train()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises((OSError, RuntimeError, SafetensorError)) as error:
            build().train(resume_from_checkpoint=True)
    said = "".join(traceback.format_exception_only(error.value))
    assert "No space left" in said or "failed writing" in said  # what it was
    assert "while the checkpoint 'run/checkpoint-2' was written, which is therefore incomplete." in said
    assert "The last complete checkpoint is 'run/checkpoint-1'; resume from it." in said
    found = list_checkpoints(Path("run"))
    assert found.pop(1) is None and None not in found.values()
    assert not list(Path("run").rglob("*.partial"))
    resumed = build()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_a_final_model_that_does_not_fit_says_so_too(monkeypatch):
    trainer = build()
    trainer.train()
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full_for_safetensors)
    with pytest.raises(SafetensorError) as error:
        trainer.save_model()
    (note,) = error.value.__notes__
    assert "while the model in 'run' was written" in note and "complete checkpoint is 'run/checkpoint-3'" in note


def test_before_the_first_checkpoint_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        build().train()
    (note,) = error.value.__notes__
    assert "There is no complete checkpoint in 'run'." in note
