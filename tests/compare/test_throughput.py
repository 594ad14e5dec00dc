"""The table of `benchmarks.throughput`: ratios within a turn, medians over turns."""

import pytest

from benchmarks import throughput, throughput_arm
from benchmarks.throughput_arm import ARMS, CASES, Case, completion_settings


def turn(plain, two_steps, ours):
    """Each arm took `ours` times what the plain one that it is compared with took."""
    seconds = {"plain GRPO": plain, "plain GRPO, two steps a generation": two_steps}
    return {
        arm: {
            "step": seconds[against] * (1 if arm == against else ours),
            "update": seconds[against] / 2,
            "memory": 100.0 * (1 if arm == against else 1.5),
            "tokens": 7,
            "device": "CPU",
        }
        for arm, (_, against, _) in ARMS.items()
    }


def test_each_arm_is_compared_with_its_own_plain_arm_of_the_same_turn(tmp_path, monkeypatch):
    turns = [turn(1.0, 8.0, 1.1), turn(10.0, 80.0, 1.3), turn(3.0, 2.0, 1.0)]  # a machine that slows down tenfold
    rows = throughput.rows_of("a case", turns)
    assert [row["case"] for row in rows] == [f"a case: {arm}" for arm in ARMS if not arm.startswith("plain")]
    for row in rows:
        assert abs(row["step_ratio"] - 1.1) < 1e-9
        low, high = row["step_ratio_range"]
        assert abs(low - 1.0) < 1e-9 and abs(high - 1.3) < 1e-9
        assert row["update_ratio"] == 1.0 and abs(row["memory_ratio"] - 1.5) < 1e-9
        assert row["same_rollouts"] and row["repeats"] == 3 and row["ideal"] == 1.0
    monkeypatch.setattr(throughput, "RESULTS", tmp_path)
    throughput.write_report(rows)
    assert {file.name for file in tmp_path.iterdir()} == {"throughput.json", "throughput.md", "throughput.png"}
    assert (
        "| a case: recorded, sign, in band | CPU | 1.100 (1.000 to 1.300) | 1.000 | 1.500 |"
        in (tmp_path / "throughput.md").read_text()
    )


def test_arms_that_generated_other_tokens_are_marked():
    turns = [turn(1.0, 1.0, 1.0)]
    turns[0]["recorded, sign, in band"]["tokens"] = 8
    rows = {row["case"]: row["same_rollouts"] for row in throughput.rows_of("a", turns)}
    assert not rows.pop("a: recorded, sign, in band") and all(rows.values())


def test_completions_end_between_the_two_lengths():
    """Half of the longest on average, if tokens are equally likely; padding, token 0, ends none."""
    for case in CASES.values():
        settings, ends = completion_settings(case, 16_384)
        assert settings["max_completion_length"] == case.lengths[1]
        assert settings["generation_kwargs"]["min_new_tokens"] == case.lengths[0]
        assert 0 not in ends and abs(16_384 / len(ends) - case.lengths[1] / 2) < 1


@pytest.mark.parametrize("arm", ["plain GRPO", "recorded, sign, in band", "TRL's pass, entropy change, rejecting"])
def test_an_arm_runs(arm):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    found = throughput_arm.run(Case(sizes, rollouts=8, lengths=(2, 6), steps=1), ARMS[arm])
    assert 0 < found["update"] < found["step"] and found["memory"] > 0 and found["tokens"] > 0
