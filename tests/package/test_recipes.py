"""
Single-GPU recipes: each parses, builds and dry-runs, with and without vLLM, and states the memory that is computed.

The models are described by configs built here, of the real sizes; no weights exist.
"""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import Qwen3Config

from entrocraft_trl.cli import main
from entrocraft_trl.cli.arguments import make_parser, parse
from entrocraft_trl.cli.recipe import recipes


ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests" / "samples" / "gsm8k_sample.jsonl"
CONFIGS = ROOT / "configs"
RECIPES = sorted(CONFIGS.glob("*lora-*.yaml"))
WITH_VLLM = [path for path in RECIPES if path.stem.startswith("lora-")]
SIZES = {  # hidden, intermediate, layers, heads, key heads: of the Qwen3 models of that name
    "0.6b": (1024, 3072, 28, 16, 8),
    "1.7b": (2048, 6144, 28, 16, 8),
    "4b": (2560, 9728, 36, 32, 8),
}


@pytest.fixture(scope="module")
def model_folders(reference_folder, tmp_path_factory) -> dict[str, str]:
    """For each size a folder with a config of that size and a tokenizer, and no weights."""
    folders = {}
    for size, (hidden, intermediate, layers, heads, key_heads) in SIZES.items():
        folder = tmp_path_factory.mktemp(size)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(reference_folder / name, folder)
        config = Qwen3Config(
            vocab_size=151936,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=128,
            tie_word_embeddings=True,
            dtype="bfloat16",
        )
        config.save_pretrained(folder)
        folders[size] = str(folder)
    return folders


def with_vllm(recipe: Path, folder: Path) -> Path:
    """The recipe with the lines about vLLM uncommented, as its reader would."""
    head, _, tail = recipe.read_text().partition("# With vLLM")
    tail = re.sub(r"^# (\w+: .*)$", r"\1", "# With vLLM" + tail, flags=re.MULTILINE)
    path = folder / f"{recipe.stem}-vllm.yaml"
    path.write_text(re.sub(r"^dtype: .*\n", "", head, flags=re.MULTILINE) + tail)
    return path


def dry_run(recipe: Path, model: str, capsys, *more: str) -> str:
    here = ["--model_name_or_path", model, "--dataset_name", str(SAMPLE), "--eval_strategy", "no", "--dry_run"]
    capsys.readouterr()
    code = main(["train", "--config", str(recipe), *here, *more])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def needed(plan: str) -> str:
    return re.search(r"needed of one GPU +([\d.]+)", plan)[1]


def test_the_set_of_recipes():
    assert [path.stem for path in RECIPES] == [
        "lora-qwen3-0.6b",
        "lora-qwen3-1.7b",
        "lora-qwen3-4b",
        "qlora-qwen3-1.7b",
        "qlora-qwen3-4b",
    ]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_dry_run_says_the_memory_that_the_recipe_states(recipe, model_folders, capsys):
    plan = dry_run(recipe, model_folders[recipe.stem.rpartition("-")[2]], capsys)
    assert re.search(r"GPU memory: ([\d.]+) GiB", recipe.read_text())[1] == needed(plan)
    parts = re.findall(r"^  (\S.*?)  +[\d.]+$", plan, flags=re.MULTILINE)
    static = ["weights", "adapter", "gradients", "optimizer"]
    assert parts == [*static, "update: activations", "update: logits", "generation", "allowance"]
    assert "rejection        entropy_change" in plan and "band at 100%     0.150 to 0.300 times" in plan


