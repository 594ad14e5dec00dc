"""
Metrics of what is computed, and TRL's own with their meaning restored where only some rows are.

Logged by every trainer of this package, over all ranks:

- `computed_rows`, `computed_tokens`: rows, and padded tokens with those of prompts, that go through the model in the
  update, as shares of those of the generation batch
- `seconds_generation`, `seconds_reading`, `seconds_update`: of this process, once per generation batch and per
  optimizer step: sampling; what else prepares loss inputs, rewards aside (the passes of old policy and reference, and
  those that read the policy); forward and backward passes of the loss, without the optimizer. On a GPU the host's time

TRL takes means over each micro-batch, and averages them. Where micro-batches are made up anew, one number for the
window takes their place: `kl` and the clip ratios are means over all its loss tokens (rows, where the ratio is one of
whole sequences), of which those that were not computed have a clip ratio of 0; `clip_ratio/low_min` and `high_max` are
the extremes of all its rows. `entropy` and `vespo/phi_seq_mean` are left out if they would have to count what was not
computed. The loss, `grad_norm` and the counts of tokens are what they were.
"""

import math
from collections.abc import Sequence

from .plan import Share


# By what a metric counts, and what is known of it where a row was not computed.
OF_TOKENS = ("entropy", "kl")  # nothing
CLIPPED = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio")  # it is 0
LEAST, LARGEST = "clip_ratio/low_min", "clip_ratio/high_max"  # as before
OF_ROWS = ("vespo/phi_seq_mean",)  # nothing
RESTORED = (*OF_TOKENS, *CLIPPED, LEAST, LARGEST, *OF_ROWS)


def restored(name: str, values: Sequence[float], shares: Sequence[Share], *, of_sequences: bool) -> float:
    """
    The metric `name` over the rows of a window from its values in the micro-batches; NaN if it cannot be known.

    Args:
        name (`str`): One of `RESTORED`.
        values (`Sequence[float]`): Of the micro-batches that were computed.
        shares (`Sequence[Share]`): What each of them is of the window.
        of_sequences (`bool`): Whether ratios are those of whole sequences, and not of tokens.
    """
    whole = shares[0]
    by_rows = name in OF_ROWS or (of_sequences and name not in OF_TOKENS)
    parts = [share.rows if by_rows else share.tokens for share in shares]
    window, left = (whole.window_rows, whole.left_rows) if by_rows else (whole.window_tokens, whole.left_tokens)
    if name in (LEAST, LARGEST):
        known = [value for value in values if not math.isnan(value)] + [0.0] * bool(left)
        return (min if name == LEAST else max)(known, default=math.nan)
    if left and name not in CLIPPED:
        return math.nan
    total = sum(value * part for value, part in zip(values, parts, strict=True) if part)
    return total / max(window, 1)
