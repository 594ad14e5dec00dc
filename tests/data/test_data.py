"""Rows from files of each kind to the columns that TRL reads, and the message for each way they can be wrong."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from entrocraft_trl.data.loading import PromptFormat, drop_long_prompts, load_rows, prepare_rows


SAMPLE = Path(__file__).parents[1] / "samples" / "gsm8k_sample.jsonl"
SHARED = Path(__file__).parents[3] / "shared" / "data"


def rows(**columns) -> Dataset:
    return Dataset.from_dict(columns)


def test_gsm8k_rows_become_messages_and_final_numbers():
    form = PromptFormat("question", "answer", "####", system_prompt="Be brief.", prompt_template="{prompt} \\boxed{}")
    prepared = prepare_rows(load_rows(str(SAMPLE)), form)
    assert len(prepared) == 16
    system, user = prepared[0]["prompt"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"].startswith("Natalia sold clips") and user["content"].endswith(" \\boxed{}")
    assert prepared[0]["solution"] == "72"
    assert prepared[0]["answer"].endswith("#### 72")  # other columns stay, for other rewards


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize(
    ("file", "form", "size"),
    [
        ("gsm8k_train.jsonl", PromptFormat("question", "answer", "####", conversational=False), 7473),
        ("gsm8k_test.jsonl", PromptFormat("question", "answer", "####"), 1319),
        ("amc23.jsonl", PromptFormat("problem", "answer"), 40),
        ("aime24.jsonl", PromptFormat("problem", "answer"), 30),
    ],
)
def test_shared_data_sets(file, form, size):
    prepared = prepare_rows(load_rows(str(SHARED / file)), form)
    assert len(prepared) == size
    # AIME's own `solution` column is a text; the answer must have taken its place.
    assert all(len(solution) < 20 for solution in prepared["solution"])


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_each_kind_of_file(tmp_path, suffix):
    table = rows(prompt=["αβγ ∑ 数学", "b"], answer=[1, 2])
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        table.to_csv(path)
    elif suffix == "parquet":
        table.to_parquet(path)
    else:
        table.to_json(path)
    prepared = prepare_rows(load_rows(str(path)), PromptFormat(answer_column="answer", conversational=False))
    assert list(prepared["prompt"]) == ["αβγ ∑ 数学", "b"]
    assert list(prepared["solution"]) == ["1", "2"]


def test_pattern_folder_slice_and_saved_data_set(tmp_path):
    for name in ("train", "test"):
        rows(prompt=[name] * 3).to_json(tmp_path / f"{name}.jsonl")
    assert len(load_rows(str(tmp_path / "t*.jsonl"))) == 6
    assert set(load_rows(str(tmp_path), "test")["prompt"]) == {"test"}
    assert len(load_rows(str(tmp_path / "train.jsonl"), "train[:2]")) == 2
    rows(prompt=["saved"]).save_to_disk(tmp_path / "saved")
    assert load_rows(str(tmp_path / "saved"))["prompt"][0] == "saved"


def test_messages_stay_messages():
    messages = [{"role": "user", "content": "2+2?"}]
    prepared = prepare_rows(rows(prompt=[messages]), PromptFormat(system_prompt="s"))
    assert prepared[0]["prompt"] == [{"role": "system", "content": "s"}, *messages]


def test_plain_text_prompt_with_system_paragraph():
    form = PromptFormat("q", system_prompt="s", prompt_template="Q: {prompt}\nA:", conversational=False)
    assert prepare_rows(rows(q=["2+2?"]), form)[0]["prompt"] == "s\n\nQ: 2+2?\nA:"


def test_streamed_rows_and_max_samples():
    stream = load_rows(str(SAMPLE), streaming=True)
    prepared = list(prepare_rows(stream, PromptFormat("question", "answer", "####"), max_samples=3))
    assert [row["solution"] for row in prepared] == ["72", "10", "5"]
    assert len(prepare_rows(load_rows(str(SAMPLE)), PromptFormat("question"), max_samples=3)) == 3


def test_the_answer_takes_its_place_in_a_template():
    form = PromptFormat("q", "a", "####", "${answer}$")
    assert prepare_rows(rows(q=["?"], a=["so #### 11\\sqrt{2} "]), form)[0]["solution"] == "$11\\sqrt{2}$"


def test_drop_long_prompts():
    table = rows(prompt=["a", "aaa", "aa"])
    assert list(drop_long_prompts(table, len, 2)["prompt"]) == ["a", "aa"]
    with pytest.raises(ValueError, match="max_prompt_length=0"):
        drop_long_prompts(table, len, 0)


@pytest.mark.parametrize(
    ("table", "form", "message"),
    [
        (rows(question=["a"]), PromptFormat(), "no column 'prompt'; its columns are: question"),
        (rows(**{"a\x1b[2J": ["a"]}), PromptFormat(), r"no column 'prompt'; its columns are: a\\x1b\[2J$"),
        (rows(prompt=["a"]), PromptFormat(answer_column="gold"), "no column 'gold'; its columns are: prompt"),
        (rows(prompt=["a", "  "]), PromptFormat(), "row 1, column 'prompt': the prompt is empty"),
        (rows(prompt=["a", None]), PromptFormat(), "row 1, column 'prompt': the prompt is empty .None."),
        (rows(prompt=[3]), PromptFormat(), "row 0, column 'prompt': a prompt is text or a list of messages.*got 3"),
        (rows(prompt=["a"], x=[None]), PromptFormat(answer_column="x"), "row 0, column 'x': the answer is empty"),
        (
            rows(prompt=["a", "b"], x=["#### 1", "two"]),
            PromptFormat(answer_column="x", answer_after="####"),
            "row 1, column 'x': the answer has no '####': 'two'",
        ),
        (
            rows(prompt=["a"], x=["1 ####"]),
            PromptFormat(answer_column="x", answer_after="####"),
            "the answer is empty after '####'",
        ),
        (rows(prompt=[]), PromptFormat(), "the data set is empty"),
        (
            rows(prompt=[[{"role": "user", "content": "a"}]]),
            PromptFormat(conversational=False),
            "holds chat messages, which prompt_format='text'",
        ),
    ],
)
def test_message_of_bad_rows(table, form, message):
    with pytest.raises(ValueError, match=message):
        prepare_rows(table, form)


def test_message_of_bad_format():
    with pytest.raises(ValueError, match="prompt_template must contain '{prompt}', got 'x'"):
        PromptFormat(prompt_template="x")
    with pytest.raises(ValueError, match="answer_after='####' needs answer_column"):
        PromptFormat(answer_after="####")
    with pytest.raises(ValueError, match="answer_template=.* needs answer_column"):
        PromptFormat(answer_template="${answer}$")
    with pytest.raises(ValueError, match="answer_template must contain '{answer}', got '\\$'"):
        PromptFormat(answer_column="a", answer_template="$")
    with pytest.raises(ValueError, match="max_samples must be at least 1, got 0"):
        prepare_rows(rows(prompt=["a"]), PromptFormat(), max_samples=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file or folder"),
        ("*.parquet", None, "no file matches this pattern"),
        ("rows.txt", "a", "files must all be of one kind .*found suffixes: .txt"),
        ("broken.jsonl", '{"prompt": "a"}\n{"prompt": \n', "cannot load split 'train' of data set '.*broken.jsonl'"),
    ],
)
def test_message_of_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name))


def test_message_of_unknown_split():
    with pytest.raises(ValueError, match="cannot load split 'test' of data set"):
        load_rows(str(SAMPLE), "test")


def test_sample_is_gsm8k():
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 16 and all("####" in json.loads(line)["answer"] for line in lines)
    assert load_dataset("json", data_files=str(SAMPLE), split="train").column_names == ["question", "answer"]
