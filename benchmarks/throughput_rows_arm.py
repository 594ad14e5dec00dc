"""
One arm of `benchmarks.throughput_rows`, in a process of its own, or as one of two.

    python -m benchmarks.throughput_rows_arm CASE ARM

All arms are given the same rollouts, drawn once from a fixed seed: generation runs the model as ever, and a logits
processor says which token comes out. Rewards say which groups are dead and which rollouts a band lets go. The main
process prints one JSON line: seconds of each phase of an optimizer step (medians over steps; of the slower process),
the peak of memory, and what share of rows and padded tokens the update computed.
"""

import json
import os
import sys
import tempfile
from functools import partial
from statistics import mean, median
from typing import Any, NamedTuple

from benchmarks.throughput_arm import (
    ABOVE,
    CHANGE,
    INSIDE,
    OFFICIAL,
    SIGN,
    WARM_UP,
    Case,
    load,
    peak_memory,
    seconds,
)


GROUP, GROUPS = 4, 10  # forty rollouts a step, so that 30% and 60% of the groups are whole numbers
ACCUMULATION = 4


class RowsCase(NamedTuple):
    """What is trained: model and lengths of [`Case`], with or without LoRA."""

    case: Case
    lora: bool = False


SMALL = {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 6, "num_attention_heads": 4}
HALF_A_BILLION = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 16}
TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CASES = {
    "6M, 64 to 176 tokens": RowsCase(Case(SMALL, GROUP * GROUPS, (64, 176), steps=3)),
    "0.5B, 256 to 1024 tokens": RowsCase(Case(HALF_A_BILLION, GROUP * GROUPS, (256, 1024), steps=4, on_gpu=True)),
    "0.5B, 256 to 1024 tokens, LoRA": RowsCase(
        Case(HALF_A_BILLION, GROUP * GROUPS, (256, 1024), steps=4, on_gpu=True), lora=True
    ),
    "sanity": RowsCase(Case(TINY, GROUP * GROUPS, (4, 12), steps=1)),
}


class RowsArm(NamedTuple):
    """`settings` are `None` for plain GRPO. `right` of each group's four rollouts are, but none in `dead` of ten."""

    settings: dict[str, Any] | None
    right: int = 2
    dead: int = 0


PLAIN = "plain GRPO"
ARMS = {
    PLAIN: RowsArm(None),
    "in band": RowsArm({**SIGN, **INSIDE}),
    "in band, 30% dead": RowsArm({**SIGN, **INSIDE}, dead=3),
    "in band, 60% dead": RowsArm({**SIGN, **INSIDE}, dead=6),
    "in band, 60% dead, all rows": RowsArm({**SIGN, **INSIDE, "compute_all_rows": True}, dead=6),
    "entropy change, in band, 60% dead": RowsArm({**CHANGE, **INSIDE}, dead=6),
    "accepted 75%": RowsArm({**SIGN, **ABOVE}, right=1),
    "accepted 50%": RowsArm({**SIGN, **ABOVE}, right=2),
    "accepted 25%": RowsArm({**SIGN, **ABOVE}, right=3),
    "entropy change, rejecting": RowsArm({**CHANGE, **ABOVE}),
    "official semantics, rejecting": RowsArm({**SIGN, **OFFICIAL, **ABOVE}),
}


def draw_rollouts(lengths: tuple[int, int], steps: int, vocabulary: int, end: int) -> list[list[list[int]]]:
    """Completions of each step, `GROUP * GROUPS` each, of lengths between the two given; `end` ends each."""
    import torch

    source = torch.Generator().manual_seed(0)
    rollouts = []
    for _ in range(steps):
        sizes = torch.randint(lengths[0], lengths[1] + 1, (GROUP * GROUPS,), generator=source).tolist()
        rollouts.append(
            [[*torch.randint(end + 1, vocabulary, (size - 1,), generator=source).tolist(), end] for size in sizes]
        )
    return rollouts


def reward_of(step_rollouts: list[list[int]], arm: RowsArm) -> dict[tuple[int, ...], float]:
    """The reward of each rollout of a step: dead groups are spread over the batch, and all wrong."""
    rewards = {}
    for index, ids in enumerate(step_rollouts):
        group, place = divmod(index, GROUP)
        is_dead = group * 7 % GROUPS < arm.dead
        rewards[tuple(ids)] = float(place < arm.right and not is_dead)
    return rewards


