"""TRL's trainer configs with the fields of entropy control."""

from dataclasses import dataclass

from trl import GRPOConfig, RLOOConfig

from .control.config import EntropyControlConfig
from .microbatches.config import MicroBatchConfig


@dataclass
class EntrocraftGRPOConfig(EntropyControlConfig, MicroBatchConfig, GRPOConfig):
    __doc__ = (
        "Configuration of [`EntrocraftGRPOTrainer`]: [`~trl.GRPOConfig`] and the fields below.\n"
        + EntropyControlConfig.__doc__.rstrip()
        + "\n"
        + MicroBatchConfig.__doc__.partition("Parameters:")[2]
    )


@dataclass
class EntrocraftRLOOConfig(EntropyControlConfig, MicroBatchConfig, RLOOConfig):
    __doc__ = (
        "Configuration of [`EntrocraftRLOOTrainer`]: [`~trl.RLOOConfig`] and the fields below.\n"
        + EntropyControlConfig.__doc__.rstrip()
        + "\n"
        + MicroBatchConfig.__doc__.partition("Parameters:")[2]
    )

    def __post_init__(self):
        super().__post_init__()
        if self.entropy_source == "sampling":
            raise ValueError(
                "entropy_source='sampling' reads the rollout engine's log-probs, which TRL's RLOO trainer does not "
                "keep; use entropy_source='policy'."
            )
