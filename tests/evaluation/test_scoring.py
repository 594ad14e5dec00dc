"""Reward functions outside training: called as TRL's trainers call them, in every form that TRL takes."""

import asyncio
import functools
import json
import sys
import threading
import types

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import accuracy_reward

from entrocraft_trl import evaluate_policy
from entrocraft_trl.cli import main
from entrocraft_trl.evaluation import sampling
from entrocraft_trl.evaluation.sampling import Sample
from entrocraft_trl.evaluation.scoring import check_reward, score_samples


ROWS = Dataset.from_dict({"prompt": ["1+1=", "2+2="], "solution": ["2", "4"]})
SAMPLES = [[Sample("2", [4], False), Sample("3", [5], False)], [Sample("4", [6], False), Sample("4", [6], False)]]
RIGHT = [1.0, 0.0, 1.0, 1.0]
SETTINGS = {"generation_config": GenerationConfig(max_new_tokens=2)}


def right(completions, solution, **kwargs):
    return [float(text == wanted) for text, wanted in zip(completions, solution, strict=True)]


async def right_later(completions, solution, **kwargs):
    await asyncio.sleep(0)
    return right(completions, solution)


class Right:
    def __call__(self, **kwargs):
        return right(**kwargs)


class RightLater:
    async def __call__(self, **kwargs):
        return await right_later(**kwargs)


def right_of(answers, completions, solution, **kwargs):
    assert answers == "all"
    return right(completions, solution)


async def right_of_later(answers, completions, solution, **kwargs):
    return right_of(answers, completions, solution)


def right_in_training(completions, solution, trainer_state, log_extra, log_metric, **kwargs):
    """Asks for all that a trainer passes; a share of the run's steps must be a number."""
    log_extra("answer", completions)
    log_metric("progress", trainer_state.global_step / trainer_state.max_steps)
    return right(completions, solution)


FORMS = {
    "function": right,
    "object": Right(),
    "partial": functools.partial(right_of, "all"),
    "trainer's arguments": right_in_training,
    "async function": right_later,
    "async object": RightLater(),
    "async partial": functools.partial(right_of_later, "all"),
}


@pytest.mark.parametrize("reward", FORMS.values(), ids=FORMS)
def test_every_form_of_a_reward_that_trl_takes(reward):
    check_reward(reward, ROWS.column_names)
    assert score_samples(reward, ROWS, SAMPLES) == RIGHT


@pytest.mark.parametrize("chat", [False, True])
def test_arguments_are_those_of_trls_trainer(chat):
    """One batch of TRL's own, and the same rollouts scored outside: all but the run's state and loggers is equal."""
    calls = []

    def recording(**kwargs):
        calls.append(kwargs)
        return [0.0] * len(kwargs["prompts"])

    prompts = ["1+2=?", "1+2=?ab"]
    if chat:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    rows = Dataset.from_dict({"prompt": prompts, "solution": ["3", "4"], "completion": ["no", "use"]})
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    rollouts = tiny.random_rollouts(8)
    trainer = tiny.build_trainer(
        GRPOTrainer,
        args=tiny.build_config(GRPOConfig),
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=recording,
    )
    tiny.force_rollouts(trainer, rollouts)
    trainer.model.train()
    trainer._generate_and_score_completions(tiny.generation_inputs(trainer))
    texts = tokenizer.batch_decode(rollouts, skip_special_tokens=True)
    samples = [Sample(text, ids, False) for text, ids in zip(texts, rollouts, strict=True)]
    score_samples(recording, rows, [samples[:4], samples[4:]])
    theirs, ours = calls
    assert theirs.keys() == ours.keys()
    for name in theirs.keys() - {"trainer_state", "log_extra", "log_metric"}:
        assert ours[name] == theirs[name], name
    assert type(ours["trainer_state"]) is type(theirs["trainer_state"])


def test_none_and_nan_are_no_reward():
    rewards = [None, float("nan"), torch.tensor(0.5), True]
    assert score_samples(lambda **_: rewards, ROWS, SAMPLES) == [None, None, 0.5, 1.0]


def test_wrong_number_of_rewards_names_the_function():
    def short(length, **kwargs):
        return [1.0] * length

    with pytest.raises(ValueError, match="the reward 'short' returned 1 rewards for 4 completions"):
        score_samples(functools.partial(short, 1), ROWS, SAMPLES)


