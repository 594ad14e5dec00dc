"""
Experiments from YAML files. Everything is checked when it is read, before a model loads; an error names file and key.
"""

import copy
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import parse_flag_from_env
from trl import GRPOConfig

from .arms import TRAINERS
from .bands import EDGES, BandPlan, is_number, read_band
from .experiment import Arm, Evaluation, Experiment, Report, Tuning
from .figures import FIGURES
from .section import Section
from .start import StartingPoint


# What the runner sets itself, or what the file says elsewhere.
RESERVED = {
    *("output_dir", "seed", "logging_steps", "eval_strategy", "eval_steps"),
    *("save_strategy", "save_steps", "save_total_limit"),
}
BAND_FIELDS = {
    *("entropy_low", "entropy_high", "entropy_unit", "entropy_width", "entropy_schedule", "entropy_knots"),
}
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
HIGH_ENTROPY = 10.0  # nats: at the one that will be measured, a band may yet turn out negative
DRAWINGS = ("entropy", "reward", "pass_at_k")
DEFAULT_COLUMNS = ("mean_at_n", "pass_at_n", "distinct_correct", "final_entropy", "rms_outside", "step_seconds")


def read_experiment(file: str | os.PathLike, *, quick: bool = False, **changes: Any) -> Experiment:
    """
    Read and check a file. Its `base` is another one beside it, over which it is laid as `quick` is over the rest.

    Args:
        quick (`bool`): Lay the file's `quick` over the rest: mappings key by key, `null` takes a key away.
        **changes: Laid over it in the same way, after that.

    Raises:
        ValueError: Naming file and key, before anything loads.
        OSError: If the file cannot be read.
    """
    file = Path(file)
    content = _content(file)
    short = Section(content, str(file)).mapping("quick", {})
    content.pop("quick", None)
    for layer in (short if quick else {}, changes):
        content = laid_over(content, layer)
    experiment = _parse(file, Section(content, str(file)))
    _check_configs(experiment)
    return experiment


