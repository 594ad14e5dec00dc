"""
Training runs against the loopback Hub, in a process of their own: huggingface_hub reads its endpoint at import.

    python hub_client.py RESULT_FILE        with HF_ENDPOINT set, and the folder of the runs as working directory

Writes what was seen as JSON; test_hub.py judges it.
"""

import atexit
import json
import logging
import sys
import time
import types
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import tiny
import torch
from huggingface_hub import ModelCard, close_session
from huggingface_hub.utils import _http
from peft import LoraConfig
from transformers import TrainerCallback

from entrocraft_trl import EntrocraftGRPOTrainer
from entrocraft_trl.checkpoints.hub_download import fetch_newest_checkpoint, find_commit
from entrocraft_trl.checkpoints.run_lock import TRAINING


TOKEN = "hf_TheTokenOfTheTests"
# huggingface_hub waits 1, 2, 4, 8 and 8 seconds between its tries; the tests need the tries, not the waits.
_http.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})


class ImpatientTrainer(EntrocraftGRPOTrainer):
    hub_silence_limit = 60.0
    hub_patience = 1.0
    hub_retry_pause = 0.1


class StopAt(TrainerCallback):
    """The machine goes away: training ends at a step that is not the last one."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class WaitForUploads(TrainerCallback):
    """After each save, until it is uploaded: these steps are so short that the next save would be left out."""

    trainer = None

    def on_save(self, args, state, control, **kwargs):
        futures.wait(self.trainer._upload_jobs())


class LookAround(TrainerCallback):
    """What is in the folder when training begins, and what a second fetch returns."""

    trainer = None

    def __init__(self, folder):
        self.folder = folder

    def on_train_begin(self, args, state, control, **kwargs):
        self.files = sorted(path.name for path in Path(self.folder).iterdir() if path.name != TRAINING)
        self.again = fetch_newest("tester/round-trip", self.folder)


class Messages(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def build(folder, repository=None, callbacks=(), model=None, peft_config=None, trainer_class=None, **settings):
    hub = {"push_to_hub": True, "hub_model_id": f"tester/{repository}", "hub_token": TOKEN} if repository else {}
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", **hub, **settings}
    band = {"entropy_low": [0.9, 0.5], "entropy_high": [0.95, 0.6]}  # soon left: rejections in every later step
    args = tiny.build_config(output_dir=folder, learning_rate=0.02, **band, **settings)
    data = tiny.build_dataset(64)
    given = {"model": model, "peft_config": peft_config, "callbacks": list(callbacks)}
    trainer = tiny.build_trainer(trainer_class or ImpatientTrainer, args=args, train_dataset=data, **given)
    for callback in callbacks:
        callback.trainer = trainer
    return trainer


def fetch_newest(repository, folder):
    commit = find_commit(repository)
    return commit and fetch_newest_checkpoint(commit, folder)


def curve(trainer):
    return [tiny.history(trainer, f"entrocraft/{key}") for key in ("entropy", "entropy_low", "accepted_rollouts")]


@contextmanager
def messages_of_uploads():
    """What the user is told about uploads."""
    messages = Messages()
    sources = [logging.getLogger(name) for name in ("transformers", "entrocraft_trl")]
    for source in sources:
        source.addHandler(messages)
    told = []
    yield told
    for source in sources:
        source.removeHandler(messages)
    told += [text for text in messages.texts if "upload" in text]


def round_trip() -> dict:
    with messages_of_uploads() as told:
        seen = train_lose_and_go_on()
    return {**seen, "messages": told}


def train_lose_and_go_on() -> dict:
    """Train, push, lose the machine, download, go on: and the run that was never interrupted."""
    whole = build("whole")
    whole.train()

    nothing_yet = fetch_newest("tester/round-trip", "fresh")
    first = build("first", "round-trip", hub_strategy="checkpoint", callbacks=[StopAt(2)])
    first.train()

    arrived = LookAround("fresh")
    second = build("fresh", "round-trip", hub_strategy="checkpoint", callbacks=[arrived])
    second.train(resume_from_checkpoint="hub")
    pushed = second.push_to_hub()
    ours, theirs = dict(second.model.named_parameters()), dict(whole.model.named_parameters())
    return {
        "nothing_yet": nothing_yet,
        "fetched": arrived.files,
        "fetched_again": arrived.again,
        "same_parameters": all(torch.equal(ours[name], theirs[name]) for name in theirs),
        "same_curve": curve(second) == curve(whole),
        "steps": second.state.global_step,
        "curve_length": len(curve(second)[0]),
        "same_memory": second.control_memory == whole.control_memory,
        "commit": pushed.oid,
        "card_tags": ModelCard.load("tester/round-trip", token=TOKEN).data.tags,
    }


def all_checkpoints() -> dict:
    trainer = build("all", "all-checkpoints", hub_strategy="all_checkpoints", callbacks=[WaitForUploads()])
    trainer.train()
    return {"checkpoint": fetch_newest("tester/all-checkpoints", "all-again")}


def plain() -> dict:
    """The default strategy, `every_save`, pushes models and no checkpoints."""
    trainer = build("plain", "plain", hub_strategy="every_save")
    trainer.train()
    trainer.save_model()
    return {"checkpoint": fetch_newest("tester/plain", "plain-again")}


def local() -> dict:
    """An adapter for a model in a local folder, trained on a local file, beside what is not to be published."""
    start, data, run = Path("start").resolve(), Path("data").resolve(), Path("local")
    tiny.build_model().save_pretrained(start)
    data.mkdir()
    (data / "train.jsonl").write_text('{"prompt": "1+2=?"}\n')
    for name in ("_from_hub/abc", "_incomplete-checkpoint-1", "incomplete-checkpoint-1"):
        (run / name).mkdir(parents=True)
        (run / name / "optimizer.pt").write_bytes(b"gigabytes")
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    settings = {"hub_strategy": "checkpoint", "log_completions": True, "model_init_kwargs": {"token": TOKEN}}
    callbacks = [WaitForUploads()]
    trainer = build("local", "local", model=str(start), peft_config=adapter, callbacks=callbacks, **settings)
    with messages_of_uploads() as told:
        trainer.train()
        pushed = trainer.push_to_hub(dataset_name=str(data / "train.jsonl"))
    return {"commit": pushed.oid if pushed else None, "messages": told, "how_to_push": trainer._how_to_push()}


class OpenTrainer(ImpatientTrainer):
    hub_not_pushed = ()


def completions_asked_for() -> dict:
    trainer = build("asked", "asked", trainer_class=OpenTrainer, log_completions=True, max_steps=1)
    trainer.train()
    return {"commit": trainer.push_to_hub().oid}


def trouble(repository) -> dict:
    # `gone` must have pushed its first checkpoint before it meets the second.
    callbacks = [WaitForUploads()] if repository == "gone" else []
    trainer = build(repository, repository, hub_strategy="checkpoint", callbacks=callbacks)
    if repository == "silent":
        close_session()  # the limit belongs to the session, and a loaded machine must not meet it in the other runs
        trainer.hub_silence_limit = 0.1
    start = time.monotonic()
    with messages_of_uploads() as told:
        trainer.train()
        trained = time.monotonic()
        pushed = trainer.push_to_hub()
        pushing = time.monotonic() - trained
        futures.wait(trainer._upload_jobs())  # what is still to be told
    return {
        "steps": trainer.state.global_step,
        "commit": pushed.oid if pushed else None,
        "messages": told,
        "seconds_training": trained - start,
        "seconds_pushing": pushing,
    }


def leave_under_uploads(repository) -> None:
    """The last run of the process, which is to end although large files are under way in threads of their own."""
    trainer = build(repository, repository, hub_strategy="end", max_steps=1)
    close_session()  # the limit belongs to the session
    trainer.hub_silence_limit = 5.0
    trainer.train()
    assert trainer.push_to_hub() is None
    atexit.register(Path("left.txt").write_text, "trackers send their last metrics at exit")


def main(result_file: str) -> None:
    torch.set_num_threads(1)
    runs = (round_trip, all_checkpoints, plain, local, completions_asked_for)
    results = {run.__name__.replace("_", "-"): run() for run in runs}
    for repository in ("refusing", "forbidden", "recovering", "gone", "silent"):
        results[repository] = trouble(repository)
    Path(result_file).write_text(json.dumps(results, indent=1))
    leave_under_uploads("stalling")


if __name__ == "__main__":
    main(sys.argv[1])
