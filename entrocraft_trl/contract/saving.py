"""What checkpoints and pushes rely on. Each check's docstring is the name of its hook."""

import inspect

from .names import require


def saving_order() -> None:
    """Trainer._save_checkpoint: the model first, random states next, trainer_state.json last"""
    from transformers import Trainer

    source = inspect.getsource(Trainer._save_checkpoint)
    order = [source.find(part) for part in ("self.save_model(", "self._save_rng_state(", "TRAINER_STATE_NAME")]
    require(-1 not in order and order == sorted(order), "checkpoints are written in another order")


def callback() -> None:
    """transformers: a callback's state goes into trainer_state.json and comes back"""
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class Probe(TrainerCallback, ExportableState):
        def __init__(self, memory=None):
            self.memory = memory

        def state(self):
            return {"args": {"memory": self.memory}, "attributes": {}}

    require(Probe.from_state(Probe({"horizon": 7}).state()).memory == {"horizon": 7}, "it came back changed")


def hub_session() -> None:
    """huggingface_hub: the session that uploads use has a limit to silence that can be set"""
    from huggingface_hub import get_session

    require(hasattr(get_session().timeout, "read"), f"its timeout is {get_session().timeout!r}, without `read`")


OTHERS = (saving_order, callback, hub_session)
