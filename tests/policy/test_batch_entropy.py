"""The entropy of a batch from the numbers of its tokens. The trainer's own reading: control/test_trainer.py."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entrocraft_trl.policy import batch_entropy
from entrocraft_trl.policy.batch_entropy import BatchTotals
from entrocraft_trl.policy.tokens import TokenReading


tables = st.lists(
    st.lists(st.tuples(st.floats(0.0, 10.0, width=32), st.booleans()), min_size=4, max_size=4), min_size=1, max_size=6
)


def as_tensors(table):
    values = torch.tensor([[value for value, _ in row] for row in table])
    mask = torch.tensor([[int(on) for _, on in row] for row in table])
    return values, mask


@given(table=tables)
def test_token_aggregation_is_the_mean_over_all_loss_tokens(table):
    values, mask = as_tensors(table)
    total, count = batch_entropy.entropy_sums(values, mask, "token").tolist()
    chosen = [value for row in table for value, on in row if on]
    assert count == len(chosen)
    assert total == pytest.approx(sum(chosen), rel=1e-5, abs=1e-5)


@given(table=tables)
def test_sequence_aggregation_is_the_mean_of_the_rollouts_means(table):
    values, mask = as_tensors(table)
    total, count = batch_entropy.entropy_sums(values, mask, "sequence").tolist()
    rows = [[value for value, on in row if on] for row in table]
    means = [np.mean(row) for row in rows if row]
    assert count == len(means)
    assert total == pytest.approx(sum(means), rel=1e-5, abs=1e-5)


@given(table=tables, split=st.integers(0, 6), aggregation=st.sampled_from(["token", "sequence"]))
def test_sums_of_ranks_add_up_to_the_sums_of_the_whole(table, split, aggregation):
    values, mask = as_tensors(table)
    parts = [
        batch_entropy.entropy_sums(values[rows], mask[rows], aggregation)
        for rows in (slice(split), slice(split, None))
    ]
    torch.testing.assert_close(sum(parts), batch_entropy.entropy_sums(values, mask, aggregation))


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_padding_may_hold_nan_but_loss_tokens_may_not(aggregation):
    values = torch.tensor([[1.0, math.nan], [3.0, 5.0]])
    mask = torch.tensor([[1, 0], [1, 1]])
    total, count = batch_entropy.entropy_sums(values, mask, aggregation).tolist()
    assert total / count == pytest.approx(3.0 if aggregation == "token" else (1 + 4) / 2)
    assert math.isnan(batch_entropy.entropy_sums(values, torch.ones(2, 2), aggregation)[0])


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_an_empty_batch_counts_nothing(aggregation):
    assert batch_entropy.entropy_sums(torch.ones(2, 3), torch.zeros(2, 3), aggregation).tolist() == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------ scatter of a reading


def scatter_of(sums: torch.Tensor, num_generations: int) -> float:
    return batch_entropy.reading_scatter(batch_entropy.cluster_sums(sums, 0, len(sums), num_generations))


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_scatter_is_how_far_fresh_batches_lie_apart(aggregation):
    """Against 2,000 batches drawn anew: prompts differ, rollouts of one prompt differ less, lengths go with both."""
    groups, size, length = 8, 4, 12
    rng = np.random.default_rng(0)

    def draw():
        level = rng.normal(2.0, 0.5, (groups, 1, 1))  # of a prompt
        lengths = np.clip(rng.poisson(3 * level[..., 0]), 1, length).repeat(size, axis=1)
        values = level + rng.normal(0.0, 0.2, (groups, size, length))
        mask = np.arange(length) < lengths[..., None]
        return (torch.tensor(array.reshape(-1, length), dtype=torch.float32) for array in (values, mask))

    readings, scatters = [], []
    for _ in range(2000):
        sums = batch_entropy.rollout_sums(*draw(), aggregation)
        total, count = sums.sum(dim=0).tolist()
        readings.append(total / count)
        scatters.append(scatter_of(sums, size))
    # The linearised error of a ratio over 8 clusters comes out a tenth too small at most.
    assert np.sqrt(np.mean(np.square(scatters))) == pytest.approx(np.std(readings), rel=0.1)
    assert scatter_of(sums, 1) < 0.7 * np.std(readings), "the case cannot tell groups from rollouts"


def test_the_scatter_in_numbers():
    """Two groups of two: sums 4 and 9 over 2 and 3 tokens, mean 13 / 5; residuals -1.2 and 1.2."""
    sums = torch.tensor([[1.0, 1.0], [3.0, 1.0], [4.0, 2.0], [5.0, 1.0]])
    assert scatter_of(sums, 2) == pytest.approx(math.sqrt(2 * (1.2**2 + 1.2**2)) / 5)


def test_one_group_is_judged_by_its_rollouts():
    sums = torch.tensor([[1.0, 1.0], [3.0, 1.0]])
    assert scatter_of(sums, 2) == pytest.approx(math.sqrt(2 * (1.0 + 1.0)) / 2)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_a_group_may_lie_on_several_ranks(size):
    sums = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    parts = [batch_entropy.cluster_sums(sums[rows], rows.start, 6, size) for rows in (slice(0, 2), slice(2, 6))]
    clusters = sums.view(-1, size, 2).sum(dim=1) if size < 6 else sums
    torch.testing.assert_close(sum(parts), clusters)


@pytest.mark.parametrize("sums", [[[2.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]]], ids=["one rollout", "no loss token"])
def test_nothing_to_compare_scatters_by_nothing(sums):
    assert scatter_of(torch.tensor(sums), 1) == 0.0


def test_half_precision_is_summed_in_float32():
    values = torch.full((8, 1024), 1.001, dtype=torch.bfloat16)
    total, count = batch_entropy.entropy_sums(values, torch.ones(8, 1024), "token").tolist()
    assert total / count == float(values[0, 0])  # bfloat16 sums would stall at 256


def sampling(logps, mask, aggregation="token"):
    return BatchTotals(*batch_entropy.sampling_totals(logps, mask, aggregation).tolist())


def test_sampling_estimate_leaves_out_unscored_tokens():
    logps = torch.tensor([[-1.0, -2.0, math.nan], [-4.0, math.nan, -100.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert sampling(logps, mask).entropy == 7.0 / 3
    assert sampling(logps, mask, "sequence").entropy == (1.5 + 4.0) / 2
    assert sampling(logps, mask).unscored_share == 2 / 5


def test_sampling_estimate_converges_to_the_exact_entropy():
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(20, generator=generator).log_softmax(-1)
    tokens = torch.multinomial(log_p.exp(), 100_000, replacement=True, generator=generator)
    estimate = sampling(log_p[tokens].view(100, -1), torch.ones(100, 1000)).entropy
    assert estimate == pytest.approx(-(log_p.exp() * log_p).sum().item(), abs=0.01)  # 3 standard errors


def test_totals_of_the_policys_own_numbers():
    logps, entropies = torch.tensor([[-1.0, -2.0], [-0.5, 7.0]]), torch.tensor([[1.5, 0.5], [0.25, 7.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    found = BatchTotals(*batch_entropy.policy_totals(TokenReading(logps, entropies), mask, "token").tolist())
    sampled = [math.exp(p) * (p + h) for p, h in ((-1.0, 1.5), (-2.0, 0.5), (-0.5, 0.25))]  # S of the loss tokens
    assert found.entropy == pytest.approx((1.5 + 0.5 + 0.25) / 3)
    assert found.mean_sampled_term == pytest.approx(sum(sampled) / 3)
    assert (found.rollouts, found.tokens, found.unreadable, found.unscored) == (2, 3, 0, 0)


def test_a_batch_without_a_loss_token_has_no_entropy_and_is_not_refused():
    nothing = BatchTotals(*batch_entropy.sampling_totals(torch.zeros(2, 3), torch.zeros(2, 3), "token").tolist())
    assert math.isnan(nothing.entropy) and nothing.mean_sampled_term == nothing.unscored_share == 0.0
    batch_entropy.check_readable(nothing, "sampling", 0)
