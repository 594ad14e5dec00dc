"""Figures of runs, from hand-made records, and the table that comes of them. No training."""

import json
import math

import pytest
import yaml

from entrocraft_trl.cli.recipe import comparisons
from entrocraft_trl.compare.comparison import choose
from entrocraft_trl.compare.drawing import DRAWN, draw_summary
from entrocraft_trl.compare.figures import FIGURES, Measured, carrying_rollouts, largest_fall, measure, plateau_step
from entrocraft_trl.compare.jobs import Start, record_of
from entrocraft_trl.compare.reading import read_experiment
from entrocraft_trl.compare.table import caption, markdown, rows_of
from entrocraft_trl.control.schedule import Knot
from entrocraft_trl.metric_names import (
    ACCEPTED,
    ACCEPTED_TOKENS,
    DIRECTION,
    EFFECTIVE_BATCH_SIZE,
    ENTROPY,
    HIGH,
    LOW,
    REJECTED_NEGATIVE,
    REJECTED_POSITIVE,
)


def make_record(entropy, arm="entropy_change", band="constant", seed=0, accepted=1.0, mean_at_32=0.5, **more):
    steps = list(range(len(entropy)))
    return {
        **{"arm": arm, "band": band, "seed": seed, "max_steps": len(entropy), "samples": 32, "rollouts": 128},
        "series": {
            "step": steps,
            "entropy": list(entropy),
            "reward": [0.5] * len(entropy),
            "accepted": [accepted] * len(entropy),
        },
        "evaluation": {"mean@32": mean_at_32, "pass@1": mean_at_32, "pass@32": 0.75, "distinct_correct": 3.5},
        "settings": {"arm": {}},
        "seconds": 10.0,
        "log": [],
        **more,
    }


def constant(centre):
    return [Knot(0.0, centre - 0.05, centre + 0.05), Knot(1.0, centre - 0.05, centre + 0.05)]


def test_distances_of_a_hand_made_run():
    # Centre 0.5, edges 0.45 and 0.55. The first 2 of 20 readings do not count, however far out they are.
    entropy = [9.0, 9.0] + [0.5] * 12 + [0.54, 0.46] + [0.65, 0.65] + [0.25, 0.35]
    figures = measure(Measured(make_record(entropy, accepted=0.75), constant(0.5), skip=0.1))
    squares = 0.1**2 + 0.1**2 + 0.2**2 + 0.1**2
    assert figures["rms_outside"] == pytest.approx(math.sqrt(squares / 18))
    assert figures["in_band_share"] == pytest.approx(14 / 18)
    assert figures["mean_minus_centre"] == pytest.approx(sum(h - 0.5 for h in entropy[2:]) / 18)
    assert figures["reentry_steps"] is None and figures["self_similarity"] is None
    assert (figures["accepted_share"], figures["rejecting_steps"], figures["smallest_accepted"]) == (0.75, 1.0, 96)
    assert (figures["mean_at_n"], figures["pass_at_n"], figures["distinct_correct"]) == (0.5, 0.75, 3.5)
    assert (figures["seconds"], figures["step_seconds"]) == (10.0, 0.5)
    assert figures["jump_max"] == pytest.approx(8.5)


def test_without_a_band_there_are_no_distances():
    figures = measure(Measured(make_record([0.5] * 20)))
    assert figures["rms_outside"] is None and figures["in_band_share"] is None
    assert figures["final_entropy"] == 0.5


def test_distances_follow_a_moving_band():
    knots = [Knot(0.0, 0.95, 1.05), Knot(1.0, -0.05, 0.05)]
    centres = [1.0 - step / 20 for step in range(20)]  # progress is step / steps, as in the trainer
    inside = measure(Measured(make_record(centres), knots))
    assert (inside["rms_outside"], inside["in_band_share"]) == (0.0, 1.0)
    above = measure(Measured(make_record([centre + 0.08 for centre in centres]), knots))
    assert above["rms_outside"] == pytest.approx(0.03)
    assert above["in_band_share"] == 0.0


def test_reentry_is_measured_from_the_jump_of_the_band():
    knots = [Knot(0.0, 0.8, 0.9), Knot(0.5, 0.8, 0.9), Knot(0.5, 0.65, 0.75), Knot(1.0, 0.65, 0.75)]
    entropy = [0.85] * 20 + [0.85, 0.85, 0.85] + [0.70] * 17
    # Windows of 5 from step 21: 0.85, 0.85, 0.70, 0.70, 0.70, mean 0.76; from 22: mean 0.73, inside.
    assert measure(Measured(make_record(entropy), knots, jump=0.5))["reentry_steps"] == 2


