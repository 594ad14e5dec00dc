"""`entrocraft eval`: figures against counting by hand, being killed and continued, adapters, data files, errors."""

import json
import math
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from entrocraft_trl.cli import main
from entrocraft_trl.evaluation import sampling
from entrocraft_trl.evaluation.sample_file import _line, append_samples, resume_samples
from entrocraft_trl.evaluation.sampling import Sample, encode_prompt, sample_prompts


SHARED = Path(__file__).parents[3] / "shared" / "data"
ROWS = [{"question": f"{a}+{a}=?", "answer": 2 * a} for a in range(1, 8)]
# Two prompts a block (8 // 4), so seven prompts make four blocks, the last one short.
OPTIONS = [
    "--n",
    "4",
    "--batch_size",
    "8",
    "--max_new_tokens",
    "6",
    "--temperature",
    "1",
    "--top_p",
    "1",
    "--top_k",
    "0",
]


@pytest.fixture
def data(tmp_path) -> str:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


@pytest.fixture
def own_reward(tmp_path, monkeypatch):
    """`own_rewards:starts_with_digit`, importable from the current folder; returns the calls it got."""
    calls = []

    def starts_with_digit(prompts, completions, solution, completion_ids, **kwargs):
        calls.append((prompts, completions, solution))
        return [float(text[:1].isdigit()) for text in completions]

    monkeypatch.setitem(sys.modules, "own_rewards", types.SimpleNamespace(starts_with_digit=starts_with_digit))
    return calls


def command(model, data: str, output_dir, *more: str) -> list[str]:
    columns = ["--prompt_column", "question", "--answer_column", "answer", "--reward", "own_rewards:starts_with_digit"]
    return [
        "eval",
        "--model",
        str(model),
        "--dataset",
        data,
        *columns,
        *OPTIONS,
        "--output_dir",
        str(output_dir),
        *more,
    ]


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()[1:]]


def error_line(argv: list[str], capsys) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("entrocraft: error: ")


# ------------------------------------------------------------------------------------------------ figures and resuming


