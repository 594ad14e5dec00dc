"""
One arm of `benchmarks.throughput`, in a process of its own: peak memory does not fall within one.

    python -m benchmarks.throughput_arm CASE ARM

Prints one JSON line: seconds of each phase of an optimizer step (medians over steps), and the peak of memory.
"""

import json
import resource
import sys
import tempfile
import time
from functools import partial
from statistics import median
from typing import Any, NamedTuple


WARM_UP = 1  # the first step allocates memory, and builds AdamW's moments


class Case(NamedTuple):
    """What is trained. `model`: sizes of a random Qwen3, or `None` for the real model."""

    model: dict[str, int] | None
    rollouts: int
    lengths: tuple[int, int]  # of completions, in tokens
    steps: int
    on_gpu: bool = False
    arms: tuple[str, ...] = ()  # all, if none is named


CASES = {
    "10M, 64 to 256 tokens": Case(
        {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4},
        rollouts=8,
        lengths=(64, 256),
        steps=3,
    ),
    # Full fine-tuning takes half a minute a step: what differs most.
    "135M, 8 to 24 tokens": Case(
        None,
        rollouts=16,
        lengths=(8, 24),
        steps=2,
        arms=(
            "plain GRPO",
            "recorded, sign, in band",
            "recorded, entropy change, rejecting",
            "own pass, entropy change, rejecting",
        ),
    ),
    "0.5B, 256 to 1024 tokens": Case(
        {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 16},
        rollouts=16,
        lengths=(256, 1024),
        steps=4,
        on_gpu=True,
    ),
}

INSIDE = {"entropy_unit": "nats", "entropy_low": [0.0], "entropy_high": [100.0]}  # a band that is never left
ABOVE = {"entropy_unit": "nats", "entropy_low": [50.0], "entropy_high": [60.0]}  # and one that every step is below
SIGN = {"rejection_rule": "advantage_sign"}
CHANGE = {"rejection_rule": "entropy_change"}
OFFICIAL = {
    "out_of_band_advantages": "reward",
    "reward_coding": "zero_one",
    "rejected_rollouts": "zero_advantage",
}
TWO_STEPS = {"steps_per_generation": 2}  # with which TRL runs a pass for the old policy's log-probs


class Arm(NamedTuple):
    """`settings` are `None` for plain GRPO; `unrecorded`: as where an engine samples; `against`: plain arm."""

    settings: dict[str, Any] | None
    against: str = "plain GRPO"
    unrecorded: bool = False


ARMS = {
    "plain GRPO": Arm(None),
    "recorded, sign, in band": Arm({**SIGN, **INSIDE}),
    "recorded, sign, rejecting": Arm({**SIGN, **ABOVE}),
    "recorded, entropy change, rejecting": Arm({**CHANGE, **ABOVE}),
    "recorded, official semantics": Arm({**SIGN, **OFFICIAL, **ABOVE}),
    "own pass, sign, in band": Arm({**SIGN, **INSIDE}, unrecorded=True),
    "own pass, entropy change, rejecting": Arm({**CHANGE, **ABOVE}, unrecorded=True),
    "plain GRPO, two steps a generation": Arm({**TWO_STEPS}, against="plain GRPO, two steps a generation"),
    "TRL's pass, sign, in band": Arm(
        {**SIGN, **INSIDE, **TWO_STEPS}, against="plain GRPO, two steps a generation", unrecorded=True
    ),
    "TRL's pass, entropy change, rejecting": Arm(
        {**CHANGE, **ABOVE, **TWO_STEPS}, against="plain GRPO, two steps a generation", unrecorded=True
    ),
}


