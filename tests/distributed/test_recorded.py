"""Readings recorded while ranks sample, on every backend: equal to a pass, and all ranks take the same source."""

import pytest
from cases import BACKENDS


PART, LIMIT = "recorded_worker", 60
RUNS = ["grpo", "rloo", "several steps a generation"]


@pytest.fixture(scope="module", params=BACKENDS)
def ranks(request, launches):
    return launches.results(request.param, PART)


@pytest.mark.parametrize("run", RUNS)
def test_the_record_is_what_a_pass_says(ranks, run):
    for rank in ranks:
        assert set(rank[run]["sources"]) == {"record"}
        assert max(rank[run]["differences"]) < 1e-5
        assert rank[run]["entropies"] == ranks[0][run]["entropies"]
    assert ranks[0][run]["loss_tokens"] != ranks[1][run]["loss_tokens"], "ranks that sample the same prove little"


def test_a_record_that_one_rank_lost_is_used_by_none(ranks):
    for rank in ranks:
        assert rank["lost"]["sources"] == ["own_pass", "own_pass"]
        assert rank["lost"]["entropies"] == ranks[0]["lost"]["entropies"]


def test_a_rank_that_runs_along_with_the_others_keeps_its_record(launches):
    for rank in launches.results("cpu_zero3", PART):
        assert set(rank["layer by layer"]["sources"]) == {"record"}
        # The same seeds, hence the same rollouts as with all weights gathered at once.
        assert rank["layer by layer"]["loss_tokens"] == rank["grpo"]["loss_tokens"]
        assert rank["layer by layer"]["entropies"] == pytest.approx(rank["grpo"]["entropies"], rel=1e-5)
