"""TRL's metrics mean over a window what they mean over all its rows, or are left out."""

import math
import time

import pytest
import tiny
from test_equality import ALIVE, DEAD, REWARDS, SPLITS, train

from entrocraft_trl import EntrocraftGRPOTrainer, EntrocraftRLOOTrainer
from entrocraft_trl.baselines.base import BaselineTrainer
from entrocraft_trl.microbatches.metrics import CLIPPED, restored
from entrocraft_trl.microbatches.plan import Share


TOKENS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


def shares(*parts, window=100, left=0):
    """Micro-batches of one, two, ... rows, of a window of ten rows."""
    return [Share(index + 1, tokens, 10, window, left and 2, left, 0) for index, tokens in enumerate(parts)]


def test_tokens_that_were_not_computed_have_a_clip_ratio_of_zero():
    parts = shares(50, 30, left=20)
    assert restored("clip_ratio/low_mean", [0.2, 0.1], parts, of_sequences=False) == pytest.approx(0.13)
    assert restored("clip_ratio/low_mean", [0.2, 0.1], parts, of_sequences=True) == pytest.approx(
        0.04
    )  # 1 and 2 of 10
    assert restored("clip_ratio/low_min", [0.2, 0.1], parts, of_sequences=False) == 0.0
    assert restored("clip_ratio/high_max", [0.2, math.nan], parts, of_sequences=False) == 0.2


def test_extremes_of_all_rows():
    parts = shares(50, 50)
    assert restored("clip_ratio/low_min", [0.2, 0.1], parts, of_sequences=False) == 0.1
    assert math.isnan(restored("clip_ratio/low_min", [math.nan], shares(0, window=0)[:1], of_sequences=False))


def test_means_weigh_tokens_and_are_left_out_where_some_are_missing():
    for name in ("entropy", "kl"):
        assert restored(name, [2.0, 1.0], shares(75, 25), of_sequences=True) == pytest.approx(1.75)
        assert math.isnan(restored(name, [2.0, 1.0], shares(50, 25, left=25), of_sequences=False))
    assert (
        restored("entropy", [0.0], shares(0, window=0)[:1], of_sequences=False) == 0.0
    )  # as TRL says without a token
    assert restored("vespo/phi_seq_mean", [2.0, 1.0], shares(5, 5), of_sequences=False) == pytest.approx(0.4)
    assert math.isnan(restored("vespo/phi_seq_mean", [2.0], shares(5, left=5), of_sequences=False))


# ------------------------------------------------------------------------------------------------------- in a training


def logs(trainer_class, **settings):
    some, every = (train(trainer_class, **settings, compute_all_rows=rows)[0] for rows in (None, True))
    return some.state.log_history[:-1], every.state.log_history[:-1]


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "dapo"},
        {"loss_type": "bnpo"},
        {"loss_type": "cispo", "epsilon_high": 0.9},
        {"importance_sampling_level": "sequence"},
        {"mask_truncated_completions": True, "max_completion_length": 6},
    ],
)
def test_clip_ratios_are_those_of_all_rows(settings):
    """One micro-batch a step, so that TRL's own are means over the whole step too."""
    settings = {"per_device_train_batch_size": 16, "num_iterations": 2, "max_steps": 4, "epsilon": 0.05, **settings}
    some, every = logs(BaselineTrainer, **settings)
    names = [name for name in every[1] if name.startswith(("clip_ratio", "cispo"))]
    assert names and any(every[step][name] > 0 for step in (1, 3) for name in names)
    for ours, theirs in zip(some, every, strict=True):
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_clip_ratios_of_rloo():
    settings = {"per_device_train_batch_size": 16, "num_iterations": 2, "max_steps": 2, "beta": 0.0, **tiny.WIDE_OPEN}
    some, every = logs(EntrocraftRLOOTrainer, **settings, learning_rate=0.02)
    assert every[1]["clip_ratio/region_mean"] > 0
    for name in (*TOKENS, "clip_ratio/low_min", "clip_ratio/high_max"):
        assert some[1][name] == pytest.approx(every[1][name], abs=1e-6), name


