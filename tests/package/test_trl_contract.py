"""
The contract with TRL and transformers holds on the installed versions, is complete, and names what moved.

What it checks, and why, stands in `entrocraft_trl/contract`; the range of versions, in `entrocraft_trl/__init__.py`.
"""

import configparser
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import transformers
import trl.trainer.utils
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer

import entrocraft_trl
from entrocraft_trl import EntrocraftRLOOTrainer, contract
from entrocraft_trl.contract import names
from entrocraft_trl.control.state import EntropyControlState
from entrocraft_trl.methods import METHODS


CHECKS = contract.checks()


@pytest.mark.parametrize("hook", CHECKS)
def test_hook_holds(hook):
    CHECKS[hook]()


def overridden_by(trainers, parent) -> set[str]:
    """Methods of `parent` that classes of this package define anew, among those that `trainers` inherit."""
    owners = {owner for kind in trainers for owner in kind.__mro__ if owner.__module__.startswith("entrocraft_trl")}
    members = {name for owner in owners for name, value in vars(owner).items() if callable(value)}
    return {name for name in members if hasattr(parent, name) and not name.startswith("__")}


def test_every_overridden_method_is_in_the_contract():
    assert overridden_by([trainer for trainer, _ in METHODS.values()], GRPOTrainer) == set(names.OVERRIDDEN)
    # The loss is overridden by rival methods, all of which are GRPO's.
    assert overridden_by([EntrocraftRLOOTrainer], RLOOTrainer) == set(names.OVERRIDDEN) - {"_compute_loss"}


# --------------------------------------------------------------------------------------------------- when a hook moves


def with_another_key(self, inputs, original=GRPOTrainer._generate_and_score_completions):
    return original(self, inputs) | {"new_key": 1}


MOVES = {
    # hook: what is changed, into what (None: taken away), and the message
    "import trl.trainer.utils.split_pixel_values_by_grid": (
        *(trl.trainer.utils, "split_pixel_values_by_grid", None),
        "trl.trainer.utils has no split_pixel_values_by_grid .* imported in .*passes.py",
    ),
    "RLOOTrainer._save_rng_state": (
        *(transformers.Trainer, "_save_rng_state", None),
        "RLOOTrainer has no _save_rng_state any more; each rank's file is written here",
    ),
    "GRPOTrainer.compute_loss": (
        *(GRPOTrainer, "compute_loss", lambda self, network, inputs: None),
        r"it takes \['self', 'network', 'inputs'\] now, EntropyControlMixin's does not; the loss",
    ),
    "GRPOTrainer._save_checkpoint": (
        *(GRPOTrainer, "_save_checkpoint", lambda self, trial, model: None),
        "it takes .* now, ExactResumeMixin's does not",
    ),
    "GRPOTrainer.evaluation_loop": (
        *(GRPOTrainer, "evaluation_loop", lambda self, dataloader, prefix: None),  # ours passes `metric_key_prefix`
        "it takes .* now, EvaluationMetricsMixin's does not",
    ),
    "GRPOTrainer._run_epoch": (
        *(names.inspect, "getsource", lambda module: "self._run_epochs(args)"),
        "nobody calls it any more; a run resumed at its last step",
    ),
    "GRPOConfig.entropy_coef": (*(GRPOConfig, "__dataclass_fields__", {}), "GRPOConfig has no entropy_coef any more"),
    "GRPOTrainer: loss inputs, their keys and shapes": (
        *(GRPOTrainer, "_generate_and_score_completions", with_another_key),
        r"other keys: \['new_key'\]",
    ),
}


@pytest.mark.parametrize("hook", MOVES)
def test_the_check_of_a_hook_that_moved_says_so(hook, monkeypatch):
    owner, name, value, message = MOVES[hook]
    if value is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, value)
    with pytest.raises(names.HookMoved, match=message):
        CHECKS[hook]()


