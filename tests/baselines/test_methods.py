"""What every method has: a resumed run is the uninterrupted one, its card says it, its state is its own."""

from pathlib import Path

import pytest
import tiny
from huggingface_hub import ModelCard

from entrocraft_trl.baselines.aent import AEntTrainer
from entrocraft_trl.methods import METHODS


RIVALS = [method for method in METHODS if method != "entrocraft"]
# For methods that would leave these few rollouts alone at their defaults, and be resumed as plain GRPO.
ACTING = {
    "clip_b": {"clip_b_mu": 0.1},
    "clip_v": {"clip_v_mu": 0.1, "clip_v_max_share": 0.2},
    "stare": {"stare_target_entropy": 9.0, "stare_positive_weight": 2.0},
}
CLOCK = {*tiny.CLOCK, "train_loss"}


def sign_of_digits(completions, **kwargs) -> list[float]:
    """+1 or -1, of which random completions have both."""
    return [1.0 if sum(char.isdigit() for char in text) * 2 > len(text) else -1.0 for text in completions]


def run(method, output_dir, resume=None, **settings):
    """Six steps, two a generation, saved after the third: in the middle of a generation block."""
    settings = {
        **{"per_device_train_batch_size": 4, "steps_per_generation": 2, "max_steps": 6, "learning_rate": 0.02},
        **{"save_strategy": "steps", "save_steps": 3, "output_dir": output_dir},
        **ACTING.get(method, {}),
        **settings,
    }
    trainer_class, config_class = METHODS[method]
    args = tiny.build_config(config_class, **settings)
    trainer = tiny.build_trainer(
        trainer_class, args=args, train_dataset=tiny.build_dataset(64), reward_funcs=sign_of_digits
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def log_of(trainer) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in trainer.state.log_history]


@pytest.mark.parametrize("method", RIVALS)
def test_a_resumed_run_is_the_uninterrupted_one_and_the_card_says_the_method(method):
    whole = run(method, "whole")
    resumed = run(method, "resumed", "whole/checkpoint-3")
    tiny.assert_same_parameters(resumed.model, whole.model)
    assert log_of(resumed) == log_of(whole)
    if hasattr(whole, "numbers"):
        assert resumed.numbers == whole.numbers != whole.starting_numbers()
    card = ModelCard.load(Path("whole/README.md"))
    said = "\n".join(whole.card_section())
    assert said in card.text
    assert whole._paper.get("id", "") in card.text
    if method != "grpo":
        assert said.startswith(f"## {whole._name}\n")
        assert set(whole._tag_names) <= set(card.data.tags)


def test_the_state_of_another_method_is_refused(monkeypatch):
    run("aent", "whole", max_steps=3)
    monkeypatch.setattr(AEntTrainer, "_name", "Another")
    with pytest.raises(ValueError, match="of AEnt, where Another needs numbers named coef"):
        run("aent", "resumed", "whole/checkpoint-3")


def test_a_checkpoint_without_the_state_is_said(caplog):
    run("grpo", "whole", max_steps=3)
    resumed = run("aent", "resumed", "whole/checkpoint-3", max_steps=3)
    assert "checkpoint at step 3 holds no state of AEnt" in caplog.text
    assert resumed.numbers == {"coef": 1e-3}


def test_every_method_is_a_trainer_of_trls_with_a_config_of_its_own():
    for method, (trainer_class, config_class) in METHODS.items():
        assert issubclass(trainer_class, tiny.GRPOTrainer) and issubclass(config_class, tiny.GRPOConfig)
        assert trainer_class._config_class is config_class  # what it asks of `args`
        # Python, YAML and the command line: each field that is added has words in the help.
        fields = config_class.__dataclass_fields__
        added = set(fields) - set(tiny.GRPOConfig.__dataclass_fields__)
        assert all(fields[name].metadata.get("help") for name in added), method
