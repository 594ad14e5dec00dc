"""Data sets for training: from the Hub or local files, to the columns `prompt` and `solution` that TRL reads."""

from __future__ import annotations

import glob
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..printable import printable
from .broken_lines import find_broken_line


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(
    name: str, split: str = "train", config: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """
    Rows of one split of a data set.

    Args:
        name (`str`):
            Local file or glob pattern (`.jsonl`, `.json`, `.csv`, `.parquet`), local folder, or name on the Hub. A
            file or pattern has one split, `"train"`.
        split (`str`, *optional*, defaults to `"train"`):
            Split, also with a slice: `"train[:100]"`.
        config (`str`, *optional*):
            Configuration of a data set on the Hub.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether rows are read while training.

    Raises:
        `ValueError`: if nothing is there, or it cannot be read, or it lacks the split.
    """
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    files: list[str] = []
    try:
        if (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists():
            saved = load_from_disk(name)  # written by `save_to_disk`
            return saved[split] if isinstance(saved, dict) else saved
        files = _local_files(name)
        if files:
            return _load_files(files, split, streaming)
        return load_dataset(name, config, split=split, streaming=streaming)
    except (DatasetsError, OSError, ValueError, KeyError, StopIteration) as error:  # the last for an empty file
        cause = error
        while cause.__cause__ is not None:  # `datasets` wraps the parser's message, which says what is wrong
            cause = cause.__cause__
        what = find_broken_line(files) or str(cause) or "the file is empty"
        raise ValueError(f"cannot load split {split!r} of data set {name!r}: {what}") from error


def _load_files(files: list[str], split: str, streaming: bool) -> Dataset | IterableDataset:
    from datasets import load_dataset

    builder = BUILDERS[Path(files[0]).suffix.lower()]
    rows = load_dataset(builder, data_files=files, split=split, streaming=streaming)
    if builder == "json" and not streaming:
        # The JSON reader lets bytes pass that are no UTF-8, which would end the run when that row is drawn.
        rows.data.validate(full=True)
    return rows


def _local_files(name: str) -> list[str]:
    """Files that a path or glob pattern means, or an empty list for a folder or a name on the Hub."""
    if Path(name).is_dir():
        return []
    suffix = Path(name).suffix.lower()
    if Path(name).is_file():
        files = [name]
    elif glob.has_magic(name):
        files = sorted(path for path in glob.glob(name, recursive=True) if Path(path).is_file())
        if not files:
            raise ValueError("no file matches this pattern")
    elif suffix in BUILDERS or name.startswith((".", "/", "~")):
        raise ValueError("no such file or folder")
    else:
        return []
    kinds = {BUILDERS.get(Path(path).suffix.lower()) for path in files}
    if len(kinds) > 1 or None in kinds:
        found = sorted({Path(path).suffix or "none" for path in files})
        raise ValueError(f"files must all be of one kind ({', '.join(BUILDERS)}), found suffixes: {', '.join(found)}")
    return files


@dataclass(frozen=True)
class PromptFormat:
    """
    How a row becomes a prompt and a solution.

    Args:
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the question: text, or chat messages.
        answer_column (`str`, *optional*):
            Column of the reference answer, copied to `solution`, the column that TRL's accuracy rewards read.
        answer_after (`str`, *optional*):
            Keep only what follows the last occurrence of this text in the answer (`"####"` for GSM8K).
        answer_template (`str`, *optional*):
            Text with `{answer}` where the answer goes. TRL's accuracy rewards read LaTeX between delimiters only: of a
            bare `11\\sqrt{2}` they take the 11. `"${answer}$"` mends that.
        system_prompt (`str`, *optional*):
            System message; in a text prompt, a paragraph before the question.
        prompt_template (`str`, *optional*):
            Text with `{prompt}` where the question goes.
        conversational (`bool`, *optional*, defaults to `True`):
            Whether text questions become chat messages.
    """

    prompt_column: str = "prompt"
    answer_column: str | None = None
    answer_after: str | None = None
    answer_template: str | None = None
    system_prompt: str | None = None
    prompt_template: str | None = None
    conversational: bool = True

    def __post_init__(self):
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template must contain '{{prompt}}', got {self.prompt_template!r}")
        if self.answer_after is not None and self.answer_column is None:
            raise ValueError(f"answer_after={self.answer_after!r} needs answer_column, the column that it cuts")
        if self.answer_template is not None and "{answer}" not in self.answer_template:
            raise ValueError(f"answer_template must contain '{{answer}}', got {self.answer_template!r}")
        if self.answer_template is not None and self.answer_column is None:
            raise ValueError(f"answer_template={self.answer_template!r} needs answer_column, whose text it frames")

    def row(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """
        The new columns of a row, `{"prompt": ..., "solution": ...}`.

        Raises:
            `ValueError`: naming the row (counted from 0), the column and the value that is empty or lacks the marker.
        """
        new = {"prompt": self._prompt(row[self.prompt_column], index)}
        if self.answer_column is not None:
            new["solution"] = self._solution(row[self.answer_column], index)
        return new

    def _prompt(self, value: Any, index: int) -> str | list[dict[str, str]]:
        where = f"row {index}, column {self.prompt_column!r}"
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            raise ValueError(f"{where}: the prompt is empty ({value!r})")
        if not isinstance(value, str):
            return self._messages(value, where)
        if self.prompt_template is not None:
            # Not `str.format`: templates for mathematics hold braces of their own, as in \boxed{}.
            value = self.prompt_template.replace("{prompt}", value)
        if self.conversational:
            return self._with_system([{"role": "user", "content": value}])
        return f"{self.system_prompt}\n\n{value}" if self.system_prompt else value

    def _messages(self, value: Any, where: str) -> list[dict[str, str]]:
        if not (
            isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
        ):
            raise ValueError(f"{where}: a prompt is text or a list of messages with role and content, got {value!r}")
        for message in value:
            if not isinstance(message["role"], str):
                raise ValueError(f"{where}: a message's role must be text, got {message!r}")
            # An assistant's message that only calls a tool has no content.
            if not isinstance(message["content"], (str, list)) and not message.get("tool_calls"):
                raise ValueError(f"{where}: a message's content must be text or a list of parts, got {message!r}")
        if not any(message["content"] for message in value):
            raise ValueError(f"{where}: the prompt is empty ({value!r})")
        if not self.conversational or self.prompt_template is not None:
            raise ValueError(
                f"{where} holds chat messages, which prompt_format='text' and prompt_template cannot edit"
            )
        return self._with_system(value)

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system_prompt}, *messages] if self.system_prompt else messages

    def _solution(self, value: Any, index: int) -> str:
        where = f"row {index}, column {self.answer_column!r}"
        # NaN is how CSV and Parquet files give a number that is missing.
        if value is None or value != value or not str(value).strip():
            raise ValueError(f"{where}: the answer is empty ({value!r})")
        text = str(value)
        if self.answer_after is not None:
            if self.answer_after not in text:
                raise ValueError(f"{where}: the answer has no {self.answer_after!r}: {_shorten(text)!r}")
            text = text.rpartition(self.answer_after)[2]
            if not text.strip():
                raise ValueError(f"{where}: the answer is empty after {self.answer_after!r}: {_shorten(str(value))!r}")
        return (self.answer_template or "{answer}").replace("{answer}", text.strip())


def prompt_format(options: Any, tokenizer: Any, model: str) -> PromptFormat:
    """
    How rows become prompts, by options that are named as its own, and `prompt_format`.

    Args:
        options (`Any`): Arguments of `entrocraft train` or `entrocraft eval`, or the settings of a comparison.
        tokenizer (`Any`), model (`str`): The model's, and its name.

    Raises:
        `ValueError`: If chat messages are asked for and the tokenizer of `model` has no chat template.
    """
    has_template = tokenizer.chat_template is not None
    if options.prompt_format == "conversational" and not has_template:
        raise ValueError(
            f"prompt_format='conversational' needs a chat template, which the tokenizer of {model!r} does not have"
        )
    return PromptFormat(
        prompt_column=options.prompt_column,
        answer_column=options.answer_column,
        answer_after=options.answer_after,
        answer_template=options.answer_template,
        system_prompt=options.system_prompt,
        prompt_template=options.prompt_template,
        conversational=options.prompt_format != "text" and has_template,
    )


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def prepare_rows(
    rows: Dataset | IterableDataset, form: PromptFormat, max_samples: int | None = None
) -> Dataset | IterableDataset:
    """
    Check rows and give them the columns `prompt` and, with an answer column, `solution`. Other columns stay.

    Args:
        rows (`Dataset` or `IterableDataset`):
            Rows as loaded. Streamed rows are checked as they come, all but the first during training.
        form ([`PromptFormat`]):
            Columns and formatting.
        max_samples (`int`, *optional*):
            Keep this many rows, from the start.

    Raises:
        `ValueError`: for an empty data set, a missing column, or a row that [`PromptFormat.row`] refuses.
    """
    from datasets import Dataset, concatenate_datasets

    if max_samples is not None:
        if max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {max_samples}")
        rows = rows.take(max_samples)
    first = next(iter(rows), None)
    if first is None:
        raise ValueError("the data set is empty")
    for column in filter(None, (form.prompt_column, form.answer_column)):
        check_column(column, list(first))
    form.row(first, 0)
    if not isinstance(rows, Dataset):
        return rows.map(form.row, with_indices=True)
    # A new table beside the old one, since a column's type may change (text to messages, number to text).
    read = sorted({column for column in (form.prompt_column, form.answer_column) if column})
    new = [form.row(row, index) for index, row in enumerate(rows.select_columns(read))]
    kept = [column for column in rows.column_names if column not in new[0]]
    table = Dataset.from_list(new)
    return concatenate_datasets([table, rows.select_columns(kept)], axis=1) if kept else table


def check_column(column: str, columns: Sequence[str]) -> None:
    if column not in columns:
        raise ValueError(f"the data set has no column {column!r}; its columns are: {printable(', '.join(columns))}")


def drop_long_prompts(
    rows: Dataset | IterableDataset, count_tokens: Callable[[Any], int], max_length: int
) -> Dataset | IterableDataset:
    """
    Leave out rows whose prompt is longer than `max_length` tokens, which TRL would neither drop nor cut.

    Raises:
        `ValueError`: if no row is short enough.
    """
    from datasets import Dataset

    if not isinstance(rows, Dataset):
        return rows.filter(lambda row: count_tokens(row["prompt"]) <= max_length)
    kept = [index for index, prompt in enumerate(rows["prompt"]) if count_tokens(prompt) <= max_length]
    if not kept:
        raise ValueError(f"every prompt is longer than max_prompt_length={max_length} tokens")
    if len(kept) == len(rows):
        return rows
    warnings.warn(
        f"{len(rows) - len(kept)} of {len(rows)} rows left out: their prompts are longer than "
        f"max_prompt_length={max_length} tokens",
        stacklevel=2,
    )
    return rows.select(kept)
