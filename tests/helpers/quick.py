"""
What libraries do around a training takes longer than a training of these tests: here it is done once, or left out.

Give `pytest.MonkeyPatch.setattr` where it must be undone.
"""

import functools
from types import SimpleNamespace

from accelerate.utils import imports, memory
from trl.trainer.base_trainer import _BaseTrainer

from entrocraft_trl.reports.model_card import ModelCardMixin


def quicken_trainings(set_attribute=setattr) -> None:
    """A training of one step takes about 60 ms in place of 115 ms."""
    # Whether PEFT and DeepSpeed are there: asked twenty times a training, answered by reading their metadata.
    set_attribute(imports, "_is_package_available", functools.cache(imports._is_package_available))
    # All garbage is collected after each training, over all imported modules; Python does it by itself in time.
    set_attribute(memory, "gc", SimpleNamespace(collect=lambda: None))
    # Telemetry is off; the numbers that it would send are gathered first.
    set_attribute(_BaseTrainer, "_send_telemetry", lambda self: None)


def draw_no_figure(set_attribute=setattr) -> None:
    """Of the 270 ms that a save takes, the figure of its model card takes 230."""
    set_attribute(ModelCardMixin, "_draw_figure", lambda self, log: False)
