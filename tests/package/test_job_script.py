"""The job script: its PEP 723 metadata, and the script as a plain file in a folder of its own."""

import ast
import configparser
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from entrocraft_trl.cli.arguments import parse
from entrocraft_trl.reports.log import read_log
from entrocraft_trl.tasks import build_model, build_tokenizer


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "entrocraft_trl" / "scripts" / "train_job.py"
# The reference expression of PEP 723.
BLOCK = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")


def metadata() -> dict:
    (match,) = [found for found in BLOCK.finditer(SCRIPT.read_text()) if found["type"] == "script"]
    lines = match["content"].splitlines(keepends=True)
    return tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))


def setup() -> configparser.SectionProxy:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser["options"]


def test_metadata_states_the_ranges_of_the_package():
    ours = {str(Requirement(line)) for line in metadata()["dependencies"]}
    assert ours == {str(Requirement(line)) for line in setup()["install_requires"].strip().splitlines()}
    assert metadata()["requires-python"] == setup()["python_requires"]


def test_metadata_leaves_the_unpublished_package_out():
    # Nothing is published under this name: a dependency on it would be resolved to whoever registers it first.
    names = {Requirement(line).name.lower().replace("_", "-") for line in metadata()["dependencies"]}
    assert "entrocraft-trl" not in names and "trl" in names


def test_metadata_resolves_to_the_tested_versions():
    # A resolution that needs no network: the environment that runs this test satisfies every range.
    for line in metadata()["dependencies"]:
        requirement = Requirement(line)
        assert version(requirement.name) in requirement.specifier, line
    assert "{}.{}.{}".format(*sys.version_info[:3]) in SpecifierSet(metadata()["requires-python"])


@pytest.fixture
def job(tmp_path):
    """A copy of the script alone in a folder, as on the machine of a job."""
    return shutil.copy(SCRIPT, tmp_path / "train_job.py")


@pytest.fixture
def options(tmp_path) -> list[str]:
    build_model().save_pretrained(tmp_path / "start")  # without the warm-up, which takes a minute
    build_tokenizer().save_pretrained(tmp_path / "start")
    return [
        *("--embedded_task", "expressions", "--model_name_or_path", str(tmp_path / "start"), "--output_dir", "out"),
        *("--max_steps", "1", "--per_device_train_batch_size", "4", "--num_generations", "4", "--logging_steps", "1"),
        *("--max_completion_length", "4", "--gradient_checkpointing", "false", "--report_to", "none"),
    ]


def test_the_job_line_parses_and_keeps_the_repository_private():
    line = ast.get_docstring(ast.parse(SCRIPT.read_text())).partition("hf jobs uv run ")[2].partition("\n\n")[0]
    words = shlex.split(line.replace("\\\n", " ").partition("train_job.py")[2].replace(" ... ", " "))
    _, args, model_args, _ = parse(words)
    assert args.push_to_hub and args.hub_private_repo is True and args.hub_model_id == "USER/MODEL"
    assert (args.hub_strategy, args.resume_from_checkpoint) == ("checkpoint", "hub")
    assert model_args.model_name_or_path == "Qwen/Qwen3-0.6B"


@pytest.mark.subprocess
def test_the_script_trains_from_another_folder(job, options, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # what `--with` does: the package, and nothing of the tests
    command = [sys.executable, str(job), *options]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "entrocraft: 1 steps done, run saved in out" in done.stdout
    assert read_log(elsewhere / "out")[0]["entrocraft/entropy"] > 0
    assert (elsewhere / "out" / "model.safetensors").is_file()


def run_here(job, options, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", [str(job), *options])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(job), run_name="__main__")
    return exit.value.code


def test_dry_run(job, options, monkeypatch, capsys, tmp_path):
    assert run_here(job, [*options, "--dry_run"], monkeypatch) == 0
    assert "optimizer steps  1," in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line(job, options, monkeypatch, capsys):
    assert run_here(job, [*options, "--resume_from_checkpoint", "hub"], monkeypatch) == 2
    assert "entrocraft: error: resume_from_checkpoint=hub needs hub_model_id" in capsys.readouterr().err


@pytest.mark.subprocess
def test_without_the_package_the_script_says_where_it_comes_from(job, tmp_path):
    bare = [sys.executable, "-I", "-S", str(job)]  # the interpreter without any installed package
    done = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert 'uv run --with "entrocraft_trl @ git+https://' in done.stderr
