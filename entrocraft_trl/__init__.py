"""Entropy schedules for reinforcement learning of language models with TRL (Entrocraft, arXiv 2604.26326)."""

import warnings
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from packaging.version import Version


__version__ = "0.1.0"

# The trainers hook into private methods of both, which move between minor versions. `entrocraft_trl.contract` checks
# each hook; TRL_TESTED moves when it holds, and the tests pass, on a newer version.
SUPPORTED = {"trl": ("1.16.0", "2"), "transformers": ("5.8.0", "6")}  # from the first, below the second
TRL_TESTED = "1.16"


def _check_range(library: str, installed: str) -> None:
    lowest, below = SUPPORTED[library]
    if not Version(lowest) <= Version(installed) < Version(below):
        supported = f"{library}>={lowest},<{below}"
        raise ImportError(
            f"entrocraft_trl {__version__} works with {supported}, but {library} {installed} is installed. "
            f'Install a supported version: pip install "{supported}"'
        )


def _warn_above_tested(installed: str) -> None:
    if Version(installed).release[:2] > Version(TRL_TESTED).release:
        warnings.warn(
            f"trl {installed} is newer than {TRL_TESTED}, the newest that entrocraft_trl {__version__} was tested "
            "with. `python -m entrocraft_trl.contract` says in seconds whether all that it relies on is still there.",
            stacklevel=2,
        )


for _library in SUPPORTED:
    _check_range(_library, version(_library))
_warn_above_tested(version("trl"))

# Imported on first use: `import entrocraft_trl` then costs no more than `import trl`, which is lazy too.
_MODULE_OF = {
    "EntrocraftGRPOConfig": "config",
    "EntrocraftRLOOConfig": "config",
    "EntropyControlMixin": "control.mixin",
    "Services": "services",
    "EntropyCurveCallback": "reports.live",
    "EntrocraftGRPOTrainer": "trainer",
    "EntrocraftRLOOTrainer": "trainer",
    "Band": "control.schedule",
    "band_at": "control.schedule",
    "pass_at_k": "evaluation.accuracy",
    "evaluate_policy": "evaluation.evaluate",
}

__all__ = [
    "Band",
    "EntrocraftGRPOConfig",
    "EntrocraftGRPOTrainer",
    "EntrocraftRLOOConfig",
    "EntrocraftRLOOTrainer",
    "EntropyControlMixin",
    "EntropyCurveCallback",
    "Services",
    "band_at",
    "evaluate_policy",
    "pass_at_k",
]

if TYPE_CHECKING:
    from .config import EntrocraftGRPOConfig, EntrocraftRLOOConfig
    from .control.mixin import EntropyControlMixin
    from .control.schedule import Band, band_at
    from .evaluation.accuracy import pass_at_k
    from .evaluation.evaluate import evaluate_policy
    from .reports.live import EntropyCurveCallback
    from .services import Services
    from .trainer import EntrocraftGRPOTrainer, EntrocraftRLOOTrainer


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_MODULE_OF])
