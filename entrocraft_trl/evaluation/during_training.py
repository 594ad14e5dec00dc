"""Accuracy during training: mean@n and pass@k of every evaluation that TRL's trainers run (`eval_strategy`)."""

from __future__ import annotations

from transformers.trainer_utils import EvalLoopOutput

from .accuracy import default_ks, right_by_prompt, summarise


class EvaluationMetricsMixin:
    """
    Adds `eval_mean@<n>` and `eval_pass@<k>` to the metrics of an evaluation, with `n = num_generations_eval` (by
    default `num_generations`) samples a prompt and `k` the powers of two up to `n`, and `n`.

    A completion is right if the reward at `accuracy_reward_index` exceeds `accuracy_threshold`: by default the first
    reward function and 0.5, which suits rewards of 0 and 1 as well as -1 and 1. Set them on the class or the trainer.

    Put before the trainer among the bases. Listens to `_calculate_rewards`; the rewards there are those of all ranks,
    in the order of the data, so every rank computes the same metrics and nothing is communicated.
    """

    accuracy_reward_index = 0
    accuracy_threshold = 0.5
    _evaluation_rewards: list[float] | None = None

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._evaluation_rewards = []
        try:
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            rewards, self._evaluation_rewards = self._evaluation_rewards, None
        n = self.num_generations_eval
        if hasattr(dataloader.dataset, "__len__"):
            # With several processes, the last batch is filled up with the first prompts again, which count once.
            rewards = rewards[: len(dataloader.dataset) * n]
        if rewards:
            correct = right_by_prompt(rewards, n, self.accuracy_threshold)
            for name, value in summarise(correct, ks=default_ks(n)).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _calculate_rewards(self, *args, **kwargs):
        rewards = super()._calculate_rewards(*args, **kwargs)
        if self._evaluation_rewards is not None:
            self._evaluation_rewards += rewards[:, self.accuracy_reward_index].tolist()
        return rewards
