"""Runs of a comparison: what each is known by, that none is repeated, and that a killed one goes on."""

import json
import shutil
import sys
from dataclasses import replace

import psutil
import pytest
import torch
import yaml
from whole_comparison import WHOLE as SHORT

from entrocraft_trl.compare import arms, comparison, jobs, workers
from entrocraft_trl.compare.jobs import Start, jobs_of, measured_start, run_job, tuning_jobs
from entrocraft_trl.compare.reading import laid_over, read_experiment
from entrocraft_trl.compare.start import StartingPoint, fingerprint
from entrocraft_trl.compare.version import statements


WHOLE = laid_over(SHORT, {"training": {"learning_rate": 1.0e-3}})
START = Start({"policy": "abc"}, 0.9, {})
CLOCK = {"step_seconds", "seconds", "log"}


@pytest.fixture(autouse=True)
def policies_of_the_session(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ENTROCRAFT_CACHE", str(tmp_path_factory.getbasetemp() / "policies"))


@pytest.fixture
def read(tmp_path):
    def read(**changes):
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(laid_over(WHOLE, changes), sort_keys=False))
        return read_experiment(file)

    return read


def names(found):
    return [(job.seed, job.arm.name, job.band) for job in found]


def test_seeds_come_first_and_an_unsteered_method_runs_once_on_each(read):
    experiment = read()
    chosen = {"bonus": {"entropy_coef_delta": 0.5}}
    found = jobs_of(experiment, START, chosen)
    one = [("grpo", None), ("bonus", "constant"), ("bonus", "linear"), ("rule", "constant"), ("rule", "linear")]
    assert names(found) == [(seed, *pair) for seed in (0, 1) for pair in one]
    assert all(job.more == ((("entropy_coef_delta", 0.5),) if job.arm.name == "bonus" else ()) for job in found)
    assert len({job.file_name for job in found}) == len(found)
    assert names(tuning_jobs(experiment, START)) == [(9, "bonus", "linear")] * 2


def test_a_band_that_is_negative_at_the_measured_entropy(read):
    experiment = read(bands={"deep": [[0, 1.0, -0.9]]})
    with pytest.raises(jobs.RunError, match="mine.yaml: bands.deep: entropy cannot be negative, .* entropy 0.9 nats"):
        jobs_of(experiment, START, {})


def test_without_bands_every_method_runs_once_on_each_seed(read):
    methods = {"bonus": {"follow": None}, "rule": {"entropy_low": [0.5, 0.4], "entropy_high": [0.9]}}
    experiment = read(bands=None, tuning=None, methods=methods)
    assert names(jobs_of(experiment, START, {}))[:3] == [(0, "grpo", None), (0, "bonus", None), (0, "rule", None)]
    config = experiment.config(experiment.arms["rule"], "folder", 0, None, {})
    assert config.entropy_low == [0.5, 0.4] and config.entropy_unit == "initial"


def test_a_run_is_known_by_what_it_depends_on_and_by_nothing_else(read, monkeypatch):
    def digests(start=START, **changes):
        return [jobs.digest_of(job.settings()) for job in jobs_of(read(**changes), start, {})]

    same = digests()
    assert len(set(same)) == len(same)
    assert digests(workers=3, checkpoint_steps=2, report={"skip": 0.5}) == same
    assert digests(methods={"grpo": None, "plain": {"method": "grpo"}})[-1] in same  # by another name
    for changes in (
        {"training": {"learning_rate": 2.0e-3}},
        {"training": {"max_steps": 5}},
        {"evaluation": {"temperature": 1.0}},
        {"evaluation": {"every": 2}},
        {"start": replace(START, identity={"policy": "abd"})},
    ):
        assert not set(same) & set(digests(**changes)), changes
    moved = digests(start=replace(START, entropy=0.8))  # another band, which plain GRPO does not see
    assert [new == old for new, old in zip(moved, same, strict=True)] == [True, False, False, False, False] * 2
    monkeypatch.setattr(
        jobs, "method_version", lambda method: "new" if method == "entrocraft" else method_version(method)
    )
    changed = digests()
    assert [new == old for new, old in zip(changed, same, strict=True)] == [True, True, True, False, False] * 2


method_version = arms.method_version


def test_the_version_of_a_method_counts_how_its_update_is_computed(monkeypatch):
    """Which rows are left out, and what the others weigh, is part of a training."""
    whole, found = arms.WINGS, set()
    for wing in (None, "microbatches", "normalisation"):
        monkeypatch.setattr(arms, "WINGS", whole - {wing})
        found.add(method_version.__wrapped__("entrocraft"))
    assert len(found) == 3


def test_the_version_of_a_method_is_that_of_its_code():
    versions = {name: method_version(name) for name in ("entrocraft", "grpo", "clip_cov", "kl_cov")}
    assert len(set(versions.values())) == 4
    code = '"""Of this."""\n\ndef f(x):\n    """Doc."""\n    return x + 1  # why\n'
    assert statements(code) == statements("def f(x):\n    return x+1")
    assert statements(code) != statements("def f(x):\n    return x + 2")


