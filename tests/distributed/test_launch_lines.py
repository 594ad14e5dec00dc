"""Every file in `configs/accelerate` is one that Accelerate takes, and the launch line in its comment is right."""

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from launching import CONFIGS, ROOT, expected_launch, launch_line, run_line

from entrocraft_trl.reports.log import read_log


NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
EXPECTED = {
    # name: processes, distributed type, ZeRO stage
    "single_gpu": (1, "NO", 0),
    "ddp": (8, "MULTI_GPU", 0),
    "fsdp2": (8, "FSDP", 0),
    "zero1": (8, "DEEPSPEED", 1),
    "zero2": (8, "DEEPSPEED", 2),
    "zero3": (8, "DEEPSPEED", 3),
    "zero3_offload": (8, "DEEPSPEED", 3),
    "cpu_ddp": (2, "MULTI_GPU", 0),
    "cpu_fsdp2": (2, "FSDP", 0),
    "cpu_zero1": (2, "DEEPSPEED", 1),
    "cpu_zero2": (2, "DEEPSPEED", 2),
    "cpu_zero3": (2, "DEEPSPEED", 3),
}


def line_in(name: str) -> list[str]:
    """The launch line in the comment at the top of a file, as words."""
    (line,) = re.findall(r"^#     (accelerate launch .*)$", (CONFIGS / f"{name}.yaml").read_text(), re.MULTILINE)
    return line.split()


def test_there_is_a_file_for_each_way_to_run():
    assert set(NAMES) == set(EXPECTED)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_takes_the_file(name):
    processes, kind, stage = EXPECTED[name]
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # refuses unknown keys
    assert (config.num_processes, config.distributed_type) == (processes, kind)
    assert (config.mixed_precision or "no") == ("no" if name.startswith("cpu_") else "bf16")
    launched = expected_launch(name)
    assert (launched["processes"], launched["zero_stage"], launched["fsdp"]) == (processes, stage, kind == "FSDP")


@pytest.mark.parametrize("name", NAMES)
def test_the_launch_line_names_its_own_file_and_a_run(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = line_in(name)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    assert Path(args.config_file) == Path(f"configs/accelerate/{name}.yaml")
    assert args.module and args.training_script == "entrocraft_trl"
    command, option, run = args.training_script_args
    assert (command, option) == ("train", "--config") and Path(run).is_file()
    processes, kind, _ = EXPECTED[name]
    assert (args.num_processes, args.use_deepspeed, args.use_fsdp) == (processes, kind == "DEEPSPEED", kind == "FSDP")


@pytest.mark.parametrize("name", [name for name in NAMES if EXPECTED[name][1] == "DEEPSPEED"])
def test_offload_only_where_the_name_says_so(name):
    zero = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["deepspeed_config"]
    device = "cpu" if name.endswith("_offload") else "none"
    for key in ("offload_optimizer_device", "offload_param_device"):
        assert zero.get(key, "none") == device


@pytest.mark.parametrize("name", ["cpu_ddp", "cpu_zero2", "cpu_zero3"])
def test_the_launch_line_trains(name, reference_folder, tmp_path):
    target = line_in(name)[4:]
    assert target[:2] == ["-m", "entrocraft_trl"]
    if name != "cpu_ddp":
        # DeepSpeed would compile an operator first, which takes 45 s, ninja and a C++ compiler.
        target[:2] = [str(Path(__file__).with_name("cli_worker.py"))]
    run = tmp_path / "run"
    options = ["--model_name_or_path", str(reference_folder), "--output_dir", str(run), "--max_steps", "2"]
    options += ["--per_device_train_batch_size", "8"]
    # With a model that is there; otherwise the run would first warm one up, for half a minute.
    text = run_line(launch_line(name, *target, *options), folder=tmp_path, limit=180)
    assert text.count("entrocraft: 2 steps done") == 1  # only the main process speaks
    if name != "cpu_ddp":
        assert text.count(f"launched as 2 processes, ZeRO stage {EXPECTED[name][2]}") == 2
    records = [record for record in read_log(run) if "reward" in record]
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        rollouts = record["entrocraft/effective_batch_size"] / record["entrocraft/accepted_rollouts"]
        assert rollouts == pytest.approx(16)  # 8 on each of two processes
    assert (run / "model.safetensors").stat().st_size > 50_000  # about 20,000 float32 parameters, from both ranks
