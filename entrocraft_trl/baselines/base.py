"""What the configs of all rival methods check, and how their trainers are built."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer

from ..config_values import number
from ..credentials import CredentialsMixin
from ..microbatches.config import MicroBatchConfig
from ..policy.batch_entropy import entropy_sums
from ..policy.mixin import Heard, PolicyReadingMixin
from ..policy.passes import find_policy_pass
from ..policy.recorder import reading_of_rollouts
from ..policy.tokens import loss_mask
from ..services import Services


# Losses that clip the importance ratio of each token. The methods are stated for these, with the mean over tokens.
CLIPPED_LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo")

# Key among the loss inputs.
SAMPLED_ENTROPY = "entrocraft_sampled_entropy"


@dataclass
class BaselineConfig(CredentialsMixin, MicroBatchConfig, GRPOConfig):
    """
    [`~trl.GRPOConfig`] that refuses what its method does not use, where TRL's own variants of GRPO ignore it. The only
    field that is added is `compute_all_rows` of [`MicroBatchConfig`].
    """

    def __post_init__(self):
        super().__post_init__()
        for item in fields(self):
            # argparse looks at choices on the command line only, not in a YAML file or in Python.
            allowed, value = item.metadata.get("choices"), getattr(self, item.name)
            if allowed and item.name not in GRPOConfig.__dataclass_fields__ and value not in allowed:
                raise ValueError(f"{item.name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        self.refuse_other_than("the bonus would steer the same entropy twice", entropy_coef=0.0)
        self.refuse_other_than("the bonus would steer the same entropy twice", use_adaptive_entropy=False)

    def refuse_other_than(self, reason: str, **allowed: Any) -> None:
        """
        Refuse a setting that the method does not read.

        Args:
            reason (`str`): Why, in words.
            allowed: Name of a field and its only value, or a tuple of them, the first of which is recommended.

        Raises:
            ValueError: If the field holds anything else.
        """
        for name, values in allowed.items():
            values = values if isinstance(values, tuple) else (values,)
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not for {type(self).__name__}: {reason}; set "
                    f"{name}={' or '.join(map(repr, values))}."
                )

    def check_number(self, name: str, low: float, high: float = math.inf) -> None:
        """Make the field `name` a finite float in `low`..`high`, also from text, or refuse it."""
        value = number(name, getattr(self, name))
        if not math.isfinite(value) or not low <= value <= high:
            bounds = f"at least {low:g}" if high == math.inf else f"in {low:g}..{high:g}"
            raise ValueError(f"{name} must be finite and {bounds}, got {value!r}.")
        setattr(self, name, value)

    @property
    def on_policy(self) -> bool:
        """Whether each generation serves one optimizer step, so that all importance ratios are 1."""
        return self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) == 0


class BaselineTrainer(PolicyReadingMixin, Services, GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] with the services of this package: the ground that rival methods stand on, and plain GRPO in a
    comparison of methods.

    TRL's `entropy` is a mean over what the update computes. Where that leaves rows out, the entropy of the policy that
    sampled the generation batch is logged in its place, if it was recorded or TRL has read it anyway.

    Raises:
        TypeError: If `args` is not of the method's own config class, whose checks would then be left out.
    """

    _tag_names = ["trl", "grpo"]
    _config_class = BaselineConfig

    def __init__(self, model, reward_funcs, args=None, *rest, **kwargs):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = self._config_class(f"{name.split('/')[-1]}-{self._name}")
        if not isinstance(args, self._config_class):
            raise TypeError(
                f"{type(self).__name__} needs args of type {self._config_class.__name__}, got {type(args).__name__}."
            )
        super().__init__(model, reward_funcs, args, *rest, **kwargs)

    def _generate_and_score_completions(self, inputs):
        if not self.model.training or self.computes_all_rows():
            return super()._generate_and_score_completions(inputs)
        with nullcontext(self._heard) if self._heard else self.listening_to_policy() as heard:  # a method may listen
            batch = super()._generate_and_score_completions(inputs)
        # Among the loss inputs, so that it is saved with what is left of a generation batch.
        return {**batch, SAMPLED_ENTROPY: self._entropy_if_read(batch, heard)}

    def _entropy_if_read(self, batch: dict[str, Any], heard: Heard) -> torch.Tensor:
        """Mean over the loss tokens of all ranks in nats, `()`; NaN if it would take a pass, or without a token."""
        mask = loss_mask(batch)
        reading = None if heard.not_recorded else reading_of_rollouts(heard.turns, batch, mask)
        if reading is None:
            reading = find_policy_pass(heard.passes, batch, batch["completion_mask"])
        sums = torch.tensor([torch.nan, torch.nan], device=mask.device)
        if reading is not None:
            sums = entropy_sums(reading.entropies, mask, "token")
        total, tokens = self.accelerator.reduce(sums, reduction="sum")
        return total / tokens

    def metric_of_all_rows(self, name, inputs):
        if name == "entropy" and SAMPLED_ENTROPY in inputs:
            return inputs[SAMPLED_ENTROPY].item()
        return super().metric_of_all_rows(name, inputs)

    def log_training(self, name: str, value: float) -> None:
        """Add `value` to the metric `name` of the next log record of the training."""
        self._metrics["train"][name].append(float(value))
