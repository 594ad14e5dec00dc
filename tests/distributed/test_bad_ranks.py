"""
Bad input on one of two ranks ends both with the same message. In plain TRL the rank that fails leaves the others in a
collective, where they wait until its time limit.
"""

import pytest


PART, BACKENDS, LIMIT = "bad_input_worker", ["cpu_ddp"], 60  # hung ranks would wait for half an hour
# Each rank has four rollouts, so the third one of rank 1 is number 6 of the batch.
EXPECTED = {
    "infinite": ["'judge' returned inf, where rewards must be finite", "for rollout 6 of the batch"],
    "text": ["'judge' returned 'good', of type str, not a number, for rollout 2 of the batch"],
    "too few": ["'judge' returned 3 rewards for 4 completions (rollouts 4 to 7 of the batch)"],
    "exception": ["'judge' raised KeyError: 'only here' (rollouts 0 to 3 of the batch)"],
    "unscored": ["In 10 generation batches in a row no rollout got a reward: 'judge' returned None or NaN"],
    "logits": ["FloatingPointError", "step 0 is not finite", "in 1 of 8 rollouts"],
}


@pytest.fixture(scope="module")
def ranks(launches):
    return launches.results("cpu_ddp", PART)


@pytest.mark.parametrize("case", EXPECTED)
def test_both_ranks_end_with_the_same_message(ranks, case):
    first, second = (outcomes[case]["error"] for outcomes in ranks)
    assert first == second
    for part in EXPECTED[case]:
        assert part in first


def test_the_exception_itself_is_shown_where_it_was_raised(ranks):
    assert [outcomes["exception"]["cause"] for outcomes in ranks] == ["KeyError('only here')", None]


def test_a_refused_step_leaves_no_entropy_behind(ranks):
    assert [outcomes["logits"]["initial_entropy"] for outcomes in ranks] == [None, None]


def test_rewards_on_one_rank_alone_are_rewards(ranks):
    first, second = (outcomes["half scored"] for outcomes in ranks)
    assert first["steps"] == 12
    assert first == second


def test_the_ranks_are_still_in_step_afterwards(ranks):
    first, second = (outcomes["healthy"] for outcomes in ranks)
    assert first["steps"] == 2
    assert first == second
