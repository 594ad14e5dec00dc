"""What takes a tiny run, or a look into the sources. Each check's docstring is the name of its hook."""

import inspect
import re
from collections.abc import Callable
from typing import Any

from .names import require


ATTRIBUTES = {
    "reward_weights": "rewards are summed with them",
    "reward_funcs": "each is wrapped, to name the one that fails",
    "reward_func_names": "messages name them",
    "temperature": "the policy is read at it",
    "num_iterations": "it tells where a generation batch ends",
    "num_generations_eval": "mean@n has this n",
    "router_aux_loss_coef": "the router's loss is not weighed with the rollouts",
    "use_vllm": "an engine's rollouts are not recorded",
    "use_transformers_continuous_batching": "nor are those of continuous batching",
    "log_completions": "the table gets a column of what was kept",
    "_metrics": "entrocraft/... is logged through it",
    "_logs": "the table of completions",
    "_step": "micro-steps are saved and restored",
    "_buffered_inputs": "what is left of a generation batch is saved and restored",
}


def build(trainer: str, config: str, rollout_func: Callable | None = None, peft_config: Any = None, **settings) -> Any:
    """A trainer of TRL's on a tiny model, whose batch is 8 rollouts of at most 8 tokens."""
    import trl
    from transformers import PrinterCallback

    from ..tasks import build_model, build_tokenizer, expression_reward, make_dataset

    # RLOO has a KL term by default, which would load a reference model.
    defaults = {"output_dir": "run", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "beta": 0.0}
    defaults |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_steps": 1, "logging_steps": 1}
    defaults |= {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8}
    built = getattr(trl, trainer)(
        model=build_model(),
        reward_funcs=expression_reward,
        args=getattr(trl, config)(**{**defaults, **settings}),
        train_dataset=make_dataset("train", 16),
        processing_class=build_tokenizer(),
        peft_config=peft_config,
        **({"rollout_func": rollout_func} if rollout_func else {}),
    )
    built.remove_callback(PrinterCallback)
    built.model.train()
    return built


def first_batch(trainer: Any) -> dict[str, Any]:
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def policy_pass(trainer: str, config: str) -> None:
    """the pass that returns log-probs and entropies"""
    import trl

    parameters = inspect.signature(getattr(trl, trainer)._get_per_token_logps_and_entropies).parameters
    first = list(parameters)[:5]
    expected = ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]
    require(first == expected, f"its first parameters are {first}; they are passed by position, as {expected}")
    missing = {"batch_size", "compute_entropy"} - set(parameters)
    require(not missing, f"it lost {sorted(missing)}")
    require(parameters["compute_entropy"].default is False, "it computes entropies unasked")


def attributes(trainer: str, config: str) -> None:
    """attributes that are read and written"""
    built = build(trainer, config)
    missing = {name: use for name, use in ATTRIBUTES.items() if not hasattr(built, name)}
    require(not missing, f"gone: {missing}")
    require(built.reward_weights.shape == (1,), f"reward_weights has shape {tuple(built.reward_weights.shape)}")
    require(
        (built._step, built._buffered_inputs) == (0, None),
        f"_step, _buffered_inputs start as {(built._step, built._buffered_inputs)}, not as (0, None)",
    )


def loss_inputs(trainer: str, config: str) -> None:
    """loss inputs, their keys and shapes"""
    batch = first_batch(build(trainer, config))
    rows = batch["completion_ids"].size(0)
    known = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"}
    known |= {"num_items_in_batch"} if trainer == "GRPOTrainer" else {"old_logps"}
    require(
        set(batch) == known, f"other keys: {sorted(set(batch) ^ known)}; what has a dropped rollout to do with them?"
    )
    shapes = {key: tuple(value.shape) for key, value in batch.items()}
    require(shapes["advantages"] == (rows,), f"advantages have shape {shapes['advantages']}, not one per rollout")
    require(shapes["completion_mask"] == shapes["completion_ids"], f"mask and ids differ: {shapes}")
    if trainer == "GRPOTrainer":
        count = batch["num_items_in_batch"]
        tokens = batch["completion_mask"].sum()
        require(
            count.ndim == 0 and count == tokens,
            f"num_items_in_batch is {count}, not the {tokens} loss tokens, for which a rejection puts what it leaves",
        )
    else:
        require(shapes["old_logps"] == (rows,), f"old_logps have shape {shapes['old_logps']}, not one sum a rollout")