def load(case: Case):
    """Model and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from entrocraft_trl.tasks import build_tokenizer

    if case.model is None:
        from entrocraft_trl.tasks.real_model import real_model_path

        folder = real_model_path()
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    sizes = {**case.model, "head_dim": 64, "num_key_value_heads": case.model["num_attention_heads"] // 2}
    vocabulary = 151_936 if case.on_gpu else 16_384
    # The usual scale of weights, 0.02, makes all tokens equally likely; this one gives them some 5 nats.
    config = Qwen3Config(vocab_size=vocabulary, initializer_range=0.05, tie_word_embeddings=True, **sizes)
    return Qwen3ForCausalLM(config), build_tokenizer()


def completion_settings(case: Case, vocabulary: int) -> tuple[dict[str, Any], list[int]]:
    """Settings for lengths between the two given, and the tokens, a share of the vocabulary, that end a completion."""
    shortest, longest = case.lengths
    ends = list(range(1, 1 + round(vocabulary / (longest / 2))))
    settings = {
        "max_completion_length": longest,
        "generation_kwargs": {"min_new_tokens": shortest, "eos_token_id": ends},
    }
    return settings, ends


def seconds(case: Case) -> float:
    """A clock: seconds of this process on a CPU, so that whatever else the machine does is not counted."""
    import torch

    if not case.on_gpu:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(case: Case) -> float:
    """In bytes: of PyTorch's allocations on a GPU, of the whole process, libraries too, on a CPU."""
    import torch

    if case.on_gpu:
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(case: Case, arm: Arm) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftGRPOTrainer

    controlled = arm.settings is not None and "rejection_rule" in arm.settings
    parent = EntrocraftGRPOTrainer if controlled else GRPOTrainer
    config_class = EntrocraftGRPOConfig if controlled else GRPOConfig

    now = partial(seconds, case)

    class Timed(parent):
        prepare_seconds = 0.0

        def _generate_and_score_completions(self, inputs):
            start = now()
            batch = super()._generate_and_score_completions(inputs)
            self.prepare_seconds += now() - start
            return batch

        if controlled and arm.unrecorded:

            def _why_not_recorded(self):
                return "the benchmark says so"

    class Clock(TrainerCallback):
        def __init__(self):
            self.starts, self.steps = 0.0, []

        def on_step_begin(self, *args, **kwargs):
            self.starts = now()
            self.trainer.prepare_seconds = 0.0

        def on_step_end(self, *args, **kwargs):
            self.steps.append((now() - self.starts, self.trainer.prepare_seconds))

    def reward(completion_ids, **kwargs):
        """Half of the rollouts are right, whatever the policy: a coin that depends on the tokens alone."""
        return [float(sum(ids) % 2) for ids in completion_ids]

    model, tokenizer = load(case)
    lengths, ends = completion_settings(case, model.config.vocab_size)
    model.generation_config.eos_token_id = ends
    per_step = (arm.settings or {}).get("steps_per_generation", 1)
    args = config_class(
        output_dir=tempfile.mkdtemp(),  # a benchmark that is stopped leaves a checkpoint there
        per_device_train_batch_size=case.rollouts // per_step,
        num_generations=8,
        max_steps=(WARM_UP + case.steps) * per_step,
        learning_rate=1e-8,  # so small that all arms sample the same rollouts to the end
        use_cpu=not case.on_gpu,
        bf16=case.on_gpu,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
        **lengths,
        # What reading costs: the update is that of plain GRPO. `throughput_rows_arm` has what it costs by default.
        **({"compute_all_rows": True} if controlled else {}),
        **(arm.settings or {}),
    )
    clock = Clock()
    prompts = [f"{'ab' * (index % 5)}1+2=?" for index in range(64)]
    trainer = Timed(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    clock.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    # All optimizer steps of a generation are one step here.
    grouped = [clock.steps[start : start + per_step] for start in range(0, len(clock.steps), per_step)][WARM_UP:]
    whole = [sum(step for step, _ in group) for group in grouped]
    prepare = [sum(seconds for _, seconds in group) for group in grouped]
    return {
        "step": median(whole),
        "update": median(a - b for a, b in zip(whole, prepare, strict=True)),
        "memory": peak_memory(case),
        "tokens": trainer.state.num_input_tokens_seen,
        "device": torch.cuda.get_device_name() if case.on_gpu else "CPU, one thread",
    }


if __name__ == "__main__":
    from benchmarks.runs import one_quiet_thread

    one_quiet_thread()
    print(json.dumps(run(CASES[sys.argv[1]], ARMS[sys.argv[2]])))
