"""The figures of `benchmarks.control`, from hand-made records. No training."""

import json
import math

import pytest
import transformers
from transformers import TrainerState
from trl import GRPOConfig, GRPOTrainer

from benchmarks import control, control_report
from entrocraft_trl import EntrocraftGRPOTrainer
from entrocraft_trl.compare import run as comparison
from entrocraft_trl.control.schedule import band_at, parse_knots
from entrocraft_trl.tasks import task as tasks


def make_record(entropy, method="entropy_change", band="constant", seed=0, accepted=1.0, mean_at_32=0.5):
    return {
        "method": method,
        "band": band,
        "seed": seed,
        "steps": len(entropy),
        "entropy": list(entropy),
        "reward": [0.5] * len(entropy),
        "accepted": [accepted] * len(entropy),
        "evaluation": {"mean@32": mean_at_32, "pass@32": 0.75, "distinct_correct": 3.5, "entropy": 0.4},
        "seconds": 1.0,
    }


# --------------------------------------------------------------------------------------------------------------- bands


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
def test_bands(band, values):
    knots = control.band_knots(1.0)[band]
    assert [control.centre_at(knots, progress) for progress in values] == pytest.approx(list(values.values()))


def test_bands_scale_with_the_initial_entropy_and_the_step_is_in_nats():
    one, two = control.band_knots(1.0), control.band_knots(2.0)
    assert set(one) == {"constant", "linear", "cosine", "rise_decay", "step"}
    for band in one:
        assert [progress for progress, _ in one[band]] == [progress for progress, _ in two[band]]
        assert one[band][0][0] == 0.0 and one[band][-1][0] == 1.0
        if band != "step":
            assert [c for _, c in two[band]] == pytest.approx([2 * c for _, c in one[band]])
    assert two["step"][0][1] - two["step"][-1][1] == pytest.approx(0.15)


def test_the_cosine_between_its_knots_is_the_cosine():
    knots = control.band_knots(1.0)["cosine"]
    for index in range(101):
        progress = index / 100
        exact = 0.5 + 0.5 * (1 + math.cos(math.pi * progress)) / 2
        assert control.centre_at(knots, progress) == pytest.approx(exact, abs=2e-3)  # a twenty-fifth of the half width


def test_the_centre_is_that_of_the_band_the_trainer_is_given():
    """`run_one` hands the trainer each knot as centre ± half width; the benchmark must measure against that band."""
    for knots in control.band_knots(0.9).values():
        width = control.HALF_WIDTH
        parsed = parse_knots([f"{p}:{c - width}:{c + width}" for p, c in knots])
        for index in range(61):
            low, high = band_at(index / 60, shape="piecewise", knots=parsed)
            centre = control.centre_at(knots, index / 60)
            assert (low, high) == pytest.approx((centre - width, centre + width))


# ------------------------------------------------------------------------------------------------------------- figures


def test_distances_of_a_hand_made_run():
    # Centre 0.5, edges 0.45 and 0.55. The first 2 of 20 readings do not count, however far out they are.
    entropy = [9.0, 9.0] + [0.5] * 12 + [0.54, 0.46] + [0.65, 0.65] + [0.25, 0.35]
    record = make_record(entropy, accepted=0.75)
    figures = control.measure(record, [(0.0, 0.5), (1.0, 0.5)], "constant")
    squares = 0.1**2 + 0.1**2 + 0.2**2 + 0.1**2
    assert figures["rms_outside"] == pytest.approx(math.sqrt(squares / 18))
    assert figures["in_band_share"] == pytest.approx(14 / 18)
    assert figures["reentry_steps"] is None
    assert figures["accepted_share"] == 0.75
    assert (figures["mean_at_32"], figures["pass_at_32"], figures["distinct_correct"]) == (0.5, 0.75, 3.5)


