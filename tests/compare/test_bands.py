"""Bands of a comparison: the shapes of the control experiment, in nats, and settings that follow them."""

import math
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from entrocraft_trl.cli.recipe import comparisons
from entrocraft_trl.compare.bands import FollowsBand, band_fields, band_of, read_band
from entrocraft_trl.compare.reading import read_experiment
from entrocraft_trl.control.schedule import band_at, parse_knots


@pytest.fixture(scope="module")
def bands():
    return read_experiment(comparisons()["compare/control"]).bands


def centre_at(plan, initial, progress):
    low, high = band_of(plan.knots(initial), progress)
    return (low + high) / 2


@pytest.mark.parametrize(
    ("band", "values"),
    [
        ("constant", {0.0: 0.85, 0.5: 0.85, 1.0: 0.85}),
        ("linear", {0.0: 1.0, 0.5: 0.75, 1.0: 0.5}),
        ("cosine", {0.0: 1.0, 0.5: 0.75, 0.25: 1.0 - 0.5 * (1 - math.sqrt(0.5)) / 2, 1.0: 0.5}),
        ("rise_decay", {0.0: 1.0, 1 / 6: 1.075, 1 / 3: 1.15, 2 / 3: 0.825, 1.0: 0.5}),
        ("step", {0.0: 0.85, 0.499: 0.85, 0.501: 0.70, 1.0: 0.70}),
    ],
)
def test_shapes_of_the_control_experiment(bands, band, values):
    assert [centre_at(bands[band], 1.0, progress) for progress in values] == pytest.approx(list(values.values()))
    assert all(knot.high - knot.low == pytest.approx(0.1) for knot in bands[band].knots(1.0))


def test_bands_scale_with_the_initial_entropy_and_the_step_is_in_nats(bands):
    for name, plan in bands.items():
        if name != "step":
            assert centre_at(plan, 2.0, 0.3) == pytest.approx(2 * centre_at(plan, 1.0, 0.3))
    assert centre_at(bands["step"], 2.0, 0.0) - centre_at(bands["step"], 2.0, 1.0) == pytest.approx(0.15)
    assert {name: plan.jump for name, plan in bands.items() if plan.jump is not None} == {"step": 0.5}


def test_the_cosine_between_its_knots_is_the_cosine(bands):
    for index in range(101):
        progress = index / 100
        exact = 0.5 + 0.5 * (1 + math.cos(math.pi * progress)) / 2
        assert centre_at(bands["cosine"], 1.0, progress) == pytest.approx(exact, abs=2e-3)


def test_what_the_trainer_is_given_is_the_band_that_is_measured_against(bands):
    for plan in bands.values():
        fields, knots = band_fields(plan.knots(0.9)), plan.knots(0.9)
        for index in range(61):
            given = band_at(index / 60, shape=fields["entropy_schedule"], knots=parse_knots(fields["entropy_knots"]))
            assert given == band_of(knots, index / 60)


def test_a_constant_band_may_have_an_offset_in_nats_and_a_width_of_its_own():
    plan = read_band({"points": [[0, 1.0, 0.05]], "width": 0.2}, 0.1)
    assert [(low, high) for _, low, high in plan.knots(0.8)] == [pytest.approx((0.75, 0.95))] * 2


def test_settings_follow_low_centre_and_high(bands):
    args = SimpleNamespace()
    callback = FollowsBand({"a": "low", "b": "centre", "c": "high"}, bands["linear"].knots(0.9))
    callback.on_step_begin(args, TrainerState(global_step=5, max_steps=10), None)
    assert (args.a, args.b, args.c) == pytest.approx((0.75 * 0.9 - 0.05, 0.75 * 0.9, 0.75 * 0.9 + 0.05))
    callback.on_step_begin(args, TrainerState(global_step=10, max_steps=10), None)
    assert args.b == pytest.approx(0.5 * 0.9)
