"""Clip_B and Clip_V against their formulas, and without a token to clip against plain GRPO."""

import warnings

import loss_probe
import pytest
import tiny
import torch
from loss_probe import OFF_POLICY

from entrocraft_trl.baselines.clip_b import ClipBConfig, ClipBTrainer
from entrocraft_trl.baselines.clip_v import ClipVConfig, ClipVTrainer
from entrocraft_trl.baselines.discriminator import mean_and_deviation
from entrocraft_trl.policy.tokens import TokenReading, loss_mask


BOTH = [(ClipBTrainer, "clip_b"), (ClipVTrainer, "clip_v")]
NO_LIMIT = {"clip_v_max_share": 1.0}


def distributions(trainer, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of the whole vocabulary `(B, T, V)`, from ordinary logits, and those of the sampled tokens."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].size(1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
    p = (logits[:, -length - 1 : -1] / trainer.temperature).softmax(-1)
    return p, p.gather(-1, batch["completion_ids"][..., None]).squeeze(-1)


def discriminators(trainer, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """S of the sampled tokens and its expectation N under the policy, `(B, T)`."""
    p, sampled = distributions(trainer, batch)
    entropies = -(p * p.log()).sum(-1)
    everyones = p * (p.log() + entropies[..., None])
    return sampled * (sampled.log() + entropies), (p * everyones).sum(-1)


def leaving_tokens(trainer, batch, method: str, mu: float) -> torch.Tensor:
    """Mask `(B, T)` of the tokens that leave, by the formula; without a limit."""
    mask = batch["completion_mask"].bool()
    sampled, expected = discriminators(trainer, batch)
    negative = batch["advantages"][:, None] < 0
    if method == "clip_b":
        values = sampled[mask]
        return mask & negative & (sampled - values.mean() < -mu * values.std(correction=0))
    below = expected - sampled
    return mask & negative & (below > mu * below[mask].std(correction=0))


@pytest.mark.parametrize(("trainer_class", "method"), BOTH)
def test_tokens_that_are_clipped_leave_the_loss_and_its_denominator(trainer_class, method):
    mu = 0.1  # so that several are clipped of the few that there are
    settings = {f"{method}_mu": mu, **(NO_LIMIT if method == "clip_v" else {})}
    trainer = loss_probe.build(trainer_class, **settings)
    batch = loss_probe.loss_inputs(trainer, shift=0.3)
    leaving, mask = leaving_tokens(trainer, batch, method, mu), batch["completion_mask"].bool()
    assert 3 < leaving.sum() < (mask & (batch["advantages"][:, None] < 0)).sum()
    kept = mask & ~leaving
    assert torch.equal(loss_mask(batch).bool(), kept)
    assert batch["num_items_in_batch"] == kept.sum()
    share = (leaving.sum() / mask.sum()).item()
    assert trainer._metrics["train"][f"{method}/clipped_tokens"] == [pytest.approx(share)]
    logps, _ = loss_probe.loss_pass(trainer, batch)
    ratios, advantages = torch.exp(logps - batch["old_per_token_logps"]), batch["advantages"][:, None]
    losses = torch.maximum(-advantages * ratios, -advantages * ratios.clamp(0.8, 1.2))
    loss_probe.assert_same_step(trainer, batch, losses[kept].sum() / kept.sum())


@pytest.mark.parametrize(("share", "count"), [(0.1, None), (1e-6, 1), (0.0, 0)])
def test_clip_v_takes_the_highest_up_to_its_limit(share, count):
    trainer = loss_probe.build(ClipVTrainer, clip_v_mu=0.0, clip_v_max_share=share)
    batch = loss_probe.loss_inputs(trainer)
    mask = batch["completion_mask"].bool()
    count = int(share * mask.sum()) if count is None else count
    sampled, expected = discriminators(trainer, batch)
    candidates = leaving_tokens(trainer, batch, "clip_v", 0.0)
    assert candidates.sum() > count
    highest = (expected - sampled).masked_fill(~candidates, -torch.inf).flatten().topk(count).indices
    assert torch.equal((mask & ~loss_mask(batch).bool()).flatten().nonzero().flatten(), highest.sort().values)


@pytest.mark.parametrize(("trainer_class", "method"), BOTH)
def test_tokens_of_tools_are_not_looked_at(trainer_class, method):
    """They are no loss tokens: neither in the mean and deviation nor clipped; and they stay out."""
    trainer = loss_probe.build(trainer_class, **{f"{method}_mu": 0.0}, **(NO_LIMIT if method == "clip_v" else {}))
    batch = loss_probe.loss_inputs(trainer)
    plain = {key: value for key, value in batch.items() if key != "tool_mask"}
    mask = batch["completion_mask"].clone()
    mask[:, 1] = 0
    plain |= {"tool_mask": mask, "num_items_in_batch": (mask * batch["completion_mask"]).sum()}
    with torch.no_grad():
        reading, _ = trainer._read_pass(
            trainer.model,
            torch.cat([plain["prompt_ids"], plain["completion_ids"]], dim=1),
            torch.cat([plain["prompt_mask"], plain["completion_mask"]], dim=1),
            mask.size(1),
        )
    reading = TokenReading(*(None if number is None else number.clone() for number in reading))
    for number in reading:
        if number is not None:
            number[:, 1] = 1e6  # what is read there must not matter
    clipped = trainer.with_reading(plain, reading)
    kept = loss_mask(clipped).bool()
    assert not kept[:, 1].any() and 0 < kept.sum() < loss_mask(plain).sum()
    assert clipped["num_items_in_batch"] == kept.sum()


def test_the_deviation_is_not_lost_beside_a_large_mean():
    trainer = loss_probe.build(ClipBTrainer)
    values = 1e3 + torch.tensor([[0.0, 0.25], [0.5, 9.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    mean, deviation, tokens = mean_and_deviation(values, mask, trainer.accelerator)
    assert (mean, tokens) == (1000.25, 3)
    assert deviation == pytest.approx((2 * 0.25**2 / 3) ** 0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("trainer_class", "settings"),
    [(ClipBTrainer, {"clip_b_mu": 1e6}), (ClipVTrainer, {"clip_v_mu": 1e6}), (ClipVTrainer, {"clip_v_max_share": 0})],
)
def test_without_a_clipped_token_it_is_grpo(trainer_class, settings):
    loss_probe.assert_trains_as_plain_grpo(trainer_class, {**OFF_POLICY, **settings})


@pytest.mark.parametrize(("trainer_class", "method"), BOTH)
def test_a_run_logs_the_share_and_the_card_says_the_method(trainer_class, method):
    settings = {f"{method}_mu": 0.1, **(NO_LIMIT if method == "clip_v" else {})}
    trainer = loss_probe.build(trainer_class, **settings, **OFF_POLICY)
    trainer.train()
    assert all(0.0 < share < 0.5 for share in tiny.history(trainer, f"{method}/clipped_tokens"))
    assert "more than 0.1 standard deviations below" in "\n".join(trainer.card_section())


@pytest.mark.parametrize(("trainer_class", "method"), BOTH)
def test_evaluation_is_plain(trainer_class, method):
    trainer = loss_probe.build(trainer_class, **{f"{method}_mu": 0.0})
    inputs = tiny.generation_inputs(trainer)
    trainer.model.eval()
    assert "tool_mask" not in trainer._generate_and_score_completions(inputs)


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (ClipBConfig, {"clip_b_mu": -1}, "clip_b_mu must be finite and at least 0, got -1.0"),
        (ClipVConfig, {"clip_v_mu": "x"}, "clip_v_mu must be a number, got 'x'"),
        (ClipVConfig, {"clip_v_max_share": 2}, "clip_v_max_share must be finite and in 0..1, got 2.0"),
        *(
            (config_class, settings, f"{next(iter(settings))}=.* is not for {config_class.__name__}")
            for config_class in (ClipBConfig, ClipVConfig)
            for settings in (
                {"entropy_coef": 0.01},
                {"loss_type": "sapo"},
                {"importance_sampling_level": "sequence"},
                {"top_entropy_quantile": 0.5},
            )
        ),
    ],
)
def test_settings_are_refused(config_class, settings, message):
    with pytest.raises(ValueError, match=message):
        config_class("run", use_cpu=True, bf16=False, **settings)


def test_on_policy_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what leaves the loss is no matter of ratios
        assert ClipBConfig("run", use_cpu=True, bf16=False, clip_b_mu="1e1").clip_b_mu == 10.0
