"""The table of `benchmarks.throughput_rows`, and an arm of it."""

import pytest
import torch
from transformers import LogitsProcessorList

from benchmarks import throughput_rows, throughput_rows_arm
from benchmarks.throughput_rows_arm import ARMS, CASES, GROUP, GROUPS, PLAIN, RowsArm, reward_of


def turn(speed, **ideal):
    """An update that is a line over the ideal: 0.02 + 0.9 of it."""
    figures = {
        arm: {"step": 10.0 * speed, "update": speed * (0.02 + 0.9 * share), "memory": 5.0, "computed_tokens": share}
        for arm, share in ideal.items()
    }
    figures[PLAIN] = {"step": 20.0 * speed, "update": speed, "memory": 5.0, "computed_tokens": 1.0}
    shared = {"computed_rows": 0.5, "tokens": 7, "processes": 1, "device": "CPU"}
    return {arm: {**shared, **values} for arm, values in figures.items()}


def test_ratios_are_those_of_a_turn_and_the_line_is_found(tmp_path, monkeypatch):
    turns = [turn(speed, few=0.25, half=0.5, most=0.9) for speed in (1.0, 10.0, 3.0)]
    rows = throughput_rows.rows_of("a case", turns)
    assert [row["arm"] for row in rows] == ["few", "half", "most"]
    assert [row["update_ratio"] for row in rows] == pytest.approx([0.245, 0.47, 0.83])
    assert all(row["step_ratio"] == 0.5 and row["memory_ratio"] == 1.0 and row["same_rollouts"] for row in rows)
    fit = throughput_rows.line_through(rows)
    assert fit == pytest.approx({"slope": 0.9, "intercept": 0.02, "r_squared": 1.0})
    monkeypatch.setattr(throughput_rows, "RESULTS", tmp_path)
    throughput_rows.write_report(rows)
    text = (tmp_path / "throughput_rows.md").read_text()
    assert "update = 0.020 + 0.900 ideal, R² 1.000" in text
    assert "| half | 50% | 0.500 | 0.470 (0.470 to 0.470) | 0.500 | 1.000 |" in text


@pytest.mark.parametrize(("right", "dead"), [(1, 0), (2, 3), (3, 6)])
def test_rewards_are_those_of_the_arm(right, dead):
    rollouts = [[index] for index in range(GROUP * GROUPS)]
    rewards = reward_of(rollouts, RowsArm(None, right=right, dead=dead))
    groups = [[rewards[(group * GROUP + place,)] for place in range(GROUP)] for group in range(GROUPS)]
    assert sum(not any(group) for group in groups) == dead
    assert {sum(group) for group in groups} == ({0.0, float(right)} if dead else {float(right)})


def test_the_processor_says_which_tokens_come_out():
    class Model:
        def generate(self, logits_processor):
            assert isinstance(logits_processor, LogitsProcessorList)
            ids = torch.tensor([[3, 4], [0, 4]])
            for _ in range(3):
                ids = torch.cat([ids, logits_processor(ids, torch.zeros(2, 9)).argmax(1, keepdim=True)], dim=1)
            return ids[:, 2:].tolist()

    model = Model()
    throughput_rows_arm.force_tokens(model, iter([[[5, 6, 1], [7, 1]], [[1], [8, 8, 1]]]))
    assert model.generate() == [[5, 6, 1], [7, 1, 0]]
    assert model.generate() == [[1, 0, 0], [8, 8, 1]]


@pytest.mark.parametrize(
    ("arm", "rows"), [(PLAIN, 1.0), ("in band, 60% dead", 0.4), ("accepted 75%", 0.75), ("accepted 25%", 0.25)]
)
def test_an_arm_runs_and_computes_what_it_says(arm, rows):
    found = throughput_rows_arm.run(CASES["sanity"], ARMS[arm])
    assert found["computed_rows"] == pytest.approx(rows)
    assert found["computed_tokens"] <= rows
    assert 0 < found["update"] < found["step"] and found["tokens"] > 0
