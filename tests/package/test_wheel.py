"""The package as people get it: a source distribution and its wheel, installed where no checkout is seen."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
# What a build reads. From a copy: setuptools leaves `build/` beside its sources, and packs whatever is still in there.
SOURCES = ("entrocraft_trl", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
BUILD = "from setuptools.build_meta import build_sdist; print(build_sdist('.'))"
WHERE = "import entrocraft_trl, sys; print(entrocraft_trl.__file__); print(sys.path)"

pytestmark = pytest.mark.subprocess


def run(*words, **options) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def elsewhere(folder: Path) -> dict:
    return {"cwd": folder, "env": {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built offline, and from the source distribution, so that this is complete as well."""
    folder = tmp_path_factory.mktemp("build")
    sources = folder / "sources"
    sources.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, sources)
    archive = run(sys.executable, "-c", BUILD, cwd=sources).splitlines()[-1]
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, sources / archive)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """`bin` of an environment with the wheel, and with this one's other packages: its editable install is not seen."""
    home = tmp_path_factory.mktemp("home")
    venv.create(home)
    (packages,) = home.glob("lib/python*/site-packages")
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python")
    run(*pip, "install", "--no-index", "--no-deps", "--quiet", wheel, **elsewhere(home))
    # Behind its own packages on the path. `.pth` files in that folder, an editable install's among them, are not read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return home / "bin"


def test_the_wheel_holds_all_that_is_not_code(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    recipes = {
        f"entrocraft_trl/recipes/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.*")
    }
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "entrocraft_trl").rglob("*.py")}
    assert {"entrocraft_trl/py.typed", "entrocraft_trl/scripts/train_job.py"} | recipes | modules <= packed
    assert {name.split("/")[0].partition("-")[0] for name in packed} == {"entrocraft_trl"}  # no tests, no benchmarks


def test_it_is_imported_from_the_wheel(installed, tmp_path):
    file, path = run(installed / "python", "-c", WHERE, **elsewhere(tmp_path)).splitlines()
    assert Path(file).is_relative_to(installed.parent)
    assert repr(str(ROOT)) not in path  # the environment itself may lie in the checkout
    told = run(installed / "entrocraft", "--version", **elsewhere(tmp_path))
    assert told.split() == ["entrocraft_trl", version("entrocraft_trl")]


def test_help_lists_the_recipes(installed, tmp_path):
    assert "recipe " in run(installed / "entrocraft", "--help", **elsewhere(tmp_path))
    # By way of the job script, which people copy out of the package.
    (script,) = installed.parent.glob("lib/python*/site-packages/entrocraft_trl/scripts/train_job.py")
    listed = run(installed / "python", shutil.copy(script, tmp_path), "--help", **elsewhere(tmp_path)).splitlines()
    assert {f"  {path.stem}" for path in (ROOT / "configs").glob("*.yaml")} <= set(listed)


def test_a_recipe_dry_runs_by_name(installed, reference_folder, tmp_path):
    data = shutil.copy(ROOT / "tests" / "samples" / "gsm8k_sample.jsonl", tmp_path)
    words = ["train", "--config", "lora-qwen3-0.6b", "--model_name_or_path", reference_folder, "--dataset_name", data]
    plan = run(installed / "entrocraft", *words, "--eval_strategy", "no", "--dry_run", **elsewhere(tmp_path))
    assert "rewards          accuracy_reward" in plan and "band at 100%     0.150 to 0.300 times" in plan
    assert "optimizer steps  500, each on 64 rollouts (8 per prompt)" in plan


def test_a_launch_file_is_found_by_name(installed, tmp_path):
    path = run(installed / "entrocraft", "recipe", "accelerate/zero3", **elsewhere(tmp_path)).strip()
    assert Path(path).is_relative_to(installed.parent)
    assert Path(path).read_bytes() == (ROOT / "configs" / "accelerate" / "zero3.yaml").read_bytes()
