"""
Data that cannot be trained on: files broken anywhere, rows without a usable prompt or answer, too few rows. The
message names file and line, or row and column; and what is odd but whole arrives unchanged.
"""

import csv
import io
import json
import math

import pyarrow
import pyarrow.parquet
import pytest
import tiny
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from soak import profile

from entrocraft_trl import EntrocraftGRPOTrainer
from entrocraft_trl.cli import main
from entrocraft_trl.data.broken_lines import find_broken_line
from entrocraft_trl.data.loading import PromptFormat, drop_long_prompts, load_rows, prepare_rows


ROWS = [{"prompt": f"question {index}", "answer": index} for index in range(10)]
LINES = [json.dumps(row) for row in ROWS]


def with_line(number: int, line: str) -> str:
    """The ten good lines with another one in a place, counted from 1 as editors do."""
    return "\n".join([*LINES[: number - 1], line, *LINES[number:]]) + "\n"


# -------------------------------------------------------------------------------------------------------- broken files

PARQUET = io.BytesIO()
pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"] * 100}), PARQUET)
PARQUET = PARQUET.getvalue()

BROKEN_LINE = {
    "half.jsonl": (with_line(7, '{"prompt": "question 6", "answer": '), "line 7: not valid JSON: Expecting value"),
    "cut.jsonl": ("\n".join(LINES)[:-5], "line 10: not valid JSON: Unterminated string"),
    "number.jsonl": (with_line(4, "5"), "line 4: a JSON object with the row's columns is needed, got a number"),
    "list.jsonl": (with_line(10, "[1, 2]"), "line 10: a JSON object with the row's columns is needed, got a list"),
    "twice.jsonl": (with_line(2, '{"prompt": "a", "prompt": "b"}'), "line 2: the key 'prompt' stands twice"),
    "half_pair.jsonl": (with_line(3, '{"prompt": "\\ud800", "answer": 1}'), "line 3: not valid Unicode: surrogates"),
    "latin.jsonl": (with_line(5, '{"prompt": "café"}').encode("latin-1"), r"line 5: not UTF-8 text .*xe9"),
    "binary.jsonl": (b"\x00\x01\x02", "line 1: not valid JSON"),
    "mark.JSONL": (b"\xef\xbb\xbf" + with_line(2, "\ufeff" + LINES[1]).encode(), "line 2: not valid JSON: .*BOM"),
}
# Here the loader's own message serves, whatever it is in the versions that are installed.
BROKEN = {
    "empty.jsonl": ("", "the file is empty"),
    "blank.jsonl": ("\n \n", "no data"),
    "half.json": ("[\n" + ",\n".join([*LINES[:6], '{"prompt": ', *LINES[7:]]) + "\n]", "."),
    "none.json": ("[]", "no data"),
    "empty.json": ("", "the file is empty"),
    "wide.csv": ("prompt,answer\na,1\nb,2,3\n", "2 fields in line 3, saw 3"),
    "quote.csv": ('prompt,answer\na,1\n"b,2\nc,3\n', "."),
    "latin.csv": ("prompt,answer\ncafé,1\n".encode("latin-1"), "xe9"),
    "header.csv": ("prompt,answer\n", "no data"),
    "empty.csv": ("", "No columns"),
    "cut.parquet": (PARQUET[: len(PARQUET) // 2], "."),
    "other.parquet": (b"hello", "."),
}


@pytest.mark.parametrize("name", BROKEN_LINE)
def test_a_broken_line_is_named(tmp_path, name):
    content, said = BROKEN_LINE[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"cannot load split 'train' of data set .*{name}, {said}"):
        load_rows(str(path))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path, name):
    content, said = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"cannot load split 'train' of data set '.*{name}': .*{said}"):
        load_rows(str(path))


