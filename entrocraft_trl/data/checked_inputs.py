"""
Rows and rewards of a trainer, checked: before its model loads the rows, and that they have the columns that the reward
functions read; in each batch the rewards.
"""

from typing import Any

from datasets import Dataset
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer.utils import identity

from ..constructor import call_of_trls_constructor
from .reward_guard import RewardGuard
from .rewards import check_reward_columns
from .rows import check_training_rows


class CheckedInputsMixin:
    """
    For TRL's GRPO and RLOO trainers: put it before the trainer among the bases.

    Raises:
        ValueError: If `train_dataset` has too few rows, no prompts, or an empty one, or not the column that a reward
            function cannot do without: before a model loads, unless the trainer has a constructor of its own, then
            right after it. In training, for bad rewards, on all ranks together (see [`RewardGuard`]).
    """

    def __init__(self, *args, **kwargs):
        self._reward_guard = RewardGuard()
        call = call_of_trls_constructor(self, CheckedInputsMixin, args, kwargs)
        if call is not None and (config := call.arguments.get("args")) is not None:
            given = call.arguments.get
            rows, environments = given("train_dataset"), given("environment_factory")
            _check_rows(config, rows, environments)
            if environments is None and given("rollout_func") is None:
                self._check_columns(given("reward_funcs"), rows)
        super().__init__(*args, **kwargs)
        if call is None:
            # RLOO's trainer has neither environments nor a rollout function.
            environments = getattr(self, "environment_factories", None)
            _check_rows(self.args, self.train_dataset, environments)
            if environments is None and getattr(self, "rollout_func", None) is None and self.data_collator is identity:
                self._check_columns(self.reward_funcs, self.train_dataset)

    def _check_columns(self, rewards: Any, rows: Any) -> None:
        """
        Of a data set all of whose columns are known, which reach the reward functions as they are. Environments,
        rollout functions, collators, transforms and methods of the user's may add to them: there the first batch tells
        (see [`RewardGuard`]), since TRL would train.
        """
        if not isinstance(rows, Dataset) or rows.format["type"] == "custom" or _may_change_rows(type(self)):
            return
        check_reward_columns(rewards if isinstance(rewards, list) else [rewards], list(rows[0]))

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        functions, names = self.reward_funcs, self.reward_func_names
        self.reward_funcs = self._reward_guard.wrap(functions, names)
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = functions
        self._reward_guard.refuse(rewards, names, self.accelerator.process_index, prompts, completions)
        if self.model.training:
            self._reward_guard.end_without_rewards(rewards, names)
        return rewards


def _may_change_rows(trainer: type) -> bool:
    """Whether a class of the user's has methods. Any but a constructor may stand between a row and its reward."""
    known = {*GRPOTrainer.__mro__, *RLOOTrainer.__mro__}
    return any(
        hasattr(type(member), "__get__") and name not in ("__init__", "__dict__", "__weakref__")
        for cls in trainer.__mro__
        if cls not in known and cls.__module__.split(".")[0] != "entrocraft_trl"
        for name, member in vars(cls).items()
    )


def _check_rows(config: Any, train_dataset: Any, environments: Any) -> None:
    prompts = config.generation_batch_size // config.num_generations
    check_training_rows(train_dataset, prompts, needs_prompts=environments is None)
