"""The figures of the sentence benchmark, from records written by hand."""

import pytest

from benchmarks.sentences import GROUP, ROLLOUTS, batch_entropies, faults, right_answers


def record(**changes):
    plain = {
        "completions": ["She lit a candle by the river.", "Candle, river."],
        "rewards": [1.0, 0.0],
        "tokens": [8, 2],
        "truncated": [False, False],
        "entropy_sums": [4.0, 6.0],
    }
    return plain | changes


def test_entropy_of_a_batch_is_a_mean_over_tokens_of_its_first_groups():
    prompts = ROLLOUTS // GROUP
    first, second = record(), record(tokens=[1, 1], entropy_sums=[5.0, 5.0])
    batches = [first] + [second] * (prompts - 1) + [second] * prompts
    assert batch_entropies(batches, 1) == [10 / 10, 10 / 2]
    assert batch_entropies(batches, 2) == [20 / 12, 20 / 4]


def test_right_answers_and_shares_of_faults():
    records = [record(), record(completions=["She lit", "She slept by the river."], rewards=[0, 0], truncated=[1, 0])]
    assert right_answers(records) == ["she lit a candle by the river"]
    shares = faults(records, [["candle", "river"]] * 2)
    assert shares == pytest.approx({"right": 0.25, "length": 0.5, "too long": 0.25})
