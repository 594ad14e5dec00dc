"""Each field from Python, YAML and the command line; each refusal names the field and its value."""

import dataclasses
import math
import warnings

import pytest
import yaml
from trl import TrlParser

from entrocraft_trl import Band, EntrocraftGRPOConfig, EntrocraftRLOOConfig
from entrocraft_trl.control.config import EntropyControlConfig


CONFIGS = [EntrocraftGRPOConfig, EntrocraftRLOOConfig]
CPU = {"use_cpu": True, "bf16": False}  # the machine of these tests has no GPU, which TRL's defaults expect

# (fields, what the message must hold). A value that is a list or a string is also tried through YAML and arguments.
REFUSED = [
    ({"entropy_low": [0.1, 0.2, 0.3]}, ["entropy_low", "one value or two", "got 3", "0.3"]),
    ({"entropy_high": []}, ["entropy_high", "one value or two", "got 0"]),
    ({"entropy_low": ["low"]}, ["entropy_low", "must hold numbers", "low"]),
    ({"entropy_low": [-0.1]}, ["entropy_low", "not negative", "-0.1"]),
    ({"entropy_high": [math.nan]}, ["entropy_high", "finite", "nan"]),
    ({"entropy_high": [1.0, math.inf]}, ["entropy_high", "finite", "inf"]),
    ({"entropy_low": [2.0], "entropy_high": [1.0]}, ["entropy_low", "2.0", "entropy_high", "1.0", "the start"]),
    ({"entropy_low": [0.1, 2.0], "entropy_high": [1.0, 1.5]}, ["low=2.0 > high=1.5", "the end"]),
    ({"entropy_unit": "bits"}, ["entropy_unit", "'initial', 'nats'", "'bits'"]),
    ({"entropy_schedule": "sine"}, ["entropy_schedule", "'linear', 'cosine'", "'sine'"]),
    ({"entropy_schedule": "piecewise"}, ["entropy_schedule='piecewise'", "needs entropy_knots", "None"]),
    ({"entropy_schedule": "step"}, ["entropy_schedule='step'", "needs entropy_knots"]),
    (
        {"entropy_schedule": "piecewise", "entropy_knots": ["0:0.5"]},
        ["entropy_knots=['0:0.5']", "progress:low:high"],
    ),
    (
        {"entropy_schedule": "step", "entropy_knots": ["0.5:0.1:0.2", "0.1:0.1:0.2"]},
        ["entropy_knots", "in order", "0.5 before 0.1"],
    ),
    ({"entropy_schedule": "piecewise", "entropy_knots": ["1.5:0.1:0.2"]}, ["entropy_knots", "0..1", "1.5"]),
    ({"entropy_schedule": "piecewise", "entropy_knots": ["0:0.3:0.2"]}, ["entropy_knots", "low=0.3 > high=0.2"]),
    ({"entropy_knots": ["0:0.1:0.2"]}, ["entropy_knots=['0:0.1:0.2']", "entropy_schedule='linear'"]),
    (
        {"entropy_schedule": "constant", "entropy_low": [0.5, 0.4], "entropy_high": [0.6]},
        ["entropy_schedule='constant'", "entropy_low=[0.5, 0.4]"],
    ),
    (
        {"entropy_schedule": "constant", "entropy_low": [0.5], "entropy_high": [0.6, 0.7]},
        ["entropy_schedule='constant'", "entropy_high=[0.6, 0.7]"],
    ),
    ({"entropy_schedule_steps": 0}, ["entropy_schedule_steps", "at least 1", "0"]),
    ({"entropy_schedule_steps": -5}, ["entropy_schedule_steps", "-5"]),
    ({"rejection_rule": "coin"}, ["rejection_rule", "'advantage_sign', 'entropy_change', 'influence'", "'coin'"]),
    ({"rejected_rollouts": "keep"}, ["rejected_rollouts", "'drop', 'zero_advantage'", "'keep'"]),
    ({"out_of_band_advantages": "raw"}, ["out_of_band_advantages", "'estimator', 'reward'", "'raw'"]),
    ({"reward_coding": "binary"}, ["reward_coding", "'plus_minus_one', 'zero_one'", "'binary'"]),
    ({"entropy_aggregation": "group"}, ["entropy_aggregation", "'token', 'sequence'", "'group'"]),
    ({"entropy_source": "engine"}, ["entropy_source", "'policy', 'sampling'", "'engine'"]),
    ({"min_accepted_share": 1.5}, ["min_accepted_share", "0..1", "1.5"]),
    ({"min_accepted_share": -0.1}, ["min_accepted_share", "0..1", "-0.1"]),
    ({"min_accepted_share": math.nan}, ["min_accepted_share", "0..1", "nan"]),
    (
        {"rejection_rule": "entropy_change", "entropy_source": "sampling"},
        ["rejection_rule='entropy_change'", "entropy_source='sampling'", "entropy_source='policy'"],
    ),
]
CHOICE_FIELDS = {
    "entropy_unit",
    "entropy_schedule",
    "rejection_rule",
    "rejected_rollouts",
    "out_of_band_advantages",
    "reward_coding",
    "entropy_aggregation",
    "entropy_source",
}


