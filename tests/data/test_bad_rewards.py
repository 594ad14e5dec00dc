"""
Rewards that are no rewards: the run ends with the name of the function and the rollout, on all ranks; what TRL allows
trains exactly as in TRL. The ranks' part is in `distributed/test_bad_ranks.py`.
"""

import asyncio
import functools
import itertools
import math
import warnings

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from soak import profile

from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftRLOOTrainer
from entrocraft_trl.data.reward_guard import LARGEST_REWARD, MOST_UNSCORABLE_BATCHES, RewardGuard
from entrocraft_trl.data.rewards import reward_name


ROWS = 8
PROMPTS = [f"{row}+{row}=?" for row in range(ROWS)]
COMPLETIONS = [f"completion {row}" for row in range(ROWS)]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """Never trained: its `_calculate_rewards` is called with other reward functions each time."""
    asynchronous = constant([1.0] * ROWS, is_async=True)  # with one of these, TRL starts an event loop
    args = tiny.build_config(output_dir=str(tmp_path_factory.mktemp("run")))
    return tiny.build_trainer(args=args, reward_funcs=[tiny.share_of_digits, asynchronous])


def calculate(trainer, *functions):
    trainer.reward_funcs = list(functions)
    trainer.reward_func_names = [function.__name__ for function in functions]
    trainer.reward_processing_classes = [None] * len(functions)
    inputs = [{"prompt": prompt, "answer": str(row)} for row, prompt in enumerate(PROMPTS)]
    ids = [[row + 2] for row in range(ROWS)]
    return trainer._calculate_rewards(inputs, PROMPTS, COMPLETIONS, ids)


def constant(output, name="my_reward", is_async=False):
    def reward(completions, **kwargs):
        return output

    async def reward_async(completions, **kwargs):
        await asyncio.sleep(0)
        return output

    function = reward_async if is_async else reward
    function.__name__ = name
    return function


def with_bad(value, row):
    rewards = [0.5] * ROWS
    rewards[row] = value
    return rewards


# ---------------------------------------------------------------------------------------------- what TRL does not take

TOO_LARGE = [math.inf, -math.inf, 1e39, -1e20, torch.tensor(math.inf), np.float32(-math.inf)]  # 1e39: inf in float32
NO_NUMBERS = ["0.5", "", [1.0], [], (1.0, 2.0), {}, {"reward": 1.0}, 1j, b"1", 10**400, int, torch.ones(2)]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("value", TOO_LARGE + NO_NUMBERS, ids=repr)
def test_a_bad_reward_is_named_with_its_function_and_rollout(trainer, value, is_async):
    row = 5
    good = constant([1.0] * ROWS, "good_reward")
    with pytest.raises(ValueError) as error:
        calculate(trainer, good, constant(with_bad(value, row), is_async=is_async))
    message = str(error.value)
    assert message.startswith("The reward function 'my_reward' returned ")
    assert f"for rollout {row} of the batch (prompt '5+5=?', completion 'completion 5')" in message
    assert repr(value)[:80] in message
    limits = "must be finite and at most 1e+18" if any(value is bad for bad in TOO_LARGE) else "not a number"
    assert limits in message
    assert "good_reward" not in message


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("output", "said"),
    [
        (None, "returned None in place of a list"),
        (3.0, "returned 3.0 in place of a list"),
        ("11111111", "returned '11111111' in place of a list"),  # eight characters, one for each rollout
        (dict.fromkeys(range(ROWS), 1.0), "in place of a list"),  # TRL would train on the keys
        (set(range(ROWS)), "in place of a list"),  # of no order
        ([], "returned 0 rewards for 8 completions"),
        ([1.0] * (ROWS - 1), "returned 7 rewards for 8 completions"),
        ([1.0] * (ROWS + 1), "returned 9 rewards for 8 completions"),
        (torch.tensor(1.0), "iteration over a 0-d tensor"),
    ],
)
def test_a_bad_list_is_named_with_its_function_and_rollouts(trainer, output, said, is_async):
    with pytest.raises(ValueError) as error:
        calculate(trainer, constant(output, is_async=is_async))
    assert "The reward function 'my_reward'" in str(error.value)
    assert said in str(error.value)
    assert "(rollouts 0 to 7 of the batch)" in str(error.value)


GOOD_VALUES = st.one_of(
    st.none(),
    st.floats(-100, 100),
    st.integers(-5, 5),
    st.booleans(),
    st.just(math.nan),
    st.floats(-100, 100, width=32).map(np.float32),
    st.floats(-100, 100, width=32).map(torch.tensor),
)
BAD_VALUES = st.sampled_from([math.inf, -math.inf, 1e300, "1", [0.5], {}, 1j])


