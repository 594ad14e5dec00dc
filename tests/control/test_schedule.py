"""Schedules against their closed forms, and every message of the band checks."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrocraft_trl.control import schedule
from entrocraft_trl.control.schedule import Band, Knot


progress_values = st.floats(0.0, 1.0)
entropies = st.floats(0.0, 20.0)


@given(step=st.integers(0, 2000), total=st.integers(1, 1000))
def test_progress_is_the_share_of_steps_done_and_holds_at_one(step, total):
    assert schedule.progress_at(step, total) == (step / total if step <= total else 1.0)


@given(progress=progress_values, low=st.tuples(entropies, entropies), width=st.tuples(entropies, entropies))
def test_linear_band_is_the_closed_form(progress, low, width):
    high = [low[0] + width[0], low[1] + width[1]]
    band = schedule.band_at(progress, shape="linear", low=low, high=high)
    assert band.low == pytest.approx((1 - progress) * low[0] + progress * low[1], abs=1e-12)
    assert band.high == pytest.approx((1 - progress) * high[0] + progress * high[1], abs=1e-12)


@given(progress=progress_values, low=st.tuples(entropies, entropies))
def test_cosine_band_is_the_closed_form(progress, low):
    band = schedule.band_at(progress, shape="cosine", low=low, high=[low[0] + 1, low[1] + 1])
    expected = low[0] + (low[1] - low[0]) * (1 - math.cos(math.pi * progress)) / 2
    assert band.low == pytest.approx(expected, abs=1e-12)
    assert band.high == pytest.approx(expected + 1, abs=1e-12)


@given(progress=progress_values)
def test_cosine_meets_linear_at_start_middle_and_end_only_crossing_once(progress):
    linear = schedule.interpolation_weight(progress, "linear")
    cosine = schedule.interpolation_weight(progress, "cosine")
    assert 0.0 <= cosine <= 1.0
    assert (cosine - linear) * (progress - 0.5) >= -1e-12  # below the line before the middle, above it after


@given(progress=progress_values)
def test_constant_band_never_moves(progress):
    assert schedule.band_at(progress, shape="constant", low=[0.5], high=[0.7]) == Band(0.5, 0.7)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_ends_are_exact_and_one_value_means_both_ends(shape):
    assert schedule.band_at(0.0, shape=shape, low=[0.6, 0.1], high=[0.7, 0.2]) == Band(0.6, 0.7)
    end = schedule.band_at(1.0, shape=shape, low=[0.6, 0.1], high=[0.7, 0.2])
    assert end == pytest.approx((0.1, 0.2), abs=1e-15)
    assert schedule.band_at(0.3, shape=shape, low=[0.6], high=[0.7]) == Band(0.6, 0.7)


def test_unknown_shape_names_itself():
    with pytest.raises(ValueError, match=r"shape must be one of 'linear', 'cosine', 'constant' here, got 'sine'"):
        schedule.interpolation_weight(0.5, "sine")


KNOTS = [Knot(0.2, 0.9, 1.1), Knot(0.5, 0.3, 0.5), Knot(0.5, 0.6, 0.8), Knot(0.9, 0.1, 0.2)]


@pytest.mark.parametrize(
    ("progress", "straight", "stepped"),
    [
        (0.0, (0.9, 1.1), (0.9, 1.1)),  # before the first knot its values hold
        (0.2, (0.9, 1.1), (0.9, 1.1)),
        (0.35, (0.6, 0.8), (0.9, 1.1)),  # half way from knot 1 to knot 2
        (0.5, (0.6, 0.8), (0.6, 0.8)),  # of two knots at one progress the later one holds from there on: a jump
        (0.7, (0.35, 0.5), (0.6, 0.8)),
        (0.9, (0.1, 0.2), (0.1, 0.2)),
        (1.0, (0.1, 0.2), (0.1, 0.2)),  # after the last knot its values hold
    ],
)
def test_knots(progress, straight, stepped):
    assert schedule.band_at(progress, shape="piecewise", knots=KNOTS) == pytest.approx(straight)
    assert schedule.band_at(progress, shape="step", knots=KNOTS) == pytest.approx(stepped)


@given(progress=progress_values, ends=st.tuples(entropies, entropies), width=entropies)
def test_two_knots_at_the_ends_are_the_linear_schedule(progress, ends, width):
    knots = [Knot(0.0, ends[0], ends[0] + width), Knot(1.0, ends[1], ends[1] + width)]
    linear = schedule.band_at(progress, shape="linear", low=ends, high=[ends[0] + width, ends[1] + width])
    assert schedule.band_at(progress, shape="piecewise", knots=knots) == pytest.approx(linear, abs=1e-12)


def test_parse_knots_reads_numbers_in_any_notation():
    assert schedule.parse_knots(["0:9e-1:1.05", " 1 : 0 : 2 "]) == [Knot(0.0, 0.9, 1.05), Knot(1.0, 0.0, 2.0)]
    assert schedule.parse_knots([]) == []


@pytest.mark.parametrize(
    ("knots", "message"),
    [
        (["0:0.5"], r"each knot must read 'progress:low:high' with three numbers, got '0:0.5'"),
        (["0:0.5:0.6:0.7"], r"each knot must read .* got '0:0.5:0.6:0.7'"),
        (["0:low:0.6"], r"each knot must read .* got '0:low:0.6'"),
        ([""], r"each knot must read .* got ''"),
        ([0.5], r"each knot must read .* got 0.5"),
        (["1.5:0.5:0.6"], r"knot progress must lie in 0\.\.1, got 1.5 in '1.5:0.5:0.6'"),
        (["-0.1:0.5:0.6"], r"knot progress must lie in 0\.\.1, got -0.1"),
        (["nan:0.5:0.6"], r"knot progress must lie in 0\.\.1, got nan"),
        (["0.5:0.5:0.6", "0.4:0.5:0.6"], r"knots must be in order of progress, got 0.5 before 0.4"),
        (["0:0.7:0.6"], r"low edge must not exceed its high edge, got low=0.7 > high=0.6 at knot '0:0.7:0.6'"),
        (["0:-1:0.6"], r"entropy cannot be negative, got low=-1.0, high=0.6 at knot '0:-1:0.6'"),
        (["0:0.1:inf"], r"the entropy band must be finite, got low=0.1, high=inf at knot '0:0.1:inf'"),
    ],
)
def test_parse_knots_refuses(knots, message):
    with pytest.raises(ValueError, match=message):
        schedule.parse_knots(knots)


@given(low=entropies, width=entropies)
def test_check_band_returns_a_good_band(low, width):
    assert schedule.check_band(low, low + width, "here") == Band(low, low + width)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (math.nan, 1.0, "must be finite, got low=nan, high=1.0 at here"),
        (0.0, math.inf, "must be finite, got low=0.0, high=inf at here"),
        (-0.1, 1.0, "entropy cannot be negative, got low=-0.1, high=1.0 at here"),
        (-2.0, -1.0, "entropy cannot be negative, got low=-2.0, high=-1.0 at here"),
        (0.6, 0.5, "low edge must not exceed its high edge, got low=0.6 > high=0.5 at here"),
    ],
)
def test_check_band_refuses(low, high, message):
    with pytest.raises(ValueError, match=message):
        schedule.check_band(low, high, "here")


def test_check_band_function_accepts_any_pair_of_numbers():
    schedule.check_band_function(lambda progress: (0.5 - 0.4 * progress, 0.6))
    schedule.check_band_function(lambda progress: [0, 1])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda progress: 0.5, r"must return two numbers \(low, high\), got 0.5 at progress 0.0"),
        (lambda progress: (0.1, 0.2, 0.3), r"must return two numbers \(low, high\), got \(0.1, 0.2, 0.3\)"),
        (lambda progress: ("a", 0.3), r"must return two numbers \(low, high\), got \('a', 0.3\)"),
        (lambda progress: None, r"must return two numbers \(low, high\), got None at progress 0.0"),
        (lambda progress: (progress, 0.5), r"low=0.51 > high=0.5 at progress 0.51 of the entropy band function"),
        (lambda progress: (0.5 - progress, 0.6), r"entropy cannot be negative, got low=-0.01.* at progress 0.51"),
        (lambda progress: (0.1, math.nan), r"must be finite, got low=0.1, high=nan at progress 0.0"),
    ],
)
def test_check_band_function_refuses(function, message):
    with pytest.raises(ValueError, match=message):
        schedule.check_band_function(function)


def test_check_band_function_lets_the_functions_own_error_through():
    def broken(progress):
        raise KeyError("my bug")

    with pytest.raises(KeyError, match="my bug"):
        schedule.check_band_function(broken)


def test_check_band_function_reaches_both_ends():
    seen = []
    schedule.check_band_function(lambda progress: seen.append(progress) or (0.0, 1.0))
    assert seen[0] == 0.0 and seen[-1] == 1.0 and len(seen) == 101


# --------------------------------------------------------------------------------------------------- width and scatter


def test_a_band_of_another_width_keeps_its_centre_and_never_goes_below_zero():
    assert schedule.Band(1.0, 1.2).of_width(0.6) == pytest.approx((0.8, 1.4))
    assert schedule.Band(0.1, 0.3).of_width(0.6) == pytest.approx((0.0, 0.5))


def test_the_running_scatter_is_the_root_of_a_running_mean_of_squares():
    assert schedule.running_scatter(None, 0.3) == 0.3
    assert schedule.running_scatter(0.1, 0.3) == pytest.approx(math.sqrt(0.9 * 0.01 + 0.1 * 0.09))
    scatter = None
    for _ in range(100):
        scatter = schedule.running_scatter(scatter, 0.2)
    assert scatter == pytest.approx(0.2)
