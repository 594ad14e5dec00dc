"""
Whole configs drawn from the declared fields, valid and not, against a description of validity in plain words: no
invalid one passes, each refusal names a field and its value, and every valid one trains.
"""

import contextlib
import dataclasses
import functools
import io
import math
import warnings

import pytest
import tiny
import torch
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st
from soak import profile
from trl import TrlParser

from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftRLOOConfig
from entrocraft_trl.control.config import EntropyControlConfig


CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}

# The choices of each field, by hand.
ALLOWED = {
    "entropy_unit": ["initial", "nats"],
    "entropy_width": ["given", "auto"],
    "entropy_schedule": ["linear", "cosine", "constant", "piecewise", "step"],
    "rejection_rule": ["advantage_sign", "entropy_change", "influence"],
    "rejected_rollouts": ["drop", "zero_advantage"],
    "out_of_band_advantages": ["estimator", "reward"],
    "reward_coding": ["plus_minus_one", "zero_one"],
    "entropy_aggregation": ["token", "sequence"],
    "entropy_source": ["policy", "sampling"],
}
DEFAULTS = {"entropy_low": [0.9, 0.15], "entropy_high": [1.05, 0.3], "entropy_schedule": "linear"}


# ------------------------------------------------------------------------------------- what is valid, in plain words


def is_number(value) -> bool:
    """A number, or a text that says one. Truth values are not numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        float(value)
    except (ValueError, OverflowError):  # the latter for an integer beyond any float
        return False
    return True


def is_edge(value) -> bool:
    """One number or a list of one or two, each finite and at least 0."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return len(values) in (1, 2) and all(is_number(v) and math.isfinite(float(v)) and float(v) >= 0 for v in values)


def ends(value) -> tuple[float, float]:
    values = [float(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return values[0], values[-1]


def points(knots) -> list[tuple[float, float, float]] | None:
    """The knots as numbers, or None if one of them is not three numbers between colons."""
    texts = knots.split() if isinstance(knots, str) else knots
    read = [text.split(":") for text in texts]
    if not all(len(parts) == 3 and all(map(is_number, parts)) for parts in read):
        return None
    return [tuple(float(part) for part in parts) for parts in read]


def are_knots(knots) -> bool:
    """In order between 0 and 1, and a band at each: finite, 0 <= low <= high."""
    known = points(knots)
    if known is None:
        return False
    in_order = all(left[0] <= right[0] for left, right in zip(known, known[1:], strict=False))
    return in_order and all(0 <= p <= 1 and 0 <= low <= high < math.inf for p, low, high in known)


def is_text_or_texts(value) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value))


def is_count(value) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return False
    try:
        return int(value) >= 1
    except ValueError:
        return False


def wrong_fields(values: dict) -> list[str]:
    """Fields of which a refusal may name any; empty for a valid config."""
    values = {**DEFAULTS, "entropy_knots": None, "entropy_schedule_steps": None, "min_accepted_share": 0.0, **values}
    wrong = [name for name, allowed in ALLOWED.items() if name in values and values[name] not in allowed]
    wrong += [name for name in ("entropy_low", "entropy_high") if not is_edge(values[name])]
    knots, shape = values["entropy_knots"], values["entropy_schedule"]
    if knots is not None and not is_text_or_texts(knots):
        wrong.append("entropy_knots")
    elif shape in ("piecewise", "step"):
        if not knots or (isinstance(knots, str) and not knots.strip()) or not are_knots(knots):
            wrong.append("entropy_knots")
    elif knots and not (isinstance(knots, str) and not knots.strip()):
        wrong.append("entropy_knots")  # read by no other shape
    if shape not in ("piecewise", "step") and is_edge(values["entropy_low"]) and is_edge(values["entropy_high"]):
        low, high = ends(values["entropy_low"]), ends(values["entropy_high"])
        if low[0] > high[0] or low[1] > high[1]:
            wrong += ["entropy_low", "entropy_high"]
        if shape == "constant":
            wrong += [name for name, end in (("entropy_low", low), ("entropy_high", high)) if end[0] != end[1]]
    if values["entropy_schedule_steps"] is not None and not is_count(values["entropy_schedule_steps"]):
        wrong.append("entropy_schedule_steps")
    share = values["min_accepted_share"]
    if not is_number(share) or not 0 <= float(share) <= 1:
        wrong.append("min_accepted_share")
    rule = values.get("rejection_rule", "entropy_change")
    if rule in ("entropy_change", "influence") and values.get("entropy_source") == "sampling":
        wrong += ["rejection_rule", "entropy_source"]
    return wrong


# ------------------------------------------------------------------------------------------------- configs at random

