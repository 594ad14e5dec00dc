"""A run's log as numbers: what counts as a reading, and each figure of readings against their bands, by hand."""

import json
import math
import random

import pytest
import tiny

from entrocraft_trl import metric_names
from entrocraft_trl.reports import log as run_log


def reading(measured, low=0.4, high=0.6, **more):
    return {metric_names.ENTROPY: measured, metric_names.LOW: low, metric_names.HIGH: high, **more}


# ------------------------------------------------------------------------------------------------- what the log holds


def test_read_log_takes_the_state_that_got_furthest(tmp_path):
    for folder, step in (("checkpoint-9", 9), ("checkpoint-10", 10), (".", 4)):
        (tmp_path / folder).mkdir(exist_ok=True)
        state = {"global_step": step, "log_history": [{"step": step, "entropy": 1.0}]}
        (tmp_path / folder / "trainer_state.json").write_text(json.dumps(state))
    assert run_log.read_log(tmp_path)[0]["step"] == 10
    assert run_log.read_log(tmp_path / "checkpoint-9")[0]["step"] == 9
    assert run_log.read_log(tmp_path / "trainer_state.json")[0]["step"] == 4


def test_messages(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trainer_state.json in"):
        run_log.read_log(tmp_path)
    state = tmp_path / "trainer_state.json"
    state.write_text("{")
    with pytest.raises(ValueError, match="is not a trainer's state: JSONDecodeError"):
        run_log.read_log(tmp_path)
    state.write_text(json.dumps({"global_step": 0, "log_history": []}))
    with pytest.raises(ValueError, match="has logged nothing yet"):
        run_log.read_log(tmp_path)


def test_values_and_series_pass_over_records_without_the_key():
    log = [{"step": 1, "a": 0.1}, {"step": 2, "b": 5}, {"step": 3, "a": 0.3}]
    assert run_log.values(log, "a") == [0.1, 0.3]
    assert run_log.series(log, "a") == ([1, 3], [0.1, 0.3])
    assert run_log.series(log, "nothing") == ([], [])


def test_entropies_are_those_before_any_filter():
    assert run_log.entropies([{"entropy": 0.3}, {"entropy": 0.4}]) == [0.3, 0.4]
    # A step without a reading of ours: TRL's entropy counts what the filter left and must not stand in for it.
    log = [reading(0.5, entropy=0.3), {"entropy": 0.0}, reading(0.6, 0.1, 0.2, entropy=0.2)]
    assert run_log.entropies(log) == [0.5, 0.6]
    assert run_log.bands(log) == [(0.4, 0.6), (0.1, 0.2)]
    assert run_log.bands([{"entropy": 0.3}]) == []


def test_newest_reading_passes_over_records_without_one():
    first, second = reading(0.5), reading(0.6)
    assert run_log.newest_reading([first, second, {"step": 2, "eval_reward": 1.0}]) is second
    assert run_log.newest_reading([{"step": 1, "entropy": 2.0}]) is None


def test_accepted_shares_and_rewards():
    log = [{"reward": 0.5, metric_names.ACCEPTED: 0.75}, {"eval_reward": 9.0}, {"reward": 0.25}, {"train_loss": 1.0}]
    assert run_log.accepted_shares(log) == [0.75]
    assert run_log.rewards(log) == [0.5, 0.25]


def test_every_name_is_one_that_a_run_logs():
    trainer = tiny.build_trainer(args=tiny.build_config(max_steps=1, **tiny.WIDE_OPEN))
    trainer.train()
    names = {value for name, value in vars(metric_names).items() if name.isupper() and name != "PREFIX"}
    assert len(names) > 5 and all(run_log.values(trainer.state.log_history, name) for name in names)
    assert metric_names.key("entropy") == metric_names.ENTROPY == "entrocraft/entropy"


# ------------------------------------------------------------------------------------------- readings and their bands

BANDS = [(0.25, 0.75), (0.25, 0.75), (0.25, 0.75), (0.5, 0.75)]
READINGS = [0.25, 0.75, 1.0, 0.375]  # on both edges, above, below: powers of two, so that nothing rounds


def test_distances_share_and_rms():
    assert run_log.distances_outside(READINGS, BANDS) == [0.0, 0.0, 0.25, 0.125]
    assert run_log.share_inside(READINGS, BANDS) == 0.5
    assert run_log.rms_outside(READINGS, BANDS) == math.sqrt((0.25**2 + 0.125**2) / 4)


def test_readings_need_a_band_each_and_figures_a_reading():
    for figure in (run_log.distances_outside, run_log.share_inside, run_log.rms_outside):
        with pytest.raises(ValueError):
            figure(READINGS, BANDS[:-1])
    for figure in (run_log.share_inside, run_log.rms_outside):
        with pytest.raises(ValueError):
            figure([], [])


@pytest.mark.parametrize(
    ("after", "steps"),
    [
        ([0.5] * 10, 0),
        ([0.8] * 4 + [0.5] * 6, 4),  # a window with one reading of 0.8 has mean 0.56, just outside
        ([0.8] * 10, None),
        ([0.8] * 5 + [0.5] + [0.8] * 4, None),  # one reading inside is no re-entry
        ([0.4, 0.6, 0.4, 0.6, 0.5] + [0.8] * 5, 0),  # scatter about the centre is inside
        ([0.5] * 4, None),  # less than a window is left
    ],
)
def test_reentry(after, steps):
    readings = [0.8] * 3 + after
    assert run_log.reentry_steps(readings, [(0.45, 0.55)] * len(readings), jump=3) == steps


def test_reentry_follows_a_moving_band():
    # Five readings of 0.5 against bands whose edges have the means (0.4, 0.5): on the edge, which belongs to it.
    edges = [(0.9, 1.0), (0.5, 0.6), (0.45, 0.55), (0.4, 0.5), (0.35, 0.45), (0.3, 0.4)]
    assert run_log.reentry_steps([0.5] * 6, edges, jump=0) == 1


@pytest.mark.parametrize("slope", [0.0, -0.002, 0.01])
def test_reading_scatter_recovers_the_noise_on_a_slope(slope):
    noise = random.Random(0)
    readings = [1.0 + slope * step + noise.gauss(0.0, 0.02) for step in range(2000)]
    assert run_log.reading_scatter(readings) == pytest.approx(0.02, rel=0.1)


def test_a_straight_line_has_no_scatter():
    assert run_log.reading_scatter([0.1 * step for step in range(30)]) == pytest.approx(0.0, abs=1e-12)


def test_final_entropy_is_the_mean_of_the_last_readings():
    assert run_log.final_entropy([9.0] + [0.5, 1.0] * 5) == 0.75
    assert run_log.final_entropy([0.5, 1.0]) == 0.75  # fewer than ten
    assert run_log.final_entropy([9.0, 1.0, 3.0], last=2) == 2.0
