"""`entrocraft eval --use_vllm` with a real engine: its samples are the policy's, with and without an adapter."""

import json
from pathlib import Path
from typing import get_args

import engine
import pytest
import tiny
import torch
from equality import LORA
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from entrocraft_trl.cli import main
from entrocraft_trl.evaluation.vllm_sampling import LORA_RANKS, vllm_sampler


STRONG_LORA = LORA | {"lora_alpha": 64}  # samples of the two policies have to differ
# The largest that chi-square with 23 degrees of freedom, one fewer than tokens, is in 999 of 1,000 samples.
CHI_SQUARE = 49.7


@pytest.fixture(scope="module")
def adapter_folder(model_folder, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), LoraConfig(**STRONG_LORA))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path) -> str:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{a}+{a}=?", "solution": str(2 * a)}) + "\n" for a in range(1, 6)))
    return str(file)


def evaluate(model: str, data: str, output_dir: Path, *more: str) -> tuple[list[dict], dict]:
    """Samples and figures of the command."""
    options = "--use_vllm --dtype float32 --n 4 --max_new_tokens 6 --temperature 1 --top_p 1 --top_k 0".split()
    with engine.forgotten():
        where = ["--model", model, "--dataset", data, "--output_dir", str(output_dir)]
        assert main(["eval", *where, *options, *more]) == 0
    lines = (output_dir / "samples.jsonl").read_text().splitlines()[1:]
    return [json.loads(line) for line in lines], json.loads((output_dir / "summary.json").read_text())["metrics"]


def chi_square(samples, log_probs: torch.Tensor) -> float:
    """Of the first tokens of samples, against the policy's `(V,)`."""
    counts = torch.bincount(torch.tensor([sample.ids[0] for sample in samples]), minlength=len(log_probs))
    expected = len(samples) * log_probs.exp()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("with_adapter", [False, True], ids=["model", "adapter"])
def test_samples_are_drawn_from_the_policy(engines, model_folder, adapter_folder, with_adapter):
    import vllm

    llm = vllm.LLM(model=model_folder, enable_lora=with_adapter, seed=0)
    settings = GenerationConfig(do_sample=True, temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=1)
    adapter = adapter_folder if with_adapter else None
    sample = vllm_sampler(llm, tiny.build_tokenizer(), 2000, settings, seed=3 << 32, adapter=adapter)
    prompt = tiny.build_tokenizer()("1+2=?")["input_ids"]
    (samples,) = sample([prompt], 0)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        base = (model(ids).logits[0, -1].double() / 1.5).log_softmax(-1)
        adapted = (PeftModel.from_pretrained(model, adapter_folder)(ids).logits[0, -1].double() / 1.5).log_softmax(-1)
    assert chi_square(samples, adapted if with_adapter else base) < CHI_SQUARE
    assert chi_square(samples, base if with_adapter else adapted) > 2 * CHI_SQUARE


def test_the_command_samples_alike_whatever_the_blocks_are(engines, model_folder, data, tmp_path):
    whole, metrics = evaluate(model_folder, data, tmp_path / "whole")
    blocks, _ = evaluate(model_folder, data, tmp_path / "blocks", "--batch_size", "8")
    assert [record["completions"] for record in whole] == [record["completions"] for record in blocks]
    assert len({text for record in whole for text in record["completions"]}) > 10, "each sample has its own stream"
    assert metrics["mean@4"] == sum(sum(record["rewards"]) for record in whole) / 20
    assert metrics["entropy"] is None


def test_the_command_samples_with_an_adapter(engines, model_folder, adapter_folder, data, tmp_path):
    base, _ = evaluate(model_folder, data, tmp_path / "base")
    adapted, _ = evaluate(adapter_folder, data, tmp_path / "adapted")
    assert [record["completions"] for record in base] != [record["completions"] for record in adapted]


def test_the_ranks_of_adapters_are_vllms(vllm_is_installed):
    from vllm.config.lora import MaxLoRARanks

    assert set(LORA_RANKS) <= set(get_args(MaxLoRARanks))
