"""The methods by name, for the command line and for comparisons: a line each."""

from importlib import import_module


# Name -> module and trainer class in it, imported when it is asked for; its config is the class's `_config_class`.
METHODS = {
    "entrocraft": ("trainer", "EntrocraftGRPOTrainer"),
    "grpo": ("baselines.base", "BaselineTrainer"),
    "clip_cov": ("baselines.clip_cov", "ClipCovTrainer"),
    "kl_cov": ("baselines.kl_cov", "KLCovTrainer"),
    "psr": ("baselines.reinforce", "PSRTrainer"),
    "nsr": ("baselines.reinforce", "NSRTrainer"),
    "w_reinforce": ("baselines.reinforce", "WReinforceTrainer"),
    "raft_plus_plus": ("baselines.raft", "RAFTPlusPlusTrainer"),
    "aent": ("baselines.aent", "AEntTrainer"),
    "entropic": ("baselines.entropic", "EntroPICTrainer"),
    "entropic_sequence": ("baselines.entropic_sequence", "EntroPICSequenceTrainer"),
}


def trainer_of(method: str) -> type:
    """
    Trainer class of a method; its `_config_class` is the config that it takes.

    Raises:
        KeyError: If `METHODS` has no such name.
    """
    module, name = METHODS[method]
    return getattr(import_module(f".{module}", __package__), name)