def test_the_broken_one_of_several_files_is_named(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text("\n".join(LINES))
    (tmp_path / "0.jsonl").write_text("")  # an empty one among others is no fault
    assert len(load_rows(str(tmp_path / "*.jsonl"))) == 30
    (tmp_path / "b.jsonl").write_text(with_line(7, "{"))
    with pytest.raises(ValueError, match=r"/b\.jsonl, line 7: not valid JSON"):
        load_rows(str(tmp_path / "*.jsonl"))


def test_a_column_that_changes_its_type_late_is_named(tmp_path):
    """Beyond the first block that the reader looks at, a change of type cannot be mended any more."""
    path = tmp_path / "late.jsonl"
    count = 100_000  # about 12 MB; the reader's block is 10 MB
    line = json.dumps({"prompt": "x" * 90, "answer": 1}) + "\n"
    path.write_text(line * count + '{"prompt": "x", "answer": "one"}\n')
    with pytest.raises(ValueError, match=f"line {count + 1}: column 'answer' holds a text, but a number in the lines"):
        load_rows(str(path))


BROKEN_LINES = st.one_of(
    st.sampled_from(
        ["{", "}", '{"prompt"}', '{"prompt": }', "nul", '{"prompt": "a",}', '{"prompt": "a"} x', "\x00", "'a'"]
    ),
    st.sampled_from(["5", "null", '"text"', "[]", "[{}]", "true", '{"a": 1, "a": 2}', '{"prompt": "\\udfff"}']),
    st.integers(1, 20).map(lambda cut: LINES[0][:-cut]),
)


@profile(50)
@given(number=st.integers(1, len(LINES)), line=BROKEN_LINES, ending=st.sampled_from(["\n", "\r\n"]))
def test_any_broken_line_is_found(tmp_path_factory, number, line, ending):
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    lines = with_line(number, line).split("\n")
    path.write_bytes(ending.join(lines).encode())
    assert find_broken_line([str(path)]).startswith(f"{path}, line {number}: ")


# Any text, except what is no text (half surrogate pairs) and what the readers take for nothing.
TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30).filter(lambda t: t.strip())


