"""What a trainer's constructor was called with, when a mixin of ours wants to see it before a model loads."""

import inspect

from trl import GRPOTrainer, RLOOTrainer


def call_of_trls_constructor(trainer: object, mixin: type, args: tuple, kwargs: dict) -> inspect.BoundArguments | None:
    """
    The call that reaches the constructor of TRL's trainer, by the names of its arguments; `None` if one of the user's
    stands between.

    That one may name its arguments as it likes, make them itself or change them: what became of them is only known
    when it is done, and a guess would refuse what is right or miss what is wrong.

    Args:
        trainer (`object`): The trainer under construction.
        mixin (`type`): Class whose constructor asks; those of this package after it pass on what they get.
        args, kwargs: What it was called with.
    """
    order = type(trainer).__mro__
    for cls in order[order.index(mixin) + 1 :]:
        if "__init__" not in vars(cls) or cls.__module__.split(".")[0] == "entrocraft_trl":
            continue
        if cls not in (GRPOTrainer, RLOOTrainer):
            return None
        signature = inspect.signature(cls.__init__)
        without_self = signature.replace(parameters=list(signature.parameters.values())[1:])
        return without_self.bind(*args, **kwargs)
    return None