def name_of(fields) -> str:
    return ",".join(f"{key}={value}" for key, value in fields.items())


def as_arguments(fields) -> list[str]:
    arguments = []
    for key, value in fields.items():
        values = value if isinstance(value, list) else [value]
        # `=` for a single value, since argparse takes "-0.1" after a space for an option in some versions
        arguments += [f"--{key}={values[0]}"] if len(values) == 1 else [f"--{key}", *map(str, values)]
    return arguments


def parse(config_class, arguments):
    return TrlParser((config_class,)).parse_args_and_config(["--use_cpu", "--bf16", "false", *arguments])[0]


def write_yaml(fields) -> str:
    with open("config.yaml", "w") as file:
        yaml.safe_dump({**CPU, **fields}, file)
    return "config.yaml"


def assert_message(error, parts):
    for part in parts:
        assert part in str(error.value), f"{part!r} is missing in: {error.value}"


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize(("fields", "parts"), REFUSED, ids=[name_of(fields) for fields, _ in REFUSED])
def test_refused_from_python(config_class, fields, parts):
    with pytest.raises(ValueError) as error:
        config_class("run", **CPU, **fields)
    assert_message(error, parts)


@pytest.mark.parametrize(("fields", "parts"), REFUSED, ids=[name_of(fields) for fields, _ in REFUSED])
def test_refused_from_yaml(fields, parts):
    with pytest.raises(ValueError) as error:
        TrlParser((EntrocraftGRPOConfig,)).parse_args_and_config(["--config", write_yaml(fields)])
    assert_message(error, parts)


def test_scores_over_all_tokens_are_refused_where_a_part_of_them_is_trained_on():
    fields = {**CPU, "rejection_rule": "entropy_change", "top_entropy_quantile": 0.2}
    with pytest.raises(ValueError, match="rejection_rule='entropy_change'.*top_entropy_quantile=0.2.*advantage_sign"):
        EntrocraftGRPOConfig("run", **fields)
    EntrocraftGRPOConfig("run", **CPU, top_entropy_quantile=0.2, rejection_rule="advantage_sign")


def test_rloo_keeps_no_log_probs_of_an_engine_to_read():
    with pytest.raises(ValueError, match="entropy_source='sampling'.*RLOO.*entropy_source='policy'"):
        EntrocraftRLOOConfig("run", **CPU, entropy_source="sampling", rejection_rule="advantage_sign")


ON_COMMAND_LINE = [(fields, parts) for fields, parts in REFUSED if fields.get("entropy_high") != []]


@pytest.mark.parametrize(("fields", "parts"), ON_COMMAND_LINE, ids=[name_of(fields) for fields, _ in ON_COMMAND_LINE])
def test_refused_on_the_command_line(fields, parts, capsys):
    wrong_type = fields.get("entropy_low") == ["low"]
    wrong_choice = len(fields) == 1 and CHOICE_FIELDS & fields.keys() and "entropy_knots" not in parts[-1]
    wrong_choice = wrong_choice and fields.get("entropy_schedule") not in ("piecewise", "step")
    if wrong_type or wrong_choice:  # argparse refuses these itself, by type or by `choices`
        with pytest.raises(SystemExit):
            parse(EntrocraftGRPOConfig, as_arguments(fields))
        (name, value), message = next(iter(fields.items())), capsys.readouterr().err
        assert f"--{name}" in message
        assert (value[0] if isinstance(value, list) else value) in message
        return
    with pytest.raises(ValueError) as error:
        parse(EntrocraftGRPOConfig, as_arguments(fields))
    assert_message(error, parts)


