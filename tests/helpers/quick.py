"""
What libraries do around a training takes longer than a training of these tests: here it is done once, or left out.

Give `pytest.MonkeyPatch.setattr` where it must be undone.
"""

import functools
from types import SimpleNamespace

import jinja2
import torch
from accelerate.utils import imports, memory
from trl.trainer import utils
from trl.trainer.base_trainer import _BaseTrainer

from entrocraft_trl.reports import memory_report
from entrocraft_trl.reports.gpu_memory import count_parameters
from entrocraft_trl.reports.model_card import ModelCardMixin


def quicken_trainings(set_attribute=setattr) -> None:
    """A training of one step takes about half as long."""
    # Whether PEFT and DeepSpeed are there: asked twenty times a training, answered by reading their metadata.
    set_attribute(imports, "_is_package_available", functools.cache(imports._is_package_available))
    # All garbage is collected after each training, over all imported modules; Python does it by itself in time.
    set_attribute(memory, "gc", SimpleNamespace(collect=lambda: None))
    # Telemetry is off; the numbers that it would send are gathered first.
    set_attribute(_BaseTrainer, "_send_telemetry", lambda self: None)
    # Each seed is queued for accelerators that are not there, with the lines of source that set it: 1.5 ms a seed.
    for accelerator in (torch.cuda, torch.xpu, torch.mtia):
        set_attribute(accelerator, "traceback", SimpleNamespace(format_stack=list))
    # TRL's model card: the same template, and the same versions read from the same metadata, at each save.
    set_attribute(jinja2, "Template", functools.cache(jinja2.Template))
    set_attribute(utils, "version", functools.cache(utils.version))


def count_parameters_once(set_attribute=setattr) -> None:
    """The parameters of a large model and its adapter are counted in 300 ms, those of the same three in many tests."""
    counted = {}

    def count(config, peft_config=None):
        key = config.to_json_string(), str(peft_config)
        if key not in counted:
            counted[key] = count_parameters(config, peft_config)
        return counted[key]

    set_attribute(memory_report, "count_parameters", count)


draw_figure = ModelCardMixin._draw_figure


def draw_no_figure(set_attribute=setattr) -> None:
    """Of the 270 ms that a save takes, the figure of its model card takes 230."""
    set_attribute(ModelCardMixin, "_draw_figure", lambda self, log: False)


def draw_figures(set_attribute=setattr) -> None:
    set_attribute(ModelCardMixin, "_draw_figure", draw_figure)
