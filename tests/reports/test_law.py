"""The law R = -a exp(H) + b on curves whose a and b are known."""

import math
import random

import pytest

from entrocraft_trl.metric_names import ENTROPY, HIGH, LOW
from entrocraft_trl.reports.law import Law, Point, controlled_by, fit_error, fit_law, law_points, predict_rest
from entrocraft_trl.reports.law_plot import plot_law


A, B = 0.3, 0.9


def curve(count=40, noise=0.0, seed=0):
    """Entropy falls from 0.8 towards 0.1 nats."""
    source = random.Random(seed)
    entropies = [0.1 + 0.7 * math.exp(-index / 12) for index in range(count)]
    return [Point(5 * i, h, B - A * math.exp(h) + source.gauss(0, noise)) for i, h in enumerate(entropies)]


def test_known_numbers_are_found():
    law = fit_law(curve())
    assert (law.a, law.b, law.ceiling) == pytest.approx((A, B, B - A))
    assert fit_error(law, curve()) == pytest.approx(0.0, abs=1e-12)
    assert law.accuracy(0.0) == pytest.approx(law.ceiling)
    assert law.accuracy(1.0) == pytest.approx(B - A * math.e)


def test_noise_is_the_error_of_the_fit():
    points = curve(400, noise=0.02)
    law = fit_law(points)
    assert (law.a, law.b) == pytest.approx((A, B), abs=0.02)
    assert fit_error(law, points) == pytest.approx(0.02, rel=0.1)


def test_the_rest_is_predicted_from_the_first_15_percent():
    points = curve()
    prediction = predict_rest(points)
    assert prediction.fitted == 6  # of 40
    assert (prediction.law.a, prediction.law.b) == pytest.approx((A, B))
    assert prediction.law_error == pytest.approx(0.0, abs=1e-12)
    first, rest = points[:6], points[6:]
    constant = sum(point.accuracy for point in first) / 6
    assert prediction.constant == pytest.approx(constant)
    assert prediction.constant_error == pytest.approx(math.sqrt(sum((p.accuracy - constant) ** 2 for p in rest) / 34))
    # The accuracy levels off, which a straight line through its beginning does not know.
    assert prediction.line_error > prediction.constant_error > 0.05


def test_a_straight_line_is_found_where_it_is_one():
    points = [Point(step, 0.5 + 0.01 * (step % 3), 0.1 + 0.002 * step) for step in range(0, 100, 5)]
    prediction = predict_rest(points)
    assert (prediction.slope, prediction.intercept) == pytest.approx((0.002, 0.1))
    assert prediction.line_error == pytest.approx(0.0, abs=1e-12)
    assert prediction.law_error > 0.05


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (curve(3), "3 points are too few: 3 are fitted, and there is nothing to predict"),
        ([Point(step, 0.5, 0.1 * step) for step in range(9)], "a line through 3 points at 1 places is not determined"),
    ],
)
def test_what_cannot_be_predicted(points, said):
    with pytest.raises(ValueError, match=said):
        predict_rest(points)


# ---------------------------------------------------------------------------------------------------------- from a log


def make_log(**more):
    """Three steps, evaluated at the start and after the second and third one. A reading is of before its step."""
    steps = [
        {"step": step, "reward": 0.1, "entropy": entropy, **more} for step, entropy in ((1, 0.9), (2, 0.7), (3, 0.5))
    ]
    evaluations = [
        {"step": step, "eval_mean@8": accuracy, "entropy": 9.0} for step, accuracy in ((0, 0.1), (2, 0.3), (3, 0.4))
    ]
    return [evaluations[0], *steps[:2], evaluations[1], steps[2], evaluations[2]]


def test_an_evaluation_has_the_entropy_of_the_readings_beside_it():
    assert law_points(make_log()) == [
        Point(0, pytest.approx(0.9), 0.1),  # the first reading is of the policy that was evaluated
        Point(2, pytest.approx(0.6), 0.3),
        Point(3, pytest.approx(0.5), 0.4),
    ]
    assert law_points([*make_log(), {"step": 3, "eval_mean@8": 0.9}])[-1].accuracy == 0.4  # the first time counts


def test_our_reading_comes_before_trls_and_the_metric_may_be_named():
    log = [{**record, ENTROPY: record["entropy"] / 2} if "reward" in record else record for record in make_log()]
    assert law_points(log)[0].entropy == pytest.approx(0.45)
    log = [{**record, "eval_reward": 7.0} if "eval_mean@8" in record else record for record in log]
    assert law_points(log, "eval_reward")[0].accuracy == 7.0
    with pytest.raises(ValueError, match="holds no eval_rewards; .* It has: eval_mean@8, eval_reward"):
        law_points(log, "eval_rewards")


def test_the_reward_of_a_batch_has_the_entropy_of_that_batch():
    assert law_points(make_log(), "reward") == [Point(1, 0.9, 0.1), Point(2, 0.7, 0.1), Point(3, 0.5, 0.1)]


def test_a_run_without_evaluation_or_entropy():
    with pytest.raises(ValueError, match="holds no eval_mean@n; evaluate during training .* It has: no evaluation"):
        law_points([{"step": 1, "reward": 0.1, "entropy": 0.9}])
    with pytest.raises(ValueError, match="no entropy"):
        law_points([{"step": 1, "eval_mean@8": 0.1}, {"step": 1, "reward": 0.2}])


def test_who_controlled_the_entropy():
    assert controlled_by(make_log()) is None
    assert controlled_by(make_log(**{LOW: 0.1, HIGH: 0.2})) == "a band"
    assert controlled_by(make_log(entropy_coef=0.01)) == "TRL's adaptive entropy bonus"
    assert controlled_by(make_log(**{"repo/zeta": 0.01})) == "REPO-R"


def test_the_figure_has_two_panels_for_each_run():
    points = curve(noise=0.01)
    runs = {"with prediction": (points, fit_law(points), predict_rest(points)), "few": (points[:3], Law(A, B), None)}
    axes = plot_law(runs).axes
    assert len(axes) == 4
    assert [len(axis.get_lines()) for axis in axes] == [2, 5, 1, 1]
    with pytest.raises(ValueError, match="no run"):
        plot_law({})