NUMBERS = st.one_of(
    st.sampled_from([0, 0.15, 0.3, 0.9, 1, 1.05, 3.0, 60.0, "0.5", "5e-1", " 1 ", 1e300]),
    st.floats(0, 10, allow_nan=False),
)
NO_NUMBERS = st.sampled_from(
    [-0.1, math.nan, math.inf, -math.inf, True, False, None, "", "low", "nan", "inf", "-1", "0,5", [], {}, {"a": 1}]
    + [[0.1, 0.2, 0.3], ["x"], [None], [0.5, math.nan], [[0.5]], [True], b"1", 1j, 10**400, [0.5, "-inf"]]
)
EDGES = st.one_of(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=2), st.tuples(NUMBERS))
KNOT_NUMBERS = st.sampled_from(["0", "0.25", "0.5", "1", "1.0", "5e-1"] * 8 + ["nan", "-0.5", "2", "", "x", "inf"])
KNOTS = st.one_of(
    st.lists(st.tuples(KNOT_NUMBERS, KNOT_NUMBERS, KNOT_NUMBERS).map(":".join), min_size=1, max_size=3),
    st.sampled_from(
        [["0:0.9:1.05", "1:0.2:0.3"], "0:0.9:1.05 0.5:0.4:0.5 1:0.2:0.3", ["0.5:0:9"], ["0:1:2", "0:3:4"]] * 3
        + [None, [], "", " ", "0:1", ["0:1:2:3"], [0.5], [["0", "1", "2"]], 5, 0.0, False, True, {"0": 1}, ["0;1;2"]]
    ),
)
STEPS = st.sampled_from(
    [None, 1, 2, 7, 10**9, "5"] * 2 + [0, -1, 2.5, 100.0, "x", "2.5", math.nan, math.inf, True, [3]]
)
CHOICES = {
    name: st.sampled_from(allowed * 8 + [allowed[0].upper(), "", None, 1, True, [allowed[0]], "none"])
    for name, allowed in ALLOWED.items()
}
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        **CHOICES,
        "entropy_low": st.one_of(EDGES, EDGES, EDGES, NO_NUMBERS),
        "entropy_high": st.one_of(EDGES, EDGES, EDGES, NO_NUMBERS),
        "entropy_knots": KNOTS,
        "entropy_schedule_steps": STEPS,
        "min_accepted_share": st.one_of(st.sampled_from([0, 0.5, 1, "0.25", 1.01, -0.01]), NO_NUMBERS),
    },
)

# Drawn apart, since few of the others have a shape and knots for it.
KNOT_CONFIGS = st.fixed_dictionaries(
    {"entropy_schedule": st.sampled_from(["piecewise", "step"]), "entropy_knots": KNOTS}
)


def renderings(value) -> list[str]:
    """Ways in which a message may quote a value: itself, one of its parts, or what it was read as."""
    parts = [value, *(value if isinstance(value, (list, tuple, dict)) else [])]
    parts += [float(part) for part in parts if is_number(part) and abs(float(part)) < math.inf]
    words = [repr(value.split())] if isinstance(value, str) else []
    return [repr(part) for part in parts] + [str(value)] + words


