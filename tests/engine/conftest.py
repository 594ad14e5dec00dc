"""vLLM on a CPU, in an environment of its own: `make test-vllm`. Elsewhere these tests are skipped."""

import importlib.util
import os

import pytest


INSTALLED = importlib.util.find_spec("vllm") is not None
if INSTALLED:  # set before vLLM is imported, which TRL's trainers do
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or a process is pinned to a core that others may keep busy
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, as colocated ones are anyway
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCHDYNAMO_DISABLE": "1",  # its sampler would be compiled for minutes, to draw a few tokens
    }


@pytest.fixture(scope="session", autouse=True)
def vllm_is_installed():
    if not INSTALLED:
        pytest.skip("vLLM is not installed here: `make test-vllm` runs this in an environment that has it")


@pytest.fixture
def engines(vllm_is_installed, monkeypatch):
    """What the engines of a test are built with beside what TRL or the command says; nothing is left of them after."""
    import engine

    options = {
        "dtype": "float32",  # or its numbers would be those of bfloat16
        "enforce_eager": True,
        "kv_cache_memory_bytes": engine.KV_CACHE_BYTES,
    }
    engine.build_with(options, monkeypatch)
    with engine.forgotten():
        yield options


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny model with the smallest heads that vLLM's attention for CPUs has."""
    import tiny

    folder = tmp_path_factory.mktemp("model")
    tiny.build_model(head_dim=32).save_pretrained(folder)
    tiny.build_tokenizer().save_pretrained(folder)
    return str(folder)