def rewards(trainer: str, config: str) -> None:
    """rewards of all ranks, a column per function"""
    rows = [{"prompt": "24=", "target": 24}] * 8
    found = build(trainer, config)._calculate_rewards(rows, ["24="] * 8, ["9+8-1+8"] * 8, [[3, 4, 5]] * 8)
    require(tuple(found.shape) == (8, 1), f"shape {tuple(found.shape)} for 8 rollouts and one function")


def table(trainer: str, config: str) -> None:
    """the table of completions, as long as a generation batch"""
    built = build(trainer, config, log_completions=True)
    missing = {"prompt", "completion", "advantages", "rewards", "extra"} - set(built._logs)
    require(not missing, f"_logs lost {sorted(missing)}")
    built._logs["extra"]["kept"].extend([True])
    lengths = built._logs["advantages"].maxlen, built._logs["extra"]["kept"].maxlen
    require(lengths == (8, 8), f"advantages and extra columns hold {lengths} rows, not (8, 8)")
    first_batch(built)
    rows = len(built._logs["advantages"]), len(built._logs["prompt"])
    require(
        rows == (8, 8), f"{rows} advantages and prompts after a batch of 8: the tail that is rewritten is not there"
    )


def nan_in_log(trainer: str, config: str) -> None:
    """NaN is logged as nothing"""
    built, logs = build(trainer, config), {}
    built._metrics["train"]["probe"].append(float("nan"))
    built.log(logs)
    require(logs["probe"] is None, f"it is logged as {logs['probe']}; NaN is written where nothing was measured")


def counters(trainer: str, config: str) -> None:
    """counters of a run, which resuming restores"""
    built = build(trainer, config)
    built.train()
    require(built._step == 1, f"_step is {built._step} after one micro-step")
    for name in ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged"):
        require(hasattr(built, name), f"transformers' trainer has no {name} any more")


def rejecting_mask(trainer: str, config: str) -> None:
    """the mask that the loss reads and the model does not"""
    import torch

    built = build(trainer, config)
    batch = first_batch(built)
    built.current_gradient_accumulation_steps = 1
    run, attention_masks = built._get_per_token_logps_and_entropies, []

    def spy(model, input_ids, attention_mask, *args, **kwargs):
        attention_masks.append(attention_mask)
        return run(model, input_ids, attention_mask, *args, **kwargs)

    built._get_per_token_logps_and_entropies = spy
    # On policy all ratios are 1: advantages that do not add up to 0 give a loss that is not 0.
    batch["advantages"] = torch.arange(1.0, 9.0)
    masked = {**batch, "tool_mask": torch.zeros_like(batch["completion_mask"])}
    losses = [built._compute_loss(built.model, inputs).item() for inputs in (batch, masked)]
    plain = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    require(
        len(attention_masks) == 2 and all(torch.equal(mask, plain) for mask in attention_masks),
        "the model gets another mask than completion_mask, which a rejection leaves alone",
    )
    if trainer == "GRPOTrainer":
        require(losses[0] != 0.0 == losses[1], f"tool_mask rejects; with and without it the loss is {losses[::-1]}")
    else:
        require(losses[0] == losses[1] != 0.0, f"the loss reads tool_mask now ({losses}); a rejection relies on 0")


def recording(trainer: str, config: str) -> None:
    """what the model's forward passes show of the tokens that generation returns"""
    from ..policy.recorder import GenerationRecorder

    built = build(trainer, config)
    prompts = [[3, 4, 5], [6]] * 4  # of two lengths: padded
    recorder = GenerationRecorder(built.model, built.temperature)
    count = (8,) if trainer == "GRPOTrainer" else ()  # GRPO also takes the number of generations
    with recorder.listening():
        generated = built._generate_single_turn(prompts, None, {}, *count)
    ids = generated[0] if trainer == "GRPOTrainer" else generated
    require(
        len(recorder.turns(prompts, ids)) == len(prompts),
        "hooks see other tokens than come out: the policy would be read in a pass of its own, which takes time",
    )


