"""What can be seen without a run: imports, overridden methods and settings."""

import ast
import inspect
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


LIBRARIES = ("trl", "transformers", "accelerate", "peft", "datasets", "huggingface_hub")

# Methods that the trainers override, and for what. Each has to exist, to take what ours takes, and to be called.
OVERRIDDEN = {
    "_generate_and_score_completions": "entropy control edits the loss inputs that it returns; its own passes wait",
    "_generate_single_turn": "the policy is read while it samples",
    "_get_per_token_logps_and_entropies": "the old policy's pass also reads the entropy, or waits for rows to leave",
    "_calculate_rewards": "rewards are checked, and kept for +1/-1 advantages and for mean@n",
    "_compute_loss": "rival methods change what TRL's loss reads, or add a term to it",
    "compute_loss": "the loss is weighed by the rows that a rejection leaves, and that a micro-batch has",
    "_prepare_inputs": "micro-batches are made up anew after it has made a generation batch",
    "_generate": "its time is logged",
    "train": "checkpoints are chosen, restored and saved on SIGTERM",
    "_run_epoch": "a run resumed at its last step takes no other",
    "training_step": "the loss of each step has to be finite; a micro-batch without rows ends here",
    "_get_grad_norm": "and so has the gradient's norm",
    "save_model": "nothing is saved that is not finite",
    "_save_checkpoint": "a checkpoint that is written again is not complete meanwhile",
    "_save_rng_state": "each rank's file is written here, after the model and before trainer_state.json",
    "init_hf_repo": "the Hub's silence gets a limit before the first request",
    "_push_from_checkpoint": "failed uploads are said",
    "_finish_current_push": "waiting for an upload gets a limit",
    "push_to_hub": "the last upload is tried again",
    "_save": "what is saved holds no token, and its card no path",
    "create_model_card": "the card gets the method's section, results and how to load, and no path",
    "evaluation_loop": "mean@n and pass@k join the metrics",
}
SETTINGS = (
    *("top_p", "top_k", "min_p", "temperature", "use_vllm", "num_generations", "num_iterations", "reward_weights"),
    *("steps_per_generation", "generation_batch_size", "per_device_train_batch_size", "enable_jit_checkpoint"),
)
GRPO_SETTINGS = (
    *("entropy_coef", "use_adaptive_entropy"),  # refused beside a band, and by rival methods
    *("loss_type", "importance_sampling_level", "top_entropy_quantile", "epsilon", "epsilon_high", "delta", "beta"),
    *("scale_rewards", "multi_objective_aggregation", "off_policy_mask_threshold"),  # refused where they are not read
)


class HookMoved(Exception):
    """Something of the libraries' is not as this package expects it; the message says what, and who needs it."""


def require(holds: bool, message: str) -> None:
    if not holds:
        raise HookMoved(message)


def imports() -> dict[tuple[str, str], set[str]]:
    """Module and name of everything that this package imports from `LIBRARIES`, with the files that do."""
    home = Path(__file__).parents[1]
    found: dict[tuple[str, str], set[str]] = {}
    for path in home.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in LIBRARIES:
                for alias in node.names:
                    found.setdefault((node.module, alias.name), set()).add(str(path.relative_to(home)))
    return found


def check_import(module: str, name: str, users: set[str]) -> None:
    try:
        getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise HookMoved(f"{module} has no {name} ({error}); imported in {', '.join(sorted(users))}") from None


def check_override(trainer: str, method: str, use: str) -> None:
    import transformers
    import trl

    import entrocraft_trl

    from ..methods import METHODS

    parent = getattr(trl, trainer)
    theirs = getattr(parent, method, None)
    require(theirs is not None, f"{trainer} has no {method} any more; {use}")
    found = list(inspect.signature(theirs).parameters)
    ours = [getattr(entrocraft_trl, f"Entrocraft{trainer}"), *(kind for kind, _ in METHODS.values())]
    for owner in dict.fromkeys(owner for kind in ours if issubclass(kind, parent) for owner in kind.__mro__):
        if owner.__module__.split(".")[0] == "entrocraft_trl" and method in vars(owner):
            require(_takes(vars(owner)[method], found), f"it takes {found} now, {owner.__name__}'s does not; {use}")
    if not method.startswith("_"):
        return  # whoever trains calls it
    sources = [inspect.getsource(sys.modules[kind.__module__]) for kind in (parent, transformers.Trainer)]
    require(any(re.search(rf"\bself\.{method}\b", text) for text in sources), f"nobody calls it any more; {use}")


def _takes(override: Callable, theirs: list[str]) -> bool:
    """Whether an override stands in for a method with the parameters `theirs`: same names, in the same places."""
    parameters = inspect.signature(override).parameters.values()
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_keyword = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    passes_on = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    return theirs[: len(named)] == named and by_keyword <= set(theirs) and (passes_on or len(named) == len(theirs))


def check_setting(config: str, setting: str) -> None:
    import trl

    require(setting in getattr(trl, config).__dataclass_fields__, f"{config} has no {setting} any more")
