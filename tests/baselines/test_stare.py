"""STARE against its formula, its gate, and with the gate closed plain GRPO."""

import warnings

import loss_probe
import pytest
import tiny
import torch
from loss_probe import OFF_POLICY

from entrocraft_trl.baselines.stare import STAREConfig, STARETrainer, share_rounded_up
from entrocraft_trl.policy.tokens import loss_mask


OPEN, CLOSED = 9.0, 0.0  # targets in nats, above and below any entropy here


@pytest.mark.parametrize("negative_weight", [1.0, 0.4])  # the variants O1 and C2
def test_the_least_likely_tokens_of_each_sign_are_weighed(negative_weight):
    settings = {"stare_positive_weight": 1.7, "stare_negative_weight": negative_weight, "stare_share": 0.3}
    trainer = loss_probe.build(STARETrainer, stare_target_entropy=OPEN, **settings)
    batch = loss_probe.loss_inputs(trainer, shift=0.3)
    logps, _ = loss_probe.loss_pass(trainer, batch)
    mask, advantages = loss_mask(batch).bool(), batch["advantages"][:, None].expand_as(logps)
    ratios, weights = torch.exp(logps - batch["old_per_token_logps"]), torch.ones_like(logps)
    for tokens, weight in ((mask & (advantages > 0), 1.7), (mask & (advantages < 0), negative_weight)):
        count = -(-3 * int(tokens.sum()) // 10)
        bound = logps.detach()[tokens].sort().values[count - 1]  # the least likely, up to this log-prob
        weights[tokens & (logps.detach() <= bound)] = weight
        assert 2 < count < tokens.sum() / 2
    assert set(weights[~mask].tolist()) == {1.0}
    losses = torch.maximum(-advantages * ratios, -advantages * ratios.clamp(0.8, 1.2)) * weights
    loss_probe.assert_same_step(trainer, batch, losses[mask].sum() / mask.sum())  # no ratio reaches the dual clip of 3


@pytest.mark.parametrize(("distance", "gate"), [(0.01, 1.0), (-0.01, 0.0)])
def test_the_gate_is_open_below_the_target(distance, gate):
    plain = loss_probe.build(STARETrainer)
    batch = loss_probe.loss_inputs(plain)
    _, entropies = loss_probe.loss_pass(plain, batch)
    entropy = entropies[loss_mask(batch).bool()].mean().item()
    trainer = loss_probe.build(STARETrainer, stare_target_entropy=entropy + distance)
    batch = loss_probe.loss_inputs(trainer)
    assert trainer.numbers == {"gate": gate, "batches": 1.0, "weighed_batches": gate}
    assert trainer._metrics["train"]["stare/entropy"] == [pytest.approx(entropy, rel=1e-5)]
    weighed = trainer.token_advantages(*loss_probe.loss_pass(trainer, batch), batch)
    assert (weighed.dim() == 2) == bool(gate)


@pytest.mark.parametrize(
    ("share", "tokens", "count"), [(0.1, 30, 3), (0.1, 31, 4), (0.1, 1, 1), (0.1, 0, 0), (0.0, 50, 0), (1.0, 7, 7)]
)
def test_shares_are_rounded_up(share, tokens, count):
    assert share_rounded_up(share, tokens) == count


@pytest.mark.parametrize(
    "settings",
    [
        {"stare_target_entropy": CLOSED},
        {"stare_target_entropy": OPEN, "stare_share": 0.0},
        {"stare_target_entropy": OPEN, "stare_positive_weight": 1.0},
    ],
)
def test_without_a_weighed_token_it_is_grpo(settings):
    loss_probe.assert_trains_as_plain_grpo(STARETrainer, {**OFF_POLICY, "delta": None, **settings})


def test_evaluation_neither_reads_nor_weighs():
    trainer = loss_probe.build(STARETrainer, stare_target_entropy=OPEN)
    batch = loss_probe.loss_inputs(trainer)
    before, inputs = dict(trainer.numbers), tiny.generation_inputs(trainer)
    trainer.model.eval()
    trainer._generate_and_score_completions(inputs)
    loss = trainer._compute_loss(trainer.model, batch)
    mask = loss_mask(batch).bool()
    torch.testing.assert_close(loss, -batch["advantages"][:, None].expand_as(mask)[mask].sum() / mask.sum())
    assert trainer.numbers == before


def test_the_card_says_how_often_tokens_were_weighed():
    trainer = loss_probe.build(STARETrainer, stare_target_entropy=OPEN, stare_negative_weight=0.9, **OFF_POLICY)
    trainer.train()
    assert tiny.history(trainer, "stare/gate") == [1.0, 1.0]  # four steps, two a generation
    said = "\n".join(trainer.card_section())
    assert "below 9 nats, in 2 of 2 generation batches, the least likely 10% of the tokens" in said
    assert "1.1 where the advantage was positive, and 0.9 where it was negative" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stare_target_entropy": -1}, "stare_target_entropy must be finite and at least 0, got -1.0"),
        ({"stare_share": 10}, "stare_share must be finite and in 0..1, got 10.0"),
        ({"stare_positive_weight": 0.9}, "stare_positive_weight must be finite and at least 1, got 0.9"),
        ({"stare_negative_weight": 1.1}, "stare_negative_weight must be finite and in 0..1, got 1.1"),
        ({"stare_share": "x"}, "stare_share must be a number, got 'x'"),
        ({"entropy_coef": 0.01}, "entropy_coef=0.01 is not for STAREConfig"),
        ({"loss_type": "sapo"}, "loss_type='sapo' is not for STAREConfig"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' is not for"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5 is not for"),
    ],
)
def test_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        STAREConfig("run", use_cpu=True, bf16=False, **settings)


def test_on_policy_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # weights act there too
        assert STAREConfig("run", use_cpu=True, bf16=False, stare_share="2e-1").stare_share == 0.2
