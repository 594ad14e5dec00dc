"""
Contract with TRL and transformers: every import, method, setting and behaviour of theirs that this package relies on.

    python -m entrocraft_trl.contract

checks them on the installed versions, in seconds and on the CPU, and prints a line for each; the exit code is 1 if one
moved. Most of them are private, so that a new minor version may move them without notice; and an override that nobody
calls any more fails in silence.

`names` has what can be seen from names and signatures, the other files what takes a tiny run. Nothing imports this.
"""

import contextlib
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version


def checks() -> dict[str, Callable[[], None]]:
    """
    All checks by the name of their hook. A check returns nothing, or raises: [`names.HookMoved`], or whatever comes of
    using a hook that is gone.
    """
    from . import behaviour, micro_batches, names, rivals, saving

    found: dict[str, Callable[[], None]] = {}
    for (module, name), users in sorted(names.imports().items()):
        found[f"import {module}.{name}"] = partial(names.check_import, module, name, users)
    for trainer, config in (("GRPOTrainer", "GRPOConfig"), ("RLOOTrainer", "RLOOConfig")):
        for method, use in names.OVERRIDDEN.items():
            found[f"{trainer}.{method}"] = partial(names.check_override, trainer, method, use)
        for setting in (*names.SETTINGS, *(names.GRPO_SETTINGS if config == "GRPOConfig" else ())):
            found[f"{config}.{setting}"] = partial(names.check_setting, config, setting)
        for check in (*behaviour.OF_BOTH, *micro_batches.OF_BOTH):
            found[f"{trainer}: {check.__doc__}"] = partial(check, trainer, config)
    others = (*behaviour.OTHERS, *micro_batches.OTHERS, *rivals.OTHERS, *saving.OTHERS)
    return found | {check.__doc__: check for check in others}


def main() -> int:
    """Run all checks and print how each went. Returns 1 if a hook moved, else 0."""
    from .names import LIBRARIES, HookMoved

    warnings.simplefilter("ignore")  # the libraries' own, about the settings of the tiny runs
    print("entrocraft_trl.contract:", ", ".join(f"{name} {version(name)}" for name in LIBRARIES))
    moved = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for hook, check in checks().items():
            try:
                check()
            except Exception as error:  # a hook that is gone may show itself as any error
                text = str(error) if isinstance(error, HookMoved) else f"{type(error).__name__}: {error}"
                moved.append(hook)
                print(f"MOVED  {hook}: {' '.join(text.split())}")
            else:
                print(f"holds  {hook}")
    print(f"{len(moved)} moved (why: above):" if moved else "every hook holds", *moved, sep="\n  ")
    return 1 if moved else 0