@profile(50)
@given(
    columns=st.lists(st.lists(GOOD_VALUES, min_size=ROWS, max_size=ROWS), min_size=1, max_size=3),
    bad=st.one_of(st.none(), st.tuples(st.integers(0, 2), st.integers(0, ROWS - 1), BAD_VALUES)),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rewards_arrive_as_they_are_or_are_refused(trainer, columns, bad):
    expected = torch.tensor([[math.nan if v is None else float(v) for v in column] for column in columns]).T
    names = [f"reward_{index}" for index in range(len(columns))]
    if bad is not None:
        index, row, value = bad[0] % len(columns), bad[1], bad[2]
        columns[index][row] = value
    functions = [constant(column, name) for column, name in zip(columns, names, strict=True)]
    if bad is None:
        torch.testing.assert_close(calculate(trainer, *functions), expected, rtol=0, atol=0, equal_nan=True)
        return
    with pytest.raises(ValueError) as error:
        calculate(trainer, *functions)
    assert f"The reward function 'reward_{index}' returned {value!r}" in str(error.value)
    assert f"for rollout {row} of the batch" in str(error.value)
    assert trainer.reward_funcs == functions  # the guard has left


# ---------------------------------------------------------------------------------------------------------- exceptions


def failing_at_5(completions, answer, **kwargs):
    return [1 / (5 - int(text)) for text in answer]


def test_an_exception_names_the_rollouts_and_stays_the_cause(trainer):
    with pytest.raises(ValueError) as error:
        calculate(trainer, failing_at_5)
    assert str(error.value) == (
        "The reward function 'failing_at_5' raised ZeroDivisionError: division by zero (rollouts 0 to 7 of the batch)"
    )
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert error.value.__cause__.__traceback__.tb_next is not None  # shows the line in the user's function


def test_an_exceptions_text_gives_a_terminal_no_orders(trainer):
    def judge(completions, **kwargs):
        raise ValueError(f"cannot score {completions[0]}\x1b[2J")

    with pytest.raises(ValueError, match=r"raised ValueError: cannot score completion 0\\x1b\[2J \(rollouts"):
        calculate(trainer, judge)


def test_a_function_that_failed_is_not_called_again(trainer):
    """It may have side effects, and a judge may be paid by the call."""
    called_with = []

    def judge(completions, **kwargs):
        called_with.append(len(completions))
        raise KeyError("no more credit")

    with pytest.raises(
        ValueError, match=r"'judge' raised KeyError: 'no more credit' \(rollouts 0 to 7 of the batch\)"
    ):
        calculate(trainer, judge)
    assert called_with == [ROWS]


def test_an_exception_in_an_async_function_stays_the_cause(trainer):
    async def judge(completions, **kwargs):
        raise OSError("the judge is away")

    with pytest.raises(ValueError, match=r"'judge' raised OSError: the judge is away \(rollouts 0 to 7") as error:
        calculate(trainer, judge)
    assert isinstance(error.value.__cause__, OSError)


def test_several_failures_are_all_named(trainer):
    with pytest.raises(ValueError) as error:
        calculate(trainer, failing_at_5, constant(with_bad("x", 2)), constant([1.0] * ROWS, "good_reward"))
    first, second = str(error.value).split("; ")
    assert "'failing_at_5' raised ZeroDivisionError" in first and "rollouts 0 to 7" in first
    assert "'my_reward' returned 'x'" in second and "rollout 2" in second


def test_leaving_the_program_is_not_held_up(trainer):
    def stop(completions, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calculate(trainer, stop)
    assert trainer.reward_funcs == [stop]


def test_a_reward_model_is_checked_too():
    rewards = torch.zeros(4, 2)
    rewards[3, 1] = -math.inf
    guard = RewardGuard()
    model = torch.nn.Linear(1, 1)
    assert guard.wrap([model], ["model"]) == [model]
    with pytest.raises(ValueError, match="'judge' returned -inf.* for rollout 3 of the batch"):
        guard.refuse(rewards, ["digits", "judge"], 0, PROMPTS[:4], COMPLETIONS[:4])
    rewards[3, 1] = -LARGEST_REWARD
    guard.refuse(rewards, ["digits", "judge"], 0, PROMPTS[:4], COMPLETIONS[:4])
    rewards[3, 1] = math.nan  # not applicable
    guard.refuse(rewards, ["digits", "judge"], 0, PROMPTS[:4], COMPLETIONS[:4])


# ------------------------------------------------------------------------------------------------- what TRL does take


def scaled(completions, scale, **kwargs):
    return [scale * len(set(text)) for text in completions]


class Judge:
    """A callable object, which has no name but its class's."""

    def __call__(self, completions, **kwargs):
        return scaled(completions, 0.5)


class AsyncJudge:
    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        return scaled(completions, 0.5)


async def scaled_later(completions, scale=0.5, **kwargs):
    await asyncio.sleep(0)
    return scaled(completions, scale)


def by_step(completions, trainer_state, **kwargs):
    return scaled(completions, 0.5 + trainer_state.global_step)


def logging_more(completions, log_extra, log_metric, **kwargs):
    rewards = scaled(completions, 0.5)
    log_extra("letters", [len(set(text)) for text in completions])
    log_metric("first", rewards[0])
    return rewards


FORMS = {
    "scaled": functools.partial(scaled, scale=0.5),
    "scaled_later": functools.partial(functools.partial(scaled_later), scale=0.25),
    "Judge": Judge(),
    "AsyncJudge": AsyncJudge(),
    "by_step": by_step,
    "logging_more": logging_more,
}


@pytest.mark.parametrize("name", FORMS)
def test_whatever_trl_takes_for_a_reward_trains_as_in_trl(name):
    (plain, _), (ours, _) = tiny.run_pair({"max_steps": 2}, reward_funcs=FORMS[name])
    tiny.assert_same_parameters(ours.model, plain.model)
    keys = [f"rewards/{name}/mean", f"rewards/{name}/std", *(["first"] if name == "logging_more" else [])]
    for key in keys:
        assert len(tiny.history(plain, key)) == 2, plain.state.log_history
        assert tiny.history(ours, key) == tiny.history(plain, key)
    assert tiny.history(plain, keys[1])[0] > 0
    assert reward_name(FORMS[name]) == ours.reward_func_names[0] == name


def test_nan_warns_once_for_each_function(trainer):
    trainer._reward_guard = RewardGuard()
    with pytest.warns(
        UserWarning, match=r"'my_reward' returned NaN \(first for rollout 2 of this process\)"
    ) as record:
        calculate(trainer, constant(with_bad(math.nan, 2)), constant([1.0] * ROWS, "good_reward"))
    assert sum("returned NaN" in str(warning.message) for warning in record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calculate(trainer, constant(with_bad(math.nan, 2)))
        calculate(trainer, constant(with_bad(None, 2), "not_applicable"))


@profile(6)
@given(
    columns=st.lists(st.lists(GOOD_VALUES, min_size=ROWS, max_size=ROWS), min_size=2, max_size=2),
    aggregation=st.sampled_from(["sum_then_normalize", "normalize_then_sum"]),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_on_odd_but_allowed_rewards_is_trls_bit_for_bit(columns, aggregation):
    rollouts = tiny.random_rollouts(ROWS)
    settings = {"multi_objective_aggregation": aggregation, "learning_rate": 0.01}
    (plain, _), (ours, _) = tiny.run_pair(
        settings,
        reward_funcs=[tiny.table_reward(rollouts, columns[0]), tiny.table_reward(rollouts, columns[1])],
        rollout_func=tiny.rollout_function(rollouts),
    )
    tiny.assert_same_parameters(ours.model, plain.model)
    for key in ("reward", "reward_std", "rewards/reward/mean", "frac_reward_zero_std", "grad_norm"):
        logged = [np.array(tiny.history(trainer, key), dtype=float) for trainer in (ours, plain)]  # None becomes NaN
        assert np.array_equal(*logged, equal_nan=True), key


# -------------------------------------------------------------------------------------------------------- in training


@pytest.mark.parametrize("trainer_class", [None, EntrocraftRLOOTrainer], ids=["grpo", "rloo"])
@pytest.mark.parametrize("value", [math.inf, "x"], ids=repr)
def test_a_bad_reward_ends_the_run_before_anything_changes(trainer_class, value):
    def from_the_second_step_on(completions, trainer_state, **kwargs):
        rewards = [float(row) for row in range(len(completions))]
        return rewards if trainer_state.global_step == 0 else [*rewards[:-1], value]

    arguments = {"reward_funcs": from_the_second_step_on}
    if trainer_class is not None:
        arguments |= {"trainer_class": trainer_class}
    args_class = trainer_class._config_class if trainer_class else EntrocraftGRPOConfig
    reference = tiny.build_trainer(**arguments, args=tiny.build_config(args_class, max_steps=1, beta=0.0))
    reference.train()
    trainer = tiny.build_trainer(**arguments, args=tiny.build_config(args_class, max_steps=3, beta=0.0))
    with pytest.raises(ValueError, match="'from_the_second_step_on' returned .* for rollout 7 of the batch"):
        trainer.train()
    assert trainer.state.global_step == 1
    tiny.assert_same_parameters(trainer.model, reference.model)
    assert trainer.control_memory.last_entropy == reference.control_memory.last_entropy


def silent_in(batches):
    """A reward that scores nothing in the given training batches, counted from 1; each None or NaN in turn."""
    served = itertools.count(1)

    def judge(completions, **kwargs):
        nothing = itertools.cycle([None, math.nan])
        silent = next(served) in batches
        return [next(nothing) if silent else float(row) for row in range(len(completions))]

    return judge


def unapplied(completions, **kwargs):
    return [None] * len(completions)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_that_nothing_scores_ends():
    """Plain TRL trains on with gradients of zero, and ends as if all were well."""
    trainer = tiny.build_trainer(
        reward_funcs=[silent_in(range(3, 99)), unapplied], args=tiny.build_config(max_steps=20, **tiny.WIDE_OPEN)
    )
    with pytest.raises(ValueError, match="In 10 generation batches in a row .*'judge' and 'unapplied' returned None"):
        trainer.train()
    assert trainer.state.global_step == 2 + MOST_UNSCORABLE_BATCHES - 1
    trainer.reward_funcs[0] = silent_in(range(1, 2))  # mended: the first batch after it is not the eleventh
    trainer.train()
    assert trainer.state.global_step == 20


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_judge_that_is_away_for_a_while_does_not_end_the_run():
    away = [*range(1, MOST_UNSCORABLE_BATCHES), *range(MOST_UNSCORABLE_BATCHES + 1, 2 * MOST_UNSCORABLE_BATCHES)]
    trainer = tiny.build_trainer(
        reward_funcs=silent_in(away), args=tiny.build_config(max_steps=away[-1], **tiny.WIDE_OPEN)
    )
    trainer.train()
    assert tiny.history(trainer, "reward")[MOST_UNSCORABLE_BATCHES - 1] == 3.5  # of 0 to 7, in the batch between


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resumed_run_counts_anew(tmp_path):
    """Who resumes has mended the judge, or is told again; a first batch without reward is no reason to stop."""
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 8, **tiny.WIDE_OPEN}
    before = tiny.build_trainer(reward_funcs=unapplied, args=tiny.build_config(max_steps=8, **settings))
    before.train()
    after = tiny.build_trainer(reward_funcs=unapplied, args=tiny.build_config(max_steps=30, **settings))
    with pytest.raises(ValueError, match="'unapplied' returned None"):
        after.train(resume_from_checkpoint=True)
    assert after.state.global_step == 8 + MOST_UNSCORABLE_BATCHES - 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_batches_of_an_evaluation_do_not_count():
    """Its rows may lack what the reward reads; training goes on."""

    def only_in_training(completions, answer, **kwargs):
        return [float(text) if text else None for text in answer]

    rows = tiny.build_dataset(MOST_UNSCORABLE_BATCHES + 1)
    trainer = tiny.build_trainer(
        reward_funcs=only_in_training,
        args=tiny.build_config(per_device_eval_batch_size=4, num_generations=4, **tiny.WIDE_OPEN),
        train_dataset=rows.add_column("answer", ["1"] * len(rows)),
        eval_dataset=rows.add_column("answer", [""] * len(rows)),
    )
    trainer.evaluate()
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_bad_reward_in_evaluation_is_refused(trainer):
    trainer = tiny.build_trainer(
        reward_funcs=constant(with_bad(math.inf, 3)),
        args=tiny.build_config(per_device_eval_batch_size=ROWS),
        eval_dataset=tiny.build_dataset(2),
    )
    with pytest.raises(ValueError, match="'my_reward' returned inf.*rollout 3"):
        trainer.evaluate()


@pytest.mark.parametrize("weights", [[math.nan, 1.0], [1.0, math.inf]])
def test_reward_weights_that_are_no_numbers_are_refused(weights):
    """TRL's sum over functions leaves NaN out, and a NaN weight would train on rewards of 0."""
    with pytest.raises(ValueError, match=r"reward_weights must be finite, got \[.*(nan|inf).*\]"):
        EntrocraftGRPOConfig("run", use_cpu=True, bf16=False, reward_weights=weights)