@pytest.mark.parametrize("recipe", WITH_VLLM, ids=lambda path: path.stem)
def test_dry_run_with_vllm(recipe, model_folders, tmp_path, capsys):
    path = with_vllm(recipe, tmp_path)
    settings = yaml.safe_load(path.read_text())
    assert settings["use_vllm"] and settings["dtype"] == "float32"
    assert settings["vllm_max_model_length"] == settings["max_prompt_length"] + settings["max_completion_length"]
    plan = dry_run(path, model_folders[recipe.stem.rpartition("-")[2]], capsys)
    assert f"One GPU then needs {needed(plan)} GiB" in recipe.read_text()
    assert "vLLM: weights" in plan and "generation   " not in plan.partition("memory")[2]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_what_the_recipe_says_is_what_it_sets(recipe):
    script, args, model, _ = parse(["--config", str(recipe)])
    text = recipe.read_text()
    assert f"{args.generation_batch_size // 8} prompts x 8 rollouts an optimizer step" in text
    assert f"500 steps see {500 * args.generation_batch_size // 8} of" in text and args.max_steps == 500
    assert model.use_peft and model.load_in_4bit == recipe.stem.startswith("qlora")
    assert model.model_name_or_path == "Qwen/Qwen3-" + recipe.stem.rpartition("-")[2].upper()
    assert args.rejection_rule == "entropy_change"
    assert (args.entropy_low, args.entropy_high) == ([0.9, 0.15], [1.05, 0.3])  # the default band
    assert args.chat_template_kwargs == {"enable_thinking": False}
    assert script.reward_funcs == ["accuracy_reward"]


def test_batches_that_do_not_divide_are_refused(model_folders, capsys):
    argv = ["train", "--config", str(RECIPES[0]), "--num_generations", "7", "--dry_run"]
    assert main(argv) == 2
    assert "(64) must be divisible by num_generations (7)" in " ".join(capsys.readouterr().err.split())


def test_prompt_length_is_assumed_and_said(model_folders, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(re.sub(r"^max_prompt_length.*\n", "", RECIPES[0].read_text(), flags=re.MULTILINE))
    plan = dry_run(recipe, model_folders["0.6b"], capsys)
    assert "prompts of up to 512 tokens, assumed: set max_prompt_length" in plan


def test_models_without_an_estimate_still_dry_run(reference_folder, tmp_path, capsys):
    folder = tmp_path / "gpt2"
    shutil.copytree(reference_folder, folder)
    (folder / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    plan = dry_run(RECIPES[0], str(folder), capsys)
    assert "memory           no estimate for models of type 'gpt2'" in plan


# ----------------------------------------------------------------------------------------------------- recipes by name


def test_every_config_is_a_recipe():
    assert {name: path.read_text() for name, path in recipes().items()} == {
        path.stem: path.read_text() for path in CONFIGS.glob("*.yaml")
    }


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_a_name_means_its_file_wherever_one_stands(name, tmp_path, monkeypatch):
    by_path = parse(["--config", str(CONFIGS / f"{name}.yaml")])
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # the output folder of a run may have the recipe's name
    assert parse(["--config", name]) == parse([f"--config={name}"]) == by_path


def test_a_file_comes_before_the_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("max_steps: 3\noutput_dir: mine")
    assert parse(["--config", "quickstart"])[1].max_steps == 3


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("qwen3-4b-readmy", "did you mean 'qwen3-4b-readme'?"),
        ("zzz", "the names are: llama-3.1-8b, lora-qwen3-0.6b, "),
        ("accelerate/zero3", "the names are: "),  # not one to train with
    ],
)
def test_an_unknown_recipe_is_one_line(name, hint, capsys):
    assert main(["train", "--config", name]) == 2
    error = capsys.readouterr().err
    assert f"the path of a YAML file or the name of a recipe, got {name!r}; {hint}" in error
    assert len(error.splitlines()) == 1


def test_the_help_lists_every_recipe_on_a_line_of_its_own():
    lines = make_parser().format_help().splitlines()
    assert {f"  {name}" for name in recipes()} <= set(lines)


def test_the_recipe_command_lists_and_finds(capsys):
    assert main(["recipe"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert listed["qwen3-4b-gspo"] == "Qwen3-4B-Base with GSPO (sequence-level importance ratios), linear band."
    assert set(listed) == {str(path.relative_to(CONFIGS)).removesuffix(".yaml") for path in CONFIGS.rglob("*.yaml")}
    for name in listed:
        assert main(["recipe", name]) == 0
        assert Path(capsys.readouterr().out.strip()).samefile(CONFIGS / f"{name}.yaml")
    assert main(["recipe", "accelerate/zero4"]) == 2
    assert "there is no recipe 'accelerate/zero4'; did you mean 'accelerate/zero" in capsys.readouterr().err
