"""Every row with a gradient is computed once, on every rank in as many micro-batches of as many rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from soak import profile

from entrocraft_trl.microbatches.plan import Row, near_equal_sizes, padded_tokens, plan_window, shares


def row(carries, prompt=3, completion=5, tokens=None):
    return Row(carries, prompt, completion, completion if tokens is None else tokens)


@pytest.mark.parametrize(
    ("count", "most", "sizes"),
    [(1, 4, [1]), (4, 4, [4]), (5, 4, [3, 2]), (10, 4, [4, 3, 3]), (9, 3, [3, 3, 3]), (7, 6, [4, 3])],
)
def test_sizes(count, most, sizes):
    assert near_equal_sizes(count, most) == sizes


def test_rows_are_sorted_and_cropped():
    rows = [row(True, 3, 8), row(True, 5, 2), row(False, 9, 9), row(True, 2, 4)]
    ((long, short),) = plan_window([rows], [(9, 9)], 2)
    assert (long.rows, long.prompt_width, long.completion_width) == ((0, 1), 5, 8)
    assert (short.rows, short.prompt_width, short.completion_width) == ((3,), 2, 4)
    assert padded_tokens([[long, short]]) == 2 * (5 + 8) + (2 + 4)


def test_a_rank_with_fewer_rows_gets_its_shortest_as_fillers():
    crowded = [row(True), row(True), row(True), row(True)]
    sparse = [row(False, 3, 8), row(True, 2, 6), row(False, 3, 4), row(False, 3, 5)]
    first, second = plan_window([crowded, sparse], [(3, 5), (3, 8)], 3)
    assert [len(batch.rows) for batch in first] == [len(batch.rows) for batch in second] == [2, 2]
    assert [batch.rows for batch in second] == [(1, 0), (3, 2)]
    assert [sorted(batch.fillers) for batch in second] == [[0], [2, 3]]
    # The longer filler is cut off where the row that counts ends; with fillers alone, nothing has to be seen.
    assert [(batch.prompt_width, batch.completion_width) for batch in second] == [(2, 6), (1, 2)]


def test_an_empty_window_keeps_one_filler():
    ((batch,),) = plan_window([[row(False, 3, 8), row(False, 2, 4)]], [(5, 8)], 2)
    assert batch.rows == (1,) and batch.fillers == {1}


def test_no_micro_batch_has_a_single_completion_column():
    """TRL's metrics would take its numbers of tokens for numbers of sequences."""
    ((batch,),) = plan_window([[row(True, 3, 1)]], [(3, 8)], 1)
    assert batch.completion_width == 2
    ((batch,),) = plan_window([[row(True, 3, 1)]], [(3, 1)], 1)
    assert batch.completion_width == 1  # TRL's own batch has no more


def test_widths_stay_multiples():
    ((batch,),) = plan_window([[row(True, 3, 9)]], [(16, 12)], 1, multiple=8)
    assert (batch.prompt_width, batch.completion_width) == (8, 12)


def test_what_is_not_cropped():
    ((batch,),) = plan_window([[row(True, 3, 5)]], [(9, 7)], 1, crop_prompts=False)
    assert (batch.prompt_width, batch.completion_width) == (9, 5)
    ((batch,),) = plan_window([[row(True, 3, 5)]], [(9, 7)], 1, crop_prompts=False, crop_completions=False)
    assert (batch.prompt_width, batch.completion_width) == (9, 7)


def test_shares_of_the_window():
    ranks = [[row(True, 2, 6), row(True, 2, 4)], [row(False, 2, 5), row(True, 2, 3, tokens=2)]]
    plans = plan_window(ranks, [(2, 6), (2, 5)], 1)
    first, second = shares(ranks, plans)
    # Six tokens of one rank and two of the other, then four and a filler, whose five are left out.
    assert (first.rows, first.tokens, first.last) == (2, 8, 0)
    assert (second.rows, second.tokens, second.last) == (2, 4, 1)
    assert (first.window_rows, first.window_tokens, first.left_rows, first.left_tokens) == (4, 17, 1, 5)


ROWS = st.builds(row, st.booleans(), st.integers(1, 9), st.integers(1, 9))


@profile(100)
@given(data=st.data(), ranks=st.integers(1, 3), most=st.integers(1, 5), parts=st.integers(1, 4))
def test_any_window(data, ranks, most, parts):
    windows = [data.draw(st.lists(ROWS, min_size=most * parts, max_size=most * parts)) for _ in range(ranks)]
    plans = plan_window(windows, [(9, 9)] * ranks, most)
    sizes = [[len(batch.rows) for batch in plan] for plan in plans]
    assert all(of_rank == sizes[0] for of_rank in sizes)
    assert 1 <= len(sizes[0]) <= parts and max(sizes[0]) <= most and max(sizes[0]) - min(sizes[0]) <= 1
    for rows, plan in zip(windows, plans, strict=True):
        computed = [index for batch in plan for index in batch.rows]
        fillers = {index for batch in plan for index in batch.fillers}
        assert len(computed) == len(set(computed))
        assert set(computed) - fillers == {index for index, one in enumerate(rows) if one.carries_gradient}
        assert not any(rows[index].carries_gradient for index in fillers)
        for batch in plan:
            for index in set(batch.rows) - batch.fillers:
                assert rows[index].prompt <= batch.prompt_width <= 9
                assert rows[index].completion <= batch.completion_width <= 9
    most_of_a_rank = max(sum(one.carries_gradient for one in rows) for rows in windows)
    assert sum(sizes[0]) == max(most_of_a_rank, 1)
