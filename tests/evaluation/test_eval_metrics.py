"""`eval_mean@n` and `eval_pass@k` of evaluations during training, against counting by hand."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from entrocraft_trl import EntrocraftGRPOTrainer, EntrocraftRLOOTrainer
from entrocraft_trl.evaluation.accuracy import default_ks, right_by_prompt
from entrocraft_trl.evaluation.during_training import EvaluationMetricsMixin


# Five prompts, four samples each, in batches of two prompts: the last batch is shorter than the others.
PROMPTS, N = 5, 4
EVALUATION = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8, "num_generations_eval": N}


def pass_rates(counts: list[int], n: int) -> dict[int, float]:
    """By the formula of the paper, with exact binomials; for k = 1, 2, 4 of four samples."""
    return {
        k: sum(1 - math.comb(n - c, k) / math.comb(n, k) for c in counts) / len(counts) for k in (1, 2, 4) if k <= n
    }


def recording_reward(seen: list):
    def starts_with_digit(prompts, completions, **kwargs):
        rewards = [float(text[:1].isdigit()) for text in completions]
        seen.append(list(zip(prompts, rewards, strict=True)))
        return rewards

    return starts_with_digit


@pytest.mark.parametrize("trainer_class", [EntrocraftGRPOTrainer, EntrocraftRLOOTrainer])
def test_metrics_equal_counting_by_hand(trainer_class):
    seen = []
    more = {"beta": 0.0} if trainer_class is EntrocraftRLOOTrainer else {}  # no reference model
    args = tiny.build_config(trainer_class._config_class, **EVALUATION, **more, max_steps=2, num_generations=2)
    trainer = tiny.build_trainer(
        trainer_class, args=args, reward_funcs=recording_reward(seen), eval_dataset=tiny.build_dataset(PROMPTS)
    )
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if f"eval_mean@{N}" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2]
    # Calls: a training batch, then the three batches of an evaluation, twice.
    for logged, batches in zip(evaluations, (seen[1:4], seen[5:8]), strict=True):
        rows = [row for batch in batches for row in batch]
        assert len(rows) == PROMPTS * N
        groups = [rows[start : start + N] for start in range(0, len(rows), N)]
        assert all(len({prompt for prompt, _ in group}) == 1 for group in groups)
        counts = [int(sum(reward for _, reward in group)) for group in groups]
        assert logged[f"eval_mean@{N}"] == sum(counts) / (PROMPTS * N)
        assert {k: logged[f"eval_pass@{k}"] for k in (1, 2, 4)} == pytest.approx(pass_rates(counts, N), abs=1e-12)
    assert not any("pass@" in key for entry in trainer.state.log_history for key in entry if "loss" in entry)


def scripted_trainer(table: dict[str, list[float]], **attributes):
    """A trainer whose rewards are looked up: sample by sample of each prompt, in order; NaN is None."""
    served: dict[str, int] = {}

    def style(completions, **kwargs):
        return [1.0] * len(completions)

    def reward(prompts, completions, **kwargs):
        values = []
        for prompt in prompts:
            index = served[prompt] = served.get(prompt, -1) + 1
            values.append(None if math.isnan(table[prompt][index % N]) else table[prompt][index % N])
        return values

    args = tiny.build_config(**EVALUATION)
    dataset = Dataset.from_dict({"prompt": list(table)})
    trainer = tiny.build_trainer(args=args, reward_funcs=[reward, style], eval_dataset=dataset)
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


TABLE = {"1+2=?": [1.0, 1.0, 0.5, math.nan], "2+2=?": [0.0] * 4, "3+2=?": [0.6, 0.0, -1.0, 0.0]}


def test_a_reward_above_one_half_of_the_first_function_is_right():
    metrics = scripted_trainer(TABLE).evaluate()
    assert metrics["eval_mean@4"] == 3 / 12  # two, none, one; 0.5 and no reward are not above 0.5
    expected = pass_rates([2, 0, 1], N)
    assert {k: metrics[f"eval_pass@{k}"] for k in (1, 2, 4)} == pytest.approx(expected)


def test_another_function_or_threshold_on_request():
    assert scripted_trainer(TABLE, accuracy_reward_index=1).evaluate()["eval_mean@4"] == 1.0
    assert scripted_trainer(TABLE, accuracy_threshold=0.7).evaluate()["eval_mean@4"] == 2 / 12


def test_every_data_set_has_its_prefix_and_the_metric_can_choose_the_best_model():
    trainer = scripted_trainer(TABLE)
    trainer.eval_dataset = {"easy": Dataset.from_dict({"prompt": ["1+2=?"]}), "hard": trainer.eval_dataset}
    metrics = trainer.evaluate()
    assert metrics["eval_easy_mean@4"] == 2 / 4 and metrics["eval_easy_pass@4"] == 1.0
    assert metrics["eval_hard_mean@4"] == 3 / 12
    assert trainer._evaluation_rewards is None  # nothing is collected outside an evaluation


def test_it_works_on_a_plain_trainer():
    class Plain(EvaluationMetricsMixin, GRPOTrainer):
        pass

    args = tiny.build_config(GRPOConfig, **EVALUATION)
    trainer = tiny.build_trainer(Plain, args=args, eval_dataset=tiny.build_dataset(2))
    assert "eval_pass@4" in trainer.evaluate()


@pytest.mark.parametrize("processes", [2, 3])
def test_prompts_that_fill_up_the_last_batch_count_once(processes):
    """Accelerate's own sampler deals the rows to `processes`; the rewards come back in the order of a gather."""
    rows = RepeatSampler(range(PROMPTS), mini_repeat_count=N, shuffle=False)
    rewards = [float(index % 3 == 0) for index in range(PROMPTS)]
    size = {2: 6, 3: 4}[processes]  # rows per process and batch; with six, groups of four samples straddle processes
    dealt = [
        list(BatchSamplerShard(BatchSampler(rows, size, drop_last=False), processes, index, even_batches=True))
        for index in range(processes)
    ]
    gathered = [torch.tensor([[rewards[row]] for part in parts for row in part]) for parts in zip(*dealt, strict=True)]
    assert sum(map(len, gathered)) > PROMPTS * N  # some rows come twice

    class Loop:
        num_generations_eval = N

        def evaluation_loop(self, dataloader, metric_key_prefix):
            for batch in gathered:
                self._calculate_rewards(batch)
            return SimpleNamespace(metrics={})

        def _calculate_rewards(self, batch):
            return batch

    class Ours(EvaluationMetricsMixin, Loop):
        pass

    output = Ours().evaluation_loop(SimpleNamespace(dataset=range(PROMPTS)), metric_key_prefix="eval")
    assert output.metrics["eval_mean@4"] == sum(rewards) / PROMPTS == output.metrics["eval_pass@4"]


def test_values_of_k():
    assert [default_ks(n) for n in (1, 2, 6, 8, 32)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8], [1, 2, 4, 8, 16, 32]]


def test_rewards_of_half_a_prompt_are_refused():
    with pytest.raises(ValueError, match="7 rewards are not a whole number of prompts with n=4 samples"):
        right_by_prompt([1.0] * 7, 4)
