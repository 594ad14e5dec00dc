"""Records of finished runs: kept, made anew for other settings, and averaged over seeds."""

import json

import pytest

from entrocraft_trl.compare.records import kept_record, spread


def test_a_finished_run_is_kept_and_one_with_other_settings_is_made_anew(tmp_path):
    file, made = tmp_path / "new" / "grpo-0.json", []

    def make():
        made.append(1)
        return {"reward": 0.5 * len(made)}

    first = kept_record(file, {"seed": 0}, make)
    assert first == {"settings": {"seed": 0}, "reward": 0.5} == json.loads(file.read_text())
    assert kept_record(file, {"seed": 0}, make) == first
    assert kept_record(file, {"seed": 1}, make) == {"settings": {"seed": 1}, "reward": 1.0}
    assert len(made) == 2


def test_a_run_that_is_killed_leaves_no_record(tmp_path):
    def make():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_record(tmp_path / "a.json", {}, make)
    assert list(tmp_path.iterdir()) == []


def test_spread_is_mean_and_sample_standard_deviation():
    assert spread([1.0, 2.0, 3.0]) == {"mean": 2.0, "std": 1.0}  # of a sample: n - 1
    assert spread([0.25]) == {"mean": 0.25, "std": 0.0}
    assert spread([1.0, None]) == {"mean": None, "std": None}
    assert spread([0.0, 0]) == {"mean": 0.0, "std": 0.0}
