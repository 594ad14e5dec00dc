"""Arguments of a training run, from a YAML file and the command line, on TRL's parser."""

import argparse
import difflib
import sys
from dataclasses import dataclass, field, fields

import yaml
from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig, TrlParser
from trl.scripts.grpo import GRPOScriptArguments

from ..methods import METHODS
from . import CommandError, CommandParser, is_main_process
from .recipe import config_file, recipes


@dataclass
class EntrocraftScriptArguments(GRPOScriptArguments):
    """
    Arguments of `entrocraft train` besides those of the trainer and the model. Documented here: what TRL's lack.

    Args:
        method (`str`, *optional*, defaults to `"entrocraft"`):
            What trains: this package's method, or a rival's, whose fields then take the place of its own.
        eval_dataset_name (`str`, *optional*):
            Data set for evaluation. Defaults to the test split of `dataset_name`.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the question: text or chat messages.
        answer_column (`str`, *optional*):
            Column of the reference answer, copied to `solution`, which TRL's accuracy rewards read.
        answer_after (`str`, *optional*):
            Keep what follows the last occurrence of this text in the answer (`"####"` for GSM8K).
        answer_template (`str`, *optional*):
            Text with `{answer}` where the answer goes: `"${answer}$"` for LaTeX without delimiters, which accuracy
            rewards misread.
        system_prompt (`str`, *optional*):
            System message.
        prompt_template (`str`, *optional*):
            Text with `{prompt}` where the question goes.
        prompt_format (`str`, *optional*, defaults to `"auto"`):
            `"conversational"`, `"text"`, or `"auto"`: conversational when the tokenizer has a chat template.
        max_samples (`int`, *optional*):
            Use this many training rows, from the start.
        max_prompt_length (`int`, *optional*):
            Leave out training rows whose prompt has more tokens.
        embedded_task (`str`, *optional*):
            `"expressions"`: the offline task, which brings data, reward and a starting policy.
        dry_run (`bool`, *optional*, defaults to `False`):
            Check arguments, data and rewards, print the plan, and stop before the model loads.
    """

    method: str = field(
        default="entrocraft",
        metadata={
            "help": "What trains. The options below are those of this method: `--method NAME --help` lists another's.",
            "choices": list(METHODS),
        },
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Data set for evaluation. Defaults to the test split of `dataset_name`."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the question: text or chat messages."})
    answer_column: str | None = field(
        default=None,
        metadata={"help": "Column of the reference answer, copied to `solution`, which accuracy rewards read."},
    )
    answer_after: str | None = field(
        default=None,
        metadata={"help": "Keep what follows the last occurrence of this text in the answer ('####' for GSM8K)."},
    )
    answer_template: str | None = field(
        default=None,
        metadata={"help": "Text with {answer} where the answer goes: '${answer}$' for LaTeX without delimiters."},
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message."})
    prompt_template: str | None = field(default=None, metadata={"help": "Text with {prompt} where the question goes."})
    prompt_format: str = field(
        default="auto",
        metadata={
            "help": "Chat messages or plain text; auto: messages when the tokenizer has a chat template.",
            "choices": ["auto", "conversational", "text"],
        },
    )
    max_samples: int | None = field(default=None, metadata={"help": "Use this many training rows, from the start."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Leave out training rows whose prompt has more tokens."}
    )
    embedded_task: str | None = field(
        default=None,
        metadata={"help": "Offline task with data, reward and starting policy.", "choices": ["expressions"]},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Check everything up to the model, print the plan, and stop."}
    )

    def __post_init__(self):
        # argparse checks choices on the command line only, not in a YAML file.
        for name, allowed in (
            ("prompt_format", ("auto", "conversational", "text")),
            ("embedded_task", (None, "expressions")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if isinstance(self.reward_funcs, str):  # a single name in YAML
            self.reward_funcs = [self.reward_funcs]
        if self.embedded_task and self.dataset_name:
            raise ValueError(
                f"embedded_task={self.embedded_task!r} brings its own data; drop dataset_name={self.dataset_name!r}"
            )


class _Parser(TrlParser):
    """TRL's parser, with an error message in place of argparse's usage text of several hundred lines."""

    def error(self, message: str):
        raise CommandError(message)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """With the recipes one a line: wrapped, their names would be broken at the hyphens."""


def make_parser(prog: str = "entrocraft train", method: str = "entrocraft") -> TrlParser:
    """TRL's parser over the script, trainer, model and data-mixture arguments, the trainer's being the `method`'s."""
    import torch
    from transformers.utils import is_torch_bf16_gpu_available

    parser = _Parser(
        (EntrocraftScriptArguments, METHODS[method][1], ModelConfig, DatasetMixtureConfig),
        prog=prog,
        usage=f"{prog} [--config FILE or RECIPE] [options]",  # argparse's own has a line for each of the options
        description="Settings come from a YAML file or a recipe, and from the options below, which win.\n\n"
        "recipes (`entrocraft recipe` says what each is and where its file lies):\n  " + "\n  ".join(recipes()),
        formatter_class=_HelpFormatter,
    )
    # TRL's default bf16=True is refused on machines without it. A YAML file or the command line still overrides these.
    if not torch.accelerator.is_available():
        parser.set_defaults_with_config(use_cpu=True, bf16=False)
    elif not is_torch_bf16_gpu_available():
        parser.set_defaults_with_config(bf16=False)
    return parser


def parse(
    argv: list[str],
) -> tuple[EntrocraftScriptArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig]:
    """
    Arguments of a run from `--config`, a YAML file or a recipe's name, and from the command line, which wins.

    One file serves several methods: what it says of another one is set aside, and said. On the command line it is an
    unknown option.

    Raises:
        `CommandError`: for an unknown option or key, or a value of the wrong type.
        `ValueError`, `OSError`: for a value that a config refuses, and for a YAML file that cannot be read.
    """
    # TRL reads `--config FILE` only.
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if argv and argv[-1] == "--config":
        raise CommandError("--config needs the path of a YAML file or the name of a recipe")
    if "--config" in argv:
        value = argv.index("--config") + 1
        argv[value] = config_file(argv[value])
    method = _method(argv)
    parser = make_parser(method=method)
    try:
        *parsed, in_file, in_command = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except yaml.YAMLError as error:
        raise CommandError(f"the config file is not valid YAML: {error}") from error
    except TypeError as error:  # a list or mapping in YAML where a number is meant
        raise CommandError(f"a value has the wrong type: {error}") from error
    if parsed[0].method != method:  # argparse takes a beginning such as --meth; its options were read as another's
        raise CommandError(f"write --method {parsed[0].method} in full")
    in_file = _set_aside(in_file, method)
    for values in parsed:
        for item in fields(values):  # argparse converts text from a YAML file, and lets everything else pass
            value = getattr(values, item.name)
            if item.type in (int, float, bool) and isinstance(value, (list, dict)):
                raise CommandError(f"{item.name} must be of type {item.type.__name__}, got {value!r}")
    for unknown, where in ((in_file, "key in the config file"), (in_command, "option")):
        if unknown:
            name = unknown[0].lstrip("-").split("=")[0]
            known = [action.dest for action in parser._actions]
            close = difflib.get_close_matches(name, known, n=1)
            raise CommandError(f"unknown {where}: {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return tuple(parsed)


def _method(argv: list[str]) -> str:
    """The method that the command line asks for, or else the config file: its options are needed to read the rest."""
    parser = CommandParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method")
    parser.add_argument("--config")
    asked, _ = parser.parse_known_args(argv)
    method = asked.method
    if method is None and asked.config is not None:
        try:
            with open(asked.config, encoding="utf-8") as stream:
                content = yaml.safe_load(stream)
        except yaml.YAMLError as error:
            raise CommandError(f"the config file is not valid YAML: {error}") from error
        method = content.get("method") if isinstance(content, dict) else None
    if method is None:
        return "entrocraft"
    if method not in tuple(METHODS):  # YAML may hold a list, which a dict cannot look up
        raise CommandError(f"there is no method {method!r}; the names are: {', '.join(METHODS)}")
    return method


def _set_aside(in_file: list[str], method: str) -> list[str]:
    """Of the keys and values of a config file that no argument has, those that no method's config has either."""
    if not in_file:
        return in_file
    others = {name for _, config in METHODS.values() for name in config.__dataclass_fields__}
    keys = [key.removeprefix("--") for key in in_file[::2]]
    if (aside := [key for key in keys if key in others]) and is_main_process():
        print(f"entrocraft: {method} does not read these keys of the config file: {', '.join(aside)}", file=sys.stderr)
    rest = [(key, value) for key, value in zip(keys, in_file[1::2], strict=True) if key not in others]
    return [word for key, value in rest for word in (f"--{key}", value)]
