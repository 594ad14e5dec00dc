"""
Entropy control on a trainer of one's own, whatever its constructor looks like: the same training as on TRL's, and the
same refusals. What TRL's constructor gets is known before it loads a model; what another one makes of its arguments is
known when it is done.
"""

import pytest
import tiny
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from entrocraft_trl import EntrocraftGRPOTrainer, EntropyControlMixin, Services


def rename(rows, old, new):
    return rows.rename_column(old, new) if old in rows.column_names else rows


class PassesAllOn(GRPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class HasAnOption(GRPOTrainer):
    def __init__(self, *args, option, **kwargs):
        super().__init__(*args, **kwargs)
        self.option = option


class NamesArgs(GRPOTrainer):
    def __init__(self, args=None, **kwargs):
        super().__init__(args=args, **kwargs)


class KeywordsOnly(GRPOTrainer):
    def __init__(self, *, model, args, **kwargs):
        super().__init__(model, args=args, **kwargs)


class RenamesArgs(GRPOTrainer):
    def __init__(self, model, config, data, **kwargs):
        super().__init__(model, args=config, train_dataset=data, **kwargs)


class ChangesRows(GRPOTrainer):
    """It renames the column of questions, which is not fit for TRL before."""

    def __init__(self, questions, **settings):
        super().__init__(train_dataset=rename(questions, "question", "prompt"), **settings)


def controlled(parent):
    class Controlled(EntropyControlMixin, Services, parent):
        _config_class = EntrocraftGRPOTrainer._config_class

    return Controlled


def common(args, **changed):
    return {
        "model": tiny.build_model(),
        "reward_funcs": tiny.share_of_digits,
        "args": args,
        "train_dataset": tiny.build_dataset(),
        "processing_class": tiny.build_tokenizer(),
        **changed,
    }


def by_position(trainer_class, args, **changed):
    given = common(args, **changed)
    first = [given.pop(name) for name in ("model", "reward_funcs", "args", "train_dataset")]
    return trainer_class(*first, **given)


def by_keyword(trainer_class, args, **changed):
    return trainer_class(**common(args, **changed))


def renamed(trainer_class, args, **changed):
    given = common(args, **changed)
    first = [given.pop(name) for name in ("model", "args", "train_dataset")]
    return trainer_class(*first, **given)


def with_questions(trainer_class, args, **changed):
    given = common(args, **changed)
    return trainer_class(rename(given.pop("train_dataset"), "prompt", "question"), **given)


def with_option(trainer_class, args, **changed):
    return by_keyword(trainer_class, args, option=3, **changed)


WAYS = {
    "all passed on, by keyword": (PassesAllOn, by_keyword),
    "all passed on, by position": (PassesAllOn, by_position),
    "an option": (HasAnOption, with_option),
    "args named, the rest passed on": (NamesArgs, by_keyword),
    "keywords only": (KeywordsOnly, by_keyword),
    "args renamed": (RenamesArgs, renamed),
    "rows changed": (ChangesRows, with_questions),
}


@pytest.fixture(params=WAYS)
def build(request):
    parent, way = WAYS[request.param]
    return lambda args, **changed: way(controlled(parent), args, **changed)


def rejecting(**settings):
    return tiny.build_config(beta=0.0, **tiny.TOO_LOW, **settings)


def test_any_constructor_gives_the_same_training(build):
    reference = by_keyword(EntrocraftGRPOTrainer, rejecting())
    reference.train()
    assert tiny.history(reference, "entrocraft/rejected_positive")[0] > 0
    trainer = build(rejecting())
    trainer.train()
    tiny.assert_same_parameters(trainer.model, reference.model)


def test_a_band_of_ones_own_arrives(build):
    trainer = build(tiny.build_config(entropy_unit="nats"), entropy_band=lambda progress: (1.0, 2.0 + progress))
    assert trainer.band_at(0.5) == (1.0, 2.5)


def test_a_config_without_a_band_is_refused(build):
    args = tiny.build_config(GRPOConfig)
    with pytest.raises(TypeError, match="needs args of type EntrocraftGRPOConfig, got GRPOConfig"):
        build(args)


def test_rows_are_checked(build):
    with pytest.raises(ValueError, match="has 1 rows, but one generation batch takes 2 different prompts"):
        build(rejecting(), train_dataset=tiny.build_dataset(1))
    with pytest.raises(ValueError, match="row 1, column 'prompt': the prompt is empty"):
        build(rejecting(), train_dataset=Dataset.from_dict({"prompt": ["1+1", "", "2+2"]}))


def test_a_rollout_function_is_seen_and_missed(build):
    args = tiny.build_config(entropy_source="sampling")
    rollouts = tiny.random_rollouts(8)
    build(args, rollout_func=tiny.rollout_function(rollouts))
    with pytest.raises(ValueError, match="entropy_source='sampling' needs a rollout engine"):
        build(args)


def test_a_rollout_function_that_the_subclass_brings_is_seen():
    class BringsRollouts(GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, rollout_func=tiny.rollout_function(tiny.random_rollouts(8)), **kwargs)

    by_keyword(controlled(BringsRollouts), tiny.build_config(entropy_source="sampling"))


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
def test_an_environment_is_seen(build):
    """It asks the questions, so that the rows need none."""

    class Asks:
        def reset(self, **kwargs):
            return "1+2=?"

    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = "{{ messages }}"  # shows tool calls, which TRL insists on
    rows = Dataset.from_dict({"number": [1, 2]})
    build(rejecting(), train_dataset=rows, environment_factory=Asks, processing_class=tokenizer)


@pytest.mark.parametrize("way", [by_keyword, by_position])
def test_without_args_the_defaults_of_the_controlled_config_apply(way, monkeypatch):
    """TRL's own default would be a config without a band."""

    class OnAnyMachine(EntrocraftGRPOTrainer._config_class):
        def __init__(self, output_dir):
            super().__init__(output_dir, use_cpu=True, bf16=False)

    class Controlled(EntrocraftGRPOTrainer):
        _config_class = OnAnyMachine

    trainer = way(Controlled, None, model=tiny.build_model())
    assert isinstance(trainer.args, OnAnyMachine)
    assert trainer.args.output_dir.endswith("-Entrocraft")