def _content(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a file holds, laid over its base, which may have one too."""
    if file in above:
        raise ValueError(f"{above[-1]}: base: {file.name} is laid over this file already")
    try:
        content = Section(_with_numbers(yaml.safe_load(file.read_text(encoding="utf-8"))), str(file)).rest
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    base = content.pop("base", None)
    return content if base is None else laid_over(_content(file.parent / str(base), (*above, file)), content)


def _with_numbers(content: Any) -> Any:
    """What YAML holds, with `1e-4` as a number: without a point it is text there, which TRL would only miss later."""
    if isinstance(content, dict):
        return {key: _with_numbers(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_with_numbers(value) for value in content]
    return float(content) if isinstance(content, str) and _EXPONENT.fullmatch(content) else content


def laid_over(content: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with `layer` over it: mappings are merged key by key, `None` takes a key away, all else is put in."""
    merged = copy.deepcopy(dict(content))
    for key, value in layer.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = laid_over(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


# ------------------------------------------------------------------------------------------------------------- parsing


def _parse(file: Path, top: Section) -> Experiment:
    with top.naming("task"):
        task = StartingPoint(top.mapping("task"))
    training = top.mapping("training")
    for key in RESERVED & training.keys():
        top.refuse(
            f"training.{key}", "is set by the runner: seeds, evaluation and checkpoint_steps have their own keys"
        )
    if not isinstance(training.get("max_steps"), int) or training["max_steps"] < 1:
        top.refuse("training.max_steps", f"must be a whole number of at least 1, got {training.get('max_steps')!r}")
    seeds = top.sequence("seeds", int)
    if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        top.refuse("seeds", f"must differ and lie between 0 and 2**32 - 1, got {seeds}")
    bands = {}
    width = top.value("band_width", (int, float), None)
    for name, value in top.mapping("bands", {}).items():
        with top.naming(f"bands.{name}", "the band "):
            bands[str(name)] = read_band(value, width)
    arms = {str(name): _arm(top, str(name), value, bool(bands)) for name, value in top.mapping("methods").items()}
    if not arms:
        top.refuse("methods", "names no method")
    evaluation = _settings(top, "evaluation", Evaluation)
    if not is_number(evaluation.temperature) or not evaluation.temperature > 0:
        top.refuse("evaluation.temperature", f"must be positive, got {evaluation.temperature!r}")
    for key in ("samples", "repeats", "batch_size", "every"):
        value = getattr(evaluation, key)
        if not (key == "every" and value is None) and (not isinstance(value, int) or value < 1):
            top.refuse(f"evaluation.{key}", f"must be a whole number of at least 1, got {value!r}")
    tuning = _tuning(top, arms, bands, seeds)
    report = _report(top)
    workers, checkpoint_steps = top.value("workers", int, 0), top.value("checkpoint_steps", int, None)
    if workers < 0 or (checkpoint_steps is not None and checkpoint_steps < 1):
        top.refuse("workers" if workers < 0 else "checkpoint_steps", "must be positive")
    top.end()
    return Experiment(
        file, task, training, arms, tuple(seeds), bands, evaluation, tuning, report, workers, checkpoint_steps
    )


def _arm(top: Section, name: str, value: Any, has_bands: bool) -> Arm:
    where = f"methods.{name}"
    section = Section({} if value is None else value, f"{top.where}: {where}")
    method = section.value("method", str, name)
    if method not in TRAINERS:
        top.refuse(where, f"there is no method {method!r}; the names are: {', '.join(TRAINERS)}")
    follow = section.mapping("follow", {})
    paper = section.value("paper", str, TRAINERS[method][0]._paper.get("id", "") if name == method else "")
    settings = section.rest
    known = TRAINERS[method][1].__dataclass_fields__
    for key in (*settings, *follow):
        if key not in known:
            top.refuse(where, f"{key!r} is no setting of {method}", close=(key, known))
        if key in RESERVED or key == "max_steps":
            top.refuse(where, f"{key!r} is the same for all methods, and set by the runner or in training")
    for key, edge in follow.items():
        if edge not in EDGES:
            top.refuse(f"{where}.follow.{key}", f"is one of {', '.join(EDGES)}, got {edge!r}")
    if follow and not has_bands:
        top.refuse(f"{where}.follow", "needs bands to follow, and the file has none")
    arm = Arm(name, method, settings, dict(follow), paper)
    if has_bands and arm.takes_bands and (own := BAND_FIELDS & settings.keys()):
        top.refuse(where, f"{', '.join(sorted(own))} would be a second band beside those of the file")
    return arm


def _settings(top: Section, key: str, kind: type) -> Any:
    content = top.mapping(key, {})
    for name in content:
        if name not in kind._fields:
            top.refuse(f"{key}.{name}", "is no setting", close=(name, kind._fields))
    missing = [name for name in kind._fields if name not in content and name not in kind._field_defaults]
    if missing:
        top.refuse(f"{key}.{missing[0]}", "is missing")
    return kind(**content)


def _tuning(top: Section, arms: Mapping[str, Arm], bands: Mapping[str, BandPlan], seeds: Sequence[int]):
    if "tuning" not in top.rest:
        return None
    tuning = _settings(top, "tuning", Tuning)
    if not isinstance(tuning.seed, int) or tuning.seed in seeds:
        top.refuse("tuning.seed", f"must be a seed that no result is made with, got {tuning.seed!r}")
    if tuning.by not in FIGURES or tuning.best not in ("largest", "smallest"):
        top.refuse("tuning", f"has best 'largest' or 'smallest' and by one of {', '.join(FIGURES)}")
    if (tuning.band is None) == bool(bands) or (bands and tuning.band not in bands):
        top.refuse(
            "tuning.band", f"must be one of the file's bands, {', '.join(bands) or 'none'}; got {tuning.band!r}"
        )
    candidates = {}
    for name, tried in Section(tuning.candidates, f"{top.where}: tuning.candidates").rest.items():
        where = f"tuning.candidates.{name}"
        if name not in arms:
            top.refuse(where, f"is none of the methods: {', '.join(arms)}")
        if not isinstance(tried, list) or not all(isinstance(item, dict) for item in tried) or not tried:
            top.refuse(where, f"must be a list of settings, got {tried!r}")
        known = TRAINERS[arms[name].method][1].__dataclass_fields__
        for key in {key for item in tried for key in item}:
            if key not in known or key in RESERVED or key in BAND_FIELDS:
                top.refuse(where, f"{key!r} is no setting of {arms[name].method} to be tried", close=(key, known))
        candidates[name] = tried
    return tuning._replace(candidates=candidates)


def _report(top: Section) -> Report:
    content = {"columns": list(DEFAULT_COLUMNS), **top.mapping("report", {})}
    top = Section({"report": content}, top.where)
    report = _settings(top, "report", Report)
    if not isinstance(report.columns, list):
        top.refuse("report.columns", f"must be a list, got {report.columns!r}")
    for column in report.columns:
        if column not in FIGURES:
            top.refuse("report.columns", f"there is no figure {column!r}", close=(column, FIGURES))
    if not is_number(report.skip) or not 0 <= report.skip < 1:
        top.refuse("report.skip", f"must lie between 0 and 1, got {report.skip!r}")
    if not isinstance(report.figures, (list, tuple)) or not set(report.figures) <= set(DRAWINGS):
        top.refuse("report.figures", f"must be a list of {', '.join(DRAWINGS)}, got {report.figures!r}")
    return report._replace(columns=tuple(report.columns), figures=tuple(report.figures))


def _check_configs(experiment: Experiment) -> None:
    """Build every arm's config once for each band, around a high initial entropy, and with each candidate."""
    shared = {item.name for item in fields(GRPOConfig)}
    for key in experiment.training:
        if key not in shared:
            raise ValueError(
                f"{experiment.file}: training.{key}: is no field of TRL's GRPOConfig; methods have theirs"
            )
    tuned = experiment.tuning.candidates if experiment.tuning else {}
    for arm in experiment.arms.values():
        plans = list(experiment.bands.items()) if arm.is_steered and experiment.bands else [(None, None)]
        for more in tuned.get(arm.name, [{}]):
            for band, plan in plans:
                try:
                    knots = plan and plan.knots(HIGH_ENTROPY)
                    _refuse_sharded(experiment.config(arm, tempfile.gettempdir(), 0, knots, more))
                except (ValueError, TypeError) as error:
                    on = f" on the band {band}" if band else ""
                    raise ValueError(f"{experiment.file}: methods.{arm.name}{on}: {error}") from error


def _refuse_sharded(config: GRPOConfig) -> None:
    deepspeed = config.deepspeed_plugin
    if config.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP") or (deepspeed and deepspeed.zero_stage == 3):
        raise ValueError("processes evaluate a share of the prompts, each with the whole model: DDP, ZeRO-1 or ZeRO-2")