# --------------------------------------------------------------------------------------------------------- good values


@pytest.mark.parametrize("config_class", CONFIGS)
def test_defaults(config_class):
    config = config_class("run", **CPU)
    assert (config.entropy_low, config.entropy_high) == ([0.9, 0.15], [1.05, 0.3])
    assert (config.entropy_unit, config.entropy_schedule) == ("initial", "linear")
    assert config.entropy_width == "given"
    assert config.entropy_knots is None and config.entropy_schedule_steps is None
    assert (config.rejection_rule, config.rejected_rollouts) == ("entropy_change", "drop")
    assert (config.out_of_band_advantages, config.reward_coding) == ("estimator", "plus_minus_one")
    assert (config.entropy_aggregation, config.entropy_source) == ("token", "policy")
    assert config.min_accepted_share == 0.0  # Eq. 5 to the letter
    assert config.band_at(0.0) == Band(0.9, 1.05)
    assert config.band_at(0.5) == pytest.approx((0.525, 0.675))
    assert config.band_at(1.0) == pytest.approx((0.15, 0.3))


@pytest.mark.parametrize("value", [0.5, "0.5", "5e-1", [0.5], ["5e-1"], (0.5,)])
def test_one_edge_value_in_any_form(value):
    config = EntrocraftGRPOConfig("run", **CPU, entropy_low=value, entropy_high=1)
    assert config.entropy_low == [0.5] and config.entropy_high == [1.0]
    assert config.band_at(0.7) == Band(0.5, 1.0)


@pytest.mark.parametrize(
    ("text", "low"),
    [
        ("entropy_low: 0.5", [0.5]),
        ("entropy_low: [0.5, 0.1]", [0.5, 0.1]),
        ("entropy_low: [5e-1, 1e-1]", [0.5, 0.1]),  # YAML 1.1 reads 5e-1, without a dot, as a string
        ("entropy_low: 5e-1", [0.5]),
        ("entropy_low: ['0.5', 0.1]", [0.5, 0.1]),
        ("entropy_low: 0", [0.0]),
    ],
)
def test_edges_from_yaml(text, low):
    with open("config.yaml", "w") as file:
        file.write(f"use_cpu: true\nbf16: false\nentropy_high: 1\n{text}\n")
    (config,) = TrlParser((EntrocraftGRPOConfig,)).parse_args_and_config(["--config", "config.yaml"])
    assert config.entropy_low == low


GOOD = {
    "entropy_low": [0.4, 0.2],
    "entropy_high": [0.5, 0.3],
    "entropy_unit": "nats",
    "entropy_width": "auto",
    "entropy_schedule": "cosine",
    "entropy_schedule_steps": 100,
    "rejection_rule": "entropy_change",
    "rejected_rollouts": "zero_advantage",
    "min_accepted_share": 0.25,
    "out_of_band_advantages": "reward",
    "reward_coding": "zero_one",
    "entropy_aggregation": "sequence",
    "entropy_source": "policy",
}


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_field_reads_the_same_from_python_yaml_and_command_line(config_class):
    own = {field.name for field in dataclasses.fields(EntropyControlConfig)}
    assert own == {*GOOD, "entropy_knots"}, "a new field needs a value here"
    from_python = config_class("run", **CPU, **GOOD)
    (from_yaml,) = TrlParser((config_class,)).parse_args_and_config(["--config", write_yaml(GOOD)])
    from_arguments = parse(config_class, as_arguments(GOOD))
    for name, value in GOOD.items():
        assert getattr(from_python, name) == getattr(from_yaml, name) == getattr(from_arguments, name) == value


