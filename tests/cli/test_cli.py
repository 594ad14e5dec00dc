"""The command line: help, one-line errors, and a full run on GSM8K rows with a tiny model and math-verify rewards."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

from entrocraft_trl.cli import COMMANDS, main
from entrocraft_trl.data import rewards
from entrocraft_trl.printable import printable
from entrocraft_trl.reports.log import read_log


ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests" / "samples" / "gsm8k_sample.jsonl"
SHARED = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a random Qwen3 with two layers and a byte-level BPE tokenizer trained on the sample rows."""
    folder = tmp_path_factory.mktemp("tiny")
    bpe = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train(str(SAMPLE), vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def gsm8k_options(model: str, output_dir: Path, data: Path = SAMPLE) -> list[str]:
    return [
        *("--model_name_or_path", model, "--output_dir", str(output_dir)),
        *("--dataset_name", str(data), "--prompt_column", "question"),
        *("--answer_column", "answer", "--answer_after", "####", "--reward_funcs", "accuracy_reward"),
        *("--max_steps", "2", "--save_steps", "2", "--logging_steps", "1"),
        *("--per_device_train_batch_size", "8", "--num_generations", "4", "--max_completion_length", "8"),
        *("--gradient_checkpointing", "false", "--disable_tqdm", "true", "--seed", "3"),
    ]


def error_line(argv: list[str], capsys) -> str:
    """Run a command that must fail with code 2 and one line on stderr; return that line without its prefix."""
    capsys.readouterr()
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("entrocraft: ")]
    assert len(lines) == 1, lines
    prefix = "entrocraft: error: "
    assert lines[0].startswith(prefix)
    return lines[0].removeprefix(prefix)


