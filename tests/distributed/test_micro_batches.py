"""Two ranks that compute some of their rows train as two that compute all: DDP, FSDP2, ZeRO-1, -2 and -3."""

import numpy as np
import pytest
from cases import BACKENDS as RANKED
from cases import ROWS, STEPS
from micro_batches_worker import RUNS


PART, LIMIT = "micro_batches_worker", 260
BACKENDS = (None, *RANKED)
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=BACKENDS, ids=str)
def launched(request, launches):
    return request.param, launches.results(request.param, PART), launches.folder_of(request.param, PART)


def parameters(folder, label, rank):
    return dict(np.load(folder / f"{label}-{rank}.npz"))


def largest_difference(one, other):
    assert one.keys() == other.keys() and one
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.mark.parametrize("name", RUNS)
def test_parameters_norms_and_losses_are_those_of_all_rows(launched, name):
    _, ranks, folder = launched
    for rank, found in enumerate(ranks):
        some, every = found[f"{name}-some"], found[f"{name}-all"]
        assert len(every["grad_norm"]) == STEPS and max(every["grad_norm"]) > 0.05
        assert some["grad_norm"] == pytest.approx(every["grad_norm"], rel=1e-4, abs=1e-6)
        assert some["loss"] == pytest.approx(every["loss"], rel=1e-4, abs=1e-6)
        assert some["num_tokens"] == every["num_tokens"]
        ours, theirs = (parameters(folder, f"{name}-{kind}", rank) for kind in ("some", "all"))
        assert largest_difference(ours, theirs) < TOLERANCE
        # Ranks that drift apart end with return code 0.
        assert largest_difference(ours, parameters(folder, f"{name}-some", 0)) == 0.0


@pytest.mark.parametrize("name", RUNS)
def test_rows_were_left_out_and_two_steps_were_empty(launched, name):
    _, ranks, _ = launched
    for found in ranks:
        some = found[f"{name}-some"]
        assert set(found[f"{name}-all"]["entrocraft/computed_rows"]) == {1.0}
        # With a KL term only dropped rows leave.
        assert min(some["entrocraft/computed_rows"]) <= (0.75 if name == "reference" else 0.5)
        assert some["entrocraft/computed_rows"] == ranks[0][f"{name}-some"]["entrocraft/computed_rows"]
        if name in ("sgd", "adamw", "rows", "bnpo", "baseline"):
            assert [norm == 0.0 for norm in some["grad_norm"]] == [False, False, True, False, False, True]


def test_passes_that_wait_see_fewer_rows_and_as_many_on_every_rank(launched):
    _, ranks, _ = launched
    for name, kind in (("old_policy", "policy"), ("reference", "reference")):
        some, every = ([rank[f"{name}-{rows}"]["rows_of_passes"][kind] for rank in ranks] for rows in ("some", "all"))
        assert len({*some}) == 1 and some[0] < every[0]
        # Six windows or three generation batches: all rows once, whatever they are.
        assert every == [STEPS // 2 * ROWS // len(ranks)] * len(ranks)


def test_a_run_resumed_between_spares_is_the_uninterrupted_one(launched):
    _, ranks, _ = launched
    for found in ranks:
        resumed = found["resumed"]
        assert resumed["spares"] > 0, "nothing is put to the test"
        assert resumed["difference"] == 0.0
        ours, whole = resumed["logs"]
        assert ours == whole
