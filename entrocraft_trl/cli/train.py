"""`entrocraft train`: one run from a YAML file and the command line, with TRL's helpers for model and adapters."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..printable import printable
from . import CommandError, is_main_process, user_errors
from .arguments import EntrocraftScriptArguments, parse


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig

    from ..config import EntrocraftGRPOConfig

EMBEDDED_ROWS = 4096  # prompts of the embedded task when max_samples does not say; its few targets repeat anyway


def main(argv: list[str]) -> None:
    """Run the command. Errors of the set-up become a [`CommandError`]; those of the training keep their traceback."""
    with user_errors():
        script_args, training_args, model_args, mixture_args = parse(argv)
        resume = _check_resuming(training_args, script_args.dry_run)
        inputs = _trainer_inputs(script_args, training_args, model_args, mixture_args)
    if script_args.dry_run:
        from ..reports.memory_report import describe_memory

        if is_main_process():
            print(describe(inputs, training_args, script_args.method))
            if model_args.model_name_or_path:  # the embedded task's own policy is too small to matter
                with user_errors():
                    print(describe_memory(training_args, inputs, script_args.max_prompt_length))
        return
    from ..methods import METHODS

    with ExitStack() as run:
        with user_errors():
            # Loads the model: a missing weight file or an unfit adapter is still the user's to mend.
            trainer_class, _ = METHODS[script_args.method]
            trainer = trainer_class(args=training_args, **inputs)
            run.enter_context(trainer.running())  # until the model is saved and pushed
        _train(trainer, script_args, training_args, resume)


def _check_resuming(args: GRPOConfig, dry_run: bool) -> str | bool | None:
    """What to give the trainer to resume from; what it would refuse ends the command before a model loads."""
    from ..checkpoints.choice import asks_the_hub, resolve_checkpoint

    value = args.resume_from_checkpoint
    if asks_the_hub(value, args) and not dry_run:
        from ..checkpoints.hub_download import fetch_for_all

        fetch_for_all(args)
        value = "auto"  # it is here now: the trainer need not ask again
    resolve_checkpoint(value, args.output_dir)
    return value


def _trainer_inputs(
    script_args: EntrocraftScriptArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    mixture_args: DatasetMixtureConfig,
) -> dict[str, Any]:
    """The trainer's arguments, all checked, and the model still only a name."""
    from trl import get_peft_config, get_quantization_config

    from ..data.rewards import check_reward_columns, load_reward
    from ..data.rows import check_training_rows

    rewards: list[Any] = [load_reward(name) for name in script_args.reward_funcs or []]
    if script_args.reward_model_name_or_path:
        rewards.append(script_args.reward_model_name_or_path)
    if script_args.embedded_task:
        train_rows, eval_rows, default_reward = _embedded_data(script_args, training_args)
        rewards = rewards or [default_reward]
    else:
        train_rows, eval_rows = _data(script_args, training_args, model_args, mixture_args)
    if not rewards:
        raise ValueError("no reward: name one with --reward_funcs, for instance accuracy_reward or module:function")
    check_reward_columns(rewards, list(next(iter(train_rows))))
    check_training_rows(train_rows, training_args.generation_batch_size // training_args.num_generations)
    # Last, because it can take minutes: a starting policy that is not there yet gets made.
    model = model_args.model_name_or_path or _starting_policy(script_args, training_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    return {
        "model": model,
        "reward_funcs": rewards,
        "train_dataset": train_rows,
        "eval_dataset": eval_rows,
        "peft_config": get_peft_config(model_args),
        "quantization_config": get_quantization_config(model_args),
    }


def _embedded_data(script_args, training_args):
    """Training rows, evaluation rows and reward of the offline task."""
    from ..tasks.expressions import TEST_TARGETS, expression_reward, make_dataset

    train_rows = make_dataset("train", script_args.max_samples or EMBEDDED_ROWS, training_args.seed)
    evaluates = training_args.eval_strategy != "no"
    eval_rows = make_dataset("test", len(TEST_TARGETS), training_args.seed) if evaluates else None
    return train_rows, eval_rows, expression_reward


def _starting_policy(script_args, training_args) -> str:
    if script_args.dry_run:
        return "starting policy of the embedded task (made on first use)"
    from ..tasks.warmup import starting_policy

    with training_args.main_process_first(desc="warm-up of the starting policy"):
        return str(starting_policy(progress=is_main_process() and not training_args.disable_tqdm))


def _data(script_args, training_args, model_args, mixture_args):
    """Training and evaluation rows, checked, with the columns that TRL reads."""
    from trl import get_dataset

    from ..data.loading import drop_long_prompts, load_rows, prepare_rows, prompt_format
    from ..evaluation.sampling import encode_prompt

    if not script_args.dataset_name and not mixture_args.datasets:
        raise ValueError("no data: name a data set with --dataset_name (Hub name, local file or folder)")
    tokenizer = _load_tokenizer(training_args, model_args)
    form = prompt_format(script_args, tokenizer, model_args.model_name_or_path)

    def rows_of(name: str | None, split: str):
        if mixture_args.datasets and name is None:
            mixture = get_dataset(mixture_args)
            if split not in mixture:
                raise ValueError(f"the data mixture has no split {split!r}; its splits are: {', '.join(mixture)}")
            return mixture[split]
        return load_rows(name, split, script_args.dataset_config, script_args.dataset_streaming)

    train_name = None if mixture_args.datasets else script_args.dataset_name
    train_rows = prepare_rows(rows_of(train_name, script_args.dataset_train_split), form, script_args.max_samples)
    if script_args.max_prompt_length is not None:
        train_rows = drop_long_prompts(
            train_rows, lambda prompt: len(encode_prompt(tokenizer, prompt)), script_args.max_prompt_length
        )
    eval_rows = None
    if training_args.eval_strategy != "no":
        # A data set of its own is one file, as a rule, and a file has the split "train" only.
        split = script_args.dataset_test_split
        if script_args.eval_dataset_name and split == "test" and Path(script_args.eval_dataset_name).is_file():
            split = "train"
        eval_rows = prepare_rows(rows_of(script_args.eval_dataset_name or train_name, split), form)
    return train_rows, eval_rows


def _load_tokenizer(training_args, model_args):
    from transformers import AutoTokenizer

    name = model_args.model_name_or_path
    if not name:
        raise ValueError("no model: name one with --model_name_or_path (Hub name or local folder)")
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer of model {name!r}: {error}") from error


def describe(inputs: dict[str, Any], args: GRPOConfig, method: str = "entrocraft") -> str:
    """The plan of a run, for people: model, data, rewards, batches, and what the method is set to."""
    from ..data.rewards import reward_name

    rows: Dataset | IterableDataset = inputs["train_dataset"]
    first = next(iter(rows))
    rollouts = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    steps: int | None = args.max_steps if args.max_steps > 0 else None
    size = "streamed"
    if hasattr(rows, "__len__"):
        size = f"{len(rows)} rows"
        steps = steps or math.ceil(args.num_train_epochs * len(rows) * args.num_generations / rollouts)
    rewards = [reward_name(reward) for reward in inputs["reward_funcs"]]
    lines = [
        f"model            {inputs['model']}",
        f"data             {size}, columns: {', '.join(first)}",
        f"first prompt     {str(first['prompt'])[:160]}",
        *([f"first solution   {str(first['solution'])[:160]}"] if "solution" in first else []),
        f"rewards          {', '.join(rewards)}",
        f"optimizer steps  {steps or 'unknown'}, each on {rollouts} rollouts ({args.num_generations} per prompt)",
        f"generation       {args.generation_batch_size} rollouts at a time, on {args.world_size} process(es)",
        *(_band_lines(args, steps) if method == "entrocraft" else _method_lines(args, method)),
    ]
    return "\n".join(map(printable, lines))


def _band_lines(args: EntrocraftGRPOConfig, steps: int | None) -> list[str]:
    """Rule and schedule, and the band at its start, middle and end."""
    unit = "nats" if args.entropy_unit == "nats" else "times the initial entropy"
    lines = [
        f"rejection        {args.rejection_rule}, rejected rollouts: {args.rejected_rollouts}",
        f"schedule         {args.entropy_schedule}, over {args.entropy_schedule_steps or steps or 'all'} steps",
    ]
    for progress in (0.0, 0.5, 1.0):
        low, high = args.band_at(progress)
        lines.append(f"band at {progress:>4.0%}     {low:.3f} to {high:.3f} {unit}")
    return lines


def _method_lines(args: GRPOConfig, method: str) -> list[str]:
    """A rival method's name, and the fields that it adds to those of all methods, one a line."""
    from ..baselines.base import BaselineConfig

    added = [item.name for item in fields(args) if item.name not in BaselineConfig.__dataclass_fields__]
    return [f"method           {method}", *(f"  {name:<22} {getattr(args, name)}" for name in added)]


def _train(trainer, script_args: EntrocraftScriptArguments, args: GRPOConfig, resume: str | bool | None) -> None:
    import transformers
    from packaging.version import Version

    trainer.train(resume_from_checkpoint=resume)
    if trainer.state.global_step == 0:
        # Only known now of a stream; transformers ends such a run as if all were well.
        prompts = args.generation_batch_size // args.num_generations
        raise CommandError(f"no step was made: the stream ended before the {prompts} rows of one generation batch")
    trainer.save_state()  # the log, which `entrocraft plot` reads
    trainer.save_model(args.output_dir)
    # Saving takes no longer than a checkpoint; waiting for the Hub may take as long as `hub_patience`.
    rest = "; start again with resume_from_checkpoint=auto to push it" if args.push_to_hub else ""
    trainer.exit_on_sigterm(f"the model is saved in {args.output_dir!r}{rest}.")
    pushed = trainer.push_to_hub(dataset_name=script_args.dataset_name) if args.push_to_hub else None
    if is_main_process():
        print(
            f"entrocraft: {trainer.state.global_step} steps done, run saved in {args.output_dir}; "
            f"figure: entrocraft plot {args.output_dir}"
        )
    # Together: a process that closed its group while the main one still saved hung at exit (gloo, two processes).
    trainer.accelerator.wait_for_everyone()
    if Version(transformers.__version__) >= Version("5.18.0"):
        trainer.end()  # closes trackers and the process group
    if args.push_to_hub and pushed is None and is_main_process() and not trainer.sigterm_received:
        # The disk of a job goes away with it: a job whose model is not on the Hub must not end as a success.
        raise CommandError(f"training is done, but the model in {args.output_dir!r} is not on the Hub; see above")