def test_figures_equal_sampling_and_counting_by_hand(reference_folder, data, tmp_path, own_reward, capsys):
    out = tmp_path / "out"
    assert main(command(reference_folder, data, out, "--seed", "3")) == 0
    model, tokenizer = (c.from_pretrained(reference_folder) for c in (AutoModelForCausalLM, AutoTokenizer))
    samples = []
    for start in range(0, 7, 2):
        prompts = [encode_prompt(tokenizer, row["question"]) for row in ROWS[start : start + 2]]
        settings = {"seed": (3 << 32) + start, "batch_size": 8, "measure_entropy": True}
        samples += sample_prompts(model, tokenizer, prompts, 4, GenerationConfig(max_new_tokens=6), **settings)
    right = [[sample.text[:1].isdigit() for sample in row] for row in samples]
    counts = [sum(row) for row in right]
    assert len(set(counts)) > 1, "the test needs prompts that differ in their number of right samples"
    metrics = json.loads((out / "summary.json").read_text())["metrics"]
    assert metrics["mean@4"] == sum(counts) / 28
    for k in (1, 2, 4):
        share = sum(1 - math.comb(4 - count, k) / math.comb(4, k) for count in counts) / 7
        assert metrics[f"pass@{k}"] == pytest.approx(share, abs=1e-12)
    distinct = [
        len({sample.text.strip() for sample, ok in zip(row, oks, strict=True) if ok})
        for row, oks in zip(samples, right, strict=True)
    ]
    assert metrics["distinct_correct"] == sum(distinct) / 7
    flat = [sample for row in samples for sample in row]
    tokens = sum(len(sample.ids) for sample in flat)
    assert metrics["entropy"] == pytest.approx(sum(sample.entropy_sum for sample in flat) / tokens, rel=1e-9)
    assert metrics["mean_tokens"] == tokens / 28
    assert metrics["truncated"] == sum(tiny.EOS not in sample.ids for sample in flat) / 28
    assert own_reward[0][0] == ["1+1=?"] * 4 + ["2+2=?"] * 4 and own_reward[0][2] == ["2"] * 4 + ["4"] * 4
    assert (out / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")
    assert "7 prompts, 4 completions each" in capsys.readouterr().out


def test_killed_and_continued_gives_the_same_samples(
    reference_folder, data, tmp_path, own_reward, monkeypatch, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(reference_folder, data, whole)) == 0
    reward, calls = sys.modules["own_rewards"].starts_with_digit, []

    def killed_in_the_third_block(**kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return reward(**kwargs)

    # TRL's check of the reward's columns reads the signature, which takes everything here.
    monkeypatch.setattr(sys.modules["own_rewards"], "starts_with_digit", killed_in_the_third_block)
    with pytest.raises(KeyboardInterrupt):
        main(command(reference_folder, data, parts))
    assert len(records_of(parts)) == 4 and not (parts / "summary.json").exists()
    with (parts / "samples.jsonl").open("ab") as file:  # the kill came while the third block was being written
        lines = (whole / "samples.jsonl").read_bytes().splitlines(keepends=True)
        file.write(lines[5] + lines[6][:40])
    assert main(command(reference_folder, data, parts)) == 0
    assert "continuing after 4 of 7 prompts" in capsys.readouterr().out
    assert len(calls) == 5  # two blocks, the interrupted one, and the two that were missing
    for name in ("samples.jsonl", "summary.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_finished_evaluation_is_reported_again_without_a_model(
    reference_folder, data, tmp_path, own_reward, monkeypatch
):
    out = tmp_path / "out"
    assert main(command(reference_folder, data, out)) == 0
    before = (out / "summary.json").read_bytes()
    (out / "summary.json").unlink()
    monkeypatch.setattr(sampling, "sample_prompts", lambda *args, **kwargs: pytest.fail("sampled again"))
    assert main(command(reference_folder, data, out)) == 0
    assert (out / "summary.json").read_bytes() == before


def test_other_settings_are_refused_unless_overwritten(reference_folder, data, tmp_path, own_reward, capsys):
    out = tmp_path / "out"
    assert main(command(reference_folder, data, out)) == 0
    line = error_line(command(reference_folder, data, out, "--top_p", "0.9"), capsys)
    assert "holds samples of other settings: top_p was 1.0 and is now 0.9" in line and "--overwrite" in line
    Path(data).write_text(Path(data).read_text().replace("1+1", "1+2"))
    assert "data_digest was" in error_line(command(reference_folder, data, out), capsys)
    assert main(command(reference_folder, data, out, "--overwrite")) == 0
    assert records_of(out)[0]["prompt"] == "1+2=?"


def test_new_weights_in_the_same_folder_are_refused(data, tmp_path, own_reward, capsys):
    folder = tmp_path / "model"
    tiny.build_tokenizer().save_pretrained(folder)
    tiny.build_model(seed=1).save_pretrained(folder)
    assert main(command(folder, data, tmp_path / "out")) == 0
    tiny.build_model(seed=2).save_pretrained(folder)
    assert "weights_digest was" in error_line(command(folder, data, tmp_path / "out"), capsys)


def test_any_name_of_a_model_or_a_folder_gets_its_figure_and_reaches_no_terminal_as_a_command(
    data, tmp_path, own_reward, capfd
):
    """As a formula, `$x_$` raises after all sampling; `_` hides from legends; an escape sequence recolours."""
    for name in ("$x_$", "_\x1b[31m"):
        folder = tmp_path / name
        tiny.build_tokenizer().save_pretrained(folder)
        tiny.build_model().save_pretrained(folder)
        out = tmp_path / f"out-{name}"
        assert main(command(folder, data, out)) == 0
        assert (out / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")
    assert main(command(folder, data, out)) == 0  # "continuing after 7 of 7 prompts in ..."
    written = capfd.readouterr()
    assert "\x1b[31m" not in written.out + written.err
    assert written.out.count("out-_\\x1b[31m") == 5  # numbers and figure, twice, and the file continued


# ------------------------------------------------------------------------------------------------ the file of samples

SETTINGS = {"prompts": 5, "seed": 0, "n": 1}


def record_of(index: int, **changes) -> dict:
    sample = {"completions": ["é\n"], "rewards": [None], "tokens": [3], "truncated": [False], "entropy_sums": [0.5]}
    return {"index": index, "prompt": "1+1=?", **sample, **changes}


def start_file(path: Path, count: int) -> bytes:
    assert resume_samples(path, SETTINGS, 2) == []
    append_samples(path, [record_of(index) for index in range(count)])
    return path.read_bytes()


@pytest.mark.parametrize(("count", "kept"), [(0, 0), (1, 0), (2, 2), (3, 2), (4, 4), (5, 5)])
def test_records_count_in_whole_blocks(tmp_path, count, kept):
    path = tmp_path / "samples.jsonl"
    content = start_file(path, count)
    assert [record["index"] for record in resume_samples(path, SETTINGS, 2)] == list(range(kept))
    assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[: 1 + kept])


def test_every_way_to_tear_the_file_keeps_whole_blocks(tmp_path):
    path = tmp_path / "samples.jsonl"
    content = start_file(path, 4)
    header = content.index(b"\n") + 1
    for end in range(header, len(content)):  # the header itself is written whole or not at all
        path.write_bytes(content[:end])
        lines = content[header:end].count(b"\n")
        assert len(resume_samples(path, SETTINGS, 2)) == lines // 2 * 2


HEADER = _line({"settings": SETTINGS})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a file of samples"),
        (b"[1]\n", "is not a file of samples"),
        (b'{"a": 1}\n', "KeyError"),
        (HEADER + b'{"index": 1}\n', "line 2 is of prompt 1, where prompt 0 is next"),
        (HEADER + b'nonsense\n{"index": 1}\n', "JSONDecodeError"),
        (HEADER + b"[1]\n", "line 2 holds no object"),
        (HEADER + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n", "RecursionError"),
        (
            b'{"settings": {"prompts": 5, "seed": 1, "m": 2, "n": 1}}\n',
            "m was 2 and is now None; seed was 1 and is now",
        ),
        (b'{"settings": 7}\n', "TypeError"),
        (HEADER + b'{"index": 0, "prompt": "1+1=?"}\n', "line 2 holds completions=None, where 1 values are needed"),
        (HEADER + b"".join(_line(record_of(index)) for index in range(6)), "holds 6 prompts, where there are 5"),
    ],
)
def test_foreign_files_are_refused_and_left_alone(tmp_path, content, message):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        resume_samples(path, SETTINGS, 2)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "changes",
    [
        {"completions": ["a", "b"]},  # of n = 1
        {"completions": [None]},
        {"rewards": [math.nan]},  # which this package writes as null
        {"rewards": ["1"]},
        {"rewards": 1.0},
        {"tokens": [-1]},
        {"tokens": [1.5]},
        {"tokens": [10**400]},
        {"truncated": [0]},
        {"entropy_sums": [True]},
        {"entropy_sums": {}},
    ],
)
def test_a_foreign_record_is_named(tmp_path, changes):
    path = tmp_path / "samples.jsonl"
    start_file(path, 2)
    append_samples(path, [record_of(2, **changes), record_of(3)])
    with pytest.raises(ValueError, match=f"line 4 holds {next(iter(changes))}="):
        resume_samples(path, SETTINGS, 2)


