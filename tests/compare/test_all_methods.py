"""`make compare` in a form of seconds: every method, in both regimes, to table, JSON and figures."""

import json

import pytest

from entrocraft_trl.cli.recipe import comparisons
from entrocraft_trl.compare import comparison, workers
from entrocraft_trl.compare.comparison import compare
from entrocraft_trl.compare.reading import read_experiment
from entrocraft_trl.methods import METHODS


pytestmark = pytest.mark.filterwarnings("ignore:KL-Cov does nothing here")  # on policy, as the file says
SHORT = {
    "task": {"steps": 2, "habit_steps": 1, "batch_size": 8},
    "evaluation": {"samples": 4, "repeats": 1},
    # Of these, the first two steps are one generation off policy.
    "training": {"max_steps": 3, "per_device_train_batch_size": 8},
}


@pytest.fixture(scope="module")
def experiments():
    files = [comparisons()[f"compare/{name}"] for name in ("on_policy", "off_policy")]
    more = [{}, {"training": {**SHORT["training"], "steps_per_generation": 2}}]
    return [
        read_experiment(file, quick=True, **{**SHORT, **changes}) for file, changes in zip(files, more, strict=True)
    ]


def test_every_method_of_the_package_is_compared_and_tuned_as_often(experiments):
    for name in ("on_policy", "off_policy"):
        whole = read_experiment(comparisons()[f"compare/{name}"])
        assert {arm.method for arm in whole.arms.values()} >= set(METHODS) | {"adaptive_bonus"}
        assert {name: len(tried) for name, tried in whole.tuning.candidates.items()} == dict.fromkeys(whole.arms, 2)
        assert whole.seeds == (0, 1, 2) and whole.evaluation.temperature == 0.6
    on, off = (read_experiment(comparisons()[f"compare/{name}"]) for name in ("on_policy", "off_policy"))
    assert on.arms == off.arms and on.bands == off.bands
    assert [arm.name for arm in on.arms.values() if not arm.paper] == ["entropy_change", "influence"]  # ours
    # As many rollouts in both: steps times rollouts of a step.
    assert on.max_steps * 128 == off.max_steps * off.training["per_device_train_batch_size"]


def test_all_methods_get_a_row_in_both_regimes(experiments, tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROCRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(workers, "under_launcher", lambda: True)  # in this process
    report, saved = tmp_path / "results" / "compare", {}
    # Drawing seven figures of 22 panels would take longer than training; that they are files is seen elsewhere.
    monkeypatch.setattr(comparison, "save_figure", lambda figure, path: saved.update({path.name: figure}))
    text = compare(experiments, tmp_path / "runs", report, progress=False)
    content = json.loads(report.with_suffix(".json").read_text())
    assert [(row["regime"], row["method"]) for row in content["rows"]] == [
        (experiment.name, arm) for experiment in experiments for arm in experiment.arms
    ]
    for row in content["rows"]:
        assert (row["schedule"], row["seeds"]) == ("linear", [0])
        assert row["final_entropy"] > 0 and row["seconds"] > 0 and 0 <= row["mean_at_4"] <= 1
        shown = f"[{row['method']}](https://arxiv.org/abs/{row['paper']})" if row["paper"] else row["method"]
        assert f"| linear | {shown} | " in text
    assert set(content["starts"]) == {"on_policy", "off_policy"} and text == report.with_suffix(".md").read_text()
    names = [f"compare_{e.name}{figure}.png" for e in experiments for figure in ("", "_reward", "_pass_at_k")]
    assert list(saved) == [*names, "compare_summary.png"]
    assert [axis.get_title() for axis in saved[names[0]].axes if axis.get_visible()] == list(experiments[0].arms)


def test_a_report_of_what_is_done_so_far(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROCRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(workers, "under_launcher", lambda: True)
    methods = dict.fromkeys(read_experiment(comparisons()["compare/on_policy"]).arms)
    more = {**SHORT, "methods": {**methods, "grpo": {}, "clip_higher": {"method": "grpo", "epsilon_high": 0.28}}}
    tried = {"seed": 9, "band": "linear", "candidates": {"grpo": [{}, {"learning_rate": 0.1}], "clip_higher": [{}]}}
    experiment = read_experiment(comparisons()["compare/on_policy"], quick=True, **more, tuning=tried)
    folder, report = tmp_path / "runs", tmp_path / "report"
    with pytest.raises(ValueError, match="no run of on_policy is done in"):
        compare([experiment], folder, report, only_read=True)
    compare([experiment], folder, report, progress=False)
    (run,) = (folder / "on_policy").glob("clip_higher-0-*.json")
    run.unlink()
    text = compare([experiment], folder, report, only_read=True)
    assert "| linear | [grpo](" in text and "clip_higher |" not in text
    for file in (folder / "on_policy").glob("grpo-9-*.json"):
        file.unlink()
    text = compare([experiment], folder, report, only_read=True)
    assert "[grpo]" not in text  # its settings are not chosen yet