def test_plateau_and_largest_fall():
    rewards = [0.0] * 10 + [0.5] * 10 + [1.0] * 20
    # The running mean of ten is 0.95 once it holds nine ones and a half: those of steps 20 to 28.
    assert plateau_step(list(range(40)), rewards) == 28
    assert plateau_step([0, 4, 8], [0.0, 0.0, 0.0]) is None
    assert largest_fall([0.1, 0.5, 0.3, 0.4, 0.2, 0.9]) == pytest.approx(0.3)


def test_what_single_steps_rest_on():
    entry = {REJECTED_POSITIVE: 10, REJECTED_NEGATIVE: 2, "frac_reward_zero_std": 0.25, EFFECTIVE_BATCH_SIZE: 7}
    entries = [{**entry, DIRECTION: 0, ACCEPTED_TOKENS: 0.3}, {**entry, DIRECTION: 1, ACCEPTED_TOKENS: 0.9}]
    assert [carrying_rollouts(entry, 128, by_reward=False) for entry in entries] == [84.0, 84.0]
    assert [carrying_rollouts(entry, 128, by_reward=True) for entry in entries] == [84.0, 7]
    settings = {"arm": {"out_of_band_advantages": "reward", "min_accepted_share": 0.5}}
    log = [{**entry, "grad_norm": norm} for entry, norm in zip(entries, (1.0, 3.0), strict=True)]
    figures = measure(Measured(make_record([0.5] * 2, settings=settings, log=log)))
    assert (figures["smallest_carrying"], figures["floor_binds"]) == (7, 0.5)
    assert (figures["grad_norm_median"], figures["grad_norm_max"]) == (2.0, 3.0)


# ------------------------------------------------------------------------------------------------------ log -> record


def test_a_log_becomes_series():
    knots = [Knot(0.0, 0.4, 0.5), Knot(1.0, 0.2, 0.3)]
    log = [
        {
            "step": 1,
            "reward": 0.1,
            ENTROPY: 0.9,
            "entropy": 0.8,
            ACCEPTED: 0.5,
            LOW: 0.41,
            HIGH: 0.51,
            "step_time": 1.0,
        },
        {"step": 2, "step_time": 0.5},  # a second step of the same rollouts
        {"step": 2, "eval_mean@8": 0.25},
        {"step": 3, "reward": 0.2, ENTROPY: 0.7, ACCEPTED: 1.0, LOW: 0.35, HIGH: 0.45, "step_time": 1.0},
        {"step": 4, "train_loss": 0.0},
    ]
    record = record_of(log, knots, 4)
    assert record["series"] == {
        "step": [0, 2],
        "entropy": [0.9, 0.7],
        "low": [0.41, 0.35],
        "high": [0.51, 0.45],
        "reward": [0.1, 0.2],
        "accepted": [0.5, 1.0],
    }
    assert (record["seconds"], record["step_seconds"]) == (2.5, [1.0, 0.5, 1.0])
    assert record["held_out"] == {"step": [2], "accuracy": [0.25]}


def test_a_rivals_log_has_the_band_that_it_was_to_follow():
    log = [{"step": step, "reward": 0.0, "entropy": 0.5} for step in (1, 2, 3)]
    series = record_of(log, [Knot(0.0, 0.4, 0.5), Knot(1.0, 0.2, 0.3)], 4)["series"]
    assert series["low"] == pytest.approx([0.4, 0.35, 0.3]) and series["accepted"] == [1.0] * 3
    assert record_of(log, None, 4)["series"]["low"] == [None] * 3


# --------------------------------------------------------------------------------------------------------------- table


@pytest.fixture(scope="module")
def experiment():
    return read_experiment(
        comparisons()["compare/control"], seeds=[0, 1], bands={"linear": None, "cosine": None, "rise_decay": None}
    )


START = Start({}, 1.0, {"mean@32": 0.1, "pass@32": 0.75, "distinct_correct": 1.5})


@pytest.fixture(scope="module")
def records(experiment):
    """Two seeds, two bands, all methods. Readings 0.79 and 0.80, band centre 0.85 and, on "step", 0.70 from half."""
    return [
        make_record([0.79 + 0.01 * seed] * 20, arm.name, band, seed, mean_at_32=0.4 + 0.2 * seed)
        for seed in (1, 0)
        for arm in experiment.arms.values()
        for band in (("constant", "step") if arm.is_steered else (None,))
    ]


