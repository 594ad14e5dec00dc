"""
Run worker scripts under real launch lines. A hang is a failure that shows where every rank stands.

The test calls `launch`, the worker `start_worker` (first, before torch is imported) and `write_result` (last).
"""

import faulthandler
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "accelerate"
FOLDER_VARIABLE = "ENTROCRAFT_TEST_FOLDER"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # two ranks on two cores; a fixed thread count keeps float sums reproducible
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")]),
}
DUMP_SECONDS = 3  # for the ranks to write their stacks after the signal


# ----------------------------------------------------------------------------------------------------- the test's side


def launch_line(config: str | None, *target: str) -> list[str]:
    """
    `accelerate launch` of `target`, a script or `-m module` with its arguments, under `{config}.yaml`.
    `None` is plain Python: one process, and one import of torch less.
    """
    if config is None:
        return [sys.executable, *target]
    options = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--main_process_port", str(_free_port())]
    return [str(Path(sys.executable).with_name("accelerate")), "launch", *options, *target]


def launch(config: str | None, script: Path | str, *arguments, folder: Path, limit: float = 240.0) -> list[dict]:
    """
    Run `script arguments` on all ranks of a configuration and return what each rank wrote, in the order of ranks.

    Args:
        config (`str` or `None`): Name in `configs/accelerate`, or `None` for one plain process.
        folder (`Path`): Made if missing; results, stacks and the output, `output.txt`, go there. The working directory
            is the repository's root, to which the YAML files' own paths are relative: write nothing there.
        limit (`float`): Seconds until the run counts as hung.

    Raises:
        AssertionError: If the run hangs (with the stacks of all ranks), fails (with the end of its output), or was not
            the run that `config` describes: an unfit YAML starts one process and ends with return code 0.
    """
    run_line(launch_line(config, str(script), *map(str, arguments)), folder=folder, limit=limit)
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("result-*.json"))]
    expected = expected_launch(config)
    for rank, result in enumerate(results):
        launched = result.pop("launch")
        assert launched == {**expected, "rank": rank}, f"{config}: launched {launched}, the YAML says {expected}"
    assert len(results) == expected["processes"], f"{config}: {len(results)} ranks wrote a result, {expected}"
    return results


def run_line(line: list[str], *, folder: Path, limit: float = 240.0, environment: dict[str, str] | None = None) -> str:
    """Run a command line offline and within `limit` seconds; returns its output. Otherwise as `launch`."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, **ENVIRONMENT, FOLDER_VARIABLE: str(folder), **(environment or {})}
    output = folder / "output.txt"
    with output.open("w") as stream:
        process = subprocess.Popen(line, cwd=ROOT, env=variables, stdout=stream, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
            stacks = _stacks(folder)
        finally:
            _kill_tree(process)
    text = output.read_text()
    assert code is not None, f"hung: not done after {limit} s: {' '.join(line)}\n{text[-3000:]}\n{stacks}"
    assert code == 0, f"return code {code}: {' '.join(line)}\n{_end_of(text)}"
    return text


def expected_launch(config: str | None) -> dict:
    """What the YAML says that `write_result` must find: number of processes, ZeRO stage (0: none), and FSDP or not."""
    if config is None:
        return {"processes": 1, "zero_stage": 0, "fsdp": False}
    settings = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    zero = settings.get("deepspeed_config", {})
    if "deepspeed_config_file" in zero:
        zero = json.loads((ROOT / zero["deepspeed_config_file"]).read_text())["zero_optimization"]
    stage = zero.get("zero_stage", zero.get("stage", 0))
    return {
        "processes": settings["num_processes"],
        "zero_stage": stage,
        "fsdp": settings["distributed_type"] == "FSDP",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _stacks(folder: Path) -> str:
    """Have every rank that is still there write its Python stacks, and collect them."""
    files = sorted(folder.glob("stacks-*.txt"))
    for path in files:
        pid = int(re.search(r"-pid(\d+)", path.name).group(1))
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGUSR1)
    time.sleep(DUMP_SECONDS)
    return "\n".join(f"===== {path.stem}\n{path.read_text()}" for path in files) or "no rank had started"


def _kill_tree(process: subprocess.Popen) -> None:
    """Kill the launcher and all below it; its workers lead process groups of their own."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    process.kill()
    process.wait()
    for child in below:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(below, timeout=10)


def _end_of(text: str) -> str:
    """The end of what the ranks printed, which the launcher's own report otherwise pushes out of sight, and of all."""
    ranks = text.split("torch/distributed/elastic/multiprocessing/api.py")[0]
    return f"{ranks[-4000:]}\n[...]\n{text[-1200:]}"


# --------------------------------------------------------------------------------------------------- the worker's side


def start_worker() -> Path:
    """
    First thing in a worker: stacks on SIGUSR1, and a DeepSpeed that compiles nothing. Returns the run's folder.

    DeepSpeed would compile a shared-memory operator for its first all-reduce on CPU: 45 s, and needs ninja and g++.
    """
    folder = Path(os.environ[FOLDER_VARIABLE])
    stacks = folder / f"stacks-rank{os.environ.get('RANK', '0')}-pid{os.getpid()}.txt"
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=stacks.open("w"), all_threads=True)  # open as long as the process is
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from deepspeed import ops
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        ops.__compatible_ops__ = dict.fromkeys([*ALL_OPS, "deepspeed_not_implemented"], False)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        _allow_fsdp_on_cpu()
    return folder


def _allow_fsdp_on_cpu() -> None:
    """Accelerate heeds FSDP settings on accelerators only; over CPU processes it goes on with DDP and says nothing."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    prepare = AcceleratorState.__init__

    def prepare_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        prepare(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = prepare_with_fsdp


def part_folder(name: str) -> Path:
    """Folder of a part of a launch; made if missing."""
    folder = Path(os.environ[FOLDER_VARIABLE]) / name
    folder.mkdir(exist_ok=True)
    return folder


def write_result(accelerator, **values) -> None:
    """Last thing in a worker: this rank's numbers (JSON), what it was launched as (`launch` compares), and exit."""
    plugin = accelerator.state.deepspeed_plugin
    launched = {
        "rank": accelerator.process_index,
        "processes": accelerator.num_processes,
        "zero_stage": plugin.zero_stage if plugin is not None else 0,
        "fsdp": accelerator.state.distributed_type == "FSDP",
    }
    path = Path(os.environ[FOLDER_VARIABLE]) / f"result-{accelerator.process_index:02d}.json"
    path.write_text(json.dumps({"launch": launched, **values}))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    # DDP still holds the process group that was just destroyed; taken down with the interpreter, gloo's threads abort
    # the process now and then ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
