"""The model card: TRL's, with the method's own words, figure and results of the run, valid at every save."""

import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import tiny
from huggingface_hub import ModelCard
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer

from entrocraft_trl import EntrocraftRLOOTrainer
from entrocraft_trl.reports import model_card
from entrocraft_trl.reports.hub_names import drop_paths, is_hub_name
from entrocraft_trl.reports.model_card import BEFORE, ModelCardMixin, how_to_load, result_table


# Multiples of the first entropy; tiny models leave it soon, so that the share of steps inside is neither 0 nor 1.
BAND = {"entropy_low": [0.9, 0.5], "entropy_high": [1.05, 0.6]}


class PlainTrainer(ModelCardMixin, GRPOTrainer):
    """A method that says nothing of itself; TRL's card has its name and its paper."""


class RivalTrainer(PlainTrainer):
    def card_section(self):
        return ["## My method", "", "Every other rollout went."]


def train_without_control(trainer_class=PlainTrainer, keep_key=lambda key: True):
    """A finished run; its log holds what `keep_key` lets through."""
    trainer = tiny.build_trainer(trainer_class, args=tiny.build_config(GRPOConfig, max_steps=2))
    trainer.train()
    trainer.state.log_history = [
        {key: value for key, value in record.items() if keep_key(key)} for record in trainer.state.log_history
    ]
    trainer.create_model_card()
    return trainer


def train(**settings):
    args = tiny.build_config(**{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **BAND, **settings})
    trainer = tiny.build_trainer(args=args)
    trainer.train()
    return trainer


def card_text(folder="run") -> str:
    return ModelCard.load(Path(folder) / "README.md").text


def card_of(folder="run") -> str:
    card = ModelCard.load(Path(folder) / "README.md")
    assert card.data.library_name and {"trl", "entrocraft"} <= set(card.data.tags)
    return card.text


def table_rows(text: str) -> dict[str, list[str]]:
    """First cell -> other cells, of all tables in the text."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


def test_card_of_a_run():
    trainer = train()
    text = card_of()
    initial = trainer.control_memory.initial_entropy
    rows = table_rows(text)
    assert rows["0%"] == [f"{0.9 * initial:.3f}", f"{1.05 * initial:.3f}"]
    assert rows["50%"] == [f"{0.7 * initial:.3f}", f"{0.825 * initial:.3f}"]
    assert rows["100%"] == [f"{0.5 * initial:.3f}", f"{0.6 * initial:.3f}"]
    assert f"The entropy measured first was {initial:.3f} nats." in text

    entropy, low, high, accepted = (
        tiny.history(trainer, f"entrocraft/{key}")
        for key in ("entropy", "entropy_low", "entropy_high", "accepted_rollouts")
    )
    assert rows["optimizer steps"] == ["4 of 4"]
    assert rows["last measured entropy"] == [f"{entropy[-1]:.3f} nats (band {low[-1]:.3f} to {high[-1]:.3f})"]
    inside = sum(a <= h <= b for h, a, b in zip(entropy, low, high, strict=True))
    assert rows["logged steps inside the band"] == [f"{inside / 4:.0%}"]
    assert rows["accepted rollouts, mean"] == [f"{sum(accepted) / 4:.0%}"]
    assert rows["last mean reward"] == [f"{tiny.history(trainer, 'reward')[-1]:.3f}"]

    assert "Algorithm 1 of the paper" in text and "Rule: `advantage_sign`" in text and "`linear`" in text
    assert "huggingface.co/papers/2604.26326" in text and "li2026entrocraft" in text


@pytest.mark.figure
def test_figure_lies_beside_the_card():
    train()
    (link,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", card_of())
    assert link == "entropy.png"
    assert matplotlib.image.imread(Path("run") / link).std() > 0
    assert [path.name for path in Path("run").glob("_*")] == ["_training.lock"]  # no draft is left


def test_sections_stand_once_before_the_citations():
    trainer = train()
    trainer.create_model_card(model_name="again", tags="mine")
    text = card_of()
    added = ["\n## Entropy control\n", "\n## Results\n", "\n## Loading\n", BEFORE]
    assert [text.count(heading) for heading in added] == [1, 1, 1, 1]
    places = [text.index(heading) for heading in added]
    assert places == sorted(places)
    assert "mine" in ModelCard.load("run/README.md").data.tags


def test_card_of_each_save_is_of_that_save():
    seen = []

    class Trainer(tiny.EntrocraftGRPOTrainer):
        def create_model_card(self, *args, **kwargs):
            super().create_model_card(*args, **kwargs)
            seen.append(table_rows(card_of())["optimizer steps"])

    args = tiny.build_config(max_steps=4, save_strategy="steps", save_steps=2, **BAND)
    tiny.build_trainer(Trainer, args=args).train()
    assert seen == [["2 of 4"], ["4 of 4"]]


def test_data_and_models_are_named_if_they_are_on_the_hub():
    trainer = tiny.build_trainer(args=tiny.build_config(**BAND))
    trainer.model.config._name_or_path = "Qwen/Qwen3-0.6B"
    trainer.create_model_card(dataset_name="openai/gsm8k")
    data = ModelCard.load("run/README.md").data
    assert (data.datasets, data.base_model) == ("openai/gsm8k", "Qwen/Qwen3-0.6B")
    assert "[openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k)" in card_of()


def test_paths_are_left_out(tmp_path):
    (tmp_path / "questions").mkdir()
    trainer = tiny.build_trainer(args=tiny.build_config(**BAND))
    # TRL leaves a folder out that is still there; a job's can be gone when the card is written.
    trainer.model.config._name_or_path = str(tmp_path / "gone")
    for data in (tmp_path / "train.jsonl", "questions", "data/train.jsonl", "../questions", "data/*/questions"):
        trainer.create_model_card(dataset_name=str(data))
        text = (Path("run") / "README.md").read_text()
        assert str(tmp_path) not in text and "questions" not in text and "train.jsonl" not in text
        assert "fine-tuned version of a local model." in text and "## Entropy control" in text


def test_names_of_the_hub(tmp_path):
    assert is_hub_name("gsm8k") and is_hub_name("openai/gsm8k") and is_hub_name("Qwen/Qwen3-0.6B")
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    assert not is_hub_name("openai/gsm8k")  # the folder is what `datasets` loads then
    for name in ("", "/data/x", "./x", "~/x", "a/b/c", "train.csv", "data/train.JSONL", "data/*.parquet"):
        assert not is_hub_name(name), name


def test_the_adapters_card_keeps_what_is_public(tmp_path):
    card = ModelCard("""---
