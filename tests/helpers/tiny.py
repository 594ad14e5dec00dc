"""
Tiny models, data and forced rollouts for the tests: all made by code, nothing downloaded, nothing read from a disk.

Rollouts are *forced* where a test needs to know them: `force_rollouts` replaces the generation of a trainer, so that
plain TRL and Entrocraft see the same tokens and the same rewards.
"""

import functools
import random

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftGRPOTrainer, metric_names


CHARACTERS = "0123456789+-*=? abcdef"
PAD, EOS = 0, 1
FIRST_CHARACTER = 2  # ids 0 and 1 are padding and end of sequence
VOCABULARY = FIRST_CHARACTER + len(CHARACTERS)

# What a log line says of the clock: no two runs agree.
CLOCK = (
    *("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"),
    *(metric_names.SECONDS_GENERATION, metric_names.SECONDS_READING, metric_names.SECONDS_UPDATE),
)

# Bands (nats) that force a direction, whatever the model's entropy is; its maximum is log(24) = 3.2 nats.
TOO_LOW = {"entropy_low": [50.0], "entropy_high": [60.0], "entropy_unit": "nats"}  # direction -1: keep A <= 0
TOO_HIGH = {"entropy_low": [0.0], "entropy_high": [0.0], "entropy_unit": "nats"}  # direction +1: keep A >= 0
WIDE_OPEN = {"entropy_low": [0.0], "entropy_high": [100.0], "entropy_unit": "nats"}  # direction 0: keep all


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": PAD, "<eos>": EOS}
    vocabulary.update({character: FIRST_CHARACTER + index for index, character in enumerate(CHARACTERS)})
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def build_model(seed: int = 0, family: str = "qwen3", **config):
    """About 20k parameters; weights large enough that token distributions are far from uniform and from each other."""
    classes = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    config_class, model_class = classes[family]
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.25,  # the usual 0.02 gives a uniform policy: all entropies log V, all S - N zero
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
        **({"head_dim": 16} if family == "qwen3" else {}),
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config_class(**settings))


@functools.cache  # nothing changes a data set
def build_dataset(rows: int = 16) -> Dataset:
    """Prompts of different lengths, hence left padding in every batch."""
    return Dataset.from_dict({"prompt": ["1+2=?" + "ab"[index % 2] * (index % 5) for index in range(rows)]})


def share_of_digits(completions, **kwargs) -> list[float]:
    """A reward that differs between random completions, so that advantages of both signs occur."""
    return [sum(char.isdigit() for char in text) / max(len(text), 1) for text in completions]


def build_config(config_class=EntrocraftGRPOConfig, **settings):
    defaults = {
        "output_dir": "run",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_completion_length": 8,  # short: a run takes a fraction of a second
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 0.1,  # large, so that one step moves every parameter visibly
        "lr_scheduler_type": "constant",
        "optim": "sgd",  # without momentum: the parameter change is exactly -lr * gradient
        "max_grad_norm": 0.0,  # no clipping, which would hide a wrong scale
        "shuffle_dataset": False,
    }
    if hasattr(config_class, "rejection_rule"):  # the paper's rule keeps what can be told in advance
        defaults["rejection_rule"] = "advantage_sign"
    return config_class(**{**defaults, **settings})


def build_trainer(trainer_class=EntrocraftGRPOTrainer, model=None, args=None, **arguments):
    if args is None:
        args = build_config(trainer_class._config_class if hasattr(trainer_class, "_config_class") else GRPOConfig)
    defaults = {
        "reward_funcs": share_of_digits,
        "train_dataset": build_dataset(),
        "processing_class": build_tokenizer(),
    }
    return trainer_class(model=model if model is not None else build_model(), args=args, **{**defaults, **arguments})


def run_pair(
    settings, *, plain_class=GRPOTrainer, plain_config=GRPOConfig, ours=EntrocraftGRPOTrainer, band=None, **arguments
):
    """
    Train plain TRL and Entrocraft on the same settings from the same model; returns both trainers. All rows are
    computed, in TRL's order: with some of them, or in another, sums are rounded otherwise.
    """
    build = arguments.pop("model_builder", build_model)
    trainers = []
    for trainer_class, config_class, extra in (
        (plain_class, plain_config, {}),
        (ours, ours._config_class, {"compute_all_rows": True, **(WIDE_OPEN if band is None else band)}),
    ):
        random.seed(0)
        np.random.seed(0)
        args = build_config(config_class, **settings, **extra)
        trainer = build_trainer(trainer_class, build(), args, **arguments)
        trainer.train()
        trainers.append((trainer, rng_states()))
    return trainers


def rng_states() -> tuple:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return torch.get_rng_state().tolist(), (name, keys.tolist(), position, has_gauss, gauss), random.getstate()


def parameters_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same_parameters(model, other) -> None:
    theirs = dict(other.named_parameters()) if hasattr(other, "named_parameters") else other
    for name, value in model.named_parameters():
        assert torch.equal(value, theirs[name]), f"parameter {name} differs"


def history(trainer, key: str) -> list[float]:
    """Logged values of `key`, one per logging step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# ----------------------------------------------------------------------------------------------------- forced rollouts


def random_rollouts(count: int, seed: int = 0, shortest: int = 2, longest: int = 8) -> list[list[int]]:
    """Distinct completions of different lengths, each ended by the end-of-sequence token."""
    source = random.Random(seed)
    rollouts: list[list[int]] = []
    while len(rollouts) < count:
        length = source.randint(shortest, longest) - 1
        ids = [source.randrange(FIRST_CHARACTER, VOCABULARY) for _ in range(length)] + [EOS]
        if ids not in rollouts:
            rollouts.append(ids)
    return rollouts


def force_rollouts(trainer, rollouts: list[list[int]]) -> None:
    """Make `trainer` (GRPO or RLOO) use `rollouts`, in order and over and over, instead of sampling."""
    served = 0

    def next_rollouts(count: int) -> list[list[int]]:
        nonlocal served
        chosen = [list(rollouts[(served + index) % len(rollouts)]) for index in range(count)]
        served += count
        return chosen

    if hasattr(trainer, "rollout_func"):  # GRPO also returns log-probs, RLOO does not
        trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: (next_rollouts(len(prompt_ids)), None)
    else:
        trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: next_rollouts(len(prompt_ids))


def rollout_function(rollouts: list[list[int]], **extra):
    """A `rollout_func` that returns `rollouts` in order; `extra` holds further fields (`env_mask`, `logprobs`)."""
    served = 0

    def rollout(prompts, trainer):
        nonlocal served
        indices = [(served + index) % len(rollouts) for index in range(len(prompts))]
        served += len(prompts)
        return {
            "prompt_ids": trainer.processing_class(list(prompts))["input_ids"],
            "completion_ids": [list(rollouts[index]) for index in indices],
            "logprobs": None,
            **{key: [list(values[index]) for index in indices] for key, values in extra.items()},
        }

    return rollout


def table_reward(rollouts: list[list[int]], rewards: list[float]):
    """A reward function that looks each forced rollout up."""
    table = {tuple(ids): reward for ids, reward in zip(rollouts, rewards, strict=True)}

    def reward(completion_ids, **kwargs):
        return [table[tuple(ids)] for ids in completion_ids]

    return reward


def generation_inputs(trainer) -> list[dict]:
    """What the trainer's own data loader hands to `_generate_and_score_completions` first."""
    return next(iter(trainer.get_train_dataloader()))