def test_async_rewards_share_one_loop_and_leave_a_running_one_alone():
    """Connections of a judge belong to the loop that opened them, and a notebook's cells run inside a loop."""
    loops = []

    async def reward(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    async def cell():
        return score_samples(reward, ROWS, SAMPLES), asyncio.get_running_loop()

    rewards, own = asyncio.run(cell())
    assert rewards == score_samples(reward, ROWS, SAMPLES) == [1.0] * 4
    assert loops[0] is loops[1] is not own


def test_plain_rewards_run_in_the_calling_thread():
    """math-verify's time limits work in the main thread only."""
    threads = []
    score_samples(lambda **_: threads.append(threading.current_thread()) or [0.0] * 4, ROWS, SAMPLES)
    assert threads == [threading.current_thread()]


def without_more(completions, solution):
    return right(completions, solution)


def of_environments(environments, **kwargs):
    return [environment.reward for environment in environments]


UNCALLABLE = {
    "without_more": (without_more, "got an unexpected keyword argument 'prompts'"),
    "of_environments": (of_environments, "missing a required argument: 'environments'"),
}


@pytest.mark.parametrize(("reward", "message"), UNCALLABLE.values(), ids=UNCALLABLE)
def test_a_reward_that_cannot_be_called_is_refused_before_sampling(monkeypatch, reward, message):
    monkeypatch.setattr(sampling, "sample_prompts", lambda *args, **kwargs: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=f"the reward '{reward.__name__}' cannot be called .*: {message}"):
        evaluate_policy(None, tiny.build_tokenizer(), ROWS, reward, 2, **SETTINGS)


# ------------------------------------------------------------------------------------------ the two ways to evaluate


@pytest.fixture
def forced(monkeypatch):
    """Both ways to evaluate "sample" [`SAMPLES`], with an entropy of half a nat a token."""
    samples = [[sample._replace(entropy_sum=0.5) for sample in row] for row in SAMPLES]

    monkeypatch.setattr(sampling, "sample_prompts", lambda *args, **kwargs: samples)


@pytest.mark.parametrize("reward", FORMS.values(), ids=FORMS)
def test_evaluate_policy_takes_every_form(forced, reward):
    result = evaluate_policy(None, tiny.build_tokenizer(), ROWS, reward, 2, **SETTINGS)
    figures = {"mean@2": 0.75, "pass@1": 0.75, "pass@2": 1.0, "distinct_correct": 1.0, "entropy": 0.5}
    assert result == {**figures, "mean_tokens": 1.0, "truncated": 0.0}


def test_evaluate_policy_with_chat_prompts_and_trls_accuracy_reward(forced, monkeypatch):
    rows = ROWS.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    boxed = [[sample._replace(text=f"$\\boxed{{{sample.text}}}$", entropy_sum=0.5) for sample in r] for r in SAMPLES]
    monkeypatch.setattr(sampling, "sample_prompts", lambda *args, **kwargs: boxed)
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    result = evaluate_policy(None, tokenizer, rows, accuracy_reward, 2, **SETTINGS)
    assert (result["mean@2"], result["distinct_correct"]) == (0.75, 1.0)


def eval_command(reference_folder, tmp_path, monkeypatch, reward) -> list[str]:
    monkeypatch.setitem(sys.modules, "own_rewards", types.SimpleNamespace(reward=reward))
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"question": row["prompt"], "answer": row["solution"]}) + "\n" for row in ROWS))
    named = {
        "model": reference_folder,
        "dataset": data,
        "prompt_column": "question",
        "answer_column": "answer",
        "reward": "own_rewards:reward",
        "n": 2,
        "batch_size": 4,
        "output_dir": tmp_path / "out",
    }
    return ["eval", *(word for name, value in named.items() for word in (f"--{name}", str(value)))]


@pytest.mark.parametrize("reward", FORMS.values(), ids=FORMS)
def test_eval_takes_every_form(reference_folder, tmp_path, monkeypatch, forced, reward):
    assert main(eval_command(reference_folder, tmp_path, monkeypatch, reward)) == 0
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)["rewards"] for line in lines] == [RIGHT[:2], RIGHT[2:]]


@pytest.mark.parametrize(("reward", "message"), UNCALLABLE.values(), ids=UNCALLABLE)
def test_eval_refuses_in_one_line_before_it_loads_the_model(
    reference_folder, tmp_path, monkeypatch, capsys, reward, message
):
    import transformers

    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("model loaded")
    )
    assert main(eval_command(reference_folder, tmp_path, monkeypatch, reward)) == 2
    assert f"the reward {reward.__name__!r} cannot be called" in (line := capsys.readouterr().err) and message in line