def optional_inputs() -> None:
    """GRPOTrainer: loss inputs of an old-policy pass, an environment mask and a rollout engine"""

    def rollouts(prompts, trainer):
        ids = [[5, 6, 2]] * len(prompts)
        prompt_ids = trainer.processing_class(list(prompts))["input_ids"]
        logprobs = [[-1.0] * 3] * len(prompts)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": ids,
            "logprobs": logprobs,
            "env_mask": [[1] * 3] * len(ids),
        }

    batch = first_batch(build("GRPOTrainer", "GRPOConfig", rollouts, num_iterations=2))
    for key in ("old_per_token_logps", "tool_mask", "sampling_per_token_logps"):
        require(key in batch, f"no {key} among {sorted(batch)}")
        require(batch[key].shape == batch["completion_ids"].shape, f"{key} has shape {tuple(batch[key].shape)}")


def old_policy_pass() -> None:
    """GRPOTrainer: the old policy's pass is called through self, with self.model, and its tensor is handed on"""
    built = build("GRPOTrainer", "GRPOConfig", num_iterations=2)
    run, calls = built._get_per_token_logps_and_entropies, []

    def spy(model, *args, **kwargs):
        calls.append((model, run(model, *args, **kwargs)))
        return calls[-1][1]

    built._get_per_token_logps_and_entropies = spy
    batch = first_batch(built)
    require([model for model, _ in calls] == [built.model], f"{len(calls)} passes, not one of the trainer's own model")
    logps, entropies, aux_loss = calls[0][1]
    require(
        entropies is None and aux_loss is None, "it no longer returns (log-probs, None, None) when asked for neither"
    )
    require(batch["old_per_token_logps"] is logps, "old_per_token_logps is a copy: the pass is found by identity")


def shuffle_and_split() -> None:
    """trl.trainer.utils: shuffling and splitting a batch keep scalars whole and rows together"""
    import torch
    from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

    rows = torch.arange(8)
    batch = {"rows": rows, "even": rows % 2 == 0, "count": torch.tensor(5), "scale": torch.tensor(2.0)}
    for part in split_tensor_dict(shuffle_sequence_dict(batch), 4):
        scalars = part["count"].tolist(), part["scale"].tolist()
        require(scalars == (5, 2.0), f"0-dim tensors became {scalars}; normalisers ride along as such")
        require(
            torch.equal(part["even"], part["rows"] % 2 == 0), "boolean rows lost their order: the keep mask is one"
        )


def loss_types() -> None:
    """GRPOTrainer: loss types, each with its normaliser"""
    import trl

    from ..normalisation import LOSS_TYPES

    theirs = set(re.findall(r'self\.loss_type == "(\w+)"', inspect.getsource(trl.GRPOTrainer._compute_loss)))
    theirs |= {name for name in LOSS_TYPES if f'"{name}"' in inspect.getsource(trl.GRPOTrainer._compute_loss)}
    changed = sorted(theirs ^ set(LOSS_TYPES))
    require(not changed, f"added or removed: {changed}")
    default = trl.GRPOConfig.__dataclass_fields__["loss_type"].default
    require(default == "dapo", f"the default is {default!r}, and was 'dapo'")


def fused_head() -> None:
    """trl.trainer.utils: the fused head asks a kernel that can be replaced for log-probs and entropies"""
    import torch
    from trl.trainer import utils

    from ..policy.hidden_states import expected_terms
    from ..tasks import build_model

    model = build_model()
    utils.add_fused_lm_head(model, temperature=0.5, outputs=("log_probs", "entropy"))
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        theirs = model(input_ids=ids, labels=ids, fused_lm_head=True)
        with expected_terms(model, trls_log_probs=False) as terms:
            ours = model(input_ids=ids, labels=ids, fused_lm_head=True)
    require(len(terms) == 1 and terms[0] is not None, "the kernel is not _ChunkedLogProbFunction any more")
    for name in ("log_probs", "entropy"):
        apart = (getattr(theirs, name) - getattr(ours, name)).abs().max().item()
        require(apart < 1e-5, f"{name} of the same hidden states differ by {apart:g}")
    require(terms[0].shape == ours.log_probs.shape, "N has not the shape of the log-probs")


OF_BOTH = (policy_pass, attributes, loss_inputs, rewards, table, nan_in_log, counters, rejecting_mask, recording)
OTHERS = (optional_inputs, old_policy_pass, shuffle_and_split, loss_types, fused_head)