def test_the_command_line_overrides_yaml():
    arguments = ["--config", write_yaml(GOOD), "--entropy_low", "0.25", "--entropy_unit", "nats"]
    (config,) = TrlParser((EntrocraftGRPOConfig,)).parse_args_and_config(arguments)
    assert config.entropy_low == [0.25] and config.entropy_unit == "nats"
    assert config.entropy_high == [0.5, 0.3]


@pytest.mark.parametrize("knots", [["0:0.9:1.05", "1:0.2:0.3"], "0:0.9:1.05 1:0.2:0.3"])
def test_knots_from_python_yaml_and_command_line(knots):
    fields = {"entropy_schedule": "piecewise", "entropy_knots": knots}
    (from_yaml,) = TrlParser((EntrocraftGRPOConfig,)).parse_args_and_config(["--config", write_yaml(fields)])
    words = knots.split() if isinstance(knots, str) else knots
    from_arguments = parse(EntrocraftGRPOConfig, ["--entropy_schedule", "piecewise", "--entropy_knots", *words])
    for config in (EntrocraftGRPOConfig("run", **CPU, **fields), from_yaml, from_arguments):
        assert config.band_at(0.5) == pytest.approx((0.55, 0.675))


def test_step_knots_hold():
    knots = ["0:0.9:1.05", "0.5:0.2:0.3"]
    config = EntrocraftGRPOConfig("run", **CPU, entropy_schedule="step", entropy_knots=knots)
    assert config.band_at(0.49) == Band(0.9, 1.05)
    assert config.band_at(0.5) == Band(0.2, 0.3)


def test_a_saved_config_reads_back():
    """Trainers save their config as JSON-like dicts; lists must not come back nested or as strings."""
    config = EntrocraftGRPOConfig("run", **CPU, **GOOD)
    again = EntrocraftGRPOConfig("run", **CPU, **{name: config.to_dict()[name] for name in GOOD})
    assert all(getattr(again, name) == value for name, value in GOOD.items())


@pytest.mark.parametrize("config_class", CONFIGS)
def test_help_texts_exist_and_argparse_can_print_them(config_class):
    for field in dataclasses.fields(EntropyControlConfig):
        assert field.metadata["help"]
    help_text = TrlParser((config_class,)).format_help()  # an unescaped % in a help text would raise here
    assert "--entropy_low" in help_text and "--rejection_rule" in help_text


# ----------------------------------------------------------------------------------- conflicts with TRL's own settings


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"entropy_coef": 0.01}, ["entropy_coef=0.01", "entropy_coef=0"]),
        ({"entropy_coef": -0.01}, ["entropy_coef=-0.01"]),
        ({"use_adaptive_entropy": True}, ["use_adaptive_entropy=True", "use_adaptive_entropy=False"]),
    ],
)
def test_two_entropy_controls_at_once_are_refused(fields, parts):
    with pytest.raises(ValueError) as error:
        EntrocraftGRPOConfig("run", **CPU, **fields)
    assert_message(error, parts)
    with pytest.raises(ValueError) as error:
        parse(EntrocraftGRPOConfig, as_arguments(fields))
    assert_message(error, parts)


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize(("name", "value"), [("top_p", 0.9), ("top_k", 20), ("min_p", 0.05)])
def test_narrowed_sampling_warns(config_class, name, value):
    with pytest.warns(UserWarning, match=f"{name}={value}.*narrower distribution"):
        config_class("run", **CPU, **{name: value})


def test_all_narrowing_settings_are_named_in_one_warning():
    with pytest.warns(UserWarning, match=r"top_p=0.9, top_k=20, min_p=0.05"):
        EntrocraftGRPOConfig("run", **CPU, top_p=0.9, top_k=20, min_p=0.05)


@pytest.mark.parametrize("fields", [{}, {"top_p": 1.0, "top_k": 0, "min_p": 0.0}, {"top_k": -1}, {"min_p": None}])
def test_the_full_distribution_does_not_warn(fields):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        EntrocraftGRPOConfig("run", **CPU, **fields)


def test_trls_own_checks_still_run():
    with pytest.raises(ValueError, match="num_generations"):
        EntrocraftGRPOConfig("run", **CPU, per_device_train_batch_size=3, num_generations=2)
