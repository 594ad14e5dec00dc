"""A second reading of the policy at half its sampling temperature, through TRL's own fused head."""

from contextlib import contextmanager

from peft import PeftModel
from trl.trainer.utils import add_fused_lm_head


@contextmanager
def half_temperature_head(trainer):
    """
    Inside, the fused head of `trainer.model` reports log-probs and entropies at half the sampling temperature.

    At half the temperature the head sees `p^2 / sum p^2`, which is what `rejection.expected_entropy_term` needs; TRL's
    chunked kernel computes it without the `(B, T, V)` logits. Only no-grad passes may run inside.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    forward = model.forward
    add_fused_lm_head(
        model,
        temperature=trainer.temperature / 2,
        cast_lm_head_to_fp32=getattr(trainer.args, "cast_lm_head_to_fp32", False),
        outputs=("log_probs", "entropy"),
    )
    try:
        yield
    finally:
        model.forward = forward
