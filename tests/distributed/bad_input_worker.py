"""Bad input on one of two ranks: each case must end both ranks with the same message. Then a healthy run."""

import math
import os

import tiny
import torch
from launching import part_folder

from entrocraft_trl import EntrocraftGRPOTrainer


RANK = int(os.environ.get("RANK", "0"))
ROLLOUTS = tiny.random_rollouts(8)


def on_rank(rank: int, change):
    """A reward function that is healthy on all ranks but one, where `change(rewards)` has the last word."""

    def judge(completion_ids, **kwargs):
        rewards = [float(len(ids)) for ids in completion_ids]
        return change(rewards) if RANK == rank else rewards

    return judge


def fail_alone(rewards):
    raise KeyError("only here")


class BrokenOnRankOne(EntrocraftGRPOTrainer):
    """As if the model of rank 1 returned NaN for its second rollout."""

    def read_policy(self, *args):
        tokens, source = super().read_policy(*args)
        if RANK == 1:
            tokens.entropies[1, 0] = math.nan
        return tokens, source


def train(trainer_class=EntrocraftGRPOTrainer, reward=tiny.share_of_digits, steps=2):
    trainer = tiny.build_trainer(
        trainer_class,
        args=tiny.build_config(
            output_dir=str(part_folder(__name__) / "run"),
            per_device_train_batch_size=4,
            max_steps=steps,
            dataloader_pin_memory=False,
        ),
        reward_funcs=reward,
        rollout_func=tiny.rollout_function(ROLLOUTS[4 * RANK : 4 * RANK + 4]),
    )
    try:
        trainer.train()
    except (ValueError, FloatingPointError) as error:
        cause = None if error.__cause__ is None else repr(error.__cause__)
        return trainer, {"error": f"{type(error).__name__}: {error}", "cause": cause}
    weights = torch.stack([parameter.detach().double().sum() for parameter in trainer.model.parameters()])
    return trainer, {"steps": trainer.state.global_step, "weights": weights.tolist()}


def run(backend: str, reference: str):
    outcomes = {}
    for name, rank, change in (
        ("infinite", 1, lambda rewards: [*rewards[:2], math.inf, rewards[3]]),
        ("text", 0, lambda rewards: [*rewards[:2], "good", rewards[3]]),
        ("too few", 1, lambda rewards: rewards[:3]),
        ("exception", 0, fail_alone),
    ):
        _, outcomes[name] = train(reward=on_rank(rank, change))
    _, outcomes["unscored"] = train(reward=on_rank(RANK, lambda rewards: [None] * len(rewards)), steps=12)
    _, outcomes["half scored"] = train(reward=on_rank(1, lambda rewards: [None] * len(rewards)), steps=12)
    trainer, outcomes["logits"] = train(BrokenOnRankOne)
    outcomes["logits"]["initial_entropy"] = trainer.control_memory.initial_entropy
    trainer, outcomes["healthy"] = train()

    return trainer.accelerator, outcomes