def test_rows_are_means_over_seeds_and_an_unsteered_method_stands_beside_every_band(experiment, records):
    rows = rows_of(experiment, START, records)
    assert [(row["schedule"], row["method"]) for row in rows] == [
        (band, arm) for band in ("constant", "step") for arm in experiment.arms
    ]
    for row in rows:
        assert (row["regime"], row["seeds"]) == ("control", [0, 1])
        assert row["mean_at_32"] == pytest.approx(0.5)
        assert row["std"]["mean_at_32"] == pytest.approx(0.2 / math.sqrt(2))
        assert (row["accepted_share"], row["pass_at_32"], row["distinct_correct"]) == (1.0, 0.75, 3.5)
        assert row["reentry_steps"] is None  # never, or not asked for
    # Edges 0.80 and 0.90: 0.01 below, and on the edge.
    assert rows[0]["rms_outside"] == pytest.approx(0.005, abs=1e-9)
    # Steps 2 to 9 as before; 10 to 19 are 0.04 and 0.05 above the edge at 0.75.
    expected = [math.sqrt((8 * low**2 + 10 * high**2) / 18) for low, high in ((0.01, 0.04), (0.0, 0.05))]
    assert rows[-1]["rms_outside"] == pytest.approx(sum(expected) / 2)
    assert json.loads(json.dumps(rows)) == rows


def test_the_rows_have_what_results_are_read_by(experiment, records):
    asked = (
        "method paper regime schedule seeds mean_at_32 pass_at_32 distinct_correct final_entropy rms_outside "
        "plateau_step"
    )
    assert {*asked.split(), "seconds"} <= set(rows_of(experiment, START, records)[0])


GRPO = "[grpo](https://arxiv.org/abs/2402.03300)"


def test_the_table_has_the_columns_of_the_file_and_spreads(experiment, records):
    rows = rows_of(experiment, START, records)
    lines = markdown(experiment, rows).splitlines()
    assert lines[0].startswith(
        "| band | method | RMS outside (nats) | steps inside | re-entry (steps) | accepted | mean@32"
    )
    assert len(lines) == 2 + len(rows) and lines[2].startswith(f"| constant | {GRPO} | 0.0050 ± 0.0071 | ")
    assert " | – | 100% ± 0% | 0.500 ± 0.141 | " in lines[2]
    said = caption(experiment, START)
    assert "mean ± standard deviation over seeds 0, 1" in said and "prompt, 4 times over, at temperature 1;" in said
    assert "the starting policy has mean@32 0.100, pass@32 0.750 and 1.5 distinct right answers" in said
    ours = lines[2 + [row["method"] for row in rows].index("entropy_change")]
    assert ours.startswith("| constant | entropy_change | "), "a method of no paper has no link"
    one = [{**row, "seeds": [0]} for row in rows]
    assert "±" not in markdown(experiment, one)


def test_a_comparison_that_was_cut_short_gives_a_table_of_what_is_there(experiment):
    records = [make_record([0.85] * 20, "grpo", None), make_record([0.85] * 20, "entropy_change", "constant")]
    rows = rows_of(experiment, START, records)
    assert [(row["schedule"], row["method"]) for row in rows] == [
        ("constant", "grpo"),
        ("constant", "entropy_change"),
        ("step", "grpo"),
    ]


@pytest.mark.parametrize("name", DRAWN)
def test_each_method_has_a_panel_with_a_line_for_every_seed(experiment, records, name):
    figure = DRAWN[name](experiment, START, records)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert len(shown) == len(experiment.arms) * len(experiment.bands)
    grey = 0 if name == "entropy" else 1  # the first method's mean behind the others
    for axis in shown:
        assert len(axis.get_lines()) == 2 + (0 if axis.get_title().startswith("grpo") else grey)


def test_the_summary_has_all_methods(experiment, records):
    rows = rows_of(experiment, START, records)
    figure = draw_summary([experiment], rows)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(experiment.arms)


def test_the_best_candidate_is_the_first_of_equal_ones():
    candidates = [{"value": None}, {"value": 0.3}, {"value": 0.1}, {"value": 0.3}]
    assert choose(candidates, "largest") is candidates[1]
    assert choose(candidates, "smallest") is candidates[2]


def test_columns_of_all_files_are_figures():
    for path in comparisons().values():
        assert set(yaml.safe_load(path.read_text()).get("report", {}).get("columns", [])) <= set(FIGURES)
