"""Records of finished runs: kept, made anew for other settings, and averaged over seeds."""

import json
import os

import pytest

from entrocraft_trl.compare.records import read_record, spread, write_record


def test_a_record_is_read_again_unless_it_was_made_with_other_settings(tmp_path):
    file = tmp_path / "new" / "grpo-0.json"
    assert read_record(file, {"seed": 0}) is None
    written = write_record(file, {"seed": 0}, {"reward": 0.5})
    assert written == {"settings": {"seed": 0}, "reward": 0.5} == json.loads(file.read_text())
    assert read_record(file, {"seed": 0}) == written
    assert read_record(file, {"seed": 1}) is None


def test_a_run_that_is_killed_while_writing_leaves_no_record(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_record(tmp_path / "a.json", {}, {})
    assert list(tmp_path.iterdir()) == []


def test_spread_is_mean_and_sample_standard_deviation():
    assert spread([1.0, 2.0, 3.0]) == {"mean": 2.0, "std": 1.0}  # of a sample: n - 1
    assert spread([0.25]) == {"mean": 0.25, "std": 0.0}
    assert spread([1.0, None]) == {"mean": None, "std": None}
    assert spread([0.0, 0]) == {"mean": 0.0, "std": 0.0}