@pytest.mark.parametrize("split", ["1x16", "4x4"])
def test_metrics_where_nothing_leaves(split):
    rewards = [reward + 0.01 * index for index, reward in enumerate(REWARDS)]
    some, every = logs(BaselineTrainer, rewards=rewards, **SPLITS[split])
    for ours, theirs in zip(some, every, strict=True):
        # A mean over the step's tokens, where TRL averages the means of four micro-batches.
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-5 if split == "1x16" else 0.05)


def test_the_entropy_of_a_baseline_is_read_from_trls_pass_or_left_out(monkeypatch):
    """Forced rollouts cannot be recorded; with two iterations TRL runs a pass for the old policy."""
    some, _ = logs(BaselineTrainer, **SPLITS["1x16"])
    assert some[0]["entropy"] is None
    monkeypatch.setattr(BaselineTrainer, "_why_not_recorded", lambda self: "as where an engine samples")
    some, every = logs(BaselineTrainer, **SPLITS["1x16"], num_iterations=2)
    assert some[0]["entropy"] == pytest.approx(every[0]["entropy"], abs=1e-5)
    assert some[1]["entropy"] == some[0]["entropy"]  # of the policy that sampled, not of the one under way


def test_the_entropy_of_sampled_rollouts_is_recorded():
    found = []
    for rows in (None, True):
        args = tiny.build_config(BaselineTrainer._config_class, compute_all_rows=rows, max_steps=2, learning_rate=0.02)
        reward = iter([0.0, 1.0, 0.0, 1.0, *DEAD] * 2)
        trainer = tiny.build_trainer(
            BaselineTrainer, args=args, reward_funcs=lambda completions, r=reward, **_: [next(r) for _ in completions]
        )
        trainer.train()
        found.append(trainer)
    assert tiny.history(found[0], "entrocraft/computed_rows") == [0.5, 0.5]
    assert tiny.history(found[0], "entropy") == pytest.approx(tiny.history(found[1], "entropy"), abs=1e-5)


def test_an_empty_window_logs_no_entropy_of_zero():
    rewards = [*ALIVE[0], *ALIVE[1], *ALIVE[2], *ALIVE[3], *DEAD, *DEAD, *DEAD, *DEAD]
    settings = {**SPLITS["4x4"], "rewards": rewards, **tiny.WIDE_OPEN}
    trainer, _ = train(EntrocraftGRPOTrainer, **settings)
    assert [line["entropy"] for line in trainer.state.log_history[:-1]][1] is None
    assert tiny.history(trainer, "clip_ratio/low_mean")[1] == 0.0
    assert tiny.history(trainer, "entrocraft/entropy")[1] > 2


def test_every_window_counts_once_in_a_log_line():
    """TRL averages the values of a line's micro-batches: a window with fewer of them must not count for less."""
    rewards = [*ALIVE[0], *DEAD, *DEAD, *DEAD, *ALIVE[0], *ALIVE[1], *ALIVE[2], *ALIVE[3]]
    settings = {**SPLITS["4x4"], "rewards": rewards, "num_iterations": 2, "max_steps": 4, "learning_rate": 0.1}
    single, _ = train(BaselineTrainer, **settings)
    joined, _ = train(BaselineTrainer, **settings, logging_steps=4)
    for name in CLIPPED[:3]:
        values = tiny.history(single, name)
        assert len(values) == 4 and max(values) > 0
        assert tiny.history(joined, name) == [pytest.approx(sum(values) / 4)]


def test_shares_and_clocks():
    start = time.perf_counter()
    trainer, _ = train(BaselineTrainer, **SPLITS["two windows"])
    whole = time.perf_counter() - start
    assert all(0.3 < share < 0.8 for share in tiny.history(trainer, "entrocraft/computed_rows"))
    # Of a whole generation batch, hence in the first of its two steps.
    assert len(tiny.history(trainer, "entrocraft/computed_tokens")) == 2
    assert len(tiny.history(trainer, "entrocraft/seconds_generation")) == 2
    update, reading, generation = (
        tiny.history(trainer, f"entrocraft/seconds_{phase}") for phase in ("update", "reading", "generation")
    )
    assert len(update) == 4
    assert min(update + reading + generation) > 0
    assert sum(update) + sum(reading) + sum(generation) < whole  # no second is in two of them
