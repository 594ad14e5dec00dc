"""The rule `influence` in a trainer: it keeps what exact gradients say, costs nothing inside the band, or says no."""

import pytest
import tiny
import torch
from peft import LoraConfig

from entrocraft_trl import EntrocraftGRPOTrainer, EntrocraftRLOOTrainer
from entrocraft_trl.control import diagnosis, rejection
from entrocraft_trl.policy.mixin import Heard


ROWS = 16
INFLUENCE = {"rejection_rule": "influence"}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
ROLLOUTS = tiny.random_rollouts(ROWS)
REWARDS = [float(index % 3 == 0) + 0.1 * index for index in range(ROWS)]
# Near the model's entropy of about 2.6 nats: some of what goes the wrong way has to go, and not all of it.
BANDS = {
    "below": tiny.TOO_LOW,
    "above": tiny.TOO_HIGH,
    "near the low edge": {"entropy_low": [2.57], "entropy_high": [2.77], "entropy_unit": "nats"},
}


class Recording:
    """Notes what was judged: the loss inputs, before anything is taken out, and the keep mask."""

    def _take_out(self, batch, keep, counts):
        self.judged = batch, keep.clone()
        return super()._take_out(batch, keep, counts)


class RecordingGRPO(Recording, EntrocraftGRPOTrainer):
    pass


class RecordingRLOO(Recording, EntrocraftRLOOTrainer):
    pass


def judged(trainer_class=RecordingGRPO, lora=False, **settings):
    """A trainer that has prepared one batch of loss inputs."""
    torch.manual_seed(0)
    args = tiny.build_config(trainer_class._config_class, per_device_train_batch_size=ROWS, **INFLUENCE, **settings)
    trainer = tiny.build_trainer(
        trainer_class,
        args=args,
        reward_funcs=tiny.table_reward(ROLLOUTS, REWARDS),
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    tiny.force_rollouts(trainer, ROLLOUTS)
    trainer.model.train()
    trainer.state.max_steps = 1
    trainer._generate_and_score_completions(tiny.generation_inputs(trainer))
    return trainer


def exact_scores(trainer, batch, aggregation, row_means):
    """
    From raw logits: `-A_i <G, grad log pi(y_i)>`, log pi the sum or, for row means, the mean of the log-probs, in
    units of its mean size; and as much of `A_i sum (S - N)`, or mean.
    """
    causal_lm = trainer._causal_lm()
    forward = type(causal_lm).forward  # without TRL's fused head
    trainer.model.eval()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = forward(causal_lm, input_ids=ids, attention_mask=attention_mask).logits
    log_p = logits[:, batch["prompt_ids"].size(1) - 1 : -1].log_softmax(-1)
    mask = batch["completion_mask"]
    entropies = -(log_p.exp() * log_p).sum(-1) * mask
    logps = log_p.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1) * mask
    entropy = entropies.sum() / mask.sum() if aggregation == "token" else (entropies.sum(1) / mask.sum(1)).mean()
    values = logps.sum(1) / mask.sum(1) if row_means else logps.sum(1)
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]

    def gradient(value):
        return torch.cat(
            [part.flatten() for part in torch.autograd.grad(value, parameters, retain_graph=True)]
        ).double()

    g = gradient(entropy)
    products = torch.stack([gradient(value) @ g for value in values])
    p, h = log_p.exp().detach(), entropies.detach()
    n = (p.square() * (log_p.detach() + h.unsqueeze(-1))).sum(-1)
    s = p.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1) * (logps.detach() + h)
    margins = ((s - n) * mask).sum(1) / (mask.sum(1) if row_means else 1)
    shared, own = -batch["advantages"] * products.float(), batch["advantages"] * margins
    return shared / shared.abs().mean() + own / own.abs().mean(), entropy.item()


CASES = {
    "full": {},
    "LoRA": {"lora": True},
    "row means": {"loss_type": "grpo"},
    "sequence entropy": {"entropy_aggregation": "sequence"},
    "RLOO": {"trainer_class": RecordingRLOO, "beta": 0.0},  # without the penalty, which is part of its advantages
    "TRL's own pass": {"num_iterations": 2},
}


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_is_what_exact_gradients_say(case, band):
    settings = {**CASES[case], **BANDS[band]}
    trainer = judged(**settings)
    batch, keep = trainer.judged
    scores, entropy = exact_scores(
        trainer, batch, settings.get("entropy_aggregation", "token"), settings.get("loss_type") == "grpo"
    )
    low, high = settings["entropy_low"][0], settings["entropy_high"][0]
    cushion = rejection.cushion_width(trainer.control_memory.reading_scatter)
    offset = rejection.integrate_offset(0.0, entropy, low, high, cushion=cushion)
    least, most = rejection.allowed_change(entropy, low, high, cushion=cushion, offset=offset)
    assert keep.tolist() == rejection.accept_by_entropy_change(scores, least, most).tolist()
    assert 0 < keep.sum() < ROWS
    by_sign = rejection.accept_by_advantage_sign(batch["advantages"], -1 if band != "above" else 1)
    assert keep.tolist() != by_sign.tolist(), "the case cannot tell the rules apart"
    (agreeing,) = trainer._metrics["train"]["entrocraft/influence_agrees"]
    assert agreeing == pytest.approx(((scores > 0) == (batch["advantages"] > 0)).float().mean().item())


def summed_entropy(trainer, batch) -> float:
    mask = batch["completion_mask"]
    tokens, _ = trainer.read_policy(batch, mask, Heard(not_recorded="the rollouts are from before the update"))
    return (tokens.entropies * mask).sum().item()


