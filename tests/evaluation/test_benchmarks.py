"""The paper's benchmarks by name, with a file in the place of one, and the average over them."""

import pytest

from entrocraft_trl.evaluation.benchmarks import average, parse_benchmarks


def test_a_name_means_the_hubs_rows_and_name_and_file_local_ones():
    files = parse_benchmarks(["amc23", "aime24=a=b/rows.jsonl"])  # only the first "=" parts them
    assert files == {"amc23": None, "aime24": "a=b/rows.jsonl"}
    assert list(files) == ["amc23", "aime24"]  # the order of the table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["amc24"], "unknown benchmark 'amc24'; known are: math500, amc23, aime24, aime25"),
        (["rows.jsonl"], "unknown benchmark 'rows.jsonl'.* as NAME=FILE"),
        (["AMC23"], "unknown benchmark 'AMC23'"),
        (["amc23", "amc23=rows.jsonl"], "'amc23' is named twice"),
        (["amc23="], "'amc23=' names no file"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_benchmarks(words)


def test_each_benchmark_counts_once_in_the_average():
    figures = {"math500": {"prompts": 500, "mean@4": 0.75}, "amc23": {"prompts": 40, "mean@4": 0.25}}
    assert average(figures, ["mean@4"]) == {"mean@4": 0.5}  # 0.713 by prompts
