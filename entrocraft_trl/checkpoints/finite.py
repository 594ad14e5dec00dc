"""Training ends at the first number that is not finite: one NaN spreads to all weights, and a save makes it last."""

from pathlib import Path

import torch

from .manifest import what_is_kept


class FiniteTrainingMixin:
    """
    Refuses numbers that are not finite, on all ranks together: the loss and the gradient norm of each step before the
    optimizer moves (DeepSpeed moves within the backward pass: right after), and the trained parameters before each
    save and at the end of training.
    """

    _step_loss: torch.Tensor | float = 0.0  # sum over the micro-steps of the optimizer step in progress
    _step_grad_norm: torch.Tensor | float | None = None

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._step_loss = self._step_loss + loss
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        self._step_grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._step_grad_norm

    def _agree_on_step(self, stop: bool = False) -> bool:
        """
        Whether any rank wants to stop after this optimizer step. One reduction serves this and the check of the step.

        Raises:
            FloatingPointError: If loss or gradient norm of the step are not finite on any rank.
        """
        flags = [stop, not is_finite(self._step_loss), not self._gradient_is_finite()]
        self._step_loss = 0.0
        flags = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
        stops, losses, gradients = self.accelerator.reduce(flags, reduction="sum").tolist()
        for ranks, name in ((losses, "loss"), (gradients, "gradient norm")):
            if ranks:
                # The log does not show it: transformers leaves NaN out of the losses (logging_nan_inf_filter).
                raise FloatingPointError(self._not_finite(f"The {name} of step {self.state.global_step + 1}", ranks))
        return stops > 0

    def _gradient_is_finite(self) -> bool:
        # With float16 the loss scaler looks for its scale by overflowing gradients, and leaves out such steps.
        return self.accelerator.mixed_precision == "fp16" or is_finite(self._step_grad_norm)

    def _ranks_with_unfinite_parameters(self) -> float:
        """On how many ranks a trained parameter is not finite; each looks at what it holds."""
        broken = not all(is_finite(value) for value in self.model.parameters() if value.requires_grad)
        return self.accelerator.reduce(torch.tensor(float(broken), device=self.accelerator.device), "sum").item()

    def _refuse_unfinite_parameters(self, occasion: str) -> None:
        """
        Raises:
            FloatingPointError: If a trained parameter is not finite on any rank.
        """
        if ranks := self._ranks_with_unfinite_parameters():
            raise FloatingPointError(self._not_finite(f"{occasion} step {self.state.global_step} a parameter", ranks))

    def _not_finite(self, what: str, ranks: float) -> str:
        return (
            f"{what} is NaN or infinite on {ranks:.0f} of {self.accelerator.num_processes} processes: training ends "
            f"here, and nothing more is saved. {what_is_kept(Path(self.args.output_dir))}"
        )


def is_finite(value: torch.Tensor | float | None) -> bool:
    """Whether a number, or all that this rank holds of a tensor, is finite. `None` is a norm that is not computed."""
    if value is None:
        return True
    if not isinstance(value, torch.Tensor):
        return bool(torch.isfinite(torch.tensor(value)))
    held = getattr(value, "ds_tensor", value)  # ZeRO-3: outside a pass, the parameter itself is empty
    held = held.to_local() if hasattr(held, "to_local") else held  # FSDP2
    if not held.numel():
        return True  # more ranks than rows
    # NaN goes into both, and unlike isfinite() they need no copy of the tensor.
    return all(torch.isfinite(end) for end in torch.aminmax(held.detach()))
