"""Experiments from YAML: what is refused, with file and key, before anything loads; and the configs that come out."""

from pathlib import Path

import pytest
import yaml
from whole_comparison import WHOLE

from entrocraft_trl.baselines.base import BaselineConfig
from entrocraft_trl.cli import main
from entrocraft_trl.cli.recipe import comparisons
from entrocraft_trl.compare.arms import TRAINERS
from entrocraft_trl.compare.reading import laid_over, read_experiment
from entrocraft_trl.tasks import task as tasks


pytestmark = pytest.mark.filterwarnings("ignore:KL-Cov does nothing here")  # on policy, as one file has it


def write(folder: Path, changes: dict | None = None) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(laid_over(WHOLE, changes or {}), sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"methods": {"grop": {}}},
            "methods.grop: there is no method 'grop'; the names are: entrocraft, grpo, clip_cov",
        ),
        ({"methods": {"a": {"method": 3}}}, "methods.a: method: must be str, got 3"),
        ({"methods": {"grpo": {"paper": 2503.14476}}}, "methods.grpo: paper: must be str, got 2503.14476"),
        ({"methods": {"aent": {"aent_clmap": 0.1}}}, "'aent_clmap' is no setting of aent; did you mean 'aent_clamp'?"),
        (
            {"methods": {"grpo": {"rejection_rule": "influence"}}},
            "methods.grpo: 'rejection_rule' is no setting of grpo",
        ),
        ({"methods": {"aent": {"aent_clamp": 2.0}}}, "methods.aent: aent_clamp must be finite and in 0..1, got 2.0"),
        ({"methods": {"grpo": {"seed": 1}}}, "methods.grpo: 'seed' is the same for all methods"),
        ({"methods": {"grpo": {"max_steps": 9}}}, "methods.grpo: 'max_steps' is the same for all methods"),
        ({"methods": {"rule": {"entropy_low": [0.1]}}}, "methods.rule: entropy_low would be a second band"),
        ({"methods": {"rule": {"entropy_width": "auto"}}}, "methods.rule: entropy_width would be a second band"),
        (
            {"methods": {"bonus": {"follow": {"entropy_target": "middle"}}}},
            "is one of low, centre, high, got 'middle'",
        ),
        ({"methods": {"grpo": None, "bonus": None, "rule": None}, "tuning": None}, "methods: names no method"),
        ({"training": {"max_steps": None}}, "training.max_steps: must be a whole number of at least 1, got None"),
        ({"training": {"learning_rat": 1.0}}, "training.learning_rat: is no field of TRL's GRPOConfig"),
        ({"training": {"save_steps": 1}}, "training.save_steps: is set by the runner"),
        ({"seeds": [1, 1]}, "seeds: must differ and lie between 0 and 2**32 - 1, got [1, 1]"),
        ({"seeds": None}, "the key 'seeds' is missing"),
        ({"sedes": [0]}, "unknown keys: sedes"),
        ({"task": {"name": "sums"}}, "task: there is no task 'sums'; the names are expressions and sentences"),
        ({"task": {"habit": 1}}, "task: 'habit' is no setting of it"),
        ({"task": {"habit_share": 3}}, "task: `habit_share` must lie in [0, 1], got 3"),
        ({"bands": {"odd": [[0, 1], [2, 1]]}}, "bands.odd: the band needs points in order of progress within 0..1"),
        ({"bands": {"odd": [[0.5, 1], [0, 1]]}}, "bands.odd: the band needs points in order of progress"),
        ({"bands": {"odd": "0.5"}}, "bands.odd: the band must be a number or a list of points"),
        ({"bands": {"odd": [[0]]}}, "bands.odd: the band has the point [0], which is not [progress, multiple]"),
        ({"bands": {"odd": {"points": 1.0, "shape": "cosine"}}}, "bands.odd: the band has shape 'cosine'"),
        ({"bands": {"odd": {"centre": 1.0}}}, "bands.odd: the band has unknown keys: centre"),
        ({"bands": {"odd": [[0, 0.0, 0.01]]}}, "methods.bonus on the band odd: entropy cannot be negative"),
        ({"band_width": None}, "bands.constant: the band needs a width in nats"),
        ({"evaluation": {"temprature": 1}}, "evaluation.temprature: is no setting; did you mean 'temperature'?"),
        ({"evaluation": {"temperature": 0}}, "evaluation.temperature: must be positive, got 0"),
        ({"evaluation": {"samples": 0}}, "evaluation.samples: must be a whole number of at least 1, got 0"),
        ({"tuning": {"seed": 0}}, "tuning.seed: must be a seed that no result is made with, got 0"),
        ({"tuning": {"band": "cosine"}}, "tuning.band: must be one of the file's bands, constant, linear"),
        ({"tuning": {"by": "luck"}}, "tuning: has best 'largest' or 'smallest' and by one of mean_at_n"),
        (
            {"tuning": {"candidates": {"other": [{}]}}},
            "tuning.candidates.other: is none of the methods: grpo, bonus, rule",
        ),
        ({"tuning": {"candidates": {"bonus": [{"delta_coef": 1}]}}}, "'delta_coef' is no setting of adaptive_bonus"),
        (
            {"tuning": {"candidates": {"rule": [{"min_accepted_share": 2}]}}},
            "methods.rule on the band constant: min_acc",
        ),
        ({"tuning": {"candidates": None}}, "tuning.candidates: is missing"),
        ({"report": {"columns": ["mean_at_32"]}}, "there is no figure 'mean_at_32'; did you mean 'mean_at_n'?"),
        ({"report": {"figures": ["loss"]}}, "report.figures: must be a list of entropy, reward, pass_at_k"),
        ({"report": {"skip": 1.0}}, "report.skip: must lie between 0 and 1, got 1.0"),
        ({"workers": -1}, "workers: must be positive"),
        ({"methods": ["grpo"]}, "methods: must be dict, got ['grpo']"),
    ],
)
def test_what_is_wrong_is_one_line_with_file_and_key(changes, said, tmp_path, capsys):
    file = write(tmp_path, changes)
    assert main(["compare", "--config", str(file), "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"entrocraft: error: {file}: ") and said in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({}, "it needs a name (expressions, sentences) or a model_name_or_path"),
        ({"model_name_or_path": "a/b"}, "a task with a model needs a dataset_name"),
        ({"model_name_or_path": "a/b", "dataset_name": "c"}, "a comparison takes one reward function"),
        ({"dataset_name": "c", "reward_funcs": "accuracy_reward"}, "it needs a name"),
    ],
)
def test_tasks_with_a_model_of_ones_own(task, said, tmp_path):
    file = write(tmp_path, {"task": None})
    file.write_text(file.read_text() + yaml.safe_dump({"task": task}))
    with pytest.raises(ValueError, match="mine.yaml: task: ") as error:
        read_experiment(file)
    assert said in str(error.value)


