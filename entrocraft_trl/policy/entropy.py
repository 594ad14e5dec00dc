"""Reading the policy's entropy from tensors that a pass over the rollouts left behind. Decides nothing."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class PolicyPass(NamedTuple):
    """Log-probs of the sampled tokens and token entropies in nats, both `(B, T)`, at the sampling temperature."""

    logps: torch.Tensor
    entropies: torch.Tensor


def entropy_sums(entropies: torch.Tensor, mask: torch.Tensor, aggregation: str) -> torch.Tensor:
    """
    Sum and count whose ratio is the batch entropy; add them up over ranks before dividing.

    Args:
        entropies (`torch.Tensor` of shape `(B, T)`): Token entropies in nats.
        mask (`torch.Tensor` of shape `(B, T)`): 1 on loss tokens.
        aggregation (`str`): `"token"`: mean over tokens; `"sequence"`: mean of the rollouts' means, over the rollouts
            that hold a loss token.

    Returns:
        `torch.Tensor` of shape `(2,)`, float32.
    """
    mask = mask.bool()
    # Padding may hold NaN (an engine's unscored tokens); multiplying by a zero mask would keep it.
    values = torch.where(mask, entropies.float(), 0.0)
    tokens = mask.sum(dim=1)
    if aggregation == "token":
        return torch.stack([values.sum(), tokens.sum().float()])
    rows = tokens > 0
    means = values.sum(dim=1) / tokens.clamp(min=1)
    return torch.stack([means[rows].sum(), rows.sum().float()])


def sampling_entropy_sums(logps: torch.Tensor, mask: torch.Tensor, aggregation: str) -> torch.Tensor:
    """
    `entropy_sums` of the Monte-Carlo estimate -log p from the rollout engine's log-probs `(B, T)`.

    Tokens that the engine could not score (NaN) are left out, from the count too.
    """
    scored = mask.bool() & ~torch.isnan(logps)
    return entropy_sums(-logps, scored, aggregation)


def unreadable_counts(readings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    How much of a batch cannot be read: rollouts with NaN or an infinity on a loss token, all rollouts, loss tokens.

    Args:
        readings, mask (`torch.Tensor` of shape `(B, T)`): What is read of each token, and 1 on loss tokens.

    Returns:
        `torch.Tensor` of shape `(3,)`, float32; add them up over ranks.
    """
    mask = mask.bool()
    broken = (mask & ~torch.isfinite(readings)).any(dim=1)
    return torch.stack([broken.sum(), torch.tensor(len(mask), device=mask.device), mask.sum()]).float()


# An engine leaves out a token now and then. With more than a tenth missing, the mean is that of a selection of tokens
# which nobody made, and with nearly all missing it would be the entropy of a handful.
LARGEST_UNSCORED_SHARE = 0.1


def refusal(source: str, step: int, unreadable: float, rollouts: float, tokens: float, unscored: float) -> str:
    """Why a step without a finite entropy, or with one of too few tokens, is refused, and what to do."""
    if source == "sampling" and not unreadable and unscored < tokens:
        return (
            f"The rollout engine returned no log-prob (NaN) for {unscored:.0f} of {tokens:.0f} loss tokens of the "
            f"generation batch at step {step}; entropy_source='sampling' reads from at least "
            f"{1 - LARGEST_UNSCORED_SHARE:.0%} of them. The step was refused; mend the engine's log-probs, or use "
            "entropy_source='policy'."
        )
    start = f"The policy's entropy over the generation batch at step {step} is not finite: "
    if source == "sampling":
        found = (
            f"the rollout engine returned infinite log-probs in {unreadable:.0f} of {rollouts:.0f} rollouts"
            if unreadable
            else f"the rollout engine returned NaN as the log-prob of all {tokens:.0f} loss tokens"
        )
    else:
        found = (
            f"the model returns NaN or infinite logits in {unreadable:.0f} of {rollouts:.0f} rollouts (a vocabulary "
            "masked with -inf counts too)"
        )
    return f"{start}{found}. The step was refused; lower the learning rate or resume from an earlier checkpoint."


@contextmanager
def eval_mode(model: torch.nn.Module):
    """
    Dropout off inside, every module's own mode restored after. Without it a measuring pass would draw random numbers,
    and a run whose band is never left would not be plain GRPO's run.

    Only flags are set: with `use_kernels=True`, transformers' `eval()` also swaps the kernels of the Hub for those of
    inference, and flags alone do not swap them back, so that the loss would be computed with them.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def has_dropout(model: torch.nn.Module) -> bool:
    """
    Whether a pass in training mode drops anything: dropout modules (LoRA's too), and the rates that attention and some
    older models hand to a function.
    """

    def drops(module: torch.nn.Module) -> bool:
        kind = type(module).__name__.lower()
        return any(
            isinstance(value, float) and value > 0 and "drop" in (kind if name == "p" else name.lower())
            for name, value in vars(module).items()
        )

    return any(module.training and drops(module) for module in model.modules())


def find_policy_pass(
    passes: list[PolicyPass], batch: dict[str, Any], completion_mask: torch.Tensor
) -> PolicyPass | None:
    """
    The pass among `passes` whose log-probs TRL put into the loss inputs as the old policy's, or `None`.

    GRPO keeps the tensor itself (`old_per_token_logps`), RLOO its masked sum (`old_logps`). Matching the values that
    came out, instead of repeating TRL's condition for running the pass, cannot pick the reference model's pass.
    """
    old_sums = batch.get("old_logps")
    for candidate in passes:
        if candidate.logps is batch.get("old_per_token_logps"):
            return candidate
        if old_sums is not None and torch.equal((candidate.logps * completion_mask).sum(1), old_sums):
            return candidate
    return None


def run_policy_pass(logps_and_entropies: Callable[..., tuple], model, batch: dict[str, Any], batch_size: int):
    """
    One no-grad pass of `model` over the rollouts of `batch`, in eval mode and chunks of `batch_size` rows.

    Args:
        logps_and_entropies (`Callable`): TRL's `_get_per_token_logps_and_entropies`, bound to the trainer.

    Returns:
        `PolicyPass`: log-probs and entropies of shape `(B, T)`.
    """
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    multimodal = {key: batch[key] for key in MULTIMODAL_KEYS if key in batch}
    with torch.no_grad(), eval_mode(model):
        logps, entropies, _ = logps_and_entropies(
            model,
            input_ids,
            attention_mask,
            batch["completion_ids"].size(1),
            batch_size=batch_size,
            compute_entropy=True,
            **multimodal,
        )
    return PolicyPass(logps, entropies)


MULTIMODAL_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