@profile(5)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5), kind=st.sampled_from(["jsonl", "json", "csv", "parquet"]))
def test_any_text_arrives_unchanged(tmp_path_factory, texts, kind):
    texts = [f"p {text}" if kind == "csv" else text for text in texts]  # CSV has no types: "1" would be a number
    path = tmp_path_factory.mktemp("texts") / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"prompt": texts, "answer": texts}), path)
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["prompt", "answer"], *zip(texts, texts, strict=True)])
    else:
        rows = [{"prompt": text, "answer": text} for text in texts]
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text(lines if kind == "jsonl" else json.dumps(rows), encoding="utf-8")
    assert find_broken_line([str(path)]) is None
    prepared = prepare_rows(load_rows(str(path)), PromptFormat(answer_column="answer", conversational=False))
    assert list(prepared["prompt"]) == texts
    assert list(prepared["solution"]) == [text.strip() for text in texts]


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (with_line(7, "{"), [], "rows.jsonl, line 7: not valid JSON"),
        (LINES[0], ["--dry_run"], "the data set has 1 rows, but one generation batch takes 2 different prompts"),
        # The rows of a stream are not known before.
        (LINES[0], ["--dataset_streaming", "true"], "no step was made: the stream ended before the 2 rows"),
    ],
)
def test_the_command_ends_in_one_line(tmp_path, capsys, content, options, said):
    (tmp_path / "rows.jsonl").write_text(content)
    model = tmp_path / "model"
    tiny.build_tokenizer().save_pretrained(model)
    tiny.build_model().save_pretrained(model)
    batch = ["--per_device_train_batch_size", "8", "--num_generations", "4", "--max_steps", "1"]
    files = ["--model_name_or_path", str(model), "--dataset_name", str(tmp_path / "rows.jsonl")]
    reward = ["--reward_funcs", "accuracy_reward", "--answer_column", "answer"]
    capsys.readouterr()
    assert main(["train", *files, *batch, *reward, *options, "--output_dir", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("entrocraft: ")]
    assert said in line


# ---------------------------------------------------------------------------------------------------- prompts, answers

MESSAGE = {"role": "user", "content": "2+2?"}
PROMPTS = st.one_of(
    TEXTS,
    st.sampled_from([None, "", "  ", "\n", 3, 0.5, True, [], {}, b"text", ["text"], [1], [MESSAGE, "text"], MESSAGE]),
    st.sampled_from([[MESSAGE], [{"role": "system", "content": "s"}, MESSAGE], [{**MESSAGE, "name": None}]]),
    st.sampled_from(
        [[{"role": "user"}], [{"content": "a"}], [{"role": None, "content": "a"}], [{**MESSAGE, "role": 1}]]
    ),
    st.sampled_from(
        [[{**MESSAGE, "content": value}] for value in ("", None, 3, [], {}, [{"type": "text", "text": "a"}])]
    ),
    st.just([MESSAGE, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]),
)


def is_prompt(value) -> bool:
    """Text that says something; or messages, each with a role and a content or a tool call, one of them not empty."""
    if isinstance(value, str):
        return bool(value.strip())
    if not isinstance(value, list) or not all(isinstance(m, dict) and "role" in m and "content" in m for m in value):
        return False
    whole = all(
        isinstance(m["role"], str) and (isinstance(m["content"], (str, list)) or "tool_calls" in m) for m in value
    )
    return whole and any(m["content"] for m in value)


@profile(75)
@given(value=PROMPTS, index=st.integers(0, 10**6))
def test_a_prompt_arrives_or_is_named_with_row_and_column(value, index):
    form = PromptFormat(prompt_column="question")
    if is_prompt(value):
        expected = [{"role": "user", "content": value}] if isinstance(value, str) else value
        assert form.row({"question": value}, index) == {"prompt": expected}
        return
    with pytest.raises(ValueError, match=f"^row {index}, column 'question'") as error:
        form.row({"question": value}, index)
    assert repr(value) in str(error.value) or repr(value[0]) in str(error.value)


@pytest.mark.parametrize(
    ("value", "solution"),
    [
        (72, "72"),
        (0, "0"),
        (-1.5, "-1.5"),
        (True, "True"),
        (" 7 \n", "7"),
        ("½", "½"),
        ([1, 2], "[1, 2]"),
        (10**30, "1" + "0" * 30),
    ],
)
def test_an_answer_of_any_type_becomes_text(value, solution):
    form = PromptFormat(answer_column="answer", conversational=False)
    assert form.row({"prompt": "a", "answer": value}, 0)["solution"] == solution


@pytest.mark.parametrize("value", [None, "", "  ", math.nan])
def test_an_answer_that_is_missing_is_named(value):
    form = PromptFormat(answer_column="answer")
    with pytest.raises(ValueError, match=f"row 5, column 'answer': the answer is empty .{value!r}"):
        form.row({"prompt": "a", "answer": value}, 5)


def test_a_missing_number_in_a_column_of_numbers_is_named(tmp_path):
    """CSV and JSON readers turn it into NaN, of which text would be `nan`: a wrong answer to every rollout."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": NaN}\n')
    with pytest.raises(ValueError, match="row 1, column 'answer': the answer is empty"):
        prepare_rows(load_rows(str(path)), PromptFormat(answer_column="answer"))


def test_long_prompts_are_counted_out_with_a_warning():
    table = Dataset.from_dict({"prompt": ["a" * length for length in range(1, 8)]})
    with pytest.warns(UserWarning, match="^3 of 7 rows left out: .*max_prompt_length=4 tokens"):
        assert len(drop_long_prompts(table, len, 4)) == 4


# ------------------------------------------------------------------------------------ what a trainer is given directly

ABSENT_MODEL = "there/is-no-such-model"  # an attempt to load it would raise OSError


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": []}, "has 0 rows, but one generation batch takes 2 different prompts"),
        ({"prompt": ["a"]}, "has 1 rows, but one generation batch takes 2 different prompts"),
        ({"question": ["a", "b"]}, "no column 'prompt'; its columns are: question"),
        ({"prompt": ["a", "b"], "prompts": [1, 2]}, "rename the column 'prompts'"),
        ({"prompt": ["a", "b"], "completions": [1, 2]}, "rename the column 'completions'"),
        ({"prompt": ["a", "b", ""]}, "row 2, column 'prompt': the prompt is empty ('')"),
        ({"prompt": ["a", None]}, "row 1, column 'prompt': the prompt is empty (None)"),
        ({"prompt": [None, None]}, "row 0, column 'prompt': the prompt is empty (None)"),
        ({"prompt": [[MESSAGE], []]}, "row 1, column 'prompt': the prompt is empty ([])"),
        ({"prompt": [1, 2]}, "row 0, column 'prompt': a prompt is text or a list of messages, got 1"),
        ({"prompt": [0.5, 2.0]}, "row 0, column 'prompt': a prompt is text or a list of messages, got 0.5"),
        ({"prompt": [True, False]}, "row 0, column 'prompt': a prompt is text or a list of messages, got True"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_before_the_model_loads(columns, said):
    with pytest.raises(ValueError) as error:
        tiny.build_trainer(model=ABSENT_MODEL, train_dataset=Dataset.from_dict(columns))
    assert said in str(error.value)


def test_rows_are_looked_at_in_their_own_order():
    table = Dataset.from_dict({"prompt": ["", "a", "b", None, "c"]})
    with pytest.raises(ValueError, match="row 1, column 'prompt': the prompt is empty .None"):
        tiny.build_trainer(model=ABSENT_MODEL, train_dataset=table.select([1, 3, 0]))
    tiny.build_trainer(train_dataset=table.select([4, 1, 2]))


@pytest.mark.parametrize(("rows", "accumulation", "fits"), [(3, 2, False), (4, 2, True), (1, 1, False), (2, 1, True)])
def test_rows_for_one_generation_batch_are_needed(rows, accumulation, fits):
    """8 rollouts in groups of 4 are 2 prompts for each accumulation step; TRL would end without a step or an error."""
    args = tiny.build_config(gradient_accumulation_steps=accumulation)
    if not fits:
        with pytest.raises(ValueError, match=f"takes {2 * accumulation} different prompts"):
            tiny.build_trainer(args=args, train_dataset=tiny.build_dataset(rows))
        return
    trainer = tiny.build_trainer(args=args, train_dataset=tiny.build_dataset(rows))
    trainer.train()
    assert trainer.state.global_step == 1


class Sums:
    """An environment that asks the questions itself, from a column that is no prompt."""

    def reset(self, number=7, **kwargs):
        self.number = number
        return f"{number}+{number}=?"

    def get_reward(self):
        return float(self.number)


def talking_tokenizer():
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = (  # environments need one that shows tool calls
        "{% for message in messages %}{{ message['content'] }}{% for call in message.tool_calls or [] %}"
        "{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    return tokenizer


def closeness(completion_ids, environments, **kwargs):
    return [-abs(len(set(ids)) - env.number) for ids, env in zip(completion_ids, environments, strict=True)]


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
@pytest.mark.parametrize(
    "rows", [{"number": [1, 2, 30, 4]}, {"environment": ["sums"] * 4, "number": [1, 2, 3, 4]}, None]
)
def test_an_environment_that_asks_needs_no_prompts(rows):
    """TRL trains on such rows, or on none at all; the band that is never left changes nothing."""
    plain, ours = tiny.run_pair(
        {"max_steps": 2},
        reward_funcs=closeness,
        train_dataset=None if rows is None else Dataset.from_dict(rows),
        environment_factory={"sums": Sums} if rows and "environment" in rows else Sums,
        processing_class=talking_tokenizer(),
    )
    assert tiny.history(ours[0], "rewards/closeness/std")[0] > 0
    assert tiny.history(ours[0], "rewards/Sums/mean") == tiny.history(plain[0], "rewards/Sums/mean")
    tiny.assert_same_parameters(ours[0].model, plain[0].model)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"number": [1]}, "has 1 rows, but one generation batch takes 2 different prompts"),
        ({"number": [1, 2], "prompts": [1, 2]}, "rename the column 'prompts'"),
        ({"prompt": [[MESSAGE], []]}, "row 1, column 'prompt': the prompt is empty ([])"),
    ],
)
def test_rows_for_an_environment_are_checked_otherwise(columns, said):
    with pytest.raises(ValueError) as error:
        tiny.build_trainer(model=ABSENT_MODEL, train_dataset=Dataset.from_dict(columns), environment_factory=Sums)
    assert said in str(error.value)


def test_a_prompt_made_by_a_transform_is_the_users_business():
    table = Dataset.from_dict({"question": ["1+1", "2+2"]})
    table.set_transform(lambda batch: {"prompt": [f"{text}=?" for text in batch["question"]]})
    trainer = tiny.build_trainer(train_dataset=table)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("prompts", [["数学 ∑αβ 🙂", "1+2=?"], ["1" * 500, "2"]], ids=["unicode", "long"])
def test_unusual_prompts_train_whole(prompts):
    """Beyond the model's 64 positions as well: TRL neither cuts a prompt nor leaves its row out."""
    seen = []

    class Recording(EntrocraftGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            seen.append(batch["prompt_mask"].sum(dim=1).tolist())
            return batch

    trainer = tiny.build_trainer(Recording, train_dataset=Dataset.from_dict({"prompt": prompts}))
    trainer.train()
    lengths = [len(trainer.processing_class(prompt)["input_ids"]) for prompt in prompts]
    assert seen == [[lengths[0]] * 4 + [lengths[1]] * 4]
    assert trainer.state.global_step == 1