def test_a_finished_run_is_never_repeated(read, tmp_path, monkeypatch):
    experiment = read(seeds=[0])
    folder = tmp_path / "runs"
    start = measured_start(experiment, folder)
    assert 0 < start.entropy < 4 and start.evaluation["mean@4"] >= 0
    rule = jobs_of(experiment, start, {})[-1]
    seen = []
    record = run_job(rule, folder, seen.append)
    assert seen == [0, 1, 2, 3, 4]
    assert record["series"]["step"] == [0, 1, 2, 3] and len(record["step_seconds"]) == 4
    assert record["series"]["low"] == pytest.approx([knot - 0.05 for knot in centres(start.entropy)])
    assert record["rollouts"] == 16 and record["controlled"] and record["evaluation"]["pass@4"] >= 0
    assert json.loads((folder / f"{rule.file_name}.json").read_text()) == record
    assert (folder / rule.file_name / "trainer_state.json").is_file()  # for `entrocraft plot`

    def refuse(*args, **kwargs):
        raise AssertionError("trained or measured again")

    monkeypatch.setattr(jobs, "train_and_evaluate", refuse)
    monkeypatch.setattr(jobs, "evaluate", refuse)
    assert run_job(rule, folder) == record
    assert measured_start(experiment, folder) == start
    renamed = rule.arm._replace(name="ours")
    assert replace(rule, arm=renamed).record(folder) == {**record, "arm": "ours"}
    with pytest.raises(AssertionError, match="trained"):
        run_job(replace(rule, seed=1), folder)


def centres(initial):
    return [initial * (1 - 0.5 * step / 4) for step in range(4)]


@pytest.mark.parametrize("name", ["grpo", "bonus", "rule"])
def test_a_killed_run_goes_on_from_its_last_checkpoint(name, read, tmp_path):
    experiment = read(seeds=[0], evaluation={"every": 2}, checkpoint_steps=2)
    start = measured_start(experiment, tmp_path / "start")
    job = next(
        job for job in jobs_of(experiment, start, {}) if (job.arm.name, job.band) in ((name, "linear"), (name, None))
    )
    whole = run_job(job, tmp_path / "whole")

    def die(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, tmp_path / "killed", die)
    assert job.record(tmp_path / "killed") is None
    seen = []
    resumed = run_job(job, tmp_path / "killed", seen.append)
    assert seen == [2, 3, 4]
    assert {key: value for key, value in resumed.items() if key not in CLOCK} == {
        key: value for key, value in whole.items() if key not in CLOCK
    }
    assert len(resumed["step_seconds"]) == 4  # of both lives
    assert resumed["held_out"]["step"] == [0, 2, 4]
    assert not list((tmp_path / "killed").glob("*/checkpoint-*"))


def test_a_target_follows_the_band(read, tmp_path, monkeypatch):
    experiment = read(seeds=[0])
    job = jobs_of(experiment, START, {})[2]
    assert (job.arm.name, job.band) == ("bonus", "linear")
    targets, train = [], jobs.train_and_evaluate

    def look(trainer_class, args, task, *, callbacks, **options):
        def note(step):
            targets.append(args.entropy_target)

        return train(trainer_class, args, task, callbacks=[*callbacks, jobs.ReportsSteps(note)], **options)

    monkeypatch.setattr(jobs, "train_and_evaluate", look)
    run_job(job, tmp_path)
    assert targets == pytest.approx([0.9, *centres(0.9)])  # at the start, and after each step that step's


def test_a_failing_run_stops_no_other_and_is_told_after_the_report(read, tmp_path, monkeypatch, capsys):
    """One candidate of two loses by failing; then a run of the table fails, and its row is missing."""
    experiment = read(seeds=[0], bands={"constant": None})
    real = jobs.train_and_evaluate

    def some_fail(trainer_class, args, *rest, **options):
        if getattr(args, "entropy_coef_delta", 0) == 0.04 or type(args).__name__ == "EntrocraftGRPOConfig":
            raise FloatingPointError("the loss is NaN")
        return real(trainer_class, args, *rest, **options)

    def in_this_process(todo, folder, count):
        for made, (index, job) in enumerate(todo, 1):
            try:
                yield index, run_job(job, folder), 4 * made
            except FloatingPointError as error:
                yield index, error, 4 * made

    monkeypatch.setattr(jobs, "train_and_evaluate", some_fail)
    monkeypatch.setattr(workers, "_side_by_side", in_this_process)
    monkeypatch.setattr(comparison, "measure_start", measured_start)
    with pytest.raises(jobs.RunError) as error:
        comparison.compare([experiment], tmp_path, tmp_path / "report")
    nan = "FloatingPointError: the loss is NaN"
    assert str(error.value) == (
        "2 runs failed, and the table is without them: mine, bonus, band linear, seed 9, with entropy_coef_delta "
        f"0.04: {nan}; mine, rule, band linear, seed 0: {nan}"
    )
    content = json.loads((tmp_path / "report.json").read_text())
    assert [row["method"] for row in content["rows"]] == ["grpo", "bonus"]
    assert [(c["settings"], c["chosen"]) for c in content["tuning"]["mine"]["bonus"]] == [
        ({"entropy_coef_delta": 0.04}, False),
        ({}, True),
    ]
    printed = capsys.readouterr().out
    assert "[1/2] failed: bonus, band linear, seed 9, with entropy_coef_delta 0.04: FloatingPointError" in printed
    assert "[1/3] grpo, seed 0: " in printed and "about 0 minutes left" in printed


