"""Loss and gradient of a trainer on forced rollouts, beside formulas that are written out in the test."""

import tiny
import torch
from trl import GRPOTrainer


REWARDS = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]  # two groups of 4, unbalanced


def build(trainer_class, rewards=REWARDS, **settings):
    """A trainer on as many forced rollouts as there are rewards, with its model in training mode."""
    rollouts = tiny.random_rollouts(len(rewards))
    config_class = getattr(trainer_class, "_config_class", tiny.GRPOConfig)
    args = tiny.build_config(config_class, **settings)
    trainer = tiny.build_trainer(trainer_class, args=args, reward_funcs=tiny.table_reward(rollouts, rewards))
    tiny.force_rollouts(trainer, rollouts)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def loss_inputs(trainer, shift: float = 0.0) -> dict:
    """
    Loss inputs of one generation batch. With a `shift`, the old policy's log-probs are the current ones and noise of
    that size, so that ratios spread around 1.
    """
    batch = trainer._generate_and_score_completions(tiny.generation_inputs(trainer))
    if shift:
        with torch.no_grad():
            logps, _ = loss_pass(trainer, batch)
        noise = torch.randn(logps.shape, generator=torch.Generator().manual_seed(3))
        batch["old_per_token_logps"] = logps + shift * noise
    return batch


def loss_pass(trainer, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies `(B, T)` from plain TRL's pass, with gradient."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logps, entropies, _ = GRPOTrainer._get_per_token_logps_and_entropies(
        trainer, trainer.model, input_ids, attention_mask, batch["completion_ids"].size(1), compute_entropy=True
    )
    return logps, entropies


def gradient_of(trainer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same_step(trainer, batch, expected: torch.Tensor, rtol: float = 1e-5) -> None:
    """The trainer's loss on `batch` is `expected`, and so is its gradient."""
    loss = trainer._compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=1e-6)
    gradient, reference = gradient_of(trainer, loss), gradient_of(trainer, expected)
    assert max(value.abs().max() for value in reference.values()) > 1e-3, "nothing to compare"
    for name, value in reference.items():
        # float32 sums in another order: a few parts in 1e6 of the largest entry
        size = max(value.abs().max().item(), 1e-3)
        torch.testing.assert_close(gradient[name], value, rtol=1e-4, atol=2e-5 * size)


def assert_trains_as_plain_grpo(
    trainer_class, settings, *, plain_class=GRPOTrainer, plain_settings=None, rewards=None, exact=True
) -> None:
    """
    Both train on the same rollouts from the same start to the same parameters: bit for bit, with all rows computed in
    TRL's order; or up to rounding.
    """
    trained = []
    settings = {"compute_all_rows": True, **settings} if exact else settings
    rewards = REWARDS if rewards is None else rewards
    for kind, chosen in ((trainer_class, settings), (plain_class, {**settings, **(plain_settings or {})})):
        known = getattr(kind, "_config_class", tiny.GRPOConfig).__dataclass_fields__
        trainer = build(kind, rewards, **{name: value for name, value in chosen.items() if name in known})
        trainer.train()
        trained.append(trainer)
    start = tiny.parameters_of(tiny.build_model())
    assert any(not torch.equal(value, start[name]) for name, value in trained[1].model.named_parameters())
    if exact:
        tiny.assert_same_parameters(trained[0].model, trained[1].model)
        return
    for (name, value), other in zip(trained[0].model.named_parameters(), trained[1].model.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=name)


# Four optimizer steps, two a generation: the second is off-policy.
OFF_POLICY = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "max_steps": 4, "learning_rate": 0.02}