base_model: /models/start
tags:
- base_model:adapter:/models/start
- base_model:adapter:Qwen/Qwen3-0.6B
- lora
datasets:
- openai/gsm8k
- /data/train
---
text
""")
    card.save(tmp_path / "README.md")
    drop_paths(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model is None and data.datasets == ["openai/gsm8k"]
    assert data.tags == ["base_model:adapter:Qwen/Qwen3-0.6B", "lora"]
    assert [path.name for path in tmp_path.glob("*.md")] == ["README.md"]  # no draft is left
    drop_paths(tmp_path / "elsewhere" / "README.md")  # a model that is no adapter has no card of its own


@pytest.mark.figure
def test_card_before_the_first_reading():
    trainer = tiny.build_trainer(args=tiny.build_config(**BAND))
    trainer.create_model_card()
    text = card_of()
    assert "Neither entropy nor reward was logged yet." in text and "entropy.png" not in text
    assert table_rows(text)["0%"] == ["0.900", "1.050"] and "times the initial entropy" in text
    assert not (Path("run") / "entropy.png").exists()


def test_band_in_nats_and_band_of_a_function():
    nats = {"entropy_unit": "nats", "entropy_low": [0.4], "entropy_high": [0.6]}
    trainer = tiny.build_trainer(args=tiny.build_config(**nats), entropy_band=lambda progress: (progress, 2.0))
    trainer.create_model_card()
    text = card_of()
    assert table_rows(text)["25%"] == ["0.250", "2.000"] and "low edge (nats)" in text
    assert "schedule: given by a function" in text and "measured first" not in text


@pytest.mark.figure
def test_a_broken_figure_is_left_out_with_a_warning(caplog, monkeypatch):
    from entrocraft_trl.reports import plots

    def broken(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(plots, "save_figure", broken)
    trainer = train()
    text = card_of()
    assert trainer.state.global_step == 4
    assert "entropy.png" not in text and "| optimizer steps | 4 of 4 |" in text
    assert "The model card got no figure: OSError: No space left on device" in caplog.text


def test_a_broken_section_leaves_the_card_of_trl(caplog, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(model_card, "result_table", broken)
    trainer = train()
    assert trainer.state.global_step == 4
    assert "## Citations" in card_of() and "## Entropy control" not in card_of()
    assert "The model card got no section on this run: ZeroDivisionError: oops" in caplog.text


def test_only_the_main_process_writes(monkeypatch):
    trainer = tiny.build_trainer(args=tiny.build_config(**BAND))
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    Path("run").mkdir(exist_ok=True)
    Path("run/README.md").write_text("of the main process")
    trainer.create_model_card()
    assert [(path.name, path.read_text()) for path in Path("run").iterdir()] == [("README.md", "of the main process")]


@pytest.mark.figure
def test_figure_is_not_replaced_under_an_upload(monkeypatch):
    trainer = train()
    before = (Path("run") / "entropy.png").read_bytes()
    trainer.state.log_history[-2]["entrocraft/entropy"] = 9.0  # the last reading; after it comes the run's summary
    with monkeypatch.context() as uploading:
        running = SimpleNamespace(is_done=lambda: False)
        uploading.setattr(trainer, "push_in_progress", running, raising=False)
        trainer.create_model_card()
    assert (Path("run") / "entropy.png").read_bytes() == before and "](entropy.png)" in card_of()
    trainer.create_model_card()
    assert (Path("run") / "entropy.png").read_bytes() != before


def test_rloo_and_lora(tmp_path):
    args = tiny.build_config(EntrocraftRLOOTrainer._config_class, max_steps=2, save_strategy="steps", save_steps=2)
    # Reference log-probs need no model on a disk with an adapter, which is switched off for them.
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    tiny.build_trainer(EntrocraftRLOOTrainer, args=args, peft_config=adapter).train()
    text = card_of()
    assert 'AutoPeftModelForCausalLM.from_pretrained("run")' in text and "| optimizer steps | 2 of 2 |" in text
    assert "rloo" in ModelCard.load("run/README.md").data.tags
    assert EntrocraftRLOOTrainer._paper["id"] == "2604.26326" != RLOOTrainer._paper["id"]


def test_result_table_of_a_hand_made_log():
    edges = {"entrocraft/entropy_low": 0.4, "entrocraft/entropy_high": 0.6}
    log = [
        {"entrocraft/entropy": entropy, "entrocraft/accepted_rollouts": share, "reward": reward, **edges}
        for entropy, share, reward in ((0.5, 1.0, 0.1), (0.7, 0.5, 0.2), (0.6, 0.75, 0.3), (0.39, 0.75, 0.4))
    ]
    rows = table_rows("\n".join(result_table([*log, {"train_loss": 1.0}], 40, 100)))
    assert rows["last measured entropy"] == ["0.390 nats (band 0.400 to 0.600)"]
    assert rows["logged steps inside the band"] == ["50%"]  # the edges belong to the band
    assert rows["accepted rollouts, mean"] == ["75%"]
    assert rows["last mean reward"] == ["0.400"] and rows["optimizer steps"] == ["40 of 100"]


@pytest.mark.figure
def test_a_method_without_words_of_its_own_keeps_trls_and_gets_its_results():
    trainer = train_without_control()
    card = ModelCard.load("run/README.md")
    assert "entrocraft" not in card.data.tags and "2604.26326" not in card.text
    assert "trained with GRPO, a method introduced in" in card.text and "Entropy control" not in card.text
    entropy, reward = (tiny.history(trainer, key)[-1] for key in ("entropy", "reward"))
    assert table_rows(card.text) == {
        "at this save": [""],
        "---": ["---"],
        "optimizer steps": ["2 of 2"],
        "last measured entropy": [f"{entropy:.3f} nats"],
        "last mean reward": [f"{reward:.3f}"],
    }
    assert "](entropy.png)" in card.text and (Path("run") / "entropy.png").exists()
    assert 'AutoModelForCausalLM.from_pretrained("run")' in card.text


def test_a_method_speaks_for_itself():
    train_without_control(RivalTrainer)
    text = card_text()
    assert text.index("## My method\n\nEvery other rollout went.\n\n## Results\n") < text.index(BEFORE)


@pytest.mark.figure
def test_a_log_without_entropy_gives_no_figure_and_one_without_numbers_no_table():
    train_without_control(keep_key=lambda key: key in ("step", "reward"))
    text = card_text()
    assert "entropy.png" not in text and not (Path("run") / "entropy.png").exists()
    assert list(table_rows(text)) == ["at this save", "---", "optimizer steps", "last mean reward"]
    train_without_control(keep_key=lambda key: key == "step")
    text = card_text()
    assert table_rows(text) == {} and "entropy.png" not in text
    assert "## Results\n\nNeither entropy nor reward was logged yet.\n\n## Loading\n" in text


def test_loading_lines_are_python():
    for adapter in (False, True):
        lines = how_to_load("user/model", adapter)
        code = "\n".join(lines[lines.index("```python") + 1 : lines.index("```")])
        compile(code, "card", "exec")
        assert code.count('from_pretrained("user/model")') == 2
