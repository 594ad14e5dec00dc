"""A resumed run is the uninterrupted one, whatever is left of a generation batch: spares, fillers, or TRL's own."""

from pathlib import Path

import pytest
import tiny
import torch
from equality import LORA
from peft import LoraConfig

from entrocraft_trl import EntrocraftGRPOTrainer, EntrocraftRLOOTrainer
from entrocraft_trl.baselines.base import BaselineTrainer
from entrocraft_trl.checkpoints.rank_file import read_rank_file
from entrocraft_trl.normalisation import KEPT, WEIGHT


# Two optimizer steps a generation, two micro-steps each; a checkpoint after the first of them.
SETTINGS = {
    **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
    **{"max_steps": 6, "learning_rate": 0.02, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"},
}


def half_right(completions, **kwargs) -> list[float]:
    """Half of the groups are dead: prompts come in groups of four."""
    return [float(index // 4 % 2 and sum(map(ord, text)) % 2) for index, text in enumerate(completions)]


def run(output_dir, resume=None, trainer_class=EntrocraftGRPOTrainer, peft_config=None, **settings):
    band = tiny.TOO_LOW if trainer_class is not BaselineTrainer else {}
    args = tiny.build_config(trainer_class._config_class, output_dir=output_dir, **{**SETTINGS, **band, **settings})
    data = tiny.build_dataset(64)
    arguments = {"train_dataset": data, "reward_funcs": half_right, "peft_config": peft_config}
    trainer = tiny.build_trainer(trainer_class, args=args, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def log_of(trainer):
    ignored = (*tiny.CLOCK, "train_loss")
    return [{key: value for key, value in line.items() if key not in ignored} for line in trainer.state.log_history]


def buffer_of(checkpoint):
    return read_rank_file(Path(checkpoint, "entrocraft_rank_0.pt"))["buffered_inputs"]


@pytest.mark.parametrize(
    ("trainer_class", "settings"),
    [
        (EntrocraftGRPOTrainer, {}),
        (EntrocraftGRPOTrainer, {"loss_type": "bnpo", "logging_steps": 4}),
        (EntrocraftGRPOTrainer, {"loss_type": "grpo", "num_iterations": 2}),
        (EntrocraftRLOOTrainer, {"beta": 0.0}),
        (BaselineTrainer, {}),
    ],
)
def test_with_spares(trainer_class, settings):
    whole = run("whole", trainer_class=trainer_class, **settings)
    left = buffer_of("whole/checkpoint-3")
    assert {} in left and any(WEIGHT in inputs for inputs in left), "nothing is put to the test"
    resumed = run("resumed", "whole/checkpoint-3", trainer_class, **settings)
    tiny.assert_same_parameters(resumed.model, whole.model)
    assert log_of(resumed) == log_of(whole)


def test_with_log_probs_of_passes_that_had_waited():
    settings = {"beta": 0.1, "peft_config": LoraConfig(**LORA)}
    whole = run("whole", **settings)
    left = [inputs for inputs in buffer_of("whole/checkpoint-3") if inputs]
    for key in ("old_per_token_logps", "ref_per_token_logps"):
        assert all(WEIGHT in inputs and not inputs[key].isnan().any() for inputs in left)
    resumed = run("resumed", "whole/checkpoint-3", **settings)
    tiny.assert_same_parameters(resumed.model, whole.model)
    assert log_of(resumed) == log_of(whole)


def test_a_checkpoint_of_a_version_that_computed_all_rows():
    """What is left of its generation batch is TRL's split, with the marks of a rejection: it is trained as it is."""
    whole = run("whole", compute_all_rows=True)
    left = buffer_of("whole/checkpoint-3")
    assert {} not in left and all(KEPT in inputs and WEIGHT not in inputs for inputs in left)
    resumed = run("resumed", "whole/checkpoint-3")
    assert tiny.history(resumed, "entrocraft/computed_rows")[-1] < 1
    for (name, value), other in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=name)
    assert tiny.history(resumed, "grad_norm") == pytest.approx(tiny.history(whole, "grad_norm"), rel=1e-3)


def test_the_switch_may_be_thrown_in_between():
    whole = run("whole")
    assert {} in buffer_of("whole/checkpoint-3")
    resumed = run("resumed", "whole/checkpoint-3", compute_all_rows=True)
    assert tiny.history(resumed, "entrocraft/computed_rows")[-1] == 1
    for (name, value), other in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=name)