def test_the_command_prints_each_hook_and_fails_if_one_moved(monkeypatch, capsys):
    def moved():
        raise names.HookMoved("it takes\ntwo now")

    def gone():
        return GRPOTrainer.nothing

    with monkeypatch.context() as patch:
        patch.setattr(contract, "checks", lambda: {"one": lambda: None, "two": moved, "three": gone})
        assert contract.main() == 1
        patch.setattr(contract, "checks", lambda: {"one": lambda: None})
        assert contract.main() == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"trl {trl.__version__}, transformers {transformers.__version__}" in printed[0]
    assert printed[1:3] == ["holds  one", "MOVED  two: it takes two now"]
    assert printed[3].startswith("MOVED  three: AttributeError: type object 'GRPOTrainer' has no attribute 'nothing'")
    assert printed[4:7] == ["2 moved (why: above):", "  two", "  three"]
    assert printed[8:] == ["holds  one", "every hook holds"]


# ------------------------------------------------------------------------------------------------------------ versions


@pytest.mark.parametrize(
    ("library", "version"),
    [("trl", "1.16.0"), ("trl", "1.16.5"), ("trl", "1.99"), ("transformers", "5.8.0"), ("transformers", "5.99.1")],
)
def test_versions_in_the_range_are_accepted(library, version):
    entrocraft_trl._check_range(library, version)


@pytest.mark.parametrize(
    ("library", "version", "supported"),
    [
        *(("trl", version, "trl>=1.16.0,<2") for version in ("1.15.3", "0.29.1", "2.0.0")),
        *(("transformers", version, "transformers>=5.8.0,<6") for version in ("5.7.9", "4.57.6", "6.0.0")),
    ],
)
def test_versions_out_of_the_range_are_refused(library, version, supported):
    with pytest.raises(ImportError) as error:
        entrocraft_trl._check_range(library, version)
    message = str(error.value)
    assert f"{library} {version} is installed" in message and f'pip install "{supported}"' in message


def test_a_newer_trl_than_the_tested_one_is_named_in_a_warning():
    with pytest.warns(UserWarning) as caught:
        entrocraft_trl._warn_above_tested("1.17.0")
    (warning,) = caught
    assert "trl 1.17.0 is newer than 1.16, the newest that entrocraft_trl" in str(warning.message)
    assert "python -m entrocraft_trl.contract" in str(warning.message)


@pytest.mark.parametrize("version", ["1.16.0", "1.16.7"])  # private methods move between minor versions
def test_the_tested_trl_does_not_warn(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entrocraft_trl._warn_above_tested(version)


def test_the_package_requires_the_ranges_that_it_checks():
    parser = configparser.ConfigParser()
    parser.read(Path(__file__).parents[2] / "setup.cfg")
    required = map(Requirement, parser["options"]["install_requires"].strip().splitlines())
    ranges = {requirement.name: requirement.specifier for requirement in required}
    for library, (lowest, below) in entrocraft_trl.SUPPORTED.items():
        assert ranges[library] == SpecifierSet(f">={lowest},<{below}")


# ------------------------------------------------------------------------------------------------------------- imports


def test_entropy_controls_state_is_one_that_transformers_saves():
    callback = EntropyControlState()
    callback.memory.horizon = 7
    assert EntropyControlState.from_state(callback.state()).memory.horizon == 7


IMPORTS = "import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"


def modules_after(statement) -> set[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(entrocraft_trl.__file__).parents[1])}
    output = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(module=statement)],
        capture_output=True, text=True, check=True, env=environment, timeout=120,
    )  # fmt: skip
    return set(json.loads(output.stdout.splitlines()[-1]))


@pytest.mark.subprocess
def test_import_costs_no_more_than_trls():
    extra = modules_after("entrocraft_trl") - modules_after("trl")
    top_level = {name.split(".")[0] for name in extra} - set(sys.stdlib_module_names)
    assert top_level <= {"entrocraft_trl", "packaging"}, f"import entrocraft_trl also imports {sorted(top_level)}"
    for heavy in ("torch", "transformers.trainer", "trl.trainer.grpo_trainer", "peft", "matplotlib"):
        assert heavy not in extra


def test_public_names_are_importable():
    for name in entrocraft_trl.__all__:
        assert getattr(entrocraft_trl, name) is not None
        assert name in dir(entrocraft_trl)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        entrocraft_trl.Nothing  # noqa: B018
