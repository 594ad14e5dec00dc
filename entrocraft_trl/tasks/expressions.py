"""Embedded task: write an arithmetic expression that equals a target.

The prompt is a two-digit target and an equals sign, `"24="`; a right answer is any expression of single digits 1 to 9
with at least [`MIN_OPERATORS`] operators and that exact value, such as `"9+8+9-2"` or `"3+7*3"`. A target has tens of
thousands of right answers, so that a policy that loses its entropy shows it: the number of distinct right answers
falls.

Nothing is downloaded: the tokenizer and the model are built here, and `starting_policy` (in `tasks/warmup.py`) teaches
the model the format and some arithmetic, on sums and differences of four digits.
"""

from __future__ import annotations

import random
import re
from fractions import Fraction

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


MIN_OPERATORS = 2  # a single operation would leave most targets with a handful of right answers, or none
MAX_ANSWER_LENGTH = 9  # characters: five operands and four operators
MAX_COMPLETION_LENGTH = MAX_ANSWER_LENGTH + 1  # tokens: one per character, and the end of sequence

TARGETS = tuple(range(10, 34))  # two digits each, so that every prompt has the same length
TEST_TARGETS = TARGETS[1::3]  # one target in three, from all parts of the range
TRAIN_TARGETS = tuple(target for target in TARGETS if target not in TEST_TARGETS)

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNK_TOKEN = "<pad>", "<bos>", "<eos>", "<unk>"
CHARACTERS = "0123456789+-*/()="

# Longest text that the parser looks at. It bounds the recursion and the size of the integers for any input.
MAX_PARSED_LENGTH = 64


class _ParseError(ValueError):
    """The text is not an expression."""


class _Parser:
    """Recursive descent over `sum := product (("+" | "-") product)*`, `product := atom (("*" | "/") atom)*`,
    `atom := number | "(" sum ")"`. There is no unary minus, and a number has no leading zero."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0
        self.numbers: list[str] = []
        self.operators = 0

    def parse(self) -> Fraction:
        value = self._sum()
        if self.position != len(self.text):
            raise _ParseError("text after the expression")
        return value

    def _peek(self) -> str:
        return self.text[self.position] if self.position < len(self.text) else ""

    def _take_operator(self, operators: str) -> str:
        character = self._peek()
        if character == "" or character not in operators:
            return ""
        self.position += 1
        self.operators += 1
        return character

    def _sum(self) -> Fraction:
        value = self._product()
        while operator := self._take_operator("+-"):
            operand = self._product()
            value = value + operand if operator == "+" else value - operand
        return value

    def _product(self) -> Fraction:
        value = self._atom()
        while operator := self._take_operator("*/"):
            operand = self._atom()
            if operator == "/" and operand == 0:
                raise _ParseError("division by zero")
            value = value * operand if operator == "*" else value / operand
        return value

    def _atom(self) -> Fraction:
        if self._peek() == "(":
            self.position += 1
            value = self._sum()
            if self._peek() != ")":
                raise _ParseError("unclosed parenthesis")
            self.position += 1
            return value
        # ASCII digits only: `str.isdigit` also accepts characters that `int` refuses, such as superscripts.
        match = re.compile("[0-9]+").match(self.text, self.position)
        if match is None:
            raise _ParseError("no number where one is needed")
        number = match.group()
        if len(number) > 1 and number[0] == "0":
            raise _ParseError("leading zero")
        self.position = match.end()
        self.numbers.append(number)
        return Fraction(int(number))


def _parse(text: str) -> tuple[Fraction, list[str], int] | None:
    """Value, numbers and operator count of an expression, or `None` where the text is not one."""
    text = canonical_answer(text)
    if len(text) > MAX_PARSED_LENGTH:
        return None
    parser = _Parser(text)
    try:
        value = parser.parse()
    except _ParseError:
        return None
    return value, parser.numbers, parser.operators


def canonical_answer(text: str) -> str:
    """The answer without any whitespace: two answers count as the same if these strings are equal."""
    return "".join(text.split())


def expression_value(text: str) -> Fraction | None:
    """
    Exact value of an arithmetic expression over `+ - * / ( )` and non-negative integers.

    Args:
        text (`str`):
            Any string. Whitespace is ignored.

    Returns:
        `Fraction` or `None`: the value, or `None` where the text is not an expression: empty, malformed, a division by
        zero, a number with a leading zero, a unary sign, or longer than [`MAX_PARSED_LENGTH`] characters. Never
        raises.
    """
    parsed = _parse(text)
    return None if parsed is None else parsed[0]


def is_correct(text: str, target: int) -> bool:
    """Whether the text follows the rules of the task (single digits 1 to 9, at least [`MIN_OPERATORS`] operators, at
    most [`MAX_ANSWER_LENGTH`] characters) and its value is the target."""
    parsed = _parse(text)
    if parsed is None or len(canonical_answer(text)) > MAX_ANSWER_LENGTH:
        return False
    value, numbers, operators = parsed
    # Longer numbers would let the policy copy the target ("24+1-1"), and a zero would let it pad any answer ("+0").
    if operators < MIN_OPERATORS or any(number not in "123456789" for number in numbers):
        return False
    return value == target


def expression_reward(completions: list[str], target: list[int], **kwargs) -> list[float]:
    """
    Reward function in TRL's signature: 1.0 for a right expression, 0.0 for anything else.

    Args:
        completions (`list[str]`):
            Texts to score, `(B,)`.
        target (`list[int]`):
            Dataset column: the value asked for in each row, `(B,)`.
        **kwargs:
            Whatever else TRL passes (`prompts`, `completion_ids`, other columns). Not used.

    Returns:
        `list[float]`: rewards `(B,)`.

    Raises:
        `ValueError`: if the two lists differ in length.
    """
    return [float(is_correct(text, value)) for text, value in zip(completions, target, strict=True)]


def make_dataset(split: str, size: int, seed: int = 0) -> Dataset:
    """
    Prompts of one split. Every target of the split appears before any appears again.

    Args:
        split (`str`):
            `"train"` or `"test"`; their targets are disjoint.
        size (`int`):
            Number of rows.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.

    Returns:
        `datasets.Dataset` with the columns `prompt` (`str`, for example `"24="`) and `target` (`int`).

    Raises:
        `ValueError`: if the split is unknown or the size is not positive.
    """
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', got {split!r}.")
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}.")
    targets = TRAIN_TARGETS if split == "train" else TEST_TARGETS
    rng = random.Random(seed)
    rows: list[int] = []
    while len(rows) < size:
        rows.extend(rng.sample(targets, len(targets)))
    rows = rows[:size]
    return Dataset.from_dict({"prompt": [f"{target}=" for target in rows], "target": rows})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Character tokenizer of the task: one token per character, padding on the left, nothing added to a text."""
    vocabulary = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNK_TOKEN, *CHARACTERS]
    tokenizer = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token=UNK_TOKEN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # without it, decoding puts a space between the characters
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(seed: int = 0) -> Qwen3ForCausalLM:
    """
    A Qwen3 of 445 thousand parameters with random weights: float32, tied embeddings, no dropout.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global random state is left as it was.
    """
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)
