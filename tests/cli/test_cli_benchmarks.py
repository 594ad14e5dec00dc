"""`entrocraft eval --benchmarks`: the table against counting by hand, one model load, killed and continued, errors."""

import json
from pathlib import Path

import datasets
import pytest
import transformers
from datasets import Dataset

from entrocraft_trl.cli import main
from entrocraft_trl.evaluation import sampling
from entrocraft_trl.evaluation.benchmarks import BENCHMARKS
from entrocraft_trl.evaluation.sampling import Sample


# As the two files have them: AMC-23 with numbers, AIME-24 with text, leading zeros, and a `solution` of its own.
AMC = [
    {"id": 0, "problem": "1+1=?", "answer": 2.0, "url": "https://amc/1", "question": "1+1=?"},
    {"id": 1, "problem": "2+2=?", "answer": 4.0, "url": "https://amc/2", "question": "2+2=?"},
]
AIME = [
    {"id": 60, "problem": "12*17=?", "solution": "It is 170+34.", "answer": "204", "url": "u", "question": "12*17=?"},
    {"id": 61, "problem": "5*5=?", "solution": "Square it.", "answer": "025", "url": "u", "question": "5*5=?"},
    {"id": 62, "problem": "9*9=?", "solution": "10*9-9.", "answer": "081", "url": "u", "question": "9*9=?"},
]
# One prompt a block (4 // 4): two blocks of AMC, three of AIME.
OPTIONS = ["--n", "4", "--batch_size", "4", "--max_new_tokens", "6", "--prompt_template", "{prompt}"]


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Both benchmarks with their files, as `--benchmarks` takes them."""
    words = []
    for name, rows in (("amc23", AMC), ("aime24", AIME)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words.append(f"{name}={file}")
    return words


@pytest.fixture
def loads(monkeypatch) -> list:
    """The models that were loaded."""
    load, models = transformers.AutoModelForCausalLM.from_pretrained, []

    def from_pretrained(name, **options):
        models.append(name)
        return load(name, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return models


def command(model, output_dir, benchmarks: list[str], *more: str) -> list[str]:
    return ["eval", "--model", str(model), "--output_dir", str(output_dir), *more, "--benchmarks", *benchmarks]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.[jm]*") if path.is_file()}


def error_line(argv: list[str], capsys) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("entrocraft: error: ")


def test_the_table_equals_counting_by_hand(reference_folder, files, loads, tmp_path, monkeypatch, capsys):
    served = iter([("2", "9"), ("9", "9"), ("204", "204"), ("25", "9"), ("9", "9")])  # two samples of each prompt
    asked = []

    def serve(model, tokenizer, prompts, n, generation_config, **kwargs):
        asked.append(generation_config)
        return [[Sample(f"$\\boxed{{{answer}}}$", [5], False, 1.0) for answer in next(served)] for _ in prompts]

    monkeypatch.setattr(sampling, "sample_prompts", serve)
    assert main(command(reference_folder, "out", files, "--n", "2")) == 0
    assert loads == [str(reference_folder)]  # one model for both
    for used in asked:  # the paper's, by default
        assert (used.temperature, used.top_p, used.top_k, used.max_new_tokens) == (0.6, 0.95, 20, 3072)
    table = "\n".join(
        [
            "| benchmark | prompts | mean@2 | pass@2 |",
            "|-----------|---------|--------|--------|",
            "| amc23     | 2       | 0.250  | 0.500  |",  # one of four samples, one of two prompts
            "| aime24    | 3       | 0.500  | 0.667  |",  # three of six samples, two of three prompts
            "| average   | –       | 0.375  | 0.583  |",  # of the two rows above: by prompts it were 0.4 and 0.6
        ]
    )
    written = Path("out/benchmarks.md").read_text()
    assert written.endswith(f"\n\n{table}\n") and written in capsys.readouterr().out
    assert "2 samples a prompt at temperature 0.6, top-p 0.95, top-k 20, up to 3072 tokens" in written
    numbers = json.loads(Path("out/benchmarks.json").read_text())
    assert numbers["average"] == {"mean@2": 0.375, "pass@2": (1 / 2 + 2 / 3) / 2}
    for name in ("amc23", "aime24"):
        metrics = json.loads(Path(f"out/{name}/summary.json").read_text())["metrics"]
        assert numbers["benchmarks"][name] == {"prompts": {"amc23": 2, "aime24": 3}[name], **metrics}
        assert Path(f"out/{name}/pass_at_k.png").read_bytes().startswith(b"\x89PNG")
    first = json.loads(Path("out/aime24/samples.jsonl").read_text().splitlines()[1])
    assert first["prompt"] == "12*17=? Let's think step by step and output the final answer within \\boxed{}."


def test_latex_answers_are_read_whole(reference_folder, tmp_path, monkeypatch):
    """As MATH-500 has them. Bare, math-verify takes `11\\sqrt{2}` for 11, and reads no word and no tuple."""
    answers = [
        "11\\sqrt{2}",
        "\\left( 3, \\frac{\\pi}{2} \\right)",
        "\\text{Evelyn}",
        "6 - 5i",
        "p - q",
        "(6,31,-1)",
        "9",
    ]
    Path("math.jsonl").write_text("".join(json.dumps({"problem": "?", "answer": answer}) + "\n" for answer in answers))
    served = iter(answers)

    def serve(model, tokenizer, prompts, n, generation_config, **kwargs):
        texts = [(next(served), "11") for _ in prompts]  # the right one, and what is left of the first
        return [[Sample(f"$\\boxed{{{text}}}$", [5], False, 1.0) for text in pair] for pair in texts]

    monkeypatch.setattr(sampling, "sample_prompts", serve)
    assert main(command(reference_folder, "out", ["math500=math.jsonl"], "--n", "2")) == 0
    records = [json.loads(line) for line in Path("out/math500/samples.jsonl").read_text().splitlines()[1:]]
    assert [record["rewards"] for record in records] == [[1.0, 0.0]] * len(answers)


def test_a_benchmark_is_the_evaluation_of_its_data_set_alone(reference_folder, files, tmp_path):
    assert main(command(reference_folder, "out", files, *OPTIONS)) == 0
    data = ["--dataset", files[1].removeprefix("aime24="), "--prompt_column", "problem", "--answer_column", "answer"]
    data += ["--answer_template", "${answer}$"]
    assert main(["eval", "--model", str(reference_folder), "--output_dir", "alone", *data, *OPTIONS]) == 0
    for name in ("samples.jsonl", "summary.json"):
        assert Path("alone", name).read_bytes() == Path("out/aime24", name).read_bytes()


def test_killed_in_the_second_benchmark_and_continued(reference_folder, files, loads, tmp_path, monkeypatch, capsys):
    assert main(command(reference_folder, "whole", files, *OPTIONS)) == 0
    real, blocks = sampling.sample_prompts, []

    def killed_in_the_fourth_block(*args, **kwargs):
        blocks.append(1)
        if len(blocks) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sampling, "sample_prompts", killed_in_the_fourth_block)
    with pytest.raises(KeyboardInterrupt):
        main(command(reference_folder, "parts", files, *OPTIONS))
    assert Path("parts/amc23/summary.json").exists() and not Path("parts/benchmarks.md").exists()
    capsys.readouterr()
    assert main(command(reference_folder, "parts", files, *OPTIONS)) == 0
    out = capsys.readouterr().out
    assert "continuing after 2 of 2 prompts in parts/amc23" in out and "after 1 of 3 prompts in parts/aime24" in out
    assert len(blocks) == 6  # three, the interrupted one, and the two that were missing
    assert contents(Path("parts")) == contents(Path("whole"))
    loads.clear()
    assert main(command(reference_folder, "parts", files, *OPTIONS)) == 0
    assert loads == [] and contents(Path("parts")) == contents(Path("whole"))


def test_another_benchmark_joins_the_finished_ones(reference_folder, files, loads, tmp_path, monkeypatch):
    assert main(command(reference_folder, "out", files[:1], *OPTIONS)) == 0
    real, prompts_sampled = sampling.sample_prompts, []

    def count(model, tokenizer, prompts, *args, **kwargs):
        prompts_sampled.extend(prompts)
        return real(model, tokenizer, prompts, *args, **kwargs)

    monkeypatch.setattr(sampling, "sample_prompts", count)
    assert main(command(reference_folder, "out", files, *OPTIONS)) == 0
    assert len(prompts_sampled) == len(AIME)
    assert list(json.loads(Path("out/benchmarks.json").read_text())["benchmarks"]) == ["amc23", "aime24"]


def test_benchmarks_come_from_the_hub_by_the_table(reference_folder, loads, tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split))
        return Dataset.from_list(AMC if name == BENCHMARKS["amc23"].dataset else AIME)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert main(command(reference_folder, "out", list(BENCHMARKS), *OPTIONS, "--max_samples", "1")) == 0
    assert asked == [(row.dataset, row.config, row.split) for row in BENCHMARKS.values()]
    assert {path.parent.name for path in Path("out").glob("*/samples.jsonl")} == set(BENCHMARKS)
    assert len(loads) == 1


def test_explicit_columns_win(reference_folder, tmp_path):
    Path("rows.jsonl").write_text(json.dumps({"problem": "no", "question": "yes", "answer": "1", "gold": "2"}) + "\n")
    columns = ["--prompt_column", "question", "--answer_column", "gold"]
    assert main(command(reference_folder, "out", ["aime25=rows.jsonl"], *OPTIONS, *columns)) == 0
    header, first = map(json.loads, Path("out/aime25/samples.jsonl").read_text().splitlines())
    assert first["prompt"] == "yes" and header["settings"]["answer_column"] == "gold"


@pytest.mark.parametrize(
    ("benchmarks", "more", "message"),
    [
        (["amc24"], [], "unknown benchmark 'amc24'; known are: math500, amc23, aime24, aime25"),
        (["amc23=missing.jsonl"], [], "benchmark 'amc23': cannot load split 'train' of data set 'missing.jsonl': no"),
        (["amc23=other.jsonl"], [], "benchmark 'amc23': the data set has no column 'problem'; its columns are: a, b"),
        (["amc23"], [], "Hub is away. A local file stands in for it as amc23=FILE"),
        (["amc23"], ["--dataset_split", "test"], "--dataset_split goes with --dataset, and not with --benchmarks"),
        (["amc23"], ["--dataset", "other.jsonl"], "argument --benchmarks: not allowed with argument --dataset"),
        ([], [], "argument --benchmarks: expected at least one argument"),
    ],
)
def test_one_line_for_what_a_user_gets_wrong_before_the_model_loads(
    reference_folder, files, loads, tmp_path, monkeypatch, capsys, benchmarks, more, message
):
    Path("other.jsonl").write_text('{"a": "1", "b": "2"}\n')
    real = datasets.load_dataset

    def load_dataset(name, *args, **kwargs):
        if name == BENCHMARKS["amc23"].dataset:
            raise ConnectionError("Hub is away")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    words = benchmarks and [files[1], *benchmarks]  # after one that is right, too
    assert message in error_line(command(reference_folder, "out", words, *OPTIONS, *more), capsys)
    assert loads == []


def test_one_of_data_set_and_benchmarks_is_needed(reference_folder, capsys):
    line = error_line(["eval", "--model", str(reference_folder)], capsys)
    assert line == "one of the arguments --dataset --benchmarks is required"


def test_overwrite_throws_nothing_away_while_a_benchmark_is_wrong(reference_folder, files, tmp_path, capsys):
    assert main(command(reference_folder, "out", files, *OPTIONS)) == 0
    before = contents(Path("out"))
    wrong = [files[0], "aime24=missing.jsonl"]
    assert "no such file" in error_line(command(reference_folder, "out", wrong, *OPTIONS, "--overwrite"), capsys)
    assert contents(Path("out")) == before
