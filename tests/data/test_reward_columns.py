"""
A column that a reward cannot do without is missed before a model loads, in Python as on the command line, and nothing
is refused that TRL would train on.
"""

import functools
import inspect

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import Qwen3ForSequenceClassification
from trl import GRPOTrainer

from entrocraft_trl import (
    EntrocraftGRPOTrainer,
    EntrocraftRLOOConfig,
    EntrocraftRLOOTrainer,
    EntropyControlMixin,
    Services,
)
from entrocraft_trl.data.rewards import check_reward_columns, load_reward


ABSENT_MODEL = "there/is-no-such-model"  # an attempt to load it would raise OSError
MISSED = "^reward 'by_gold' reads the column 'gold', which the data set does not have .columns: prompt.$"


def by_gold(completions, gold, **kwargs):
    return [float(text.count(wanted)) for text, wanted in zip(completions, gold, strict=True)]


def rows(**columns):
    return Dataset.from_dict({"prompt": ["1+2=?", "2+2=?"], **columns})


def test_a_missing_column_is_named_before_a_model_loads():
    for rewards in (by_gold, [tiny.share_of_digits, by_gold]):
        with pytest.raises(ValueError, match=MISSED):
            tiny.build_trainer(model=ABSENT_MODEL, reward_funcs=rewards, train_dataset=rows())


def test_a_missing_column_is_named_for_rloo_too():
    args = tiny.build_config(EntrocraftRLOOConfig)
    with pytest.raises(ValueError, match=MISSED):
        tiny.build_trainer(EntrocraftRLOOTrainer, ABSENT_MODEL, args=args, reward_funcs=by_gold, train_dataset=rows())


def test_columns_hidden_by_a_format_are_missing():
    """TRL's loader does not see them either."""
    hidden = rows(gold=["3", "4"]).with_format(None, columns=["prompt"])
    with pytest.raises(ValueError, match=MISSED):
        tiny.build_trainer(model=ABSENT_MODEL, reward_funcs=by_gold, train_dataset=hidden)


def test_the_answers_column_has_a_hint_for_both():
    accuracy = load_reward("accuracy_reward")
    with pytest.raises(ValueError) as error:
        tiny.build_trainer(model=ABSENT_MODEL, reward_funcs=accuracy, train_dataset=rows())
    assert str(error.value) == (
        "reward 'accuracy_reward' reads the column 'solution', which the data set does not have (columns: prompt); "
        "give the answers' column that name (on the command line: --answer_column)"
    )


# ------------------------------------------------------------------------------------- a constructor of the user's own


class NamesItsRows(GRPOTrainer):
    def __init__(self, data, **kwargs):
        super().__init__(train_dataset=data, **kwargs)


class BringsTheColumn(GRPOTrainer):
    def __init__(self, train_dataset, **kwargs):
        super().__init__(train_dataset=train_dataset.add_column("gold", ["3", "4"]), **kwargs)


def controlled(parent):
    class Controlled(EntropyControlMixin, Services, parent):
        _config_class = EntrocraftGRPOTrainer._config_class

    return Controlled


def given(**arguments):
    defaults = {"model": tiny.build_model(), "reward_funcs": by_gold, "processing_class": tiny.build_tokenizer()}
    return {**defaults, "args": tiny.build_config(), **arguments}


def test_a_constructor_is_waited_for():
    with pytest.raises(ValueError, match=MISSED):
        controlled(NamesItsRows)(rows(), **given())
    controlled(BringsTheColumn)(rows(), **given()).train()


def test_a_collator_that_a_constructor_sets_may_bring_the_column():
    class Collates(GRPOTrainer):
        def __init__(self, data, **kwargs):
            super().__init__(train_dataset=data, **kwargs)
            self.data_collator = lambda batch: [{**row, "gold": "3"} for row in batch]

    controlled(Collates)(rows(), **given()).train()


# ------------------------------------------------------------------------------------------- what TRL would train on


def trains(**arguments):
    """Builds and trains, and so does TRL: otherwise the case would prove nothing."""
    trainers = tiny.run_pair({"max_steps": 1}, **{"reward_funcs": by_gold, "train_dataset": rows(), **arguments})
    assert [trainer.state.global_step for trainer, _ in trainers] == [1, 1]


def test_a_transform_may_make_columns():
    made = rows()
    made.set_transform(lambda batch: {**batch, "gold": ["3"] * len(batch["prompt"])})
    trains(train_dataset=made)


def test_a_stream_may_have_any_columns():
    stream = rows(gold=["3", "4"]).to_iterable_dataset()
    trains(train_dataset=stream)
    tiny.build_trainer(
        reward_funcs=by_gold, train_dataset=rows().to_iterable_dataset()
    )  # its first row may take hours


def test_a_rollout_function_may_make_columns():
    def rollouts_and_answers(prompts, trainer):
        rollouts = tiny.rollout_function(tiny.random_rollouts(8))(prompts, trainer)
        return {**rollouts, "gold": ["3"] * len(prompts)}

    trains(rollout_func=rollouts_and_answers)


class Sums:
    def reset(self, **kwargs):
        return "1+1=?"


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
def test_environments_may_stand_in_for_columns():
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = "{{ messages }}"  # shows tool calls, which TRL insists on
    for given_rows in (None, Dataset.from_dict({"number": [1, 2]})):
        tiny.build_trainer(
            reward_funcs=by_gold, train_dataset=given_rows, environment_factory=Sums, processing_class=tokenizer
        )


def test_a_method_of_the_users_may_make_columns():
    class Adds(EntrocraftGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return super()._generate_and_score_completions([{**row, "gold": "3"} for row in inputs])

    class Inherits(Adds):
        pass

    for trainer_class in (Adds, Inherits):
        tiny.build_trainer(trainer_class, reward_funcs=by_gold, train_dataset=rows()).train()


def test_a_decorator_may_bring_what_the_reward_needs():
    """`functools.wraps` shows the parameters of the function within."""

    @functools.wraps(by_gold)
    def with_gold(completions, **kwargs):
        return by_gold(completions, gold=["3"] * len(completions))

    trains(reward_funcs=with_gold)


def test_rewards_that_show_nothing_are_left_to_trl():
    class Judge:
        def __call__(self, *args, **kwargs):
            return by_gold(kwargs["completions"], ["3"] * len(kwargs["completions"]))

    trains(reward_funcs=Judge())
    trains(reward_funcs=functools.partial(by_gold, gold=["3"] * 8))
    check_reward_columns([max, type, 5], ["prompt"])  # compiled code; what is no function at all, TRL says


def test_reward_models_read_no_columns(tmp_path):
    class Needy(torch.nn.Module):
        __signature__ = inspect.signature(by_gold)

    check_reward_columns([Needy(), "a/reward-model"], ["prompt"])
    policy = tiny.build_model().config
    policy.num_labels = 1
    model = Qwen3ForSequenceClassification(policy)
    model.config._name_or_path = "a/reward-model"
    trainer = tiny.build_trainer(
        reward_funcs=model, train_dataset=rows(), reward_processing_classes=tiny.build_tokenizer()
    )
    trainer.train()
    assert trainer.reward_func_names == ["reward-model"]