# -------------------------------------------------------------------------------------------------- models and engines


def test_adapter_folder_samples_from_the_adapted_model(reference_folder, data, tmp_path, own_reward):
    base = AutoModelForCausalLM.from_pretrained(reference_folder)
    torch.manual_seed(0)
    # init_lora_weights=False: an adapter that changes the model, where the default starts at zero.
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    folder = tmp_path / "adapter"  # without a tokenizer, as `save_pretrained` of an adapter leaves it
    adapted.save_pretrained(folder)
    greedy = ["--temperature", "1e-4"]  # so that small differences in rounding change nothing
    assert main(command(folder, data, tmp_path / "out", *greedy)) == 0
    merged = adapted.merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(reference_folder)
    settings = GenerationConfig(do_sample=True, temperature=1e-4, max_new_tokens=6)

    def completions(model):
        prompts = [encode_prompt(tokenizer, row["question"]) for row in ROWS]
        return [[sample.text for sample in row] for row in sample_prompts(model, tokenizer, prompts, 4, settings)]

    plain = AutoModelForCausalLM.from_pretrained(reference_folder)
    assert completions(merged) != completions(plain)
    assert [record["completions"] for record in records_of(tmp_path / "out")] == completions(merged)


def test_chat_prompts_go_through_the_template(reference_folder):
    tokenizer = AutoTokenizer.from_pretrained(reference_folder)
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}{% if think %}+{% endif %}{% if add_generation_prompt %}={% endif %}"
    )
    messages = [{"role": "user", "content": "1+2"}]
    assert encode_prompt(tokenizer, messages) == tokenizer("1+2=")["input_ids"]
    assert encode_prompt(tokenizer, messages, think=True) == tokenizer("1+2+=")["input_ids"]
    assert encode_prompt(tokenizer, "1+2") == tokenizer("1+2")["input_ids"]


