"""Where a step over some of the rows, in another order, is not the step over all of them."""

from typing import Any

from transformers import ProcessorMixin
from trl import RLOOTrainer

from ..normalisation import TRL_LOSSES, loss_normaliser, zero_advantage_is_inert


# Their frequencies follow the length of what they see, padding included.
ROPE_BY_LENGTH = {"dynamic", "longrope"}

# Where a class of its own may read log-probs of the old policy or of the reference before the loss does.
READERS = ("_generate_and_score_completions", "_get_per_token_logps_and_entropies")


def why_all_rows(trainer: Any) -> str | None:
    """
    Why every row of this trainer has to be computed, dropout aside; `None` if not. It follows from the trainer's class
    and settings, which are the same on all ranks.
    """
    args = trainer.args
    steps, accumulation = args.steps_per_generation, args.gradient_accumulation_steps
    if not zero_advantage_is_inert(type(trainer)):
        return (
            f"the loss of {type(trainer).__name__} may read other rows, or rows without an advantage; if it does not, "
            "say zero_advantage_is_inert = True in the class"
        )
    if steps % accumulation and accumulation % steps:
        return (
            f"steps_per_generation={steps} and gradient_accumulation_steps={accumulation} do not divide one another, "
            "so that optimizer steps straddle generation batches"
        )
    if getattr(trainer, "_entropy_bonus_enabled", False):
        return "the entropy bonus acts on all rows"
    if getattr(trainer, "top_entropy_quantile", 1.0) < 1.0:
        return f"top_entropy_quantile={trainer.top_entropy_quantile} chooses tokens among those of a micro-batch"
    if trainer.aux_loss_enabled:
        return "the router's loss is one over all tokens of a micro-batch"
    if loss_normaliser(type(trainer), args) == "local_tokens" and trainer.beta:
        return "its loss divides by the tokens of a micro-batch, which weighs the KL term too"
    return None


def passes_can_wait(trainer: Any) -> bool:
    """
    Whether nothing reads the log-probs of TRL's passes of old policy and reference before the loss, so that they can
    be run over the rows that are computed; where those are some, see `why_all_rows`. It follows from the trainer's
    class and settings, which are the same on all ranks.

    RLOO takes a KL term from rewards, for which it needs both passes at once. Rows with images are never taken out.
    Methods of this package read the policy by passes that do not wait; who knows what others do in `READERS`.
    """
    if isinstance(trainer, RLOOTrainer) and trainer.beta:
        return False
    if isinstance(trainer.processing_class, ProcessorMixin):
        return False
    others = [cls for cls in type(trainer).__mro__ if cls.__module__.split(".")[0] != "entrocraft_trl"]
    return not any(name in vars(cls) for cls in others if cls not in TRL_LOSSES for name in READERS)


def kl_in_loss(trainer: Any, inputs: dict[str, Any]) -> bool:
    """Whether rows without an advantage have a gradient of the KL term; RLOO has it in the reward."""
    return trainer.beta != 0 and "old_logps" not in inputs


def what_can_be_cropped(config: Any) -> tuple[bool, bool]:
    """
    Whether padding can be cropped from prompts, and from completions, without a change of what the model computes.

    Prompts are padded on the left: without it all positions are other ones, which is the same for rotary embeddings
    alone.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    if not rope:
        return False, True
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
    if any(kind.get("rope_type") in ROPE_BY_LENGTH for kind in kinds):
        return False, False
    return True, True
