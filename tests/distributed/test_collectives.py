"""
What entropy control adds to the communication of a generation batch: three sums of a handful of scalars.

One sum makes the entropy reading and its scatter, with two numbers a group (of a single one, two a rollout), one the
counts of what was kept, and one, in each optimizer step, says whether any rollout teaches something; where the policy
can be read while it samples, one more says whether that worked on every rank. The entropy-change rule, which ranks the
rollouts of all ranks by score, gathers one float per rollout besides. Influence gathers three, and adds up a gradient:
one sum a trainable parameter, of its size. To compute some of the rows only, each rank gathers six numbers a row.
"""

from collections import Counter

import cases
import pytest
import tiny


PART, BACKENDS, LIMIT = "collectives_worker", ["cpu_ddp"], 60
RULES = (
    "advantage_sign",
    "advantage_sign_zero_advantage",
    "advantage_sign_reward",
    "entropy_change",
)
HANDFUL = 24 + 2 * cases.ROWS  # numbers in all sums together; they are 20 now, and two for each rollout of one group
ROWS_OF_A_RANK = cases.ROWS // cases.RANKS


@pytest.fixture(scope="module")
def ranks(launches):
    return launches.results("cpu_ddp", PART)


def added_calls(rank: dict, rule: str) -> list[Counter]:
    """Collective calls of each step beyond those of plain GRPO, which must all be there as well."""
    added = []
    for step, plain in zip(rank["steps"][rule], rank["steps"]["plain"], strict=True):
        assert not Counter(plain) - Counter(step)
        added.append(Counter(step) - Counter(plain))
    return added


def sums_of(calls: Counter) -> list[int]:
    return sorted(int(call.split()[1]) for call in calls.elements() if call.startswith("all_reduce "))


@pytest.mark.parametrize("rule", ["plain", *RULES, "influence", "some_rows"])
def test_every_rank_makes_the_same_calls_in_the_same_order(ranks, rule):
    assert ranks[0]["steps"][rule] == ranks[1]["steps"][rule]
    assert len(ranks[0]["steps"][rule]) == cases.STEPS


@pytest.mark.parametrize("rule", RULES)
def test_three_small_sums_are_added_whatever_was_accepted(ranks, rule):
    assert len(set(ranks[0]["accepted"][rule])) >= 2  # or "whatever was accepted" would say nothing
    steps = added_calls(ranks[0], rule)
    assert [len(sums_of(step)) for step in steps] == [3] * cases.STEPS
    assert len({tuple(sums_of(step)) for step in steps}) == 1  # their sizes do not depend on the batch
    assert sum(sums_of(steps[0])) <= HANDFUL


def test_a_recorded_reading_adds_one_number_to_them(ranks):
    for rank in ranks:
        assert rank["sampled"] == ranks[0]["sampled"]
        for step, plain in zip(rank["sampled"]["recorded"], rank["sampled"]["plain"], strict=True):
            added = Counter(step) - Counter(plain)
            assert not Counter(plain) - Counter(step)
            assert set(added) == {call for call in added if call.startswith("all_reduce ")}
            assert len(sums_of(added)) == 4 and sums_of(added)[0] == 1


def test_computing_some_rows_gathers_once_what_the_plan_has_to_know(ranks):
    lengths = f"all_gather {6 * ROWS_OF_A_RANK}"
    for some, every in zip(ranks[0]["steps"]["some_rows"], ranks[0]["steps"]["advantage_sign"], strict=True):
        assert some.count(lengths) == 1 and lengths not in every
        assert len(some) == len(every) + 1  # the others are as many, of numbers of fewer rows


@pytest.mark.parametrize("rule", RULES)
def test_only_the_entropy_change_rule_gathers_a_float_per_rollout(ranks, rule):
    gathered = [
        sorted(call for call in step.elements() if not call.startswith("all_reduce "))
        for step in added_calls(ranks[0], rule)
    ]
    one_gather = [f"all_gather {ROWS_OF_A_RANK}"]
    if rule.startswith("entropy_change"):
        # The fourth step is deep inside its band, where nothing can be rejected and nothing needs ranking.
        assert gathered == [one_gather, one_gather, one_gather, [], one_gather, one_gather]
    else:
        assert gathered == [[]] * cases.STEPS


def test_influence_adds_up_one_gradient_where_something_may_go(ranks):
    sizes = sorted(parameter.numel() for parameter in tiny.build_model().parameters())
    small = sums_of(added_calls(ranks[0], "entropy_change")[0])
    for number, step in enumerate(added_calls(ranks[0], "influence")):
        gathers = [call for call in step.elements() if not call.startswith("all_reduce ")]
        if number == 3:  # deep inside the band
            assert (sums_of(step), gathers) == (small, [])
        else:
            # Besides the parameters, the count of what the gradient is the mean of.
            assert sums_of(step) == sorted([*small, *sizes, 1])
            assert sorted(gathers) == [f"all_gather {numbers * ROWS_OF_A_RANK}" for numbers in (1, 2)]
