"""
What is trained on every backend: rollouts, rewards and bands that make acceptance as uneven over ranks as can be.

A generation batch is one group of 8 rollouts that crosses the ranks: rank 0 of two holds the first four, rank 1 the
others. So "the first four were right, the others wrong" leaves one rank with all of its rollouts and the other with
none as soon as one sign of advantage is rejected.
"""

import tiny


STEPS = 6
ROWS = 8  # rollouts of a generation batch, over all ranks
BACKENDS = ("cpu_ddp", "cpu_zero1", "cpu_zero2", "cpu_zero3", "cpu_fsdp2")
SHARDED = ("cpu_zero3", "cpu_fsdp2")  # no rank has the parameters whole
RANKS = 2  # in the launched runs; one process imitates their micro-batches

TOO_LOW, INSIDE, TOO_HIGH = (50.0, 60.0), (0.0, 100.0), (0.0, 0.0)  # nats; an entropy is at most log(24) = 3.2

FIRST_RIGHT = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
LAST_RIGHT = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
MIXED = [1.0, 0.5, 0.0, 0.0, 0.2, 1.0, 0.0, 1.0]
ALL_RIGHT, ALL_WRONG = [1.0] * ROWS, [0.0] * ROWS

# Band and rewards of each optimizer step. A batch that serves two steps is made at the even ones.
UNEVEN = [
    (TOO_LOW, FIRST_RIGHT),  # A <= 0: rank 0 keeps none, rank 1 keeps all
    (TOO_HIGH, MIXED),
    (TOO_HIGH, FIRST_RIGHT),  # A >= 0: rank 0 keeps all, rank 1 none
    (INSIDE, MIXED),
    (TOO_LOW, LAST_RIGHT),  # A <= 0: rank 0 keeps all, rank 1 none
    (TOO_LOW, MIXED),
]
# With the raw +1/-1 reward as advantage a whole batch can have the wrong sign: steps that accept nothing on any rank.
EMPTY = [
    (TOO_LOW, ALL_RIGHT),
    (TOO_HIGH, FIRST_RIGHT),
    (TOO_HIGH, ALL_WRONG),
    (INSIDE, FIRST_RIGHT),
    (TOO_LOW, ALL_RIGHT),
    (TOO_LOW, LAST_RIGHT),
]
# Equal rewards with a mean that float32 rounds up (0.3) or down (0.9): without a signal, whatever the band.
EQUAL = [
    (TOO_LOW, [0.3] * ROWS),
    (TOO_HIGH, [0.9] * ROWS),
    (TOO_LOW, FIRST_RIGHT),
    (TOO_LOW, [0.3] * ROWS),
    (TOO_HIGH, [0.9] * ROWS),
    (INSIDE, MIXED),
]
# The entropy-change rule rejects by score, in a band near the model's entropy, which is about 2.6 nats.
GRADED = [
    ((2.7, 2.8), FIRST_RIGHT),
    ((2.4, 2.5), MIXED),
    ((2.4, 2.5), FIRST_RIGHT),
    (INSIDE, MIXED),
    ((2.8, 2.9), LAST_RIGHT),
    ((2.7, 2.8), MIXED),
]

ENTROPY_CHANGE = {"rejection_rule": "entropy_change"}
INFLUENCE = {"rejection_rule": "influence"}
CASES = {
    # name: settings of the run, plus "plan" (default: UNEVEN) and "lora" (default: no)
    "drop": {},
    "zero_advantage": {"rejected_rollouts": "zero_advantage"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "two_iterations": {"num_iterations": 2},
    "two_steps_per_generation": {"steps_per_generation": 2},
    "reference_model": {"beta": 0.1},
    "reference_model_zero_advantage": {"beta": 0.1, "rejected_rollouts": "zero_advantage"},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "clipping": {"max_grad_norm": 0.1},  # the gradient's norm is 4 to 8: every step is clipped
    # Adam divides by the gradient's size: it would hide a wrong scale, and so is no more than one case.
    "adamw_and_clipping": {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 0.1},
    "row_means": {"loss_type": "grpo"},
    "micro_batch_token_means": {"loss_type": "bnpo"},
    "floor": {"min_accepted_share": 0.75},
    "nothing_accepted": {"out_of_band_advantages": "reward", "reward_coding": "zero_one", "plan": EMPTY},
    "equal_rewards": {"plan": EQUAL},
    "entropy_change": {**ENTROPY_CHANGE, "plan": GRADED},
    "lora": {"lora": True},
    "lora_zero_advantage": {"lora": True, "rejected_rollouts": "zero_advantage"},
    "lora_everything": {
        "lora": True,
        "beta": 0.1,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "max_grad_norm": 0.1,
    },
    "lora_entropy_change": {"lora": True, **ENTROPY_CHANGE, "plan": GRADED},
    "influence": {**INFLUENCE, "plan": GRADED},
    "influence_accumulation": {**INFLUENCE, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "lora_influence": {"lora": True, **INFLUENCE, "plan": GRADED},
}
LOCAL_COUNTS = "drop:local_counts"  # `drop` on a trainer in which every rank counts only what it kept itself

ROLLOUTS = tiny.random_rollouts(STEPS * ROWS, seed=5)


def cases_of(backend: str | None) -> list[str]:
    """All that the backend can train: what needs whole parameters is refused where they are sharded."""
    return [case for case in CASES if backend not in SHARDED or CASES[case].get("rejection_rule") != "influence"]


def plan_of(case: str) -> list[tuple[tuple[float, float], list[float]]]:
    return CASES[case].get("plan", UNEVEN)


def band_function(case: str):
    """The plan's band as a function of progress; half a step of slack against rounding."""
    plan = plan_of(case)
    return lambda progress: plan[min(int(progress * STEPS + 0.5), STEPS - 1)][0]


def reward_function(case: str):
    """Looks the reward of each rollout up in the plan."""
    return tiny.table_reward(ROLLOUTS, [reward for _, rewards in plan_of(case) for reward in rewards])


def rows_of_this_rank(prompts, trainer) -> dict:
    """A `rollout_func`: this rank's share of the rollouts that the plan holds for the current optimizer step."""
    first = trainer.state.global_step * ROWS + trainer.accelerator.process_index * len(prompts)
    return {
        "prompt_ids": trainer.processing_class(list(prompts))["input_ids"],
        "completion_ids": [list(ids) for ids in ROLLOUTS[first : first + len(prompts)]],
        "logprobs": None,
    }


def order_of_rows(steps_per_generation: int, processes: int) -> list[int]:
    """
    Instead of TRL's shuffle: the order in which this process splits its rows into micro-batches.

    Ranks keep theirs. One process takes the ranks' first micro-batches first, then their second ones, and so on:
    otherwise its optimizer steps would hold other rollouts than the ranks' do.
    """
    if processes > 1:
        return list(range(ROWS // processes))
    share = ROWS // RANKS // steps_per_generation
    return [
        rank * (ROWS // RANKS) + chunk * share + row
        for chunk in range(steps_per_generation)
        for rank in range(RANKS)
        for row in range(share)
    ]