def test_a_file_that_is_no_yaml_or_not_there(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("a: [")
    assert main(["compare", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "a.yaml is not valid YAML: " in capsys.readouterr().err
    assert main(["compare", "--config", str(tmp_path / "b.yaml")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["compare", "--config", "controll"]) == 2
    assert "did you mean 'compare/control'?" in capsys.readouterr().err


def test_quick_lays_one_mapping_over_another_and_takes_keys_away(tmp_path):
    file = write(tmp_path)
    whole, quick = read_experiment(file), read_experiment(file, quick=True, workers=1)
    assert (whole.max_steps, whole.seeds, list(whole.bands)) == (4, (0, 1), ["constant", "linear"])
    assert (quick.max_steps, quick.seeds, list(quick.bands), quick.workers) == (2, (0,), ["linear"], 1)
    assert quick.training["per_device_train_batch_size"] == 16  # of the rest
    assert quick.arms == whole.arms


def test_every_method_trains_with_the_tasks_and_the_files_arguments_towards_the_same_band(tmp_path):
    experiment = read_experiment(write(tmp_path))
    knots = experiment.bands["linear"].knots(0.9)
    configs = {
        name: experiment.config(arm, "folder", 3, knots, {"learning_rate": 0.5} if name == "rule" else {})
        for name, arm in experiment.arms.items()
    }
    expected = BaselineConfig(**tasks.expression_arguments("folder", max_steps=4, seed=3))
    changed = {"per_device_train_batch_size": 16, "learning_rate": 0.5}
    for name, config in configs.items():
        assert type(config) is TRAINERS[experiment.arms[name].method][1]
        for key in tasks.expression_arguments(""):
            if key not in changed:
                assert getattr(config, key) == getattr(expected, key)
        assert config.per_device_train_batch_size == 16 and config.eval_strategy == "no"
    assert [config.learning_rate for config in configs.values()] == [2e-4, 2e-4, 0.5]
    rule, bonus = configs["rule"], configs["bonus"]
    assert (rule.rejection_rule, rule.entropy_unit) == ("entropy_change", "nats")
    assert tuple(rule.band_at(0.5)) == pytest.approx((0.75 * 0.9 - 0.05, 0.75 * 0.9 + 0.05))
    assert bonus.use_adaptive_entropy and bonus.entropy_target == pytest.approx(0.9)


def test_numbers_that_yaml_reads_as_text(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(write(tmp_path).read_text().replace("max_steps: 4", "max_steps: 4\n  learning_rate: 1e-3"))
    assert yaml.safe_load(file.read_text())["training"]["learning_rate"] == "1e-3"
    assert read_experiment(file).training["learning_rate"] == 0.001


def test_a_file_may_stand_on_another_one(tmp_path):
    base = write(tmp_path)
    file = tmp_path / "other.yaml"
    file.write_text("base: mine.yaml\ntraining: {max_steps: 9}\nmethods: {rule: null}\ntuning: null\n")
    other = read_experiment(file)
    assert (other.name, other.max_steps, list(other.arms)) == ("other", 9, ["grpo", "bonus"])
    assert other.bands == read_experiment(base).bands and other.tuning is None
    assert read_experiment(file, quick=True).seeds == (0,)  # the base's short form too
    third = tmp_path / "third.yaml"
    third.write_text(f"base: {file.name}\nseeds: [7]\n")
    top = read_experiment(third)
    assert (top.seeds, top.training, top.arms, top.bands) == ((7,), other.training, other.arms, other.bands)
    file.write_text("base: third.yaml")
    with pytest.raises(ValueError, match=f"third.yaml: base: {file.name} is laid over this file already"):
        read_experiment(file)
    file.write_text("base: nowhere.yaml")
    with pytest.raises(FileNotFoundError):
        read_experiment(file)


def test_evaluation_during_training_and_checkpoints(tmp_path):
    file = write(tmp_path, {"evaluation": {"every": 2}, "checkpoint_steps": 3})
    experiment = read_experiment(file)
    config = experiment.config(experiment.arms["grpo"], "folder", 0, None, {})
    assert (config.eval_strategy, config.eval_steps, config.eval_on_start) == ("steps", 2, True)
    assert (config.num_generations_eval, config.per_device_eval_batch_size) == (4, 256)
    assert (config.save_strategy, config.save_steps, config.save_total_limit) == ("steps", 3, 1)


@pytest.mark.parametrize("path", comparisons().values(), ids=lambda path: path.stem)
@pytest.mark.parametrize("quick", [False, True])
def test_every_file_that_comes_with_the_package_builds(path, quick):
    experiment = read_experiment(path, quick=quick)
    assert experiment.arms and experiment.max_steps >= 1
    assert path.read_text().startswith("# ")  # what `entrocraft recipe` lists


def test_a_dry_run_says_what_would_run(tmp_path, capsys):
    assert main(["compare", "--config", str(write(tmp_path)), "--dry_run"]) == 0
    first, *arms = capsys.readouterr().out.splitlines()
    # GRPO once, the others on two bands; two seeds each.
    assert first == "mine: 3 methods, 2 bands, seeds 0, 1: 10 runs and 2 of tuning, of 4 optimizer steps each"
    assert [arm.strip() for arm in arms] == ["grpo", "bonus", "rule"]