def test_an_update_by_what_is_kept_moves_the_entropy_the_right_way():
    """The rule's promise, for a small plain gradient step: what is left raises, or lowers, the entropy."""
    for band, direction in (("below", 1), ("above", -1)):
        trainer = judged(**BANDS[band])
        batch, keep = trainer.judged
        trainer.model.eval()
        before = summed_entropy(trainer, batch)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        logits = trainer.model(input_ids=ids, attention_mask=attention_mask).logits
        log_p = logits[:, batch["prompt_ids"].size(1) - 1 : -1].log_softmax(-1)
        logps = log_p.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1) * batch["completion_mask"]
        (batch["advantages"] * keep * logps.sum(1)).sum().backward()
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(1e-5 * parameter.grad)
        assert direction * (summed_entropy(trainer, batch) - before) > 0


# ------------------------------------------------------------------------------------------------- nothing in the band


def test_inside_the_band_no_gradient_is_taken(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: pytest.fail("a gradient was taken"))
    trainer = judged(**tiny.WIDE_OPEN)
    assert trainer.judged[1].all()
    assert "entrocraft/influence_agrees" not in trainer._metrics["train"]


def test_where_no_rollout_has_an_advantage_no_gradient_is_taken(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: pytest.fail("a gradient was taken"))
    args = tiny.build_config(**INFLUENCE, **tiny.TOO_LOW)
    trainer = tiny.build_trainer(args=args, reward_funcs=lambda completions, **kwargs: [1.0] * len(completions))
    trainer.train()
    assert tiny.history(trainer, "entrocraft/accepted_rollouts") == [1.0]


def test_one_seed_gives_one_run_out_of_the_band_too():
    """Dropout in the loss draws from a state that the rule leaves alone: if nothing is taken out, two rules agree."""
    runs = []
    for rule in ("advantage_sign", "influence"):
        args = tiny.build_config(max_steps=2, learning_rate=0.02, rejection_rule=rule, **tiny.TOO_LOW)
        torch.manual_seed(3)
        trainer = tiny.build_trainer(model=tiny.build_model(attention_dropout=0.3), args=args)
        trainer._take_out = lambda batch, keep, counts: batch
        trainer.train()
        runs.append((trainer, tiny.rng_states()))
    tiny.assert_same_parameters(runs[0][0].model, runs[1][0].model)
    assert runs[0][1] == runs[1][1]
    assert len(tiny.history(runs[1][0], "entrocraft/influence_agrees")) == 2


# ------------------------------------------------------------------------------------------------------------ refusals


def test_fp16_is_refused():
    with pytest.raises(ValueError, match="rejection_rule='influence'.*fp16=True.*bf16=True.*'entropy_change'"):
        tiny.build_config(fp16=True, **INFLUENCE)


@pytest.mark.parametrize("rule", ["influence", "entropy_change"])
@pytest.mark.parametrize("by", ["argument", "launcher"])
def test_fsdp_is_refused_by_influence_alone(rule, by, monkeypatch):
    if by == "launcher":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    settings = {"rejection_rule": rule, **({"fsdp": True} if by == "argument" else {})}
    if rule == "entropy_change":
        tiny.build_config(**settings)
        return
    with pytest.raises(
        ValueError, match="rejection_rule='influence'.*FSDP spreads them.*ZeRO-2 or DDP.*entropy_change"
    ):
        tiny.build_config(**settings)


@pytest.mark.parametrize("settings", [{"top_entropy_quantile": 0.2}, {"entropy_source": "sampling"}])
def test_what_the_entropy_change_rule_refuses_is_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"rejection_rule='influence'.*{name}={value!r}"):
        tiny.build_config(**INFLUENCE, **settings)


def test_an_unknown_loss_is_refused():
    class Mine(EntrocraftGRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    args = tiny.build_config(rejected_rollouts="zero_advantage", **INFLUENCE)
    with pytest.raises(TypeError, match="Mine computes a loss of its own"):
        tiny.build_trainer(Mine, args=args)


# ---------------------------------------------------------------------------------------------------------- pure parts


def test_scores_take_the_place_of_those_of_the_entropy_change_rule():
    """A gradient step on `A log pi` moves the entropy by `A D`; accepting a rollout changes it by `-c`."""
    advantages, derivatives = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([3.0, 0.5, 9.0])
    scores = rejection.influence_scores(advantages, derivatives)
    assert scores.tolist() == [-6.0, 0.5, 0.0]
    assert rejection.accept_by_entropy_change(scores, 1.0, 1.0).tolist() == [True, False, True]  # a rise is wanted
    assert torch.equal(rejection.influence_scores(advantages, derivatives, torch.tensor(0.5)), scores / 2)


def test_both_scores_count_alike_whatever_their_units():
    own, shared = torch.tensor([1.0, -3.0, 2.0]), torch.tensor([30.0, 20.0, 10.0])
    both = rejection.both_scores(own, shared)
    assert both.tolist() == pytest.approx([0.5 + 1.5, -1.5 + 1.0, 1.0 + 0.5])
    assert torch.equal(rejection.both_scores(own * 8, shared / 4), both)
    assert torch.equal(rejection.both_scores(own * 0, shared), shared / 20)


def test_share_of_one_sign_counts_rollouts_with_an_advantage():
    advantages = torch.tensor([1.0, -1.0, 1.0, 0.0])
    assert diagnosis.share_of_one_sign(torch.tensor([0.5, 0.5, 2.0, 3.0]), advantages) == pytest.approx(2 / 3)