def test_every_end_token_of_the_model_ends_a_completion(reference_folder, monkeypatch):
    model, tokenizer = (c.from_pretrained(reference_folder) for c in (AutoModelForCausalLM, AutoTokenizer))
    other = tokenizer.convert_tokens_to_ids("a")
    model.generation_config.eos_token_id = [other]
    tail = torch.tensor([[5, other, tiny.PAD], [5, 6, tiny.EOS], [5, 6, 7]])
    monkeypatch.setattr(model, "generate", lambda input_ids, **kwargs: torch.cat([input_ids, tail], dim=1))
    (samples,) = sample_prompts(model, tokenizer, [[2, 3]], 3, GenerationConfig(max_new_tokens=3))
    assert [sample.ids for sample in samples] == [[5, other], [5, 6, tiny.EOS], [5, 6, 7]]
    assert [sample.truncated for sample in samples] == [False, False, True]


def test_measuring_entropy_leaves_the_forward_as_it_was(reference_folder):
    model, tokenizer = (c.from_pretrained(reference_folder) for c in (AutoModelForCausalLM, AutoTokenizer))
    sample_prompts(model, tokenizer, [[2, 3]], 1, GenerationConfig(max_new_tokens=2), measure_entropy=True)
    assert "forward" not in vars(model)
    model.forward = forward = model.forward  # as a trainer's patched model has it
    sample_prompts(model, tokenizer, [[2, 3]], 1, GenerationConfig(max_new_tokens=2), measure_entropy=True)
    assert vars(model)["forward"] is forward


class FakeVllm:
    """Stands in for the module `vllm`, which is not installed here: what our code hands over, not what vLLM does."""

    def __init__(self):
        self.engines, self.requests = [], []

    def LLM(self, **options):
        self.engines.append(options)
        return self

    def SamplingParams(self, **settings):
        return settings

    def LoRARequest(self, *arguments):
        return arguments

    def generate(self, prompts, sampling_params, lora_request, use_tqdm):
        self.requests += zip(prompts, sampling_params, [lora_request] * len(prompts), strict=True)
        completion = types.SimpleNamespace(token_ids=(2 + 7, tiny.EOS), finish_reason="stop")  # the digit 7
        cut = types.SimpleNamespace(token_ids=(2 + 10,), finish_reason="length")  # a plus sign
        return [types.SimpleNamespace(outputs=[completion, cut, cut, cut]) for _ in prompts]


def install(vllm: FakeVllm, monkeypatch) -> FakeVllm:
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.lora", types.ModuleType("vllm.lora"))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", vllm)
    return vllm