# ----------------------------------------------------------------------------------------------- a model of one's own


def starts_with_a_digit(completions, **kwargs):
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(text[:1].isdigit()) for text in texts]


@pytest.fixture
def own_task(reference_folder, tmp_path):
    rows = [{"question": f"1+{number}=?", "answer": str(1 + number)} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "model_name_or_path": str(reference_folder),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "eval_dataset_name": str(tmp_path / "rows.jsonl"),
        "eval_samples": 3,
        "prompt_column": "question",
        "answer_column": "answer",
        "reward_funcs": f"{__name__}:starts_with_a_digit",
    }


@pytest.mark.parametrize("adapter", [{}, {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]}])
def test_a_model_and_data_of_ones_own(own_task, adapter, tmp_path):
    (tmp_path / "own.yaml").write_text(
        yaml.safe_dump(
            {
                "task": {**own_task, **adapter},
                "training": {
                    **{"max_steps": 3, "per_device_train_batch_size": 8, "num_generations": 4},
                    **{"max_completion_length": 6, "learning_rate": 0.01, "gradient_checkpointing": False},
                },
                "seeds": [0],
                "evaluation": {"samples": 4},
                "band_width": 0.5,
                "bands": {"low": [[0, 0.0, 0.5]]},
                "methods": {"rule": {"method": "entrocraft", "rejection_rule": "entropy_change"}},
                "checkpoint_steps": 2,
            }
        )
    )
    experiment = read_experiment(tmp_path / "own.yaml")
    start = measured_start(experiment, tmp_path)
    (job,) = jobs_of(experiment, start, {})

    def die(step):
        if step == 3:
            raise KeyboardInterrupt

    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, tmp_path / "killed", die)
    torch.manual_seed(2)  # an adapter's first weights are the run's, not those of what ran before in this process
    whole, resumed = run_job(job, tmp_path / "whole"), run_job(job, tmp_path / "killed")
    assert resumed["series"] == whole["series"] and resumed["evaluation"] == whole["evaluation"]
    assert whole["series"]["entropy"][0] == pytest.approx(start.entropy, rel=0.2)
    assert len(set(whole["series"]["entropy"])) == 3 and min(whole["series"]["accepted"]) < 1.0
    assert set(whole["evaluation"]) >= {"mean@4", "distinct_correct", "self_similarity", "self_similarity_of"}
    assert job.settings()["start"]["policy"] == fingerprint(own_task["model_name_or_path"])


def test_weights_are_known_by_what_they_are_and_not_by_where_they_lie(reference_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(reference_folder, folder)
    assert fingerprint(folder) == fingerprint(reference_folder) != "copy"
    (folder / "config.json").write_text("{}")
    assert fingerprint(folder) != fingerprint(reference_folder)
    assert fingerprint("owner/name") == "owner/name"


def test_a_start_is_known_by_its_data(own_task, reference_folder):
    point = StartingPoint(own_task)
    before = point.identity(reference_folder)
    assert point.identity(reference_folder) == before and len(before["data"]) == 2
    with open(own_task["dataset_name"], "a") as stream:
        stream.write('\n{"question": "1+9=?", "answer": "10"}')
    assert point.identity(reference_folder) != before


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_a_worker_without_a_job_holds_no_memory_of_its_last(tmp_path, monkeypatch):
    """A model's weights behind one small block that stays: freed, but not at the end of the heap."""
    process, kept = psutil.Process(), []

    def run(job, folder, report):
        for parameter in policy:
            parameter.fill_(1.0)  # or no page of it is there
        kept.append(torch.ones(1))
        policy.clear()

    # Smaller than what glibc gets from the system and returns to it as one piece, whatever else is set.
    policy = [torch.empty(16 * 1024) for _ in range(4000)]
    monkeypatch.setattr(workers, "run_job", run)
    before = process.memory_info().rss
    workers._run_in_worker(0, None, tmp_path)
    weights = 4000 * 16 * 1024 * 4
    assert process.memory_info().rss - before < weights / 8
