"""
How the log-prob of each rollout moves with the entropy: through the parameters that all contexts share.

With G the gradient of the batch's entropy, D_i is the derivative of rollout i's log-prob along G / |G|. A gradient
step on A_i times that log-prob changes the entropy by its size times A_i D_i |G|, at first order, in all contexts.

Functions on a model and its rollouts. None touches `.grad`, an optimizer or a random state; each leaves the parameters
as they were, to the last bit. Parameters have to be whole on each rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .batch_entropy import entropy_sums
from .eval_mode import eval_mode
from .passes import pass_of_rows, run_policy_pass, select_rows


# Every eighth rollout gives nearly the G of all: on a 135M model 95% of the predicted effect, with 20 of 160 rollouts.
_EVERY, _FEWEST = 8, 16
# Length of a difference: what moves the entropy by this share of itself, at first order. Ten times as long, a step
# meets curvature (4 to 19% off); a third as long, the rounding of float32 where the policy is sharp.
_SHARE_OF_ENTROPY = 0.001


def rows_for_gradient(first: int, count: int, total: int) -> list[int]:
    """
    Which of this rank's rollouts G is computed from: an eighth of all ranks' rollouts, or 16 of them, evenly spread.

    No random number is drawn, and the rollouts are the same however many ranks share them.

    Args:
        first, count (`int`): This rank's rollouts among those of all ranks.
        total (`int`): Rollouts of all ranks.
    """
    every = min(_EVERY, max(total // _FEWEST, 1))
    return [row for row in range(count) if (first + row) % every == 0]


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What a step moves, in the model's order; with LoRA the adapter's parameters alone."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def resolves_small_steps(model: torch.nn.Module) -> bool:
    """
    Whether all weights are float32, so that a difference of two passes is a derivative, unless autocast rounds anyway.

    In bf16 a small step is lost: weights move by less than their last bit, and the activations' rounding does more to
    the log-probs than the step. Measured on the embedded task under autocast, the step of `difference_step` gave
    derivatives that were off by 200%, and no longer step less than 20%.
    """
    return all(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters())


def rounds_products() -> bool:
    """Whether torch was told to use TF32 or bfloat16 inside float32 products, which drowns a small step as well."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set for single backends, which this function of torch's refuses to sum up
        return True


def entropy_gradient(
    read: Callable[..., Any],
    model: torch.nn.Module,
    batch: dict[str, Any],
    mask: torch.Tensor,
    rows: Sequence[int],
    *,
    aggregation: str,
    batch_size: int,
) -> tuple[list[torch.Tensor], float]:
    """
    Gradient of the summed entropy of `rows`, one tensor a trainable parameter, and the count that makes it a mean; to
    be added up over ranks. Zeros for no rows.

    Args:
        read (`Callable`): As in `run_policy_pass`.
        batch (`dict`): Loss inputs of this rank, `B` rows.
        mask (`torch.Tensor` of shape `(B, T)`): 1 on loss tokens.
        aggregation (`str`): See `entropy_sums`.
        batch_size (`int`): Rows of one backward pass.
    """
    parameters = trainable_parameters(model)
    gradient = [torch.zeros_like(parameter) for parameter in parameters]
    count = 0.0
    with torch.enable_grad(), eval_mode(model), checkpointed(model):
        for start in range(0, len(rows), batch_size):
            part = list(rows[start : start + batch_size])
            reading = pass_of_rows(read, model, select_rows(batch, part), batch_size)
            entropy_sum, entropy_count = entropy_sums(reading.entropies, mask[part], aggregation)
            _add(gradient, torch.autograd.grad(entropy_sum, parameters, materialize_grads=True))
            count += entropy_count.item()
    return gradient, count


def derivatives_by_gradients(
    read: Callable[..., Any],
    model: torch.nn.Module,
    batch: dict[str, Any],
    mask: torch.Tensor,
    rows: Sequence[int],
    direction: Sequence[torch.Tensor],
) -> torch.Tensor:
    """
    `D_i` of each of `rows`, and 0 elsewhere, `(B,)`: the inner product of the rollout's gradient with `direction`. One
    forward and one backward pass a rollout, and no step that a low precision would swallow.

    Args:
        direction (`Sequence[torch.Tensor]`): One tensor a trainable parameter, of norm 1 all together.
    """
    parameters = trainable_parameters(model)
    derivatives = torch.zeros(len(mask), device=mask.device)
    with torch.enable_grad(), eval_mode(model), checkpointed(model):
        for row in rows:
            reading = pass_of_rows(read, model, select_rows(batch, [row]), 1)
            logp = torch.where(mask[[row]].bool(), reading.logps, 0.0).sum()
            gradient = torch.autograd.grad(logp, parameters, materialize_grads=True)
            for ours, theirs in zip(gradient, direction, strict=True):
                derivatives[row] += (ours.float() * theirs.float()).sum().to(mask.device)
    return derivatives


def derivatives_by_difference(
    read: Callable[..., Any],
    model: torch.nn.Module,
    batch: dict[str, Any],
    mask: torch.Tensor,
    direction: list[torch.Tensor],
    *,
    step: float,
    logps: torch.Tensor | None,
    batch_size: int,
) -> torch.Tensor:
    """
    `D_i` of each rollout, `(B,)`, as a one-sided difference: a pass without gradients at `step` along `direction`.

    Args:
        direction (`list[torch.Tensor]`): As in `derivatives_by_gradients`. Overwritten with the parameters of the
            pass, so that no further copy of the parameters is made.
        step (`float`): See `difference_step`.
        logps (`torch.Tensor` of shape `(B, T)`, *optional*): Log-probs at the parameters as they are, without dropout;
            another pass reads them where they are not known.
    """
    if logps is None:
        logps = run_policy_pass(read, model, batch, batch_size).logps
    parameters = trainable_parameters(model)
    for tensor, parameter in zip(direction, parameters, strict=True):
        tensor.mul_(step).add_(parameter.detach())
    with held_at(parameters, direction):
        moved = run_policy_pass(read, model, batch, batch_size).logps
    return torch.where(mask.bool(), moved - logps, 0.0).sum(dim=1) / step


def difference_step(entropy: float, slope: float) -> float:
    """
    Length of a step along G / |G| that moves the mean entropy by a thousandth of itself.

    Counted in entropy and not in parameters, it fits full fine-tuning and adapters of any size alike.

    Args:
        entropy (`float`): Nats, above 0.
        slope (`float`): |G| of the mean entropy, above 0.
    """
    return _SHARE_OF_ENTROPY * entropy / slope


@contextmanager
def held_at(parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """
    Parameters at `values` inside. After, they have their own storage again: nothing was written to it, and so nothing
    is rounded, as adding a step and subtracting it would.
    """
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value


@contextmanager
def checkpointed(model: torch.nn.Module) -> Iterator[None]:
    """
    Inside, layers that train with gradient checkpointing have it in eval mode too, where transformers leaves it off.

    Always without re-entering autograd: `torch.autograd.grad` refuses a graph of re-entrant checkpoints.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    own = [vars(layer).get("forward") for layer in layers]  # accelerate's hooks put one there
    try:
        for layer in layers:
            # In eval mode nothing is drawn at random, and no random state need be kept.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


def total_norm(tensors: Sequence[torch.Tensor]) -> float:
    """Of all entries together, in float32."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).norm().item()


def _add(totals: list[torch.Tensor], parts: Sequence[torch.Tensor]) -> None:
    for total, part in zip(totals, parts, strict=True):
        total.add_(part)
