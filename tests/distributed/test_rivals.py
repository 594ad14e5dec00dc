"""Rival methods train on two ranks as on one process: their statistics are of all ranks, on every backend."""

import numpy as np
import pytest
from rivals_worker import MEASURED, SETTINGS


PART, LIMIT = "rivals_worker", 240
RANKED = ("cpu_ddp", "cpu_zero3", "cpu_fsdp2")
BACKENDS = (None, *RANKED)
# Float32 sums in another order. A statistic of one rank alone makes more than 1e-3.
TOLERANCE = 2e-5


def parameters(launches, backend, method) -> list[dict[str, np.ndarray]]:
    folder = launches.folder_of(backend, PART)
    return [dict(np.load(folder / f"{method}-{rank}.npz")) for rank in range(len(launches.results(backend, PART)))]


def largest_difference(one, other) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("backend", RANKED)
def test_parameters_are_those_of_one_process(launches, backend, method):
    (expected,) = parameters(launches, None, method)
    first, second = parameters(launches, backend, method)
    assert largest_difference(first, expected) < TOLERANCE
    assert largest_difference(first, second) == 0.0


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("backend", RANKED)
def test_what_is_measured_is_that_of_one_process(launches, backend, method):
    (expected,) = (found[method] for found in launches.results(None, PART))
    first, second = (found[method] for found in launches.results(backend, PART))
    assert first == second  # exactly: the numbers are reduced, and the same everywhere
    assert first["entropy"] == pytest.approx(expected["entropy"], abs=1e-5)
    assert first["measured"] == pytest.approx(expected["measured"], abs=1e-5)
    assert first["numbers"] == pytest.approx(expected["numbers"], abs=1e-5)


def test_the_methods_act(launches):
    (found,) = launches.results(None, PART)
    for method in MEASURED:
        assert len(set(found[method]["measured"])) > 1, f"{method} measured the same in every step"
    ends = {method: parameters(launches, None, method)[0] for method in SETTINGS}
    for one in ends:
        for other in ends:
            assert one == other or largest_difference(ends[one], ends[other]) > 100 * TOLERANCE, (one, other)