def test_distances_follow_a_moving_band():
    knots = [(0.0, 1.0), (1.0, 0.0)]
    centres = [1.0 - step / 20 for step in range(20)]  # progress is step / steps, as in the trainer
    inside = control.measure(make_record(centres), knots, "linear")
    assert (inside["rms_outside"], inside["in_band_share"]) == (0.0, 1.0)
    above = control.measure(make_record([centre + 0.08 for centre in centres]), knots, "linear")
    assert above["rms_outside"] == pytest.approx(0.03)
    assert above["in_band_share"] == 0.0


def test_reentry_is_measured_from_the_middle_of_the_run_and_for_the_step_band_alone():
    knots = control.band_knots(1.0)["step"]  # 0.85, then 0.70 from the middle on
    entropy = [0.85] * 20 + [0.85, 0.85, 0.85] + [0.70] * 17
    figures = control.measure(make_record(entropy, band="step"), knots, "step")
    # Windows of 5 from step 21: 0.85, 0.85, 0.70, 0.70, 0.70, mean 0.76; from 22: mean 0.73, inside.
    assert figures["reentry_steps"] == 2
    assert control.measure(make_record(entropy), knots, "constant")["reentry_steps"] is None


def test_plain_grpo_runs_once_per_seed_and_every_seed_is_a_whole_table(tmp_path):
    bands = ("constant", "step")
    todo = control.jobs(tmp_path, 0.9, 60, (0, 1), bands, bonus=(1e-3, 0.1))
    half = len(todo) // 2
    for seed, part in enumerate((todo[:half], todo[half:])):
        assert {job["seed"] for job in part} == {seed}
        pairs = [(job["method"], job["band"]) for job in part]
        others = {(method, band) for method in control.METHODS if method != "grpo" for band in bands}
        assert len(set(pairs)) == len(pairs) and set(pairs) == {("grpo", "none")} | others
    assert all((job["steps"], job["initial_entropy"], job["bonus"]) == (60, 0.9, (1e-3, 0.1)) for job in todo)
    json.dumps(todo)  # they go to worker processes, and their records to files


@pytest.fixture
def trained(monkeypatch):
    """Stands in for training; collects `(trainer class, config, callbacks)` of each run."""
    calls = []

    def train_and_evaluate(trainer_class, args, task, *, callbacks=()):
        calls.append((trainer_class, args, callbacks))
        log = [{"reward": 0.5, "entropy": 0.6 + 0.01 * step} for step in range(args.max_steps)]
        return comparison.Run(log, make_record([])["evaluation"], 1.0)

    monkeypatch.setattr(tasks, "expression_task", lambda *args, **kwargs: None)
    monkeypatch.setattr(comparison, "train_and_evaluate", train_and_evaluate)
    for name in ("set_verbosity_error", "disable_progress_bar"):  # they would outlive this test
        monkeypatch.setattr(transformers.logging, name, lambda: None)
    return calls


def test_a_finished_run_is_read_from_disk_and_one_with_other_settings_is_not(tmp_path, trained):
    job = next(j for j in control.jobs(tmp_path, 0.9, 5, (0,), ("constant",), (1e-3, 0.1)) if j["method"] == "grpo")
    record = control.run_one(job)
    assert record["entropy"] == pytest.approx([0.60, 0.61, 0.62, 0.63, 0.64])
    assert record["accepted"] == [1.0] * 5  # plain GRPO rejects nothing
    assert control.run_one(job) == json.loads(json.dumps(record)) and len(trained) == 1
    assert len(control.run_one({**job, "steps": 6})["entropy"]) == 6 and len(trained) == 2


