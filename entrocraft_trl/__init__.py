"""Entropy schedules for reinforcement learning of language models with TRL (Entrocraft, arXiv 2604.26326)."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from packaging.version import Version


__version__ = "0.1.0"

# The trainers hook into private methods of TRL, which change between minor versions; tests/test_trl_contract.py checks
# each hook. The upper bound moves when those tests pass on a new version.
TRL_MIN, TRL_BELOW = "1.16.0", "1.17"


def _check_trl(installed: str) -> None:
    if not Version(TRL_MIN) <= Version(installed) < Version(TRL_BELOW):
        raise ImportError(
            f"entrocraft_trl {__version__} works with trl>={TRL_MIN},<{TRL_BELOW}, but trl {installed} is installed. "
            f'Install a tested version: pip install "trl>={TRL_MIN},<{TRL_BELOW}"'
        )


_check_trl(version("trl"))

# Imported on first use: `import entrocraft_trl` then costs no more than `import trl`, which is lazy too.
_MODULE_OF = {
    "EntrocraftGRPOConfig": "config",
    "EntrocraftRLOOConfig": "config",
    "EntropyControlMixin": "control",
    "EntropyCurveCallback": "live",
    "EntrocraftGRPOTrainer": "trainer",
    "EntrocraftRLOOTrainer": "trainer",
    "Band": "schedule",
    "band_at": "schedule",
    "pass_at_k": "evaluation",
    "evaluate_policy": "evaluation",
}

__all__ = [
    "Band",
    "EntrocraftGRPOConfig",
    "EntrocraftGRPOTrainer",
    "EntrocraftRLOOConfig",
    "EntrocraftRLOOTrainer",
    "EntropyControlMixin",
    "EntropyCurveCallback",
    "band_at",
    "evaluate_policy",
    "pass_at_k",
]

if TYPE_CHECKING:
    from .config import EntrocraftGRPOConfig, EntrocraftRLOOConfig
    from .control import EntropyControlMixin
    from .evaluation import evaluate_policy, pass_at_k
    from .live import EntropyCurveCallback
    from .schedule import Band, band_at
    from .trainer import EntrocraftGRPOTrainer, EntrocraftRLOOTrainer


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_MODULE_OF])
