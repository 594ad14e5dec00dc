"""The place between the forward pass of TRL's loss and the loss: what a method may do there with one pass."""

from typing import Any

import torch


class LossPassMixin:
    """
    For GRPO trainers whose method reads the current log-probs: put it before the trainer among the bases, and override
    `token_advantages` or `loss_term`. In evaluation nothing is changed.

    TRL's loss calls `_get_per_token_logps_and_entropies` and reads `inputs["advantages"]`, of shape `(B,)` or
    `(B, T)`, only after that. So the advantages of tokens are put there meanwhile, and no pass is run twice.
    """

    _loss_inputs: dict[str, Any] | None = None
    _loss_term: torch.Tensor | None = None

    def token_advantages(self, logps: torch.Tensor, entropies: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """
        Advantages that TRL's loss multiplies the ratios with, `(B,)` or `(B, T)`; what carries a gradient is
        differentiated along.

        Args:
            logps, entropies (`torch.Tensor` of shape `(B, T)`): Of the loss's own pass, with gradient.
            inputs (`dict`): Loss inputs of the micro-batch.
        """
        return inputs["advantages"]

    def loss_term(self, logps: torch.Tensor, entropies: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor | None:
        """A scalar that is added to TRL's loss, already divided by the accumulation steps; arguments as above."""
        return None

    def _compute_loss(self, model, inputs):
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        # A copy: TRL hands out the same dict again for the next iteration over its rollouts.
        self._loss_inputs = dict(inputs)
        try:
            loss = super()._compute_loss(model, self._loss_inputs)
            return loss if self._loss_term is None else loss + self._loss_term
        finally:
            self._loss_inputs = self._loss_term = None

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._loss_inputs is not None:  # not for the passes of the old policy and of the reference model
            inputs = self._loss_inputs
            self._loss_term = self.loss_term(logps, entropies, inputs)
            inputs["advantages"] = self.token_advantages(logps, entropies, inputs)
        return logps, entropies, aux_loss


def old_logps(logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """Log-probs `(B, T)` of the policy that TRL's ratios compare with: the current one where TRL keeps no other."""
    old = inputs.get("old_per_token_logps")
    return logps.detach() if old is None else old
