"""Which rows go into which micro-batch. Pure functions on numbers; every rank makes the plans of all ranks alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


# With a single completion column, TRL's metrics take a micro-batch's numbers of tokens for numbers of sequences.
LEAST_COMPLETION_WIDTH = 2


class Row(NamedTuple):
    """One row of a generation batch: whether it carries gradient, and its lengths in tokens, without padding."""

    carries_gradient: bool
    prompt: int
    completion: int
    loss_tokens: int

    @property
    def length(self) -> int:
        return self.prompt + self.completion


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one rank that are computed together, by their index in the window, and what they are cropped to."""

    rows: tuple[int, ...]
    fillers: frozenset[int]  # those among them that are there for their number only
    prompt_width: int
    completion_width: int


def near_equal_sizes(count: int, most: int) -> list[int]:
    """Sizes of `ceil(count / most)` parts of `count` things, as equal as can be, the larger ones first."""
    parts = -(-count // most)
    small, larger = divmod(count, parts)
    return [small + 1] * larger + [small] * (parts - larger)


def plan_window(
    ranks: Sequence[Sequence[Row]],
    widths: Sequence[tuple[int, int]],
    most: int,
    *,
    multiple: int | None = None,
    crop_prompts: bool = True,
    crop_completions: bool = True,
) -> list[list[MicroBatch]]:
    """
    The micro-batches of each rank for the rows of one window, that is of one optimizer step, or of what a generation
    batch gives to it.

    All ranks get as many micro-batches with as many rows: TRL's metrics gather a number of each row, and ranks whose
    rows are not as many abort there. So a rank with fewer rows than another adds fillers, its shortest rows without
    gradient, and a window in which no rank has any keeps one: with gradients of None in place of 0, AdamW would leave
    out its momentum and weight decay. Rows are sorted by length, the longest first, so that a lack of memory shows at
    once, and each micro-batch is cropped to its longest prompt and completion.

    Args:
        ranks: Rows of the window, for each rank as many.
        widths: Padded widths of prompts and completions on each rank, in tokens.
        most (`int`): Rows of a micro-batch at most.
        multiple (`int`, *optional*): Widths stay multiples of it, or the padded width.
        crop_prompts, crop_completions (`bool`): Whether they are cropped at all.

    Returns:
        For each rank a list of [`MicroBatch`], of the same length; never empty.
    """
    count = max(1, *(sum(row.carries_gradient for row in rows) for rows in ranks))
    sizes = near_equal_sizes(count, most)
    return [
        [
            _cropped(
                rows,
                *part,
                least=(1 if crop_prompts else prompt, LEAST_COMPLETION_WIDTH if crop_completions else completion),
                most=(prompt, completion),
                multiple=multiple or 1,
            )
            for part in _parts(rows, sizes)
        ]
        for rows, (prompt, completion) in zip(ranks, widths, strict=True)
    ]


def _parts(rows: Sequence[Row], sizes: Sequence[int]) -> Iterator[tuple[list[int], frozenset[int]]]:
    """Rows of each micro-batch of a rank, and the fillers among them."""
    by_length = sorted(range(len(rows)), key=lambda index: -rows[index].length)
    chosen = [index for index in by_length if rows[index].carries_gradient]
    others = [index for index in by_length if not rows[index].carries_gradient]
    fillers = frozenset(others[len(others) - (sum(sizes) - len(chosen)) :])
    chosen += [index for index in others if index in fillers]
    start = 0
    for size in sizes:
        part = chosen[start : start + size]
        yield part, fillers & frozenset(part)
        start += size


def _cropped(
    rows: Sequence[Row],
    part: Sequence[int],
    fillers: frozenset[int],
    *,
    least: tuple[int, int],
    most: tuple[int, int],
    multiple: int,
) -> MicroBatch:
    """Widths are those of the longest rows; a filler is cut off wherever the others end."""
    lengths = [(rows[index].prompt, rows[index].completion) for index in part if index not in fillers]
    longest = [max(column) for column in zip(least, *lengths, strict=True)]
    prompt, completion = (
        min(-(-width // multiple) * multiple, limit) for width, limit in zip(longest, most, strict=True)
    )
    return MicroBatch(tuple(part), fillers, prompt, completion)


class Share(NamedTuple):
    """
    What a micro-batch is of its window, over all ranks, and what the window leaves out; counts of rows and of loss
    tokens, and padded tokens (prompts included) that go through the model.
    """

    rows: int  # fillers included
    tokens: int
    window_rows: int
    window_tokens: int
    left_rows: int  # without a gradient, fillers included
    left_tokens: int
    last: int  # 1 for the last of the window


def shares(ranks: Sequence[Sequence[Row]], plans: Sequence[Sequence[MicroBatch]]) -> list[Share]:
    """[`Share`] of each micro-batch of a window."""
    everyone = [row for rows in ranks for row in rows]
    tokens = sum(row.loss_tokens for row in everyone)
    left = [row for row in everyone if not row.carries_gradient]
    return [
        Share(
            rows=sum(len(batch.rows) for batch in step),
            tokens=sum(
                rows[index].loss_tokens
                for rows, batch in zip(ranks, step, strict=True)
                for index in batch.rows
                if index not in batch.fillers
            ),
            window_rows=len(everyone),
            window_tokens=tokens,
            left_rows=len(left),
            left_tokens=sum(row.loss_tokens for row in left),
            last=int(number == len(plans[0]) - 1),
        )
        for number, step in enumerate(zip(*plans, strict=True))
    ]


def padded_tokens(plans: Sequence[Sequence[MicroBatch]]) -> int:
    """Tokens that go through the model, padding and prompts included."""
    return sum(len(batch.rows) * (batch.prompt_width + batch.completion_width) for plan in plans for batch in plan)
