"""The loss of the rollouts that are left, as if a micro-batch had held no others."""

from ..normalisation import KEPT, loss_normaliser, micro_batch_weight


class KeptRolloutsLossMixin:
    """For TRL's trainers: a loss that divides by rows divides by those that [`loss_inputs.drop_rollouts`] left."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        # Not in `_compute_loss`: a subclass that computes a loss of its own there would leave the weight out.
        if KEPT not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        weight = micro_batch_weight(inputs, loss_normaliser(type(self), self.args))
        # TRL adds the router loss of a mixture of experts inside; it is no mean over the rollouts that are left.
        coefficient = self.router_aux_loss_coef
        self.router_aux_loss_coef = coefficient / weight
        try:
            return weight * super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.router_aux_loss_coef = coefficient