# ------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("data", [SAMPLE, SHARED], ids=["sample", "shared"])
def test_full_run_on_gsm8k(tiny_model, tmp_path, capsys, data):
    if not data.exists():
        pytest.skip("the shared data sets are not here")
    run = tmp_path / "run"
    assert main(["train", *gsm8k_options(tiny_model, run, data)]) == 0
    assert f"entrocraft plot {run}" in capsys.readouterr().out
    assert (run / "checkpoint-2" / "trainer_state.json").is_file()
    assert (run / "model.safetensors").is_file()

    records = [record for record in read_log(run) if "reward" in record]
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert 0 < record["entrocraft/entropy"] < 7  # nats; the vocabulary has about 400 tokens
        assert record["entrocraft/entropy_low"] < record["entrocraft/entropy_high"]
        assert 0 <= record["entrocraft/accepted_rollouts"] <= 1
        assert "rewards/accuracy_reward/mean" in record

    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "entropy.png")
    assert (run / "entropy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.subprocess
def test_two_processes_under_torchrun(tiny_model, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = gsm8k_options(tiny_model, tmp_path / "run")
    done = subprocess.run(
        [*launch, "-m", "entrocraft_trl", "train", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,  # seconds; without the barrier at the end of a run, one process hangs
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("entrocraft: 2 steps done") == 1  # only the main process speaks
    assert len([record for record in read_log(tmp_path / "run") if "reward" in record]) == 2


def test_resume_from_the_last_checkpoint(tiny_model, tmp_path):
    run = tmp_path / "run"
    options = gsm8k_options(tiny_model, run)
    assert main(["train", *options]) == 0
    assert main(["train", *options, "--max_steps", "3", "--resume_from_checkpoint", "last"]) == 0
    assert [record["step"] for record in read_log(run) if "reward" in record] == [1, 2, 3]


def test_embedded_task_dry_run(capsys):
    config = str(ROOT / "configs" / "quickstart.yaml")
    assert main(["train", f"--config={config}", "--dry_run", "--max_steps", "7"]) == 0
    plan = capsys.readouterr().out
    assert "optimizer steps  7" in plan and "expression_reward" in plan
    assert "band at   0%" in plan and "times the initial entropy" in plan


def test_dry_run_shows_data_rewards_and_band(tiny_model, tmp_path, capsys):
    options = gsm8k_options(tiny_model, tmp_path / "run")
    options += ["--entropy_unit", "nats", "--entropy_low", "0.6", "0.1", "--entropy_high", "0.7", "0.2", "--dry_run"]
    assert main(["train", *options]) == 0
    plan = capsys.readouterr().out
    assert "16 rows" in plan and "first solution   72" in plan and "accuracy_reward" in plan
    assert "'role': 'user'" in plan  # the tokenizer has a chat template
    assert "band at  50%     0.350 to 0.450 nats" in plan
    assert not (tmp_path / "run" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------------- help, errors


@pytest.mark.subprocess
def test_help_without_heavy_imports():
    code = "import sys; from entrocraft_trl.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.subprocess
def test_module_entry_shows_training_help():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "entrocraft_trl", "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    for option in ("--entropy_low", "--embedded_task", "--lora_r", "--dry_run", "--beta"):
        assert option in done.stdout


def test_errors_before_any_command(capsys):
    assert "unknown command 'trian'; choose one of: train, plot" in error_line(["trian"], capsys)
    assert main([]) == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--entropy_low", "0.9", "0.5", "--entropy_high", "1.0", "0.3"], "low=0.5 > high=0.3"),
        (["--entropy_unit", "bits"], "invalid choice: 'bits'"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--learning_rat", "1"], None),  # argparse takes an unambiguous short form
        (["--no_such_option", "1"], "unknown option: 'no_such_option'"),
        (["--dataset_name", "missing.jsonl"], "data set 'missing.jsonl': no such file or folder"),
        (["--prompt_column", "prompt"], "no column 'prompt'; its columns are: question, answer"),
        (["--answer_after", "@@"], "row 0, column 'answer': the answer has no '@@'"),
        (["--reward_funcs", "acuracy_reward"], "unknown reward 'acuracy_reward'; choose one of accuracy_reward"),
        (["--reward_funcs", "no_module:f"], "cannot import 'no_module': ModuleNotFoundError"),
        (["--reward_funcs", "json:f"], "module 'json' has no function 'f'"),
        (["--reward_funcs", "json:__name__"], "reward 'json:__name__' is not callable"),
        (["--model_name_or_path", "./no_model"], "cannot load the tokenizer of model './no_model'"),
        (["--resume_from_checkpoint", "last"], "resume_from_checkpoint=last: there is no complete checkpoint in"),
        (["--num_generations", "3"], "must be divisible by num_generations (3)"),
        (["--prompt_template", "no place"], "prompt_template must contain '{prompt}', got 'no place'"),
        (["--embedded_task", "expressions"], "embedded_task='expressions' brings its own data"),
        (["--entropy_source", "sampling"], "or rejection_rule='advantage_sign'"),
        (
            ["--entropy_source", "sampling", "--rejection_rule", "advantage_sign"],
            "entropy_source='sampling' needs a rollout engine",
        ),
    ],
)
def test_one_line_for_what_a_user_gets_wrong(tiny_model, tmp_path, capsys, extra, message):
    argv = ["train", *gsm8k_options(tiny_model, tmp_path / "run"), *extra]
    if message is None:
        assert main([*argv, "--dry_run"]) == 0
    else:
        assert message in error_line(argv, capsys)


# Clears the screen and goes on in green; and turns the direction of writing.
ORDERS = "\x1b[2J\x1b[32m\x07\u202e"
ORDERS_SHOWN = r"\x1b[2J\x1b[32m\x07\u202e"


def test_what_does_not_print_is_shown_as_python_shows_it():
    assert printable(f"αβγ 数学 🙂 {ORDERS}\n\x85\ud800\\") == rf"αβγ 数学 🙂 {ORDERS_SHOWN}\n\x85\ud800" + "\\"
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    assert printable(every).isprintable()


def test_the_dry_run_gives_a_terminal_no_orders(tiny_model, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    row = {f"question{ORDERS}": f"2+2?{ORDERS}", "answer": f"4{ORDERS}"}
    data.write_text("\n".join([json.dumps(row)] * 2))
    options = [*gsm8k_options(tiny_model, tmp_path / "run", data), "--prompt_column", f"question{ORDERS}"]
    options.remove("--answer_after")
    options.remove("####")
    assert main(["train", *options, "--prompt_format", "text", "--dry_run"]) == 0
    plan = capsys.readouterr().out
    assert f"first prompt     2+2?{ORDERS_SHOWN}\n" in plan
    assert f"first solution   4{ORDERS_SHOWN}\n" in plan
    assert f"columns: prompt, solution, question{ORDERS_SHOWN}, answer\n" in plan
    assert printable(plan.replace("\n", "")) == plan.replace("\n", "")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--prompt_column", "absent"], f"its columns are: question{ORDERS_SHOWN}"),
        (["--prompt_column", f"no{ORDERS}"], f"no column {f'no{ORDERS}'!r}"),
        (["--reward_funcs", "raising_module:f"], f"ValueError: judge{ORDERS_SHOWN}"),
    ],
)
def test_errors_give_a_terminal_no_orders(tiny_model, tmp_path, capsys, monkeypatch, extra, said):
    (tmp_path / "rows.jsonl").write_text(json.dumps({f"question{ORDERS}": "2+2?"}))
    (tmp_path / "raising_module.py").write_text(f"raise ValueError({f'judge{ORDERS}'!r})")
    monkeypatch.chdir(tmp_path)
    options = gsm8k_options(tiny_model, tmp_path / "run", tmp_path / "rows.jsonl")
    line = error_line(["train", *options, *extra], capsys)
    assert said in line
    assert printable(line) == line


def test_one_line_for_a_missing_answer_column(tiny_model, tmp_path, capsys):
    options = gsm8k_options(tiny_model, tmp_path / "run")
    cut = options.index("--answer_column")
    line = error_line(["train", *options[:cut], *options[cut + 4 :]], capsys)
    assert "reward 'accuracy_reward' reads the column 'solution'" in line and "--answer_column" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("entropy_lo: 0.5", "unknown key in the config file: 'entropy_lo'; did you mean 'entropy_low'?"),
        ("entropy_low: [0.9, .nan]", "entropy_low must be finite and not negative, got [0.9, nan]"),
        ("entropy_low: high", "invalid float value: 'high'"),
        ("entropy_schedule: cubic", "entropy_schedule must be one of"),
        ("prompt_format: chat", "prompt_format must be one of"),
        ("max_steps: [1, 2]", "max_steps must be of type int, got [1, 2]"),
        ("a: b: c", "not valid YAML"),
        ("- a", "must contain a YAML mapping"),
        ("max_steps: 1", "no data: name a data set with --dataset_name"),
        ("embedded_task: expressions\nreward_funcs: accuracy_reward", "reads the column 'solution'"),
    ],
)
def test_one_line_for_a_wrong_yaml(tmp_path, capsys, content, message):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert message in error_line(["train", "--config", str(file)], capsys)


def test_one_line_for_a_missing_yaml(capsys):
    assert "No such file or directory: 'no.yaml'" in error_line(["train", "--config", "no.yaml"], capsys)
    assert "--config needs the path" in error_line(["train", "--config"], capsys)


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("ENTROCRAFT_TRACEBACK", "1")
    with pytest.raises(Exception, match="no.yaml") as caught:
        main(["train", "--config", "no.yaml"])
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_errors_during_training_keep_their_traceback(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text(
        "def reward(completions, **kwargs):\n    raise ValueError('a bug of the reward')\n"
    )
    monkeypatch.chdir(tmp_path)
    options = gsm8k_options(tiny_model, tmp_path / "run")
    with pytest.raises(ValueError, match="a bug of the reward"):
        main(["train", *options, "--reward_funcs", "broken_reward:reward"])


# --------------------------------------------------------------------------------------------------- plot and rewards


def test_plot_compares_runs_and_previews_bands(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        state = {"global_step": 1, "log_history": [{"step": 1, "entropy": 1.0, "reward": 0.5}]}
        (tmp_path / name / "trainer_state.json").write_text(json.dumps(state))
    both = tmp_path / "both.png"
    assert main(["plot", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(both)]) == 0
    assert both.read_bytes().startswith(b"\x89PNG")
    band = tmp_path / "band.png"
    options = ["--entropy_schedule", "piecewise", "--entropy_knots", "0:0.9:1.0", "0.5:0.4:0.6", "1:0.1:0.2"]
    assert main(["plot", "--schedule", *options, "--initial_entropy", "1.2", "--output", str(band)]) == 0
    assert band.read_bytes().startswith(b"\x89PNG")
    config = str(ROOT / "configs" / "qwen3-4b-long-cosine.yaml")
    assert main(["plot", "--schedule", "--config", config, "--output", str(band)]) == 0


def test_plot_errors(tmp_path, capsys):
    assert "no trainer_state.json in" in error_line(["plot", str(tmp_path)], capsys)
    assert "name the folder of a run" in error_line(["plot"], capsys)
    assert "unknown option: '--entropy_low'" in error_line(["plot", "run", "--entropy_low", "1"], capsys)
    assert "must be positive, got -1.0" in error_line(["plot", "--schedule", "--initial_entropy=-1"], capsys)


@pytest.mark.parametrize("text", [True, False], ids=["text", "messages"])
def test_trl_rewards_take_text_and_messages(text):
    right, wrong = ("so $\\boxed{72}$", "so $\\boxed{71}$")
    completions = [right, wrong] if text else [[{"role": "assistant", "content": c}] for c in (right, wrong)]
    reward = rewards.load_reward("accuracy_reward")
    assert reward.__name__ == "accuracy_reward"
    assert reward(prompts=["", ""], completions=completions, solution=["72", "72"]) == [1.0, 0.0]


@pytest.mark.parametrize("name", rewards.TRL_REWARDS)
def test_every_trl_reward_loads(name):
    scores = rewards.load_reward(name)(
        prompts=[""], completions=["<think>\na\n</think>\n\\boxed{1}"], completion_ids=[[1]], solution=["1"]
    )
    assert scores == ([0.0] if name.startswith("get_") else [1.0])


REWARD_FORMS = """
import functools


def scaled(completions, scale, **kwargs):
    return [scale * len(str(completion)) for completion in completions]


async def later(completions, solution, log_metric, **kwargs):
    return [None if "7" in text else 1.0 for text in solution]


class Judge:
    def __call__(self, completions, trainer_state, **kwargs):
        return [float(trainer_state.global_step)] * len(completions)


half = functools.partial(scaled, scale=0.5)
judge = Judge()
"""


def test_every_form_of_reward_passes_the_dry_run_and_trains(tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "reward_forms.py").write_text(REWARD_FORMS)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    forms = ["--reward_funcs", "reward_forms:half", "reward_forms:later", "reward_forms:judge"]
    options = [*gsm8k_options(tiny_model, run), *forms]
    assert main(["train", *options, "--dry_run"]) == 0
    assert "rewards          scaled, later, Judge\n" in capsys.readouterr().out
    assert main(["train", *options]) == 0
    logged = [record for record in read_log(run) if "reward" in record]
    assert [record["rewards/Judge/mean"] for record in logged] == [0.0, 1.0]
    assert all(record["rewards/scaled/std"] > 0 for record in logged)


def test_columns_that_rewards_read(tiny_model):
    class Judge:
        def __call__(self, completions, gold, scale=1.0, **kwargs):
            return [scale] * len(completions)

    bound = functools.partial(Judge(), gold=["7"])
    with pytest.raises(ValueError, match="reward 'Judge' reads the column 'gold'.*columns: prompt"):
        rewards.check_reward_columns([bound, Judge()], ["prompt"])
    rewards.check_reward_columns([bound, "a/reward-model", max], ["prompt"])  # compiled code shows no parameters
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    rewards.check_reward_columns([model], ["prompt"])
    assert rewards.reward_name(model) == Path(tiny_model).name
    assert rewards.reward_name("a/reward-model") == "a/reward-model"


def test_own_rewards_by_module_and_by_dotted_path():
    assert rewards.load_reward("math:sqrt") is rewards.load_reward("math.sqrt")
