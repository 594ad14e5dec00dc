"""What all runs of a comparison start from: data, reward, policy and how it is loaded, from a mapping of the file."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import AutoTokenizer, GenerationConfig
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..data.loading import drop_long_prompts, load_rows, prepare_rows, prompt_format
from ..data.rewards import check_reward_columns, load_reward
from ..evaluation.sampling import encode_prompt
from ..tasks import expressions, sentences
from ..tasks.task import Task, expression_arguments, expression_task, sentence_task
from ..tasks.warmup import WarmupSettings, starting_policy
from .version import code_version


@dataclass
class DataSettings:
    """
    Data and reward of a task with a model, named as `entrocraft train` names them; there they are explained.

    Raises:
        ValueError: Without a data set, or with other than one reward function: it says what is right in evaluations.
    """

    dataset_name: str = ""
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    eval_dataset_name: str | None = None
    eval_samples: int = 64  # test rows that an evaluation takes, from the start
    reward_funcs: list[str] = field(default_factory=list)
    prompt_column: str = "prompt"
    answer_column: str | None = None
    answer_after: str | None = None
    answer_template: str | None = None
    system_prompt: str | None = None
    prompt_template: str | None = None
    prompt_format: str = "auto"
    max_samples: int | None = None
    max_prompt_length: int | None = None

    def __post_init__(self):
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = [self.reward_funcs]
        if not self.dataset_name:
            raise ValueError("a task with a model needs a dataset_name")
        if len(self.reward_funcs) != 1:
            raise ValueError(f"a comparison takes one reward function, which says what is right; {self.reward_funcs=}")
        if self.prompt_format not in ("auto", "conversational", "text"):
            raise ValueError(f"prompt_format must be auto, conversational or text, got {self.prompt_format!r}")


@dataclass
class SentenceSettings:
    """Settings of the task `sentences`: number of prompts of an evaluation (by default, each test word once)."""

    test_size: int = len(sentences.TEST_WORDS) // 2


SETTINGS = {"expressions": WarmupSettings, "sentences": SentenceSettings, None: DataSettings}
# Of a task's mapping; everything else is TRL's `ModelConfig`, as for `entrocraft train`.
NAME = "name"
PLACES = ("model_name_or_path", "dataset_name", "eval_dataset_name")  # known by what lies there
FIRST_PROMPTS = 4  # of a task with words: their rollouts tell the starting entropy
CONTENT = {".json", ".jsonl", ".csv", ".parquet", ".arrow", ".safetensors", ".bin"}  # of a folder; the rest is paper


class StartingPoint:
    """
    The task of a comparison.

    Args:
        content (`Mapping`): `name`, `"expressions"` or `"sentences"`, with their settings; or `model_name_or_path` and
            [`DataSettings`]. With any of them, fields of TRL's `ModelConfig`: precision, LoRA, another model.

    Raises:
        ValueError: For unknown names and settings; nothing is loaded.
    """

    def __init__(self, content: Mapping[str, Any]):
        self.content = dict(content)
        self.name = self.content.get(NAME)
        if self.name not in SETTINGS:
            raise ValueError(f"there is no task {self.name!r}; the names are expressions and sentences")
        if self.name is None and not self.content.get("model_name_or_path"):
            raise ValueError("it needs a name (expressions, sentences) or a model_name_or_path")
        kind = SETTINGS[self.name]
        own = {item.name for item in fields(kind)}
        theirs = {item.name for item in fields(ModelConfig)}
        for key in self.content:
            if key != NAME and key not in own | theirs:
                raise ValueError(f"{key!r} is no setting of it; those are {', '.join(sorted(own))} and ModelConfig's")
        self.settings = kind(**{key: value for key, value in self.content.items() if key in own})
        self.model = ModelConfig(**{key: value for key, value in self.content.items() if key in theirs - own})

    @property
    def has_words(self) -> bool:
        """Whether answers are words, of which repetition can be measured."""
        return self.name != "expressions"

    def task(self, seed: int, temperature: float, max_completion_length: int, progress: bool = False) -> Task:
        """
        Policy, data and reward of one run. Makes the embedded starting policy on the first call.

        Raises:
            ValueError, OSError: If data, tokenizer or reward cannot be loaded or do not fit.
        """
        policy = self.model.model_name_or_path
        if self.name == "expressions":
            if policy is None and self.settings != WarmupSettings():
                policy = starting_policy(settings=self.settings, progress=progress)
            return expression_task(seed, temperature=temperature, progress=progress, policy=policy)
        if self.name == "sentences":
            return sentence_task(seed, temperature=temperature, test_size=self.settings.test_size, policy=policy)
        return self._data_task(temperature, max_completion_length)

    def training_prompts(self, task: Task) -> Dataset:
        """Prompts on which the starting policy's entropy is measured: all of the embedded task, or the first few."""
        if self.name == "expressions":
            return expressions.make_dataset("train", len(expressions.TRAIN_TARGETS), 0)
        return task.train.select(range(min(len(task.train), FIRST_PROMPTS)))

    def _data_task(self, temperature: float, max_completion_length: int) -> Task:
        settings, name = self.settings, self.model.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(name, revision=self.model.model_revision)
        form = prompt_format(settings, tokenizer, name)
        rows = load_rows(settings.dataset_name, settings.dataset_train_split, settings.dataset_config)
        rows = prepare_rows(rows, form, settings.max_samples)
        if settings.max_prompt_length is not None:
            rows = drop_long_prompts(rows, lambda p: len(encode_prompt(tokenizer, p)), settings.max_prompt_length)
        test_name, split = settings.eval_dataset_name or settings.dataset_name, settings.dataset_test_split
        if settings.eval_dataset_name and split == "test" and Path(test_name).is_file():
            split = "train"  # the only split of a file
        test = prepare_rows(load_rows(test_name, split, settings.dataset_config), form, settings.eval_samples)
        reward = load_reward(settings.reward_funcs[0])
        check_reward_columns([reward], list(next(iter(rows))))
        sampling = GenerationConfig(do_sample=True, temperature=temperature, max_new_tokens=max_completion_length)
        return Task(name, rows, test, reward, str.strip, sampling)

    def arguments(self) -> dict[str, Any]:
        """Trainer arguments that the task brings; those of the file come after them."""
        if self.name == "expressions":
            arguments = expression_arguments("")
            return {
                name: value for name, value in arguments.items() if name not in ("output_dir", "seed", "max_steps")
            }
        arguments = {"logging_steps": 1, "report_to": "none", "save_strategy": "no"}
        if self.name == "sentences":
            arguments["max_completion_length"] = sentences.MAX_COMPLETION_LENGTH
        if not torch.accelerator.is_available():
            arguments |= {"use_cpu": True, "bf16": False}
        return arguments

    def loading(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`. float32 unless the file says otherwise, as TRL's trainers load a name."""
        return {
            "revision": self.model.model_revision,
            "dtype": self.model.dtype or "float32",
            "attn_implementation": self.model.attn_implementation,
            "quantization_config": get_quantization_config(self.model),
        }

    def adapter(self) -> PeftConfig | None:
        """The adapter that is trained in the model's place, if one is."""
        return get_peft_config(self.model)

    def identity(self, policy: Path | str) -> dict[str, Any]:
        """What tells one start from another, as JSON values: settings, data, the task's code, and the weights."""
        known = {**asdict(self.settings), **self.content}
        for key in (NAME, *PLACES):
            known.pop(key, None)
        if self.name is None:
            names = (self.settings.dataset_name, self.settings.eval_dataset_name)
            known["data"] = [fingerprint(name) for name in names if name]
        else:
            module = expressions if self.name == "expressions" else sentences
            known["version"] = code_version([module.__name__], {"tasks"})
        return {"task": self.name, **known, "policy": fingerprint(policy)}


def fingerprint(name: Path | str) -> str:
    """
    What a model or a data set is known by: a digest of a local file, or of the weights, rows and settings in a local
    folder, wherever it lies; else its name on the Hub.
    """
    path = Path(name)
    if not path.exists():
        return str(name)
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file == path or file.suffix in CONTENT:
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
