"""Rows and rewards of a trainer, checked: the rows before its model loads, the rewards in each batch."""

from typing import Any

from ..constructor import call_of_trls_constructor
from .reward_guard import RewardGuard
from .rows import check_training_rows


class CheckedInputsMixin:
    """
    For TRL's GRPO and RLOO trainers: put it before the trainer among the bases.

    Raises:
        ValueError: If `train_dataset` has too few rows, no prompts, or an empty one: before a model loads, unless the
            trainer has a constructor of its own, then right after it. In training, for bad rewards, on all ranks
            together (see [`RewardGuard`]).
    """

    def __init__(self, *args, **kwargs):
        self._reward_guard = RewardGuard()
        call = call_of_trls_constructor(self, CheckedInputsMixin, args, kwargs)
        if call is not None and (config := call.arguments.get("args")) is not None:
            _check_rows(config, *map(call.arguments.get, ("train_dataset", "environment_factory")))
        super().__init__(*args, **kwargs)
        if call is None:
            # RLOO's trainer has no environments.
            _check_rows(self.args, self.train_dataset, getattr(self, "environment_factories", None))

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


def _check_rows(config: Any, train_dataset: Any, environments: Any) -> None:
    prompts = config.generation_batch_size // config.num_generations
    check_training_rows(train_dataset, prompts, needs_prompts=environments is None)