def build(config_class, values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config_class("run", **CPU, **values)


def test_every_field_has_a_strategy():
    drawn = {*ALLOWED, "entropy_low", "entropy_high", "entropy_knots", "entropy_schedule_steps", "min_accepted_share"}
    assert drawn == {field.name for field in dataclasses.fields(EntropyControlConfig)}, "describe the new field here"


@profile(150)
@given(
    values=st.one_of(CONFIGS, KNOT_CONFIGS), config_class=st.sampled_from([EntrocraftGRPOConfig, EntrocraftRLOOConfig])
)
@example(values={"entropy_low": None}, config_class=EntrocraftGRPOConfig)
@example(values={"entropy_low": True, "entropy_high": 2}, config_class=EntrocraftGRPOConfig)
@example(values={"entropy_schedule_steps": math.nan}, config_class=EntrocraftGRPOConfig)
@example(values={"entropy_knots": 5, "entropy_schedule": "step"}, config_class=EntrocraftGRPOConfig)
def test_a_config_is_valid_or_its_refusal_names_field_and_value(values, config_class):
    wrong = wrong_fields(values)
    if config_class is EntrocraftRLOOConfig and values.get("entropy_source") == "sampling":
        wrong.append("entropy_source")  # TRL's RLOO trainer keeps no log-probs of an engine
    try:
        config = build(config_class, values)
    except (ValueError, TypeError) as error:
        message = str(error)
        named = [name for name in wrong if name in message]
        assert wrong, f"a valid config is refused: {message}"
        assert named, f"{message!r} names none of {wrong}"
        shown = {**DEFAULTS, **values}
        assert any(text in message for name in named for text in renderings(shown.get(name))), message
    else:
        assert not wrong, f"accepted although {wrong} are wrong"
        low, high = ends(values.get("entropy_low", [0.9, 0.15])), ends(values.get("entropy_high", [1.05, 0.3]))
        assert (config.entropy_low[0], config.entropy_low[-1]) == low
        assert (config.entropy_high[0], config.entropy_high[-1]) == high
        assert all(isinstance(edge, float) for edge in config.entropy_low + config.entropy_high)


def outcome(make) -> dict | None:
    """Fields of the config that `make` returns, or None if it refuses; argparse refuses by leaving the program."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # argparse prints its usage
            warnings.simplefilter("ignore")
            config = make()
    except (ValueError, TypeError, SystemExit):
        return None
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(EntropyControlConfig)}


def words(values: dict) -> list[str]:
    arguments = []
    for name, value in values.items():
        many = value.split() if name == "entropy_knots" and isinstance(value, str) else value
        is_list = isinstance(many, (list, tuple))
        assume(not is_list or name in ("entropy_low", "entropy_high", "entropy_knots"))  # one word is one value there
        many = list(many) if is_list else [many]
        assume(many and all(isinstance(word, (int, float, str)) and word != "" for word in many))
        # `=` for one value, since argparse takes a word that begins with a minus for an option
        arguments += [f"--{name}={many[0]}"] if len(many) == 1 else [f"--{name}", *map(str, many)]
    return arguments


@functools.cache  # a parser takes 20 ms to make; only a YAML file changes its defaults
def parser_of_words() -> TrlParser:
    return TrlParser((EntrocraftGRPOConfig,))


@profile(60)
@given(values=st.one_of(CONFIGS, KNOT_CONFIGS))
def test_yaml_command_line_and_python_agree(values):
    # No YAML for these types, and none of the three can leave a field out by naming it.
    assume(not any(isinstance(value, (bytes, complex)) for value in values.values()))
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    expected = outcome(lambda: EntrocraftGRPOConfig("run", **CPU, **values))
    with open("config.yaml", "w") as file:
        yaml.safe_dump({**CPU, **values}, file)
    parser = TrlParser((EntrocraftGRPOConfig,))
    assert outcome(lambda: parser.parse_args_and_config(["--config", "config.yaml"])[0]) == expected
    assume(None not in values.values())
    arguments = ["--use_cpu", "--bf16", "false", "--report_to", "none", *words(values)]
    assert outcome(lambda: parser_of_words().parse_args_and_config(arguments)[0]) == expected


# ----------------------------------------------------------------------------------------- every valid one trains


@st.composite
def valid_configs(draw) -> dict:
    values = {name: draw(st.sampled_from(allowed)) for name, allowed in ALLOWED.items()}
    if values["rejection_rule"] != "advantage_sign":
        values["entropy_source"] = "policy"
    edges = sorted(draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 60.0]), min_size=2, max_size=2)))
    start_and_end = [edges, sorted(draw(st.tuples(st.floats(0, 4), st.floats(0, 4))))]
    if values["entropy_schedule"] in ("piecewise", "step"):
        progress = sorted(draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=2)))
        values["entropy_knots"] = [f"{p}:{low}:{high}" for p, (low, high) in zip(progress, start_and_end, strict=True)]
    else:
        count = 1 if values["entropy_schedule"] == "constant" else draw(st.sampled_from([1, 2]))
        values["entropy_low"] = [low for low, _ in start_and_end[:count]]
        values["entropy_high"] = [high for _, high in start_and_end[:count]]
    values["entropy_schedule_steps"] = draw(st.sampled_from([None, 1, 10]))
    values["min_accepted_share"] = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return values


def band_at_the_start(values: dict) -> tuple[float, float]:
    """Of the knots at progress 0 the last one counts; without any, the first knot of all."""
    if "entropy_knots" not in values:
        return values["entropy_low"][0], values["entropy_high"][0]
    known = points(values["entropy_knots"])
    return ([point for point in known if point[0] == 0] or known[:1])[-1][1:]


@pytest.fixture(scope="module")
def model():
    return tiny.build_model()


ROLLOUTS = tiny.random_rollouts(8)
LOG_PROBS = [[-1.0 - 0.1 * index] * len(ids) for index, ids in enumerate(ROLLOUTS)]


@profile(16)
@given(values=valid_configs())
@pytest.mark.filterwarnings("ignore::UserWarning")  # bands far from the model's entropy are warned about
def test_every_valid_config_trains_a_step(model, values):
    assert not wrong_fields(values)
    right = [1.0, 0.0 if values["reward_coding"] == "zero_one" else -1.0]
    trainer = tiny.build_trainer(
        model=model,
        args=tiny.build_config(**values, learning_rate=0.01),
        rollout_func=tiny.rollout_function(ROLLOUTS, logprobs=LOG_PROBS),
        reward_funcs=tiny.table_reward(ROLLOUTS, right * 4),
    )
    trainer.train()
    assert trainer.state.global_step == 1
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    (entropy,) = tiny.history(trainer, "entrocraft/entropy")
    (scatter,) = tiny.history(trainer, "entrocraft/reading_scatter")
    scale = entropy if values["entropy_unit"] == "initial" else 1.0
    low, high = (edge * scale for edge in band_at_the_start(values))
    if values["entropy_width"] == "auto":
        low, high = max((low + high) / 2 - 2 * scatter, 0.0), (low + high) / 2 + 2 * scatter
    assert tiny.history(trainer, "entrocraft/entropy_low") == pytest.approx([low])
    assert tiny.history(trainer, "entrocraft/entropy_high") == pytest.approx([high])
    assert tiny.history(trainer, "entrocraft/direction") == [float(entropy > high) - float(entropy < low)]
