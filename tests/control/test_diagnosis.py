"""What the trainer reports about a rejection, against sums written out by hand."""

import math

import pytest
import torch

from entrocraft_trl.control import diagnosis
from entrocraft_trl.control.state import ControlMemory


def totals_of(keep, advantages, tokens, margins):
    counts = diagnosis.count_batch(
        torch.tensor(keep),
        torch.tensor(advantages),
        torch.tensor(tokens),
        None if margins is None else torch.tensor(margins),
    )
    return diagnosis.Counts(*counts.tolist())


def test_totals_and_metrics_of_a_hand_made_batch():
    totals = totals_of(
        keep=[True, False, False, True, True],
        advantages=[1.0, 2.0, -1.0, -3.0, 0.0],
        tokens=[4, 3, 2, 1, 6],
        margins=[0.5, -0.25, 1.0, -2.0, 7.0],  # the last rollout has no advantage: it must not count
    )
    metrics = diagnosis.rejection_metrics(totals)
    assert metrics == {
        "accepted_rollouts": 3 / 5,
        "accepted_tokens": 11 / 16,
        "effective_batch_size": 3,
        "rejected_positive": 1,
        "rejected_negative": 1,
        "rules_agree": 2 / 4,  # margins 0.5 and 1.0 are positive
        "margin_positive": pytest.approx((0.5 - 0.25) / 2),
        "margin_negative": pytest.approx((1.0 - 2.0) / 2),
    }


def test_totals_add_up_over_ranks():
    keep, advantages = [True, False, True, False], [1.0, -1.0, 0.5, 2.0]
    tokens, margins = [1, 2, 3, 4], [0.1, 0.2, -0.3, 0.4]
    whole = totals_of(keep, advantages, tokens, margins)
    parts = [totals_of(keep[i], advantages[i], tokens[i], margins[i]) for i in (slice(0, 1), slice(1, 4))]
    assert torch.allclose(torch.tensor(whole), torch.tensor(parts).sum(0))


def test_shares_without_members_are_left_out():
    metrics = diagnosis.rejection_metrics(totals_of([True], [0.0], [0], [0.0]))
    assert "rules_agree" not in metrics and "accepted_tokens" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())


def test_margins_are_not_reported_when_they_were_not_measured():
    assert "rules_agree" not in diagnosis.rejection_metrics(totals_of([True], [1.0], [2], None))


@pytest.mark.parametrize(("direction", "before", "after", "effect"), [(-1, 0.5, 0.6, 0.1), (1, 0.5, 0.6, -0.1)])
def test_realised_effect_is_positive_towards_the_band(direction, before, after, effect):
    memory = ControlMemory()
    assert diagnosis.watch(memory, before, 0.2, direction) is None
    assert diagnosis.watch(memory, after, 0.1, direction) == pytest.approx(effect)


def test_no_effect_is_reported_for_a_step_inside_the_band():
    memory = ControlMemory()
    diagnosis.watch(memory, 0.5, 0.0, 0)
    assert diagnosis.watch(memory, 0.7, 0.1, 1) is None


SCATTER = 0.02  # nats: a drift of 0.05 is clear


def run_away(steps, drift, rule="advantage_sign", direction=-1):
    """Entropy `drift` nats further from the band in each step; the messages that come."""
    memory, messages = ControlMemory(reading_scatter=SCATTER), []
    for step in range(steps):
        distance = 0.01 + drift * step
        diagnosis.watch(memory, 0.5 - distance, distance, direction)
        messages.append(diagnosis.failure_message(memory, 0.5 - distance, distance, rule, 0.25))
    return [message for message in messages if message]


def test_a_rule_that_does_not_hold_is_reported_once_with_numbers_and_a_remedy():
    messages = run_away(steps=100, drift=0.005)
    assert len(messages) == 1
    for part in (
        "below its band",
        "30 generation batches",
        "25%",
        "rejection_rule='entropy_change'",
        "0.145 more than at first",
    ):
        assert part in messages[0]


def test_the_remedy_fits_the_rule():
    (message,) = run_away(steps=60, drift=0.005, rule="entropy_change", direction=1)
    assert "above its band" in message and "learning rate" in message
    assert "Set rejection_rule='influence'" in message
    (message,) = run_away(steps=60, drift=0.005, rule="influence", direction=1)
    assert "learning rate" in message and "Set rejection_rule" not in message


@pytest.mark.parametrize(
    ("steps", "drift"),
    [
        (29, 0.1),  # one step short of the patience
        (200, 0.0),  # outside for long, but not moving away
        (200, -0.0001),  # on its way back
        (31, 0.0016),  # away by 0.048 nats, less than 2.5 scatters
    ],
)
def test_no_false_alarm(steps, drift):
    assert run_away(steps, drift) == []


def test_a_return_to_the_band_starts_the_count_again():
    memory = ControlMemory()
    for _ in range(25):
        diagnosis.watch(memory, 0.4, 0.1, -1)
    diagnosis.watch(memory, 0.55, 0.0, 0)
    assert memory.steps_outside == 0
    diagnosis.watch(memory, 0.4, 0.1, -1)
    assert (memory.steps_outside, memory.distance_at_exit) == (1, 0.1)
