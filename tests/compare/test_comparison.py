"""Comparing methods: one start, one task and one evaluation for every trainer, plain TRL included."""

import json
import math

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftGRPOTrainer
from entrocraft_trl.compare import run as comparison
from entrocraft_trl.reports.log import entropies
from entrocraft_trl.tasks import expressions
from entrocraft_trl.tasks import task as tasks
from entrocraft_trl.tasks.warmup import WarmupSettings, starting_policy


STEPS = 2
TRAINERS = {"plain": (GRPOTrainer, GRPOConfig), "ours": (EntrocraftGRPOTrainer, EntrocraftGRPOConfig)}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The embedded task from a policy that has hardly been warmed up, with two held-out prompts."""
    cache = tmp_path_factory.mktemp("cache")
    settings = WarmupSettings(steps=2, habit_steps=1, batch_size=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tasks,
            "starting_policy",
            lambda progress: starting_policy(cache, settings=settings, progress=progress),
        )
        whole = tasks.expression_task(seed=3, progress=False)
    assert whole.policy.parent == cache
    return whole


@pytest.fixture(scope="module")
def short_task(task):
    return task._replace(test=task.test.select(range(2)))


class NotesSteps(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


@pytest.fixture(scope="module")
def runs(short_task, tmp_path_factory):
    """Name -> (run, output folder, the callback that went along)."""
    finished = {}
    for name, (trainer_class, config_class) in TRAINERS.items():
        folder, callback = tmp_path_factory.mktemp(name), NotesSteps()
        arguments = tasks.expression_arguments(str(folder), max_steps=STEPS, seed=5)
        args = config_class(**{**arguments, "per_device_train_batch_size": 16, "disable_tqdm": True})
        run = comparison.train_and_evaluate(trainer_class, args, short_task, callbacks=[callback])
        finished[name] = (run, folder, callback)
    return finished


def test_the_embedded_task_holds_the_splits_and_its_seed_orders_the_training_prompts(task):
    assert task.test["target"] != task.train["target"][: len(task.test)]
    assert set(task.train["target"]) == set(expressions.TRAIN_TARGETS)
    assert sorted(task.test["target"]) == list(expressions.TEST_TARGETS)
    assert list(task.train["target"]) == list(expressions.make_dataset("train", 4096, 3)["target"])
    assert task.reward(completions=["9+8+9-2", "9+9"], target=[24, 18]) == [1.0, 0.0]
    assert task.canonical(" 9 + 9") == "9+9"
    assert task.generation_config.max_new_tokens == expressions.MAX_COMPLETION_LENGTH
    assert task.generation_config.temperature == 1.0


@pytest.mark.parametrize("config_class", [GRPOConfig, EntrocraftGRPOConfig])
def test_arguments_of_the_embedded_task_fit_every_config(config_class):
    args = config_class(**tasks.expression_arguments("folder", max_steps=7, seed=11))
    assert (args.output_dir, args.max_steps, args.seed) == ("folder", 7, 11)
    assert args.max_completion_length == expressions.MAX_COMPLETION_LENGTH
    assert (args.logging_steps, args.lr_scheduler_type) == (1, "constant")


@pytest.mark.parametrize("name", TRAINERS)
def test_the_log_has_one_record_per_step(runs, name):
    run, _, callback = runs[name]
    assert [record["step"] for record in run.log] == [1, 2] == callback.steps
    assert all(0.0 <= record["reward"] <= 1.0 for record in run.log)
    # TRL's own is left out where rows without an advantage are not computed.
    key = "entrocraft/entropy" if name == "ours" else "entropy"
    assert all(math.isfinite(record[key]) for record in run.log)
    assert all(("entrocraft/entropy" in record) == (name == "ours") for record in run.log)
    assert run.seconds > 0


@pytest.mark.parametrize("name", TRAINERS)
def test_the_evaluation_has_the_same_figures_for_every_trainer(runs, name):
    evaluation = runs[name][0].evaluation
    curve = {f"pass@{k}" for k in (1, 2, 4, 8, 16, 32)}
    assert set(evaluation) == {"mean@32", *curve, "distinct_correct", "entropy", "mean_tokens", "truncated"}
    assert 0.0 <= evaluation["mean@32"] <= evaluation["pass@32"] <= 1.0
    assert 0.0 < evaluation["entropy"] <= math.log(len(expressions.build_tokenizer()))


@pytest.mark.parametrize("name", TRAINERS)
def test_the_log_is_saved(runs, name):
    run, folder, _ = runs[name]
    saved = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [record for record in saved if "reward" in record] == run.log


def test_all_trainers_start_from_the_same_rollouts(runs):
    """Same policy, same seed: the first reading is taken on the same tokens, by TRL's pass or by ours."""
    (plain, _, _), (ours, _, _) = runs.values()
    first, ours_first = (entropies(run.log)[0] for run in (plain, ours))
    assert ours_first == pytest.approx(first, rel=1e-5)
    for key in ("reward", "completions/mean_length", "num_tokens"):
        assert plain.log[0][key] == ours.log[0][key]


def test_the_trained_policy_is_evaluated(short_task, monkeypatch):
    seen = {}

    def evaluate(model, tokenizer, task, **options):
        seen.update(model=model, options=options, task=task)
        return {"mean@32": 0.25}

    monkeypatch.setattr(comparison, "evaluate", evaluate)
    arguments = tasks.expression_arguments("run", max_steps=1, seed=6)
    args = EntrocraftGRPOConfig(**{**arguments, "per_device_train_batch_size": 8, "disable_tqdm": True})
    task = short_task._replace(reward=tiny.share_of_digits)  # right answers are too rare here to learn from in a step
    run = comparison.train_and_evaluate(EntrocraftGRPOTrainer, args, task)
    assert run.evaluation == {"mean@32": 0.25}
    assert seen["task"] is task and seen["options"]["seed"] == 6
    start = AutoModelForCausalLM.from_pretrained(short_task.policy)
    with pytest.raises(AssertionError, match="differs"):
        tiny.assert_same_parameters(start, seen["model"])


def test_evaluation_samples_each_prompt_in_every_repeat(short_task):
    model = AutoModelForCausalLM.from_pretrained(short_task.policy)
    tokenizer = AutoTokenizer.from_pretrained(short_task.policy)
    prompts = []

    def reward(completions, target, **kwargs):
        prompts.extend(target)
        return [1.0] * len(completions)

    state = torch.get_rng_state()
    found = comparison.evaluate(model, tokenizer, short_task._replace(reward=reward), samples=3, repeats=2)
    assert torch.equal(state, torch.get_rng_state())
    first, second = short_task.test["target"]
    assert prompts == [first] * 3 + [second] * 3 + [first] * 3 + [second] * 3
    assert (found["mean@3"], found["pass@3"]) == (1.0, 1.0)
    assert 1.0 <= found["distinct_correct"] <= 3.0


def test_the_tasks_temperature_reaches_the_sampler(short_task, monkeypatch):
    model, tokenizer = tasks.load_policy(short_task)
    seen, generate = [], model.generate

    def generate_and_look(generation_config, **inputs):
        seen.append(generation_config)
        return generate(generation_config=generation_config, **inputs)

    monkeypatch.setattr(model, "generate", generate_and_look)
    settings = GenerationConfig(do_sample=True, temperature=0.25, max_new_tokens=3)
    comparison.evaluate(model, tokenizer, short_task._replace(generation_config=settings), samples=2, repeats=1)
    (used,) = seen
    assert (used.do_sample, used.temperature, used.max_new_tokens) == (True, 0.25, 3)
    assert (used.top_p, used.top_k) == (1.0, 0)
