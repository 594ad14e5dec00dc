"""`entrocraft law` on run folders and on records of a comparison."""

import json
import math

import matplotlib.image
import pytest

from entrocraft_trl.cli import main
from entrocraft_trl.metric_names import HIGH, LOW


A, B = 0.3, 0.9


def make_log(count=40, band=False):
    """An evaluation after each step, exactly on the law; the entropy is the same before and after it."""
    log = []
    for step in range(1, count + 1):
        entropy = 0.1 + 0.7 * math.exp(-(step // 2) / 6)
        edges = {LOW: 0.1, HIGH: 0.9} if band else {}
        log.append({"step": step, "reward": 0.1, "entropy": entropy, **edges})
        if step % 2 == 0 and step < count:
            log.append({"step": step, "eval_mean@8": B - A * math.exp(entropy)})
    return log


def write_run(folder, log):
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": log[-1]["step"], "log_history": log}))
    return str(folder)


def test_a_run_folder(tmp_path, capsys):
    assert main(["law", write_run(tmp_path / "plain", make_log())]) == 0
    printed = capsys.readouterr().out
    heading, _, line = printed.splitlines()[:3]
    assert [cell.strip() for cell in heading.split("|")][1:6] == ["run", "points", "a", "b", "ceiling b - a"]
    cells = [cell.strip() for cell in line.split("|")][1:-1]
    assert cells[:6] == ["plain", "19", "0.300", "0.900", "0.600", "0.000"] and cells[6] == "0.000"
    assert float(cells[7]) > 0.05 and float(cells[8]) > 0.05
    assert "plain: with its entropy used up, the fit gives an accuracy of 0.600." in printed
    assert "From the first 3 points the law predicted better than both others." in printed
    assert matplotlib.image.imread(tmp_path / "law.png").std() > 0
    numbers = json.loads((tmp_path / "law.json").read_text())["plain"]
    assert (numbers["a"], numbers["b"]) == pytest.approx((A, B)) and numbers["controlled_by"] is None


def test_a_controlled_entropy_is_said(tmp_path, capsys):
    runs = [write_run(tmp_path / "plain", make_log()), write_run(tmp_path / "band", make_log(band=True))]
    assert main(["law", *runs, "--output", "out/both.png"]) == 0
    printed = capsys.readouterr().out
    assert "band: its entropy was controlled (a band), so the law, which is stated" in printed
    assert "does not apply" not in printed.split("band: its")[0]
    assert json.loads((tmp_path / "out" / "both.json").read_text())["band"]["controlled_by"] == "a band"


def test_an_accuracy_that_rose_with_the_entropy(tmp_path, capsys):
    log = [{**r, "eval_mean@8": 1 - r["eval_mean@8"]} if "eval_mean@8" in r else r for r in make_log()]
    assert main(["law", write_run(tmp_path / "odd", log)]) == 0
    printed = capsys.readouterr().out
    assert (
        "odd: its accuracy did not fall with its entropy (a is not positive)" in printed and "used up" not in printed
    )


def test_records_of_a_comparison_by_file_and_by_folder(tmp_path, capsys):
    folder = tmp_path / "comparison"
    folder.mkdir()
    for name, controlled in (("grpo-0-0123456789ab", False), ("bonus-linear-0-0123456789ab", True)):
        (folder / f"{name}.json").write_text(json.dumps({"log": make_log(), "controlled": controlled}))
    start = folder / "start-0123456789ab.json"
    start.write_text(json.dumps({"settings": {}, "entropy": 0.8, "evaluation": {}}))
    write_run(folder / "grpo-0-0123456789ab", make_log(10))  # what a run leaves beside its record
    assert main(["law", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "bonus-linear-0: its entropy was controlled (the comparison's band)" in printed
    assert set(json.loads((tmp_path / "law.json").read_text())) == {"grpo-0", "bonus-linear-0"}
    assert main(["law", str(folder / "grpo-0-0123456789ab.json")]) == 0
    assert set(json.loads((tmp_path / "law.json").read_text())) == {"grpo-0"}
    assert main(["law", *map(str, sorted(folder.glob("*.json")))]) == 0  # the start is among them
    assert set(json.loads((tmp_path / "law.json").read_text())) == {"grpo-0", "bonus-linear-0"}
    assert main(["law", str(start)]) == 2
    assert f"no run in {start}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "no trainer_state.json in 'nowhere'"),
        (["run", "--share", "1.5"], "--share must lie between 0 and 1, got 1.5"),
        (["run", "--metric", "eval_reward"], "run: the log holds no eval_reward; evaluate during training"),
        (["empty"], "empty: the log holds no eval_mean@n"),
    ],
)
def test_mistakes_are_one_line(words, said, tmp_path, capsys):
    write_run(tmp_path / "run", make_log())
    write_run(tmp_path / "empty", [{"step": 1, "reward": 0.1, "entropy": 0.5}])
    assert main(["law", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "law.png").exists()
