"""The quickstart command in short form, and its configuration file."""

import json
from pathlib import Path

import matplotlib.image
import pytest
import yaml
from transformers import Qwen3ForCausalLM

from entrocraft_trl.cli import main, quickstart
from entrocraft_trl.metric_names import ENTROPY, HIGH, LOW
from entrocraft_trl.reports.log import entropies
from entrocraft_trl.tasks import task as tasks
from entrocraft_trl.tasks.warmup import WarmupSettings, starting_policy


ROOT = Path(__file__).parents[2]


def test_the_yaml_file_holds_the_settings_of_the_command():
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    shared = {**tasks.expression_arguments(settings["output_dir"]), **quickstart.BAND}
    differing = {"save_strategy", "report_to"}  # the YAML run saves checkpoints; the comparison needs none
    assert {key: settings[key] for key in shared if key not in differing} == {
        key: value for key, value in shared.items() if key not in differing
    }


@pytest.fixture
def hardly_trained(tmp_path, monkeypatch):
    """In the place of the starting policy, whose warm-up takes a minute."""
    short = WarmupSettings(steps=2, habit_steps=1)
    monkeypatch.setattr(tasks, "starting_policy", lambda progress: starting_policy(tmp_path, settings=short))


def read(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_quickstart_writes_table_figure_and_numbers(tmp_path, hardly_trained, monkeypatch, capsys):
    drawn, generate = [], Qwen3ForCausalLM.generate

    def generate_and_look(self, input_ids, generation_config, **inputs):
        drawn.append((len(input_ids), generation_config.temperature))
        return generate(self, input_ids=input_ids, generation_config=generation_config, **inputs)

    monkeypatch.setattr(Qwen3ForCausalLM, "generate", generate_and_look)
    out = tmp_path / "out"
    assert main(["quickstart", "--max_steps", "2", "--output_dir", str(out)]) == 0
    # 8 held-out targets x 32 samples x 4 in two batches, of the start and of three runs of two training batches each.
    evaluation, training = [(512, 0.6)] * 2, [(128, 1.0)] * 2
    assert drawn == [*evaluation, *(training + evaluation) * 3]
    printed, summary = capsys.readouterr().out, read(out)
    assert [row["policy"] for row in summary["rows"]] == ["starting policy", *quickstart.ARMS]
    for row in summary["rows"]:
        assert f"| {row['policy']} " in printed and f"{row['mean@32']:.3f}" in printed
    assert "at temperature 0.6" in printed and "seed 0." in printed and "±" not in printed
    assert "The table of three seeds is in benchmarks/results/quickstart.md" in printed
    assert (out / "quickstart.md").read_text() in printed
    logs = [
        json.loads((out / f"{name}-0.json").read_text())["log"]
        for name in ("grpo", *tuple(quickstart.ARMS.values())[1:])
    ]
    first = [entropies(log)[0] for log in logs]
    assert max(first) - min(first) < 1e-5  # same start, same seed, same rollouts
    assert summary["rows"][0]["final_entropy"] == first[0]
    assert all(len(log) == 2 for log in logs)
    assert matplotlib.image.imread(out / "quickstart.png").std() > 0


def evaluation_of(score: float) -> dict[str, float]:
    return {"mean@32": score, "pass@1": score, "pass@32": 2 * score, "distinct_correct": 10 * score, "entropy": 9.0}


@pytest.fixture
def trained(hardly_trained, monkeypatch):
    """Stands in for training: three readings of each run, 0.8, and an accuracy of a tenth per seed. The calls made."""
    calls = []

    def train(name, seed, max_steps, folder):
        calls.append((name, seed))
        if name == quickstart.START:
            return {"log": [], "evaluation": evaluation_of(0.05), "seconds": None}
        start = 0.8 + 0.1 * seed
        log = [{"reward": 0.5, "entropy": start}, {"reward": 0.5, "entropy": 0.3}]
        if name != "GRPO":
            log = [{**record, ENTROPY: start, LOW: 0.9 * start, HIGH: 1.05 * start} for record in log]
        return {"log": log, "evaluation": evaluation_of(0.1 + 0.1 * seed), "seconds": 10.0 + seed}

    monkeypatch.setattr(quickstart, "train", train)
    return calls


def test_three_seeds_give_mean_and_sample_standard_deviation(tmp_path, trained, capsys):
    assert main(["quickstart", "--seeds", "0", "1", "2", "--output_dir", str(tmp_path / "out")]) == 0
    printed, summary = capsys.readouterr().out, read(tmp_path / "out")
    start, grpo, *ours = summary["rows"]
    for row in (grpo, *ours):
        assert row["mean@32"] == pytest.approx(0.2) and row["std"]["mean@32"] == pytest.approx(0.1)  # of n - 1
        assert row["pass@32"] == pytest.approx(0.4) and row["std"]["pass@32"] == pytest.approx(0.2)
        assert row["distinct_correct"] == pytest.approx(2.0) and row["std"]["distinct_correct"] == pytest.approx(1.0)
        assert (row["seconds"], row["std"]["seconds"]) == (11.0, 1.0)
    assert grpo["final_entropy"] == pytest.approx((0.9 + 0.3) / 2)  # the last readings of a run, then over the seeds
    assert (grpo["in_band_share"], ours[0]["in_band_share"]) == (0.5, 1.0)
    assert (start["mean@32"], start["std"]["mean@32"]) == (pytest.approx(0.05), pytest.approx(0.0))
    assert start["final_entropy"] == pytest.approx(0.9) and start["std"]["final_entropy"] == pytest.approx(0.1)
    assert (start["seconds"], start["in_band_share"]) == (None, None)
    assert "| 0.200 ± 0.100 | 0.400 ± 0.200 | 2.0 ± 1.0 " in " ".join(printed.split())
    assert "mean ± sample standard deviation over seeds 0, 1, 2" in printed
    assert "One seed of a tiny model" not in printed
    assert [(run["policy"], run["seed"]) for run in summary["runs"]] == trained
    assert [run["pass_at_k"]["1"] for run in summary["runs"] if run["policy"] == "GRPO"] == pytest.approx(
        [0.1, 0.2, 0.3]
    )


def test_runs_are_kept_and_continued_after_a_kill(tmp_path, trained, monkeypatch, capsys):
    train, out = quickstart.train, str(tmp_path / "out")

    def killed_at_the_fourth(name, seed, max_steps, folder):
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(name, seed, max_steps, folder)

    monkeypatch.setattr(quickstart, "train", killed_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        main(["quickstart", "--output_dir", out])
    monkeypatch.setattr(quickstart, "train", train)
    capsys.readouterr()
    assert main(["quickstart", "--output_dir", out]) == 0
    policies = ["starting policy", *quickstart.ARMS]
    assert trained == [(name, 0) for name in policies]  # none twice
    assert capsys.readouterr().out.count("kept from an earlier call") == 3
    assert main(["quickstart", "--seeds", "1", "0", "--output_dir", out]) == 0
    assert trained == [(name, seed) for seed in (0, 1) for name in policies]
    assert main(["quickstart", "--max_steps", "7", "--output_dir", out]) == 0  # other settings: made anew
    assert main(["quickstart", "--max_steps", "7", "--overwrite", "--output_dir", out]) == 0
    assert trained[8:] == [(name, 0) for name in policies] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_steps", "0"], "--max_steps must be at least 1, got 0"),
        (["--max_steps", "many"], "argument --max_steps: invalid int value: 'many'"),
        (["--seeds", "0", "-1"], "--seeds must lie between 0 and 4294967295, got -1"),
        (["--seeds", "1", "1"], "--seeds must differ, got [1, 1]"),
        (["--seeds"], "argument --seeds: expected at least one argument"),
        (["--steps", "5"], "unrecognized arguments: --steps 5"),
        (["--output_dir", "file"], "File exists: 'file'"),
        (["--output_dir", "file/run"], "Not a directory: 'file/run'"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_trained(monkeypatch, capsys, options, message):
    monkeypatch.setattr(tasks, "starting_policy", lambda progress: pytest.fail("the warm-up began"))
    Path("file").touch()
    assert main(["quickstart", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("entrocraft: error: ") and message in line


def test_a_cache_that_cannot_be_written_ends_in_one_line(monkeypatch, capsys):
    Path("file").touch()
    monkeypatch.setenv("ENTROCRAFT_CACHE", "file/cache")
    assert main(["quickstart", "--output_dir", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("entrocraft: error: ") and "Not a directory: 'file/cache'" in line


def test_figures_of_a_hand_made_log():
    ours = [{ENTROPY: h, LOW: 0.4, HIGH: 0.6} for h in (0.5, 0.7)]
    arms = [
        {"log": log, "evaluation": evaluation_of(0.1), "seconds": 1.0}
        for log in ([{"entropy": 0.5}, {"entropy": 0.3}], ours)
    ]
    grpo = quickstart.figures(arms[0], arms)
    assert grpo["in_band_share"] == 0.5 and grpo["final_entropy"] == 0.4 and grpo["seconds"] == 1.0
    assert grpo["pass_at_k"] == {1: 0.1, 32: 0.2}
    start = quickstart.figures({"log": [], "evaluation": evaluation_of(0.05), "seconds": None}, arms)
    assert (start["final_entropy"], start["in_band_share"], start["mean@32"]) == (0.5, None, 0.05)


def test_the_report_says_when_a_rule_did_not_hold():
    rows = [
        {"policy": "starting policy", "in_band_share": None},
        {"policy": "GRPO", "in_band_share": 0.1},
        {"policy": "ours", "in_band_share": 0.5},
        {"policy": "theirs", "in_band_share": 0.9},
    ]
    (line,) = quickstart.verdicts(rows)
    assert line.startswith("ours ") and "50%" in line
