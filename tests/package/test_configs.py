"""Every YAML in `configs/` parses and builds, and holds the numbers of the paper."""

from pathlib import Path

import pytest
import yaml

from entrocraft_trl import EntrocraftGRPOConfig
from entrocraft_trl.cli.arguments import parse


CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
PAPER = {
    # name: shape, band at the start, band at the end, optimizer steps
    "qwen3-4b-readme": ("linear", (0.6, 0.7), (0.4, 0.5), 392),
    "qwen3-4b-long-linear": ("linear", (0.6, 0.7), (0.1, 0.2), 1720),
    "qwen3-4b-long-cosine": ("cosine", (0.6, 0.7), (0.1, 0.2), 1720),
    "qwen3-4b-gspo": ("linear", (0.6, 0.7), (0.2, 0.3), 392),
    "qwen3-14b": ("cosine", (0.4, 0.5), (0.1, 0.2), 392),
    "llama-3.1-8b": ("cosine", (0.9, 1.0), (0.1, 0.2), 392),
    "qwen3-4b-fixed": ("constant", (0.5, 0.5), (0.5, 0.5), 1720),
    "qwen3-4b-constant": ("constant", (0.6, 0.7), (0.6, 0.7), 1720),  # of the official repository, not in the paper
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(path):
    script, args, model, _ = parse(["--config", str(path)])
    assert isinstance(args, EntrocraftGRPOConfig)
    assert script.embedded_task or (model.model_name_or_path and script.dataset_name and script.reward_funcs)


def test_every_paper_run_has_a_config():
    assert set(PAPER) <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("name", PAPER)
def test_paper_numbers(name):
    shape, start, end, steps = PAPER[name]
    script, args, _, _ = parse(["--config", str(CONFIGS[0].parent / f"{name}.yaml")])
    assert (args.entropy_unit, args.entropy_schedule) == ("nats", shape)
    assert tuple(args.band_at(0.0)) == pytest.approx(start)
    assert tuple(args.band_at(1.0)) == pytest.approx(end)
    assert args.max_steps == args.entropy_schedule_steps == steps
    assert (args.num_generations, args.generation_batch_size) == (8, 1024 * 8)
    # The accumulation is written for 8 processes; this test runs as one.
    assert args.per_device_train_batch_size * 8 * args.gradient_accumulation_steps == 256 * 8
    assert (args.learning_rate, args.beta) == (1e-6, 1e-3)
    assert (script.max_prompt_length, args.max_completion_length) == (1024, 3072)
    assert args.rejection_rule == "advantage_sign"


@pytest.mark.parametrize("name", PAPER)
def test_paper_runs_name_their_rule(name):
    # Left to the default, these runs would change with it.
    assert yaml.safe_load((CONFIGS[0].parent / f"{name}.yaml").read_text())["rejection_rule"] == "advantage_sign"


@pytest.mark.parametrize("processes", [1, 8])
@pytest.mark.parametrize("name", PAPER)
def test_paper_batches_divide_on_one_and_eight_processes(name, processes, monkeypatch):
    monkeypatch.setattr(EntrocraftGRPOConfig, "world_size", property(lambda self: processes))
    _, args, _, _ = parse(["--config", str(CONFIGS[0].parent / f"{name}.yaml")])
    assert args.steps_per_generation == 1024 // processes
    assert args.steps_per_generation % args.gradient_accumulation_steps == 0


def test_gspo_uses_sequence_ratios():
    _, args, _, _ = parse(["--config", str(CONFIGS[0].parent / "qwen3-4b-gspo.yaml")])
    assert args.importance_sampling_level == "sequence"
