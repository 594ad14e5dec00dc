"""Trainer and config of each method that can be compared, and which version of it this package holds."""

import functools
from dataclasses import dataclass, field

from trl import GRPOConfig, GRPOTrainer

from ..config import EntrocraftRLOOConfig
from ..credentials import CredentialsMixin
from ..methods import METHODS
from ..services import Services
from ..trainer import EntrocraftRLOOTrainer
from .version import code_version


# Of this package, what a training depends on. The other services of a trainer change no step.
WINGS = {"policy", "control", "microbatches", "normalisation", "baselines", "config", "trainer"}


@dataclass
class AdaptiveBonusConfig(CredentialsMixin, GRPOConfig):
    """[`~trl.GRPOConfig`] with TRL's adaptive entropy bonus (arXiv 2505.22312) switched on. No field is added."""

    use_adaptive_entropy: bool = field(default=True, metadata={"help": "TRL's adaptive bonus on the entropy."})


class AdaptiveBonusTrainer(Services, GRPOTrainer):
    """[`~trl.GRPOTrainer`] with TRL's adaptive entropy bonus, and the services that any run of a comparison has."""

    _config_class = AdaptiveBonusConfig
    _name = "GRPO with an adaptive entropy bonus"


# What `entrocraft train` has, and what is worth comparing with although nobody needs this package for it.
TRAINERS: dict[str, tuple[type, type[GRPOConfig]]] = {
    **METHODS,
    "adaptive_bonus": (AdaptiveBonusTrainer, AdaptiveBonusConfig),
    "entrocraft_rloo": (EntrocraftRLOOTrainer, EntrocraftRLOOConfig),
}


@functools.cache
def method_version(method: str) -> str:
    """[`code_version`] of a method: the modules of its trainer and config, and what they take from [`WINGS`]."""
    trainer, config = TRAINERS[method]
    return code_version({cls.__module__ for cls in (*trainer.__mro__, *config.__mro__)} - {__name__}, WINGS)
