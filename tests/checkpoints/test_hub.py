"""Training against a loopback Hub: what is pushed, what comes back, and what a broken Hub does to a run (nothing)."""

import hashlib
import json
import shlex
import subprocess
import sys
import threading
from collections import Counter
from concurrent import futures
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_client import TOKEN
from hub_environment import HELPERS, client_environment
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard, close_session, errors, get_session

from entrocraft_trl.checkpoints import hub as hub_module
from entrocraft_trl.checkpoints.hub import HubUploadMixin, _is_final
from entrocraft_trl.cli import CommandError
from entrocraft_trl.cli.train import _train


PLAIN_FILES = {"README.md", "config.json", "entropy.png", "model.safetensors", "tokenizer.json", "training_args.bin"}
CHECKPOINT_FILES = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server after all runs, the folder of the runs, and what the client saw."""
    folder = tmp_path_factory.mktemp("hub")
    with HubServer() as server:
        environment = client_environment(server.url, folder)
        client = [sys.executable, str(HELPERS / "hub_client.py"), "results.json"]
        # All runs together take about 20 seconds on an idle core; a hang is a failure, with the client's last words.
        done = subprocess.run(client, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        yield server, folder, json.loads((folder / "results.json").read_text())


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commit_of(repository, title: str) -> dict[str, bytes]:
    (files,) = [files for _, commit, files in repository.commits if commit == title]
    return files


# ------------------------------------------------------------------------------------------------------ the round trip


def test_pushed_bytes_are_the_bytes_on_disk(hub):
    server, folder, _ = hub
    repository = server.repositories["tester/round-trip"]
    pushed = commit_of(repository, "Training in progress, step 2, checkpoint")
    local = files_under(folder / "first" / "checkpoint-2")
    assert set(local) >= CHECKPOINT_FILES
    assert {path: pushed[f"last-checkpoint/{path}"] for path in local} == local
    pushed = commit_of(repository, "Training in progress, step 2")
    assert set(pushed) >= PLAIN_FILES
    assert pushed["model.safetensors"] == local["model.safetensors"]
    assert hashlib.sha256(pushed["model.safetensors"]).hexdigest() in server.blobs  # it came by the LFS protocol
    assert not any("checkpoint-" in path or path.startswith("_") for path in pushed)


def test_run_resumed_from_the_hub_is_the_uninterrupted_run(hub):
    _, _, results = hub
    seen = results["round-trip"]
    assert seen["nothing_yet"] is None  # the first start of a job: there is no repository to resume from
    assert seen["fetched"] == ["checkpoint-2"] and seen["fetched_again"] == "fresh/checkpoint-2"
    assert seen["steps"] == 4 and seen["curve_length"] == 4 and seen["messages"] == []
    assert seen["same_parameters"] and seen["same_curve"] and seen["same_memory"]


def test_the_old_checkpoint_does_not_come_back_over_the_new_one(hub):
    server, folder, results = hub
    repository = server.repositories["tester/round-trip"]
    final, _, files = repository.commits[-1]
    assert final == results["round-trip"]["commit"]
    # A download to "last-checkpoint" in the run's folder would be pushed again with the model: step 2 over step 4.
    assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == 4
    assert files["model.safetensors"] == (folder / "fresh" / "model.safetensors").read_bytes()


def test_pushed_card_is_valid_and_complete(hub):
    server, folder, results = hub
    files = server.repositories["tester/round-trip"].files
    card = ModelCard(files["README.md"].decode())
    assert {"trl", "grpo", "entrocraft"} <= set(card.data.tags)
    assert set(results["round-trip"]["card_tags"]) == set(card.data.tags)
    assert "## Entropy control" in card.text and "](entropy.png)" in card.text
    assert 'from_pretrained("tester/round-trip")' in card.text
    assert "| optimizer steps | 4 of 4 |" in card.text
    assert files["entropy.png"] == (folder / "fresh" / "entropy.png").read_bytes()


def test_newest_of_all_checkpoints(hub):
    server, folder, results = hub
    paths = server.repositories["tester/all-checkpoints"].files
    assert "checkpoint-2/trainer_state.json" in paths and "checkpoint-4/trainer_state.json" in paths
    assert results["all-checkpoints"]["checkpoint"] == "all-again/checkpoint-4"
    assert files_under(folder / "all-again" / "checkpoint-4") == files_under(folder / "all" / "checkpoint-4")


def test_default_strategy_pushes_models_without_checkpoints(hub):
    server, folder, results = hub
    repository = server.repositories["tester/plain"]
    assert results["plain"]["checkpoint"] is None
    assert "Training in progress, step 2" in repository.titles
    assert repository.files["model.safetensors"] == (folder / "plain" / "model.safetensors").read_bytes()


def test_no_card_names_a_place_on_this_machine(hub):
    server, folder, results = hub
    # The server refuses cards that do: the checkpoints' too, in which PEFT names the folder of the starting policy.
    assert results["local"]["messages"] == [] and results["local"]["commit"] is not None
    repository = server.repositories["tester/local"]
    cards = {path: files[path].decode() for _, _, files in repository.commits for path in files if path[-3:] == ".md"}
    assert set(cards) == {"README.md", "last-checkpoint/README.md"}
    cards |= {str(path): path.read_text() for path in (folder / "local").rglob("*.md")}
    assert not [name for name, card in cards.items() if str(folder) in card]
    assert "on the [" not in cards["README.md"] and "## Entropy control" in cards["README.md"]


# -------------------------------------------------------------------------------------------------- what is not pushed


def paths_of(files: dict[str, bytes]) -> set[str]:
    return {path for path in files if not path.startswith("last-checkpoint/")}


def test_completions_and_half_written_checkpoints_stay_here(hub):
    server, folder, _ = hub
    local = files_under(folder / "local")
    assert any(path.startswith("completions/") for path in local)  # TRL's file of prompts and completions
    for _, _, files in server.repositories["tester/local"].commits:
        top = {path.split("/")[0] for path in files if "/" in path}
        assert top <= {"last-checkpoint"}, top
    assert "adapter_model.safetensors" in files and "training_args.bin" in files


def test_no_byte_that_is_pushed_or_saved_is_of_the_token(hub):
    server, folder, _ = hub
    token = TOKEN.encode()
    for repository in server.repositories.values():
        for _, title, files in repository.commits:
            assert not [path for path, content in files.items() if token in content], (repository.name, title)
    assert not [path for path, content in files_under(folder).items() if token in content]
    assert server.blobs and not [oid for oid, content in server.blobs.items() if token in content]


def test_completions_are_pushed_if_asked_for(hub):
    server, folder, _ = hub
    pushed = server.repositories["tester/asked"].files
    (path,) = [path for path in files_under(folder / "asked") if path.endswith(".parquet")]
    assert pushed[path] == (folder / "asked" / path).read_bytes()


def test_the_command_that_we_print_pushes_what_the_run_pushes(hub):
    server, folder, results = hub
    repository = server.repositories["tester/local"]
    before = paths_of(repository.files)
    command = results["local"]["how_to_push"].partition("later with: ")[2]
    assert command.startswith('hf upload tester/local "local" . --exclude ')
    command = command.replace("tester/local", "tester/by-hand", 1)
    environment = {**client_environment(server.url, folder), "HF_TOKEN": TOKEN}
    hf = Path(sys.executable).with_name("hf")
    line = [str(hf), *shlex.split(command)[1:]]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert paths_of(server.repositories["tester/by-hand"].files) == before


# ------------------------------------------------------------------------------------------------------- a broken Hub


TROUBLES = ["refusing", "forbidden", "silent", "gone"]


@pytest.mark.parametrize("trouble", [*TROUBLES, "recovering"])
def test_training_goes_on_with_complete_checkpoints_and_a_warning(hub, trouble):
    _, folder, results = hub
    seen = results[trouble]
    assert seen["steps"] == 4
    for step in (2, 4):
        checkpoint = files_under(folder / trouble / f"checkpoint-{step}")
        assert set(checkpoint) >= CHECKPOINT_FILES
        assert json.loads(checkpoint["trainer_state.json"])["global_step"] == step
    assert (folder / trouble / "model.safetensors").read_bytes() == checkpoint["model.safetensors"]
    assert any(f"tester/{trouble} failed" in text and "Training goes on" in text for text in seen["messages"]), seen


@pytest.mark.parametrize("trouble", TROUBLES)
def test_last_push_gives_up_and_says_how_to_push_later(hub, trouble):
    _, _, results = hub
    seen = results[trouble]
    assert seen["commit"] is None
    assert any(f'hf upload tester/{trouble} "{trouble}" . --exclude "_*"' in text for text in seen["messages"])
    retries = sum("Trying again" in text for text in seen["messages"])
    if trouble != "silent":  # whose silence may use up all the patience
        assert (retries > 0) == (trouble != "forbidden"), seen  # a refused token stays refused
    # Patience is 1 second; the rest is saving the model, drawing the figure, and a loaded machine.
    assert seen["seconds_training"] + seen["seconds_pushing"] < 60


def test_a_process_ends_under_its_uploads(hub):
    server, folder, _ = hub
    # Python waits for these threads: for the request that is under way, not for all six tries.
    tries = Counter(request for request in server.requests if "/stalled/" in request)
    assert len(tries) > 1 and max(tries.values()) < 6, tries
    assert (folder / "left.txt").exists()


def test_last_push_makes_up_for_failed_ones(hub):
    server, folder, results = hub
    files = server.repositories["tester/recovering"].files
    assert results["recovering"]["commit"] == server.repositories["tester/recovering"].commits[-1][0]
    assert files["model.safetensors"] == (folder / "recovering" / "model.safetensors").read_bytes()


class Parent:
    """What the mixin needs of a trainer, and of one whose uploads are given."""

    def __init__(self):
        self.args = SimpleNamespace(output_dir="run", hub_token=None, hub_revision=None)
        self.hub_model_id = "tester/stuck"
        self.state = SimpleNamespace(global_step=4)
        self.upload = None

    def is_world_process_zero(self):
        return True

    def init_hf_repo(self):
        raise ConnectionError("no Hub here")

    def push_to_hub(self, commit_message, blocking, token, revision):
        assert blocking is False  # the parent's own waiting has no limit
        self._finish_current_push()
        return HfApi().run_as_future(self.upload)

    def _push_from_checkpoint(self, folder):
        if self.upload is not None:  # transformers starts no upload while one is running
            HfApi().run_as_future(self.upload)


class Uploads(HubUploadMixin, Parent):
    hub_patience = 0.2


@pytest.fixture
def stuck():
    """An upload that ends with the test."""
    end = threading.Event()
    yield end.wait
    end.set()


def test_an_upload_that_never_ends_does_not_hold_the_run(caplog, monkeypatch, stuck):
    limits = []

    def wait(jobs, timeout):
        limits.append(timeout)
        return futures_wait(jobs, timeout=timeout)

    futures_wait = futures.wait
    monkeypatch.setattr(hub_module.futures, "wait", wait)
    trainer = Uploads()
    trainer.upload = stuck
    trainer._push_from_checkpoint("run/checkpoint-4")
    assert trainer.push_to_hub() is None
    assert limits == [0.2, 0.0]  # one patience for all waiting: the checkpoint's upload left nothing for the model's
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    assert all("still running" in text and "hf upload tester/stuck" in text for text in caplog.messages)


def no_route():
    raise ConnectionError("no route to host")


def test_sigterm_ends_the_waiting_and_the_retries(caplog, stuck):
    for upload in (stuck, no_route):
        trainer = Uploads()
        trainer.hub_patience = 900.0
        trainer.sigterm_received = True
        trainer.upload = upload
        assert trainer.push_to_hub() is None
    assert "still running" in caplog.text
    # Failed or not yet looked at: whether the thread was done in time makes no difference to the exit.
    assert "Trying again" not in caplog.text


def test_a_save_that_is_not_pushed_is_said(caplog, stuck):
    trainer = Uploads()
    trainer.upload = stuck
    trainer._push_from_checkpoint("run/checkpoint-2")
    assert caplog.text == ""
    trainer.upload = None
    trainer._push_from_checkpoint("run/checkpoint-4")
    assert "step 4 was not pushed to tester/stuck" in caplog.text
    caplog.clear()
    stuck.__self__.set()
    futures.wait(trainer._upload_jobs())
    trainer._push_from_checkpoint("run/checkpoint-4")
    assert caplog.text == ""


def http_error(status: int) -> errors.HfHubHTTPError:
    return errors.HfHubHTTPError("no", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (http_error(401), True),
        (http_error(404), True),
        (http_error(408), False),
        (http_error(429), False),
        (http_error(500), False),
        (ConnectionError("gone"), False),
        (ValueError("Invalid metadata in README.md"), True),
    ],
)
def test_only_troubles_of_the_hub_are_tried_again(error, final):
    assert _is_final(error) is final
    wrapped = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")  # as huggingface_hub wraps it
    wrapped.__cause__ = error
    assert _is_final(wrapped) is final


def test_an_upload_that_fails_is_said_too(caplog):
    start, told = threading.Event(), threading.Event()

    def upload():
        start.wait()
        raise ConnectionError("no route to host\nRequest ID: 1")

    trainer = Uploads()
    trainer.upload = upload
    trainer._push_from_checkpoint("run/checkpoint-4")
    trainer._upload_jobs()[0].add_done_callback(lambda job: told.set())  # after the one that logs
    start.set()
    told.wait()
    (message,) = caplog.messages
    assert message.startswith("An upload to tester/stuck failed: ConnectionError: no route to host. Training goes on")


def test_first_contact_has_a_limit_and_raises(monkeypatch):
    limits = []
    monkeypatch.setattr(hub_module, "limit_silence", limits.append)
    with pytest.raises(ConnectionError, match="no Hub here"):
        Uploads().init_hf_repo()  # before any training: nothing is lost, and a wrong token shows at once
    assert limits == [60.0]


def test_default_session_of_huggingface_hub_has_no_limit():
    close_session()  # whatever other tests left in it
    assert get_session().timeout.read is None  # the reason for all this; if it fails, the limit may be theirs now


@pytest.mark.parametrize("pushed", [None, "a commit"])
def test_the_command_fails_if_the_model_is_not_on_the_hub(pushed, capsys):
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=4),
        accelerator=SimpleNamespace(wait_for_everyone=lambda: None),
        push_to_hub=lambda **_: pushed,
        sigterm_received=False,
        **dict.fromkeys(["train", "save_state", "save_model", "exit_on_sigterm", "end"], lambda *_, **__: None),
    )
    args = SimpleNamespace(push_to_hub=True, output_dir="run")
    with nullcontext() if pushed else pytest.raises(CommandError, match="the model in 'run' is not on the Hub"):
        _train(trainer, SimpleNamespace(dataset_name=None), args, None)
    assert "4 steps done, run saved in run" in capsys.readouterr().out
