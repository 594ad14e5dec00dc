"""TRL's trainer configs with the fields of entropy control."""

from dataclasses import dataclass

from trl import GRPOConfig, RLOOConfig

from .control.config import EntropyControlConfig


@dataclass
class EntrocraftGRPOConfig(EntropyControlConfig, GRPOConfig):
    __doc__ = (
        "Configuration of [`EntrocraftGRPOTrainer`]: [`~trl.GRPOConfig`] and the fields below.\n"
        + EntropyControlConfig.__doc__
    )


@dataclass
class EntrocraftRLOOConfig(EntropyControlConfig, RLOOConfig):
    __doc__ = (
        "Configuration of [`EntrocraftRLOOTrainer`]: [`~trl.RLOOConfig`] and the fields below.\n"
        + EntropyControlConfig.__doc__
    )

    def __post_init__(self):
        super().__post_init__()
        if self.entropy_source == "sampling":
            raise ValueError(
                "entropy_source='sampling' reads the rollout engine's log-probs, which TRL's RLOO trainer does not "
                "keep; use entropy_source='policy'."
            )
