"""What the card says of entropy control, from plain values; whole cards are in tests/reports/test_model_card.py."""

import itertools
from dataclasses import fields

import pytest
import tiny

from entrocraft_trl.control import card, loss_inputs, rejection
from entrocraft_trl.control.config import EntropyControlConfig


def test_every_rule_has_its_words():
    for rule, rejected in itertools.product(
        ("advantage_sign", "entropy_change", "influence"), ("drop", "zero_advantage")
    ):
        chosen = {"rejection_rule": rule, "rejected_rollouts": rejected}
        words = "\n".join(card.describe_control(tiny.build_config(**chosen)))
        assert f"`{rule}`" in words and f"`{rejected}`" in words
        assert ("Algorithm 1" in words) == (rule == "advantage_sign")
        assert ("advantage 0" in words) == (rejected == "zero_advantage")


def test_a_config_takes_what_has_words_and_nothing_else():
    choices = {item.name: item.metadata.get("choices") for item in fields(EntropyControlConfig)}
    assert choices["rejection_rule"] == tuple(rejection.RULES)
    assert choices["rejected_rollouts"] == tuple(loss_inputs.REJECTED)


@pytest.mark.parametrize("unit", ["initial", "nats"])
@pytest.mark.parametrize("measured", [None, 0.8])
def test_the_unit_is_said_and_the_first_entropy_where_the_band_hangs_on_it(unit, measured):
    in_nats = unit == "nats" or measured is not None
    args = tiny.build_config(entropy_unit=unit)
    section = card.card_section(args, lambda progress: (progress, 2.0), in_nats=in_nats, initial_entropy=measured)
    assert section[0] == "## Entropy control"
    name = "nats" if in_nats else "times the initial entropy"
    assert f"| progress of the schedule | low edge ({name}) | high edge ({name}) |" in section
    assert [line for line in section if "%" in line] == [
        "| 0% | 0.000 | 2.000 |",
        "| 25% | 0.250 | 2.000 |",
        "| 50% | 0.500 | 2.000 |",
        "| 75% | 0.750 | 2.000 |",
        "| 100% | 1.000 | 2.000 |",
    ]
    first = ["The entropy measured first was 0.800 nats."] if (unit, measured) == ("initial", 0.8) else []
    assert [line for line in section if "measured first" in line] == first


def test_the_shape_of_the_schedule_is_said():
    args = tiny.build_config(entropy_schedule="cosine")
    assert "schedule: `cosine`." in card.describe_control(args)[-1]
    assert "schedule: given by a function." in card.describe_control(args, own_band=True)[-1]


def test_a_width_that_follows_the_scatter_is_said():
    (sentence,) = card.describe_control(tiny.build_config(entropy_width="auto"))[-1:]
    assert sentence.endswith("width: four times the scatter of one reading.")