def test_every_method_trains_with_the_same_arguments_towards_the_same_band(tmp_path, trained):
    todo = control.jobs(tmp_path, 0.9, 10, (3,), ("linear",), (1e-3, 0.1))
    for job in todo:
        record = control.run_one(job)
        assert control.measure(record, control.band_knots(0.9)["linear"], "linear")["mean_at_32"] == 0.5
    configs = {job["method"]: (trainer, args) for job, (trainer, args, _) in zip(todo, trained, strict=True)}
    shared = tasks.expression_arguments("", max_steps=10, seed=3)
    expected = GRPOConfig(**shared)
    for _, args in configs.values():
        assert all(getattr(args, name) == getattr(expected, name) for name in shared if name != "output_dir")
    assert len({args.output_dir for _, args in configs.values()}) == len(control.METHODS)
    assert {method: trainer for method, (trainer, _) in configs.items()} == {
        "grpo": GRPOTrainer,
        "adaptive_bonus": GRPOTrainer,
        "advantage_sign": EntrocraftGRPOTrainer,
        "entropy_change": EntrocraftGRPOTrainer,
    }
    for method in ("advantage_sign", "entropy_change"):
        args = configs[method][1]
        assert (args.rejection_rule, args.entropy_unit) == (method, "nats")
        assert tuple(args.band_at(0.5)) == pytest.approx((0.75 * 0.9 - 0.05, 0.75 * 0.9 + 0.05))
    bonus = configs["adaptive_bonus"][1]
    assert bonus.use_adaptive_entropy and (bonus.entropy_coef_delta, bonus.entropy_coef_max) == (1e-3, 0.1)
    assert bonus.entropy_target == pytest.approx(0.9)
    (follower,) = next(callbacks for _, args, callbacks in trained if args is bonus)
    follower.on_step_begin(bonus, TrainerState(global_step=5, max_steps=10), None)
    assert bonus.entropy_target == pytest.approx(0.75 * 0.9)


# -------------------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two seeds, two bands, all methods. Readings 0.8, band centre 0.85 and, on "step", 0.70 in the second half."""
    bands = ("constant", "step")
    records = []
    for seed in (1, 0):
        for method in control.METHODS:
            for band in ("none",) if method == "grpo" else bands:
                entropy = [0.79 + 0.01 * seed] * 20
                records.append(make_record(entropy, method, band, seed, mean_at_32=0.4 + 0.2 * seed))
    folder = tmp_path_factory.mktemp("report") / "results"
    control_report.write_report(folder, records, bands, 1.0, {"mean@32": 0.1}, {"5e-3/1": 0.2})
    return folder


def test_figures_are_means_over_seeds(report):
    rows = json.loads((report / "control.json").read_text())["rows"]
    for row in rows:
        assert row["mean_at_32"] == pytest.approx(0.5)
        assert row["std"]["mean_at_32"] == pytest.approx(0.2 / math.sqrt(2))
        assert (row["accepted_share"], row["pass_at_32"], row["distinct_correct"]) == (1.0, 0.75, 3.5)
        assert row["reentry_steps"] is None  # never, or not asked for
    constant, step = (next(row for row in rows if row["band"] == band) for band in ("constant", "step"))
    assert constant["rms_outside"] == pytest.approx(0.005, abs=1e-9)  # 0.01 below the edge, and on it
    # Steps 2 to 9 as before; 10 to 19 are 0.04 and 0.05 above the edge at 0.75.
    expected = [math.sqrt((8 * low**2 + 10 * high**2) / 18) for low, high in ((0.01, 0.04), (0.0, 0.05))]
    assert step["rms_outside"] == pytest.approx(sum(expected) / 2)


def test_a_cut_benchmark_still_gives_a_table_of_what_is_there(tmp_path):
    records = [make_record([0.85] * 20, "grpo", "none"), make_record([0.85] * 20, "entropy_change", "constant")]
    control_report.write_report(tmp_path, records, ("constant", "step"), 1.0, {}, {})
    rows = json.loads((tmp_path / "control.json").read_text())["rows"]
    assert [(row["band"], row["method"]) for row in rows] == [
        ("constant", "grpo"),
        ("constant", "entropy_change"),
        ("step", "grpo"),
    ]
