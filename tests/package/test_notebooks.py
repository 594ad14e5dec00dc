"""
The notebooks: run from top to bottom in a short form, in a Jupyter kernel, and what is saved in them.

The short form replaces numbers in the cell tagged `settings`, the one that a user edits. In the same kernel, which
saves the imports, each notebook then runs once more with that cell switched to a real model: a tiny one in a folder,
and data with the columns of the Hub's. Checks on a notebook's variables are cells of their own, so that they run in
its kernel.
"""

import ast
import base64
import inspect
import io
import re
import socket
from pathlib import Path

import datasets
import matplotlib.image
import nbformat
import pytest
import tiny
import torch
from nbclient import NotebookClient
from peft import LoraConfig
from transformers import BitsAndBytesConfig, Qwen3Config

from entrocraft_trl import EntrocraftGRPOConfig
from entrocraft_trl.reports.gpu_memory import GIB
from entrocraft_trl.reports.memory_report import estimate_run
from entrocraft_trl.tasks import warmup


FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ("quickstart", "lora_single_gpu", "entropy_schedules")

# Settings of the short form; the rest of each notebook runs as it stands.
SHORT = {
    "quickstart": {"MAX_STEPS": 2, "SAMPLES": 4},
    "lora_single_gpu": {"MAX_STEPS": 2, "SAMPLES": 4, "QLORA": True},  # without a GPU: the notebook says it is skipped
    "entropy_schedules": {"MAX_STEPS": 4, "SICK_STEPS": 2, "READINGS": 2},
}
CHECKS = {
    "quickstart": """
assert set(evaluations) == set(answers) == {"before", "GRPO", "Entrocraft"}
assert [record["step"] for record in logs["GRPO"]] == [record["step"] for record in logs["Entrocraft"]] == [1, 2]
# Same start, same seed: the first batch is the same, and its entropy the initial one.
assert abs(readings["GRPO"][0] - readings["Entrocraft"][0]) < 1e-5
assert abs(band[0][0] - 0.9 * readings["Entrocraft"][0]) < 1e-5
assert sampling.temperature == 0.6 and table.loc["before", "entropy"] == readings["GRPO"][0]
for values in evaluations.values():
    assert abs(values["pass@1"] - values["mean@4"]) < 1e-9 and values["pass@1"] <= values["pass@2"] <= values["pass@4"]
assert list(table.index) == ["before", "GRPO", "Entrocraft"]
""",
    "lora_single_gpu": """
assert quantization_config is None and not has_gpu
assert torch.equal(reloaded_logits, trained_logits) and not torch.equal(base_logits, trained_logits)
assert (merged_logits - trained_logits).abs().max() < 1e-4 < (base_logits - trained_logits).abs().max()
assert not any("lora" in name for name, _ in merged.named_parameters())
# Adam keeps two float32 numbers per trained parameter, and a step counter of 4 bytes per tensor.
counters = 4 * sum(parameter.requires_grad for parameter in trainer.model.parameters()) / 2**20
assert memory_use["before"]["optimizer states"] == 0 and memory_use["before"]["adapter"] == trainable * 4 / 2**20
assert abs(memory_use["after"]["optimizer states"] - 2 * memory_use["after"]["adapter"] - counters) < 1e-9
assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
assert set(evaluations) == set(completions) == {"before", "after"} and sampling.temperature == 0.6
""",
    "entropy_schedules": """
assert abs(initial - sum(readings) / 2) < 1e-9 and abs(logs["sign rule"][0]["entrocraft/entropy"] / initial - 1) < 0.2
assert [len(log) for log in logs.values()] == [4, 4] and [len(log) for log in sick.values()] == [2] * 4
assert all(record["entrocraft/direction"] == -1 for record in sick["wrong unit"])
assert all(record["entrocraft/accepted_rollouts"] == 1 for record in sick["band too wide"])
assert bands["piecewise: rise, then decay"](0.3) == (1.05, 1.25) and bands["step"](0.5) == (0.55, 0.75)
last = sum(record["entrocraft/distance_outside_band"] for record in logs["sign rule"][-1:])
assert table.loc["distance_outside_band", "sign rule"] == last  # the last quarter of four steps is one
""",
}
PRINTED = {
    "quickstart": "4096 training rows",
    "lora_single_gpu": "QLoRA was skipped",
    "entropy_schedules": "far outside the band",  # the trainer's warning on the wrong unit
}


