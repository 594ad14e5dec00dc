"""Resuming from the Hub on several nodes: one commit, fetched once for a disk, and one error for all ranks."""

import dataclasses
import json
import pickle
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hub_environment import HELPERS, client_environment
from hub_server import HubServer
from torch.distributed.checkpoint import FileSystemReader
from transformers import TrainerControl, TrainerState

from entrocraft_trl.checkpoints.hub_download import runs_code


def checkpoint(step: int, folder: str = "last-checkpoint", **files: bytes) -> dict[str, bytes]:
    """A complete checkpoint, with weights that show its step."""
    state = dataclasses.asdict(TrainerState(global_step=step, max_steps=9, epoch=0.5))
    state["stateful_callbacks"] = {"TrainerControl": TrainerControl().state()}
    content = {"trainer_state.json": json.dumps(state).encode(), "model.safetensors": b"weights %d" % step, **files}
    return {f"{folder}/{name}": value for name, value in content.items()}


SHARED, OWN = "tester/shared", "tester/own"
CASES = {
    "one disk": f"{SHARED}=../shared-run",
    "a disk each": f"{OWN}=run",
    "moving": "tester/moving=../moving-run",
    "not there": "tester/nowhere=../nothing",
    "mute": "tester/mute=../mute-run",
    "second disk fails": f"{OWN}=broken",
    "broken state": "tester/broken-state=../broken-run",
    "pickle": "tester/pickle=../pickle-run",
}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """The server, and for each case what both nodes saw."""
    folder = tmp_path_factory.mktemp("nodes")
    with HubServer() as server, socket.socket() as probe:
        server.add(SHARED, checkpoint(2) | {"model.safetensors": b"not of the checkpoint"})
        server.add(OWN, checkpoint(4, "checkpoint-4") | checkpoint(2, "checkpoint-2"))
        server.add("tester/moving", checkpoint(2)).upcoming = [checkpoint(4), checkpoint(6), checkpoint(8)]
        server.add("tester/mute", checkpoint(2))
        server.add(
            "tester/broken-state", checkpoint(2, "checkpoint-2") | {"last-checkpoint/trainer_state.json": b"[]"}
        )
        server.add("tester/pickle", checkpoint(2, **{"pytorch_model_fsdp_0/.metadata": b"a pickle"}))
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        processes = []
        for rank in (0, 1):
            node = folder / f"node-{rank}"
            node.mkdir()
            if rank == 1:
                (node / "broken").write_text("a file where the folder of the run should be")
            launched = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment = {**client_environment(server.url, folder), **launched, **address}
            worker = [sys.executable, str(HELPERS / "hub_nodes_worker.py"), "results.json", *CASES.values()]
            stream = (node / "output.txt").open("w")
            processes.append(subprocess.Popen(worker, cwd=node, env=environment, stdout=stream, stderr=stream))
        try:
            codes = [process.wait(timeout=180) for process in processes]  # a hang is a failure
        finally:
            for process in processes:
                process.kill()
        outputs = [(folder / f"node-{rank}" / "output.txt").read_text()[-3000:] for rank in (0, 1)]
        assert codes == [0, 0], outputs
        results = [json.loads((folder / f"node-{rank}" / "results.json").read_text()) for rank in (0, 1)]
        yield server, {name: [result[case] for result in results] for name, case in CASES.items()}


def requests_for(server: HubServer, repository: str) -> Counter:
    return Counter(request for request in server.requests if repository in request)


def test_one_process_fetches_for_all_that_share_a_disk(nodes):
    server, seen = nodes
    assert [node["weights"] for node in seen["one disk"]] == [{"2": "weights 2"}] * 2
    assert seen["one disk"][0]["left"] == ["checkpoint-2"]
    requests = requests_for(server, SHARED)
    assert requests["GET /api/models/tester/shared"] == 1  # the second node asks nothing
    assert requests and max(requests.values()) == 1, requests


def test_a_node_with_a_disk_of_its_own_fetches_the_same_commit(nodes):
    _, seen = nodes
    assert [node["weights"] for node in seen["a disk each"]] == [{"4": "weights 4"}] * 2


def test_list_and_download_are_of_one_commit(nodes):
    server, seen = nodes
    assert len(server.repositories["tester/moving"].commits) > 2  # it did move
    assert [node["weights"] for node in seen["moving"]] == [{"2": "weights 2"}] * 2


def test_no_repository_is_a_start_from_zero(nodes):
    _, seen = nodes
    assert [node["weights"] for node in seen["not there"]] == [{}, {}]


@pytest.mark.parametrize("case", ["mute", "second disk fails"])
def test_a_failure_is_the_same_on_all_ranks(nodes, case):
    _, seen = nodes
    first, second = (node["error"] for node in seen[case])
    assert first == second
    reason = {"mute": "mute: ReadTimeout: ", "second disk fails": "own: NotADirectoryError: "}[case]
    assert first.startswith("cannot fetch a checkpoint of tester/" + reason)


def test_a_state_that_tells_no_step_is_left_out(nodes):
    _, seen = nodes
    assert [node["weights"] for node in seen["broken state"]] == [{"2": "weights 2"}] * 2
    assert seen["broken state"][0]["left"] == ["checkpoint-2"]
    (message,) = seen["broken state"][0]["told"]
    reason = "trainer_state.json holds no object"
    assert message == f"last-checkpoint of tester/broken-state is not complete ({reason}) and is left out."


def test_what_is_unpickled_is_said(nodes):
    _, seen = nodes
    (message,) = seen["pickle"][0]["told"]
    assert (
        "checkpoint-2 of tester/pickle was written by DeepSpeed or sharded FSDP" in message and "any code" in message
    )
    assert seen["one disk"][0]["told"] == []


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("global_step2/mp_rank_00_model_states.pt", True),
        ("global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", True),
        ("optimizer_0/.metadata", True),
        ("optimizer.pt", False),  # transformers reads these with weights_only=True
        ("rng_state_0.pth", False),
        ("entrocraft_rank_0.pt", False),
        ("training_args.bin", False),  # nobody reads it
    ],
)
def test_which_files_run_code(tmp_path, name, code):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert runs_code(tmp_path) is code


class Planted:
    def __reduce__(self):
        return Path.touch, (Path("ran.txt"),)


def test_sharded_checkpoints_do_run_code(tmp_path):
    # The reason for the warning: if this fails, torch reads them safely now.
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(AttributeError):  # it runs, and then is no metadata
        FileSystemReader(tmp_path).read_metadata()
    assert Path("ran.txt").exists()
