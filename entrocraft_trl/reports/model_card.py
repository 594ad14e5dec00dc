"""Sections of the model card that TRL writes at every save: the method's own words, results, how to load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from transformers.utils import logging

from ..atomic import write_atomically
from .hub_names import drop_paths, is_hub_name
from .log import Record, accepted_shares, bands, entropies, rewards, share_inside


logger = logging.get_logger(__name__)

CARD, FIGURE = "README.md", "entropy.png"
BEFORE = "\n## Citations"  # heading of TRL's template that the sections go in front of


class ModelCardMixin:
    """
    For TRL's trainers: put it before the trainer among the bases. Their model card gets the results of the run, read
    from its log, and what the method says of itself in `card_section`, and names no path of this machine.
    """

    def card_section(self) -> list[str]:
        """What the method did, as lines of Markdown with a heading of its own; none where TRL's card says it all."""
        return []

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """TRL's card with the sections. `dataset_name` is left out if it is a local file or folder."""
        if dataset_name is not None and not is_hub_name(dataset_name):
            dataset_name = None
        super().create_model_card(model_name, dataset_name, tags)
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        drop_paths(folder / CARD)
        try:
            self._add_sections(folder)
        except Exception as error:  # the card is written at every save, where an error would end the run
            logger.warning(f"The model card got no section on this run: {type(error).__name__}: {error}")

    def _save(self, output_dir: str | None = None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # PEFT wrote a card of its own
            drop_paths(Path(output_dir if output_dir is not None else self.args.output_dir) / CARD)

    def _add_sections(self, folder: Path) -> None:
        log = self.state.log_history
        figure = [f"![Entropy and reward during training]({FIGURE})", ""] if self._draw_figure(log) else []
        results = [*figure, *result_table(log, self.state.global_step, self.state.max_steps)]
        name = self.hub_model_id or folder.resolve().name
        sections = [
            self.card_section(),
            ["## Results", "", *(results or ["Neither entropy nor reward was logged yet."])],
            ["## Loading", "", *how_to_load(name, adapter=hasattr(self.model, "peft_config"))],
        ]
        head, heading, tail = (folder / CARD).read_text(encoding="utf-8").partition(BEFORE)
        added = "".join("\n".join(["", *lines, ""]) for lines in sections if lines)
        # In one piece: an upload in the background may be reading the card.
        text = f"{head.rstrip()}\n{added}{heading}{tail}".encode()
        write_atomically(folder / CARD, lambda stream: stream.write(text))

    def _draw_figure(self, log: Sequence[Record]) -> bool:
        """Draw the figure beside the card; whether there is one to link."""
        path = Path(self.args.output_dir) / FIGURE
        if not entropies(log):
            return False
        push = getattr(self, "push_in_progress", None)  # the main process has it, after the first contact with the Hub
        if push is not None and not push.is_done() and path.exists():
            return True  # its bytes are hashed first and sent later: a new figure in between would fail the upload
        try:
            from .plots import plot_run, save_figure

            save_figure(plot_run(log), path)
        except Exception as error:  # a full disk, a broken plotting library: the card does without
            logger.warning(f"The model card got no figure: {type(error).__name__}: {error}")
            return False
        return True


def result_table(log: Sequence[Record], step: int, max_steps: int) -> list[str]:
    """Where the run stands: a row for each figure that its log has, entropies in nats; no line without any."""
    readings, edges, accepted, reward = entropies(log), bands(log), accepted_shares(log), rewards(log)
    rows = {}
    if readings:
        band = " (band {:.3f} to {:.3f})".format(*edges[-1]) if edges else ""
        rows["last measured entropy"] = f"{readings[-1]:.3f} nats{band}"
    if edges:
        rows["logged steps inside the band"] = f"{share_inside(readings, edges):.0%}"
    if accepted:
        rows["accepted rollouts, mean"] = f"{mean(accepted):.0%}"
    if reward:
        rows["last mean reward"] = f"{reward[-1]:.3f}"
    if not rows:
        return []
    rows = {"optimizer steps": f"{step} of {max_steps}", **rows}
    return ["| at this save | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


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