def load(name: str):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def settings_cell(notebook):
    (cell,) = [cell for cell in notebook.cells if "settings" in cell.metadata.get("tags", [])]
    return cell


def set_values(cell, values: dict) -> None:
    for name, value in values.items():
        cell.source, count = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value!r}  ", cell.source, flags=re.M)
        assert count == 1, f"the cell to edit sets {name} {count} times"


def code_of(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook) -> str:
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def figures(notebook) -> list[str]:
    """The PNG figures among the outputs, in base64."""
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def str_of(name: str) -> str:
    return "\n".join(cell.source for cell in load(name).cells)


def short_form(name: str):
    """The embedded form with few steps, and with a reward that the hardly trained policy earns now and then."""
    notebook = load(name)
    cell = settings_cell(notebook)
    set_values(cell, SHORT[name])
    easy = "lambda completions, **columns: [float(text[:1] in '12345') for text in completions]"
    assert cell.source.count("reward_func = expression_reward") == 1
    cell.source = cell.source.replace("reward_func = expression_reward", f"reward_func = {easy}")
    return notebook


@pytest.fixture(scope="module")
def untrained_policy(tmp_path_factory):
    """A cache in which the starting policy is there already, though hardly trained: the real one takes a minute."""
    cache = tmp_path_factory.mktemp("cache")
    short = warmup.WarmupSettings(steps=2, habit_steps=1)
    original = warmup._train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmup, "_train", lambda settings, seed, progress: original(short, seed, progress))
        warmup.starting_policy(cache, progress=False)
    return cache


IMPORTS = "from transformers import AutoTokenizer\nfrom entrocraft_trl.data.rewards import load_reward"
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '=' if add_generation_prompt else '' }}"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A folder in the place of a Hub name: a tiny Qwen3 with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    tiny.build_model().save_pretrained(folder)
    return folder


def load_like_the_hub(name, config=None, split=None):
    """A few rows of each data set, with its columns and its way to write an answer."""
    import datasets

    if name == "openai/gsm8k":
        assert config == "main"
        rows = {"question": ["What is 1+1?", "What is 2+3?"] * 8, "answer": ["So 1+1=2.\n#### 2", "#### 5"] * 8}
    else:
        assert name == "AI-MO/NuminaMath-TIR" and config is None
        rows = {"problem": ["1+1", "2+3"] * 8, "solution": ["It is $\\boxed{2}$.", "\\boxed{5}"] * 8}
    table = datasets.Dataset.from_dict(rows)
    return table if split else datasets.DatasetDict({"train": table, "test": table})


def real_form(name: str, model: Path) -> list:
    """The cells of a notebook after a user's edit, with completions of 4 tokens instead of hundreds."""
    notebook = load(name)
    cell = settings_cell(notebook)
    set_values(cell, {**SHORT[name], "MODEL": str(model)})
    cell.source, count = re.subn(r'(?m)^(        "max_completion_length"): \d+', r"\1: 4", cell.source)
    assert count == 1
    hub = f"{inspect.getsource(load_like_the_hub)}\nimport datasets\ndatasets.load_dataset = load_like_the_hub"
    return [nbformat.v4.new_code_cell(hub), *notebook.cells, nbformat.v4.new_code_cell("assert MODEL == model_name")]


@pytest.mark.subprocess
@pytest.mark.parametrize("name", NAMES)
def test_runs_as_it_stands_and_with_a_real_model(name, untrained_policy, chat_model, tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROCRAFT_CACHE", str(untrained_policy))  # the kernel inherits the environment
    notebook = short_form(name)
    count = len(notebook.cells)
    notebook.cells += [nbformat.v4.new_code_cell(CHECKS[name]), *real_form(name, chat_model)]
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    notebook.cells = notebook.cells[:count]
    assert PRINTED[name] in printed(notebook)
    assert len(figures(notebook)) == len(figures(load(name))) >= 2
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}  # a folder that git ignores


