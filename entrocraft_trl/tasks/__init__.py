"""Embedded tasks, which need neither a download nor a GPU: data and reward, a starting policy, settings (`task`)."""

from .expressions import (
    MAX_COMPLETION_LENGTH,
    build_model,
    build_tokenizer,
    canonical_answer,
    expression_reward,
    expression_value,
    make_dataset,
)
from .warmup import WarmupSettings, starting_policy


__all__ = [
    "MAX_COMPLETION_LENGTH",
    "WarmupSettings",
    "build_model",
    "build_tokenizer",
    "canonical_answer",
    "expression_reward",
    "expression_value",
    "make_dataset",
    "starting_policy",
]
