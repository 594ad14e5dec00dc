"""The section on entropy in the model card that TRL writes at every save: band, rule, figure, final numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..atomic import write_atomically
from ..metric_names import ACCEPTED, ENTROPY, HIGH, LOW
from .log import newest_reading


logger = logging.get_logger(__name__)

CARD, FIGURE = "README.md", "entropy.png"
PROGRESS = (0.0, 0.25, 0.5, 0.75, 1.0)
BEFORE = "\n## Citations"  # heading of TRL's template that the section goes in front of

RULES = {
    "advantage_sign": "rollouts with a positive advantage were rejected while the entropy was below the band, and "
    "those with a negative advantage while it was above (Algorithm 1 of the paper)",
    "entropy_change": "rollouts whose predicted entropy change pointed the wrong way were rejected, as many as the "
    "position of the entropy in its band called for",
}
REJECTED = {
    "drop": "They left the loss and its denominator.",
    "zero_advantage": "They stayed in the loss with advantage 0.",
}


class ModelCardMixin:
    """For trainers that mix in entropy control: TRL's model card, with the paper and a section on entropy."""

    _tag_names = ["trl", "entrocraft"]
    _name = "Entrocraft"
    _paper = {
        "title": "Addressing Performance Saturation for LLM RL via Precise Entropy Curve Control",
        "id": "2604.26326",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{li2026entrocraft,
                title  = {{Addressing Performance Saturation for LLM RL via Precise Entropy Curve Control}},
                author = {Bolian Li and Yifan Wang and Yi Ding and Anamika Lochab and Ananth Grama and Ruqi Zhang},
                year   = 2026,
                eprint = {arXiv:2604.26326},
            }"""),
    }

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        try:
            self._add_entropy_section(Path(self.args.output_dir))
        except Exception as error:  # the card is written at every save, where an error would end the run
            logger.warning(f"The model card got no section on entropy: {type(error).__name__}: {error}")

    def _add_entropy_section(self, folder: Path) -> None:
        log = self.state.log_history
        section = "\n".join(
            [
                "\n## Entropy control\n",
                *describe_control(self.args, own_band=self._entropy_band != self.args.band_at),
                "",
                *band_table(self),
                "",
                *(["No entropy was logged yet.", ""] if newest_reading(log) is None else []),
                *(
                    [f"![Entropy in its band, reward and accepted rollouts]({FIGURE})", ""]
                    if self._figure(log)
                    else []
                ),
                *result_table(log, self.state.global_step, self.state.max_steps),
                *how_to_load(self.hub_model_id or folder.resolve().name, hasattr(self.model, "peft_config")),
            ]
        )
        head, heading, tail = (folder / CARD).read_text(encoding="utf-8").partition(BEFORE)
        # In one piece: an upload in the background may be reading the card.
        text = f"{head.rstrip()}\n{section}\n{heading}{tail}".encode()
        write_atomically(folder / CARD, lambda stream: stream.write(text))

    def _figure(self, log: Sequence[Mapping[str, Any]]) -> bool:
        """Draw the figure beside the card; whether there is one to link."""
        path = Path(self.args.output_dir) / FIGURE
        if newest_reading(log) is None:
            return False
        if self._upload_jobs() and path.exists():
            return True  # its bytes are hashed first and sent later: a new figure in between would fail the upload
        try:
            from .plots import plot_run, save_figure

            save_figure(plot_run(log), path)
        except Exception as error:  # a full disk, a broken plotting library: the card does without
            logger.warning(f"The model card got no entropy figure: {type(error).__name__}: {error}")
            return False
        return True


def describe_control(args, own_band: bool = False) -> list[str]:
    """What was done during training, in sentences, from the trainer's config."""
    shape = "given by a function" if own_band else f"`{args.entropy_schedule}`"
    return [
        "During training the entropy of the policy was steered along a band: on each generation batch the mean "
        f"entropy of its tokens was measured, and {RULES[args.rejection_rule]}. "
        f"{REJECTED[args.rejected_rollouts]}",
        "",
        f"Rule: `{args.rejection_rule}`; rejected rollouts: `{args.rejected_rollouts}`; schedule: {shape}.",
    ]


def band_table(trainer) -> list[str]:
    """Edges of the band over the schedule; in nats once the unit is known."""
    in_nats = trainer.args.entropy_unit == "nats" or trainer.control_memory.initial_entropy is not None
    edges = trainer.entropy_band_at if in_nats else trainer._entropy_band
    unit = "nats" if in_nats else "times the initial entropy"
    lines = [f"| progress of the schedule | low edge ({unit}) | high edge ({unit}) |", "|---|---|---|"]
    for progress in PROGRESS:
        low, high = edges(progress)
        lines.append(f"| {progress:.0%} | {low:.3f} | {high:.3f} |")
    if in_nats and trainer.args.entropy_unit == "initial":
        lines += ["", f"The entropy measured first was {trainer.control_memory.initial_entropy:.3f} nats."]
    return lines


def result_table(log: Sequence[Mapping[str, Any]], step: int, max_steps: int) -> list[str]:
    """Where the run stands, from its log; nothing before the first reading."""
    last = newest_reading(log)
    if last is None:
        return []
    readings = [record for record in log if ENTROPY in record]
    inside = sum(record[LOW] <= record[ENTROPY] <= record[HIGH] for record in readings) / len(readings)
    accepted = [record[ACCEPTED] for record in readings if ACCEPTED in record]
    rows = {
        "optimizer steps": f"{step} of {max_steps}",
        "last measured entropy": f"{last[ENTROPY]:.3f} nats (band {last[LOW]:.3f} to {last[HIGH]:.3f})",
        "logged steps inside the band": f"{inside:.0%}",
        "accepted rollouts, mean": f"{sum(accepted) / len(accepted):.0%}" if accepted else "–",
        "last mean reward": f"{last['reward']:.3f}" if "reward" in last else "–",
    }
    return ["| at this save | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]


def how_to_load(name: str, adapter: bool) -> list[str]:
    """The lines that load the model; it needs nothing of this package."""
    kind = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    peft = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
    return [
        "The model loads as any other:",
        "",
        "```python",
        *(peft if adapter else ["from transformers import AutoModelForCausalLM, AutoTokenizer"]),
        "",
        f'model = {kind}.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
    ]
