"""The quickstart command in short form, and its configuration file."""

import json
from pathlib import Path

import matplotlib.image
import pytest
import yaml

from entrocraft_trl.cli import main, quickstart
from entrocraft_trl.compare import run as comparison
from entrocraft_trl.tasks.warmup import WarmupSettings, starting_policy


ROOT = Path(__file__).parents[2]


def test_the_yaml_file_holds_the_settings_of_the_command():
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    shared = {**comparison.expression_arguments(settings["output_dir"]), **quickstart.BAND}
    differing = {"save_strategy", "report_to"}  # the YAML run saves checkpoints; the comparison needs none
    assert {key: settings[key] for key in shared if key not in differing} == {
        key: value for key, value in shared.items() if key not in differing
    }


def test_quickstart_writes_table_figure_and_numbers(tmp_path, monkeypatch, capsys):
    short = WarmupSettings(steps=2, habit_steps=1)  # the default takes a minute
    monkeypatch.setattr(comparison, "starting_policy", lambda progress: starting_policy(tmp_path, settings=short))
    assert main(["quickstart", "--max_steps", "2", "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["policy"] for row in summary["rows"]] == ["starting policy", *quickstart.ARMS]
    for row in summary["rows"]:
        assert f"| {row['policy']} " in printed and f"{row['mean@32']:.3f}" in printed
    first = {name: curve["entropy"][0] for name, curve in summary["curves"].items()}
    assert len(first) == 3 and max(first.values()) - min(first.values()) < 1e-5  # same start, same seed, same rollouts
    assert all(len(curve["reward"]) == 2 for curve in summary["curves"].values())
    assert matplotlib.image.imread(tmp_path / "out" / "quickstart.png").std() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_steps", "0"], "--max_steps must be at least 1, got 0"),
        (["--max_steps", "many"], "argument --max_steps: invalid int value: 'many'"),
        (["--seed", "-1"], "--seed must lie between 0 and 4294967295, got -1"),
        (["--steps", "5"], "unrecognized arguments: --steps 5"),
        (["--output_dir", "file"], "File exists: 'file'"),
        (["--output_dir", "file/run"], "Not a directory: 'file/run'"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_trained(monkeypatch, capsys, options, message):
    monkeypatch.setattr(comparison, "starting_policy", lambda progress: pytest.fail("the warm-up began"))
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


def test_share_in_band_and_final_entropy_of_a_hand_made_log():
    band = [
        {"entrocraft/entropy": h, "entrocraft/entropy_low": 0.4, "entrocraft/entropy_high": 0.6} for h in (0.5, 0.7)
    ]
    plain = [{"entropy": 0.5}, {"entropy": 0.3}]
    logs, seconds = {"GRPO": plain, "ours": band}, {"GRPO": 1.0, "ours": 2.0}
    evaluation = {"mean@32": 0.1, "pass@32": 0.5, "distinct_correct": 2.0, "entropy": 0.9}
    row = quickstart.row("GRPO", evaluation, logs, seconds)
    assert row["in_band_share"] == 0.5 and row["final_entropy"] == 0.4 and row["seconds"] == 1.0
    assert quickstart.row("starting policy", evaluation, logs, seconds)["final_entropy"] == 0.9


def test_the_report_says_when_a_rule_did_not_hold():
    rows = [
        {"policy": "starting policy", "in_band_share": None},
        {"policy": "GRPO", "in_band_share": 0.1},
        {"policy": "ours", "in_band_share": 0.5},
        {"policy": "theirs", "in_band_share": 0.9},
    ]
    (line,) = quickstart.verdicts(rows)
    assert line.startswith("ours ") and "50%" in line
