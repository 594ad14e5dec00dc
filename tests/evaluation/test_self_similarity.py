"""Share of repeated 4-grams, against counting by hand."""

import math

import pytest

from entrocraft_trl.evaluation.accuracy import self_similarity


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        (["a b c d e", "f g h i"], 0.0),  # abcd, bcde, fghi
        (["a b c d", "a b c d"], 1 / 2),
        (["a b c d"] * 4, 3 / 4),
        (["the cat sat on a chair", "the dog sat on a chair"], 1 / 6),  # "sat on a chair" is the second of six
        (["a b a b a b"], 1 / 3),  # abab, baba, abab: within one answer too
        (["a b c", "a b c", "a b c d"], 0.0),  # two are too short to hold any
        (["a b  c\td", "a b c d"], 1 / 2),  # whatever blanks are between
    ],
)
def test_share_by_hand(answers, share):
    assert self_similarity(answers) == pytest.approx(share, abs=1e-12)


def test_other_lengths():
    assert self_similarity(["a b", "b a", "a b"], n=2) == pytest.approx(1 / 3)
    assert self_similarity(["a b a"], n=1) == pytest.approx(1 / 3)


def test_no_share_without_a_run_of_that_length():
    assert math.isnan(self_similarity([]))
    assert math.isnan(self_similarity(["a b c"]))