def test_vllm_gets_prompts_settings_and_seeds(reference_folder, data, tmp_path, own_reward, monkeypatch):
    vllm = install(FakeVllm(), monkeypatch)
    assert main(command(reference_folder, data, tmp_path / "out", "--use_vllm", "--seed", "1")) == 0
    assert vllm.engines[0]["model"] == str(reference_folder)
    tokenizer = tiny.build_tokenizer()
    assert [prompt["prompt_token_ids"] for prompt, _, _ in vllm.requests] == [
        tokenizer(row["question"])["input_ids"] for row in ROWS
    ]
    # vLLM samples completion j of a request with the request's seed + j: every completion has a stream of its own,
    # also across the blocks of two prompts (`batch_size` as given).
    streams = [settings["seed"] + j for _, settings, _ in vllm.requests for j in range(settings["n"])]
    assert streams == [(1 << 32) + index for index in range(7 * 4)]
    one = {name: value for name, value in vllm.requests[0][1].items() if name != "seed"}
    assert one == {"n": 4, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": 6}
    metrics = json.loads((tmp_path / "out" / "summary.json").read_text())["metrics"]
    assert (metrics["mean@4"], metrics["pass@4"], metrics["truncated"]) == (0.25, 1.0, 0.75)
    assert metrics["entropy"] is None


@pytest.mark.parametrize(
    ("adapter", "size"),
    [
        ({"r": 1}, 8),
        ({"r": 8}, 8),
        ({"r": 12}, 16),
        ({"r": 257}, 320),
        ({"r": 512}, 512),
        ({"r": 4, "rank_pattern": {"q_proj": 24}}, 32),  # the largest of all layers is what has to fit
    ],
)
def test_an_adapter_of_any_rank_gets_one_of_vllms_sizes(
    reference_folder, data, tmp_path, own_reward, monkeypatch, adapter, size
):
    vllm = install(FakeVllm(), monkeypatch)
    folder = tmp_path / "adapter"
    LoraConfig(base_model_name_or_path=str(reference_folder), **adapter).save_pretrained(folder)
    assert main(command(folder, data, tmp_path / "out", "--use_vllm")) == 0
    assert vllm.engines[0]["max_lora_rank"] == size
    assert vllm.requests[0][2] == ("adapter", 1, str(folder))


def test_an_adapter_too_large_for_vllm_is_refused_before_its_engine_starts(
    reference_folder, data, tmp_path, own_reward, monkeypatch, capsys
):
    vllm = install(FakeVllm(), monkeypatch)
    folder = tmp_path / "adapter"
    LoraConfig(base_model_name_or_path=str(reference_folder), r=513).save_pretrained(folder)
    line = error_line(command(folder, data, tmp_path / "out", "--use_vllm"), capsys)
    assert "vLLM serves adapters up to rank 512, this one has 513" in line and vllm.engines == []


# ----------------------------------------------------------------------------------------------------- data and errors


@pytest.mark.parametrize(
    ("file", "question", "count"),
    [("amc23.jsonl", "question", 40), ("aime24.jsonl", "problem", 30), (None, "question", 3)],
    ids=["amc23", "aime24", "invented"],
)
def test_math_verify_on_real_answers(reference_folder, tmp_path, monkeypatch, file, question, count):
    path = SHARED / file if file else tmp_path / "invented.jsonl"
    if file is None:  # numbers as AMC-23 writes them, text as AIME-24 does
        rows = [{"question": "q", "answer": answer} for answer in (27.0, "204", "\\frac{1}{2}")]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not path.exists():
        pytest.skip("the shared data sets are not here")
    answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    served = iter(answers)

    def right_for_one_of_two(model, tokenizer, prompts, n, generation_config, **kwargs):
        assert (generation_config.temperature, generation_config.top_p) == (0.6, 0.95)  # the paper's, by default
        assert (generation_config.top_k, generation_config.max_new_tokens) == (20, 3072)
        texts = [
            [f"So it is $\\boxed{{{str(answer).removesuffix('.0')}}}$.", "So it is $\\boxed{-17}$."]
            for answer in served
        ]
        return [[Sample(text, [5], False, 1.5) for text in row] for row in texts]

    monkeypatch.setattr(sampling, "sample_prompts", right_for_one_of_two)
    options = ["--model", str(reference_folder), "--dataset", str(path), "--prompt_column", question]
    options += ["--answer_column", "answer", "--n", "2", "--batch_size", "128", "--output_dir", "out"]
    assert main(["eval", *options]) == 0
    metrics = json.loads(Path("out/summary.json").read_text())["metrics"]
    assert len(records_of(Path("out"))) == len(answers) == count
    assert {record["rewards"][0] for record in records_of(Path("out"))} == {1.0}
    assert (metrics["mean@2"], metrics["pass@1"], metrics["pass@2"], metrics["entropy"]) == (0.5, 0.5, 1.0, 1.5)


def test_paper_settings_are_the_default():
    from entrocraft_trl.cli.eval_options import make_parser

    args = make_parser().parse_args(["--model", "m", "--dataset", "d"])
    assert (args.n, args.temperature, args.top_p, args.top_k, args.max_new_tokens) == (32, 0.6, 0.95, 20, 3072)
    assert args.reward == "accuracy_reward"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--n", "0"], "--n must be at least 1, got 0"),
        (["--temperature", "0"], "--temperature must be positive, got 0.0"),
        (["--top_p", "1.5"], "--top_p must lie above 0 and at most at 1, got 1.5"),
        (["--top_k", "-1"], "--top_k must not be negative, got -1"),
        (["--chat_template_kwargs", "[1"], "--chat_template_kwargs must be a JSON object"),
        (["--prompt_format", "conversational"], "needs a chat template"),
        (["--prompt_column", "prompt"], "no column 'prompt'; its columns are: question, answer"),
        (["--reward", "acuracy_reward"], "unknown reward 'acuracy_reward'"),
        (["--model", "./no_model"], "cannot load the tokenizer of model './no_model'"),
        (["--dataset", "missing.jsonl"], "data set 'missing.jsonl': no such file or folder"),
        (["--use_vllm"], "--use_vllm needs vLLM: pip install 'trl[vllm]', or leave the option out"),
        (["--no_such_option"], "unrecognized arguments: --no_such_option"),
    ],
)
def test_one_line_for_what_a_user_gets_wrong(
    reference_folder, data, tmp_path, own_reward, monkeypatch, capsys, extra, message
):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    assert message in error_line(command(reference_folder, data, tmp_path / "out", *extra), capsys)


def test_a_launcher_is_refused(reference_folder, data, tmp_path, own_reward, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs as one process" in error_line(command(reference_folder, data, tmp_path / "out"), capsys)
