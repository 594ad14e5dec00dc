"""Trains each rival method in one process or as one of several ranks; writes its parameters, and what it measured."""

from unittest.mock import patch

import cases
import numpy as np
import tiny
from launching import part_folder
from trl.trainer import grpo_trainer
from worker import WORLD, full_parameters, reorder

from entrocraft_trl.methods import METHODS


# Of 0 and 1, in each step's batch; one that serves two steps is made at the even ones.
THREE_RIGHT = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
REWARDS = [cases.FIRST_RIGHT, cases.LAST_RIGHT, THREE_RIGHT, cases.FIRST_RIGHT, cases.LAST_RIGHT, cases.ALL_WRONG]
TWO_STEPS = {"steps_per_generation": 2}
SETTINGS = {
    # All candidates are drawn: lots are each rank's own, and would differ from one process's.
    "clip_cov": {"clip_cov_ratio": 1.0, "clip_cov_low": 0.1, **TWO_STEPS},
    "kl_cov": {"kl_cov_ratio": 0.25, **TWO_STEPS},
    "psr": {"reward_coding": "zero_one"},
    "nsr": {"reward_coding": "zero_one", **TWO_STEPS},
    "w_reinforce": {"reward_coding": "zero_one", **TWO_STEPS},
    "raft_plus_plus": {"reward_coding": "zero_one"},
    "aent": {"aent_coef": 0.1, "aent_coef_lr": 0.01, "aent_coef_max": 1.0, "aent_entropy_low": 0.0, **TWO_STEPS},
    "entropic": {"entropic_target": 2.3, "entropic_threshold": 0.1, **TWO_STEPS},
    "entropic_sequence": {"entropic_target": 2.3, "reward_coding": "zero_one"},
    "steer": {"steer_min": 0.1, **TWO_STEPS},
    "clip_b": {"clip_b_mu": 0.5, **TWO_STEPS},
    "clip_v": {"clip_v_mu": 0.0, "clip_v_max_share": 0.15},
    "repo_r": {"repo_zeta": 0.1, "repo_zeta_max": 0.5, "repo_target_entropy": 3.1, **TWO_STEPS},
    "stare": {"stare_target_entropy": 9.0, "stare_positive_weight": 2.0, "stare_negative_weight": 0.2, **TWO_STEPS},
    "dcpo": {"dcpo_target_entropy": 9.0, "dcpo_limit": 1.0, **TWO_STEPS},
}
MEASURED = {
    "clip_cov": "clip_cov/clipped_tokens",
    "kl_cov": "kl_cov/penalty",
    "psr": "reinforce/kept_rollouts",
    "nsr": "reinforce/kept_rollouts",
    "aent": "aent/coef",
    "entropic": "entropic/alpha",
    "entropic_sequence": "entropic/alpha",
    "steer": "steer/mean_weight",
    "clip_b": "clip_b/clipped_tokens",
    "clip_v": "clip_v/clipped_tokens",
    "repo_r": "repo/zeta",
    "stare": "stare/entropy",
    "dcpo": "dcpo/weight",
}


def train(method: str):
    settings = {**SETTINGS[method]}
    steps = settings.get("steps_per_generation", 1)
    rows = cases.ROWS // steps // WORLD
    if method == "aent" and WORLD == 1:
        # Its bonus is a mean over the tokens of a micro-batch, so one process must have the ranks' micro-batches.
        rows, settings["gradient_accumulation_steps"] = rows // cases.RANKS, cases.RANKS
        settings["steps_per_generation"] = steps * cases.RANKS
    trainer_class, config_class = METHODS[method]
    args = tiny.build_config(
        config_class,
        output_dir=str(part_folder(__name__) / "run"),
        max_steps=cases.STEPS,
        learning_rate=0.02,  # at 0.1 rounding grows from step to step beyond the tolerance
        num_generations=cases.ROWS,
        per_device_train_batch_size=rows,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = tiny.build_trainer(
        trainer_class,
        args=args,
        reward_funcs=tiny.table_reward(cases.ROLLOUTS, [reward for rewards in REWARDS for reward in rewards]),
        rollout_func=cases.rows_of_this_rank,
    )
    order = cases.order_of_rows(steps, WORLD)
    with patch.object(grpo_trainer, "shuffle_sequence_dict", lambda batch: reorder(batch, order)):
        trainer.train()
    return trainer


def run(backend: str, reference: str):
    folder, found = part_folder(__name__), {}
    for method in SETTINGS:
        trainer = train(method)
        np.savez(folder / f"{method}-{trainer.accelerator.process_index}.npz", **full_parameters(trainer))
        found[method] = {
            "measured": tiny.history(trainer, MEASURED[method]) if method in MEASURED else [],
            # TRL's is a mean over micro-batches, which are more on one process where a bonus is one over their tokens.
            "entropy": tiny.history(trainer, "aent/clamped_entropy" if method == "aent" else "entropy"),
            "numbers": getattr(trainer, "numbers", {}),
        }
    return trainer.accelerator, found