@pytest.mark.parametrize(
    "name, values",
    [
        ("quickstart", {}),
        ("lora_single_gpu", {}),
        ("lora_single_gpu", {"DATASET": "AI-MO/NuminaMath-TIR"}),
        ("entropy_schedules", {}),
    ],
)
def test_prompts_and_rewards_of_a_real_model(name, values, chat_model, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", load_like_the_hub)
    notebook = load(name)
    cell = settings_cell(notebook)
    set_values(cell, {"MODEL": str(chat_model), **values})
    made = {}
    exec(f"{IMPORTS}\n{cell.source}", made)
    for rows in [made["train_dataset"], *([made["test_dataset"]] if "test_dataset" in made else [])]:
        assert rows[0]["prompt"].endswith("put the final answer in \\boxed{}.=") and "1+1" in rows[0]["prompt"]
        assert made["reward_func"](completions=["So \\boxed{2}.", "\\boxed{5}"], **rows[:2]) == [1.0, 1.0]
        assert made["reward_func"](completions=["\\boxed{3}", "\\boxed{2}"], **rows[:2]) == [0.0, 0.0]


def test_sentences_need_no_hub(chat_model):
    cell = settings_cell(load("lora_single_gpu"))
    set_values(cell, {"MODEL": str(chat_model), "DATASET": "sentences"})
    made = {}
    exec(f"{IMPORTS}\n{cell.source}", made)
    row, ids = made["test_dataset"][0], {"completion_ids": [[1], [1]]}
    assert row["prompt"].endswith(f"Words: {', '.join(row['words'])}=")  # the end of this model's chat template
    right = f"My {row['words'][0]} stood beside the old {row['words'][1]}."
    assert made["reward_func"](completions=[right, "No."], words=[row["words"]] * 2, **ids) == [1.0, 0.0]
    assert not set(row["words"]) & {word for words in made["train_dataset"]["words"] for word in words}


def test_the_table_of_memory_is_that_of_the_estimate(tmp_path):
    rows = re.findall(r"^\| `Qwen/Qwen3-([\d.]+B)` \| ([\d.]+) \| ([\d.]+) \|$", str_of("lora_single_gpu"), flags=re.M)
    assert len(rows) == 3
    # Hidden size, MLP size, layers, heads; what the three have in common is below.
    shapes = {"0.6B": (1024, 3072, 28, 16), "1.7B": (2048, 6144, 28, 16), "4B": (2560, 9728, 36, 32)}
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    for size, lora, qlora in rows:
        hidden, mlp, layers, heads = shapes[size]
        Qwen3Config(
            vocab_size=151936,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        ).save_pretrained(tmp_path / size)
        args = EntrocraftGRPOConfig(
            "unused",
            per_device_train_batch_size=8,
            gradient_accumulation_steps=8,
            num_generations=8,
            max_completion_length=512,
            gradient_checkpointing=True,
            model_init_kwargs={"dtype": torch.bfloat16},
            use_cpu=True,
        )
        for written, quantization in ((lora, None), (qlora, packed)):
            adapter = LoraConfig(r=16, target_modules="all-linear")
            inputs = {"model": tmp_path / size, "peft_config": adapter, "quantization_config": quantization}
            needed = estimate_run(args, inputs, prompt_tokens=256).needed / GIB
            assert needed == pytest.approx(float(written), abs=0.3)  # an estimate: its first decimal may move


# ------------------------------------------------------------------------------------------------------ what is saved


@pytest.mark.parametrize("name", NAMES)
def test_saved_outputs_are_complete_and_clean(name):
    notebook = load(name)
    nbformat.validate(notebook)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 500_000
    cells = code_of(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # one run, from top to bottom
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs), "warnings or progress bars among the outputs"
    text = printed(notebook) + "".join(output.data.get("text/plain", "") for output in outputs if "data" in output)
    assert not re.search(r"(?<![\w./<])/\w+/\w+", text), "an absolute path among the outputs"
    assert socket.gethostname() not in text


@pytest.mark.parametrize("name", NAMES)
def test_saved_figures_show_something(name):
    saved = figures(load(name))
    assert saved
    for figure in saved:
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(figure)))
        assert pixels.shape[1] >= 500
        assert (pixels[..., :3] < 0.95).any(axis=-1).mean() > 0.01  # not a blank page


@pytest.mark.parametrize("name", NAMES)
def test_saved_runs_are_the_full_form(name):
    """The default settings, so that the saved figures are those that the text describes."""
    statements = ast.parse(settings_cell(load(name)).source).body
    values = {s.targets[0].id: ast.literal_eval(s.value) for s in statements if isinstance(s, ast.Assign)}
    assert values["MODEL"] is None and values["MAX_STEPS"] >= 200
    assert f"{values['MAX_STEPS']} steps in " in printed(load(name))