def force_tokens(model, batches) -> None:
    """Make each call of `model.generate` return the next of `batches`, lists of token ids, at the cost of sampling."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    generate = model.generate

    class Forced(LogitsProcessor):
        def __init__(self, rows):
            self.rows, self.prompt_width = rows, None

        def __call__(self, input_ids, scores):
            if self.prompt_width is None:
                self.prompt_width = input_ids.size(1)
            place = input_ids.size(1) - self.prompt_width
            tokens = [ids[place] if place < len(ids) else 0 for ids in self.rows]
            tokens = torch.tensor(tokens, device=scores.device).unsqueeze(1)
            return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)

    def forced(*args, **kwargs):
        return generate(*args, logits_processor=LogitsProcessorList([Forced(next(batches))]), **kwargs)

    model.generate = forced


def run(rows_case: RowsCase, arm: RowsArm) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftGRPOTrainer
    from entrocraft_trl.metric_names import COMPUTED_ROWS, COMPUTED_TOKENS

    case, processes = rows_case.case, int(os.environ.get("WORLD_SIZE", "1"))
    parent = GRPOTrainer if arm.settings is None else EntrocraftGRPOTrainer
    config_class = GRPOConfig if arm.settings is None else EntrocraftGRPOConfig

    now = partial(seconds, case)

    class Timed(parent):
        preparing = updating = 0.0  # of the optimizer step under way; the latter without the optimizer

        def _prepare_inputs(self, inputs):
            start = now()
            try:
                return super()._prepare_inputs(inputs)
            finally:
                self.preparing += now() - start

        def training_step(self, *args, **kwargs):
            start, prepared = now(), self.preparing
            loss = super().training_step(*args, **kwargs)
            self.updating += now() - start - (self.preparing - prepared)
            return loss

    class Clock(TrainerCallback):
        def __init__(self):
            self.start, self.steps = 0.0, []

        def on_step_begin(self, *args, **kwargs):
            self.start = now()
            self.trainer.preparing = self.trainer.updating = 0.0

        def on_step_end(self, *args, **kwargs):
            self.steps.append((now() - self.start, self.trainer.preparing, self.trainer.updating))

    model, tokenizer = load(case)
    arguments = {}
    if rows_case.lora:
        from peft import LoraConfig

        arguments["peft_config"] = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    end = tokenizer.eos_token_id
    model.generation_config.eos_token_id = end
    steps = WARM_UP + case.steps
    rollouts = draw_rollouts(case.lengths, steps, model.config.vocab_size, end)
    rewards = {ids: reward for batch in rollouts for ids, reward in reward_of(batch, arm).items()}
    args = config_class(
        output_dir=tempfile.mkdtemp(),  # a benchmark that is stopped leaves a checkpoint there
        per_device_train_batch_size=case.rollouts // ACCUMULATION // processes,
        gradient_accumulation_steps=ACCUMULATION,
        num_generations=GROUP,
        max_completion_length=case.lengths[1],
        max_steps=steps,
        learning_rate=1e-8,
        use_cpu=not case.on_gpu,
        bf16=case.on_gpu,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
        **(arm.settings or {}),
    )
    rank, share = args.process_index, case.rollouts // processes  # the same rollouts over all processes
    force_tokens(model, iter([batch[rank * share : (rank + 1) * share] for batch in rollouts]))
    clock = Clock()
    trainer = Timed(
        model=model,
        reward_funcs=lambda completion_ids, **kwargs: [rewards[tuple(ids)] for ids in completion_ids],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [f"{'ab' * (index % 5)}1+2=?" for index in range(64)]}),
        processing_class=tokenizer,
        callbacks=[clock],
        **arguments,
    )
    clock.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    medians = [median(column) for column in zip(*clock.steps[WARM_UP:], strict=True)]
    figures = torch.tensor([*medians, peak_memory(case)], dtype=torch.float64)
    device = trainer.accelerator.device
    slowest = trainer.accelerator.gather(figures.unsqueeze(0).to(device)).amax(dim=0).tolist()

    def logged(name: str, otherwise: float) -> float:
        return mean([line[name] for line in trainer.state.log_history if name in line][WARM_UP:] or [otherwise])

    return {
        "is_main": trainer.accelerator.is_main_process,
        "processes": processes,
        **dict(zip(("step", "prepare", "update", "memory"), slowest, strict=True)),
        "computed_rows": logged(COMPUTED_ROWS, 1.0),
        "computed_tokens": logged(COMPUTED_TOKENS, 1.0),
        "tokens": logged("num_tokens", 0.0),
        "device": torch.cuda.get_device_name() if case.on_gpu else "CPU, one thread a process",
    }


if __name__ == "__main__":
    from benchmarks.runs import one_quiet_thread

    one_quiet_thread()
    found = run(CASES[sys.argv[1]], ARMS[sys.argv[2]])
    if found.pop("is_main"):
        print(json.dumps(found))
