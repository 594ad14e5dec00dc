"""The house's rules: who may import whom, and what each mixin may override."""

import ast
from pathlib import Path

import pytest
from trl import GRPOTrainer, RLOOTrainer

import entrocraft_trl
from entrocraft_trl import EntrocraftGRPOTrainer, EntrocraftRLOOTrainer, EntropyControlMixin, Services
from entrocraft_trl.baselines.loss_pass import LossPassMixin
from entrocraft_trl.policy.mixin import PolicyReadingMixin


HOME = Path(entrocraft_trl.__file__).parent

# From the bottom up. A file may import what stands in a lower line, and its own wing; nothing else.
LEVELS = [
    {"atomic", "printable", "metric_names", "constructor", "credentials", "config_values", "normalisation"},
    {"policy", "data", "tasks"},
    {"checkpoints", "reports", "evaluation", "control", "microbatches"},
    {"config"},  # TRL's configs with the fields of control
    {"services"},
    {"trainer", "baselines"},
    {"methods"},  # their names
    {"compare"},
    {"cli", "scripts", "contract", "__main__", "__init__"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def imports_of(path: Path) -> set[tuple[str, int]]:
    """Wing or module of this package that each import of a file names, with its line; not those for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    folder = path.relative_to(HOME).parent.parts
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in for_types:
            continue
        if node.level:
            base = folder[: len(folder) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
        elif node.module.split(".")[0] == "entrocraft_trl":
            base, names = (), [".".join(node.module.split(".")[1:]) or alias.name for alias in node.names]
        else:
            continue
        found |= {([*base, *name.split(".")][0], node.lineno) for name in names}
    return found


def test_every_file_has_its_level():
    tops = {path.relative_to(HOME).parts[0].removesuffix(".py") for path in HOME.rglob("*.py")}
    assert tops <= set(LEVEL_OF), "a new wing or module: say in LEVELS what it may import"


@pytest.mark.parametrize("path", sorted(HOME.rglob("*.py")), ids=lambda path: path.relative_to(HOME).as_posix())
def test_no_import_points_up_or_sideways(path):
    own = path.relative_to(HOME).parts[0].removesuffix(".py")
    if LEVEL_OF[own] == len(LEVELS) - 1:
        return
    for name, line in sorted(imports_of(path)):
        if name in LEVEL_OF and name != own:  # other names are of `entrocraft_trl` itself: public ones, the version
            assert LEVEL_OF[name] < LEVEL_OF[own], f"{path.relative_to(HOME)}:{line} imports {name}, which is no lower"


def test_wings_are_at_most_two_levels_deep_and_say_what_belongs_there():
    for path in HOME.rglob("*.py"):
        assert len(path.relative_to(HOME).parts) <= 2, f"{path} is too deep"
    for wing in HOME.glob("*/__init__.py"):
        assert ast.get_docstring(ast.parse(wing.read_text())), f"{wing} says nothing"


# ----------------------------------------------------------------------------------------------------------- overrides

# What each mixin may override of TRL's trainers, besides the constructor and attributes that name the method.
MAY_OVERRIDE = {
    LossPassMixin: {"_compute_loss", "_get_per_token_logps_and_entropies"},
    PolicyReadingMixin: {"_generate_single_turn", "_get_per_token_logps_and_entropies"},
    EntropyControlMixin: {"_generate_and_score_completions", "compute_loss"},
    Services: {
        *("_calculate_rewards", "evaluation_loop", "create_model_card", "_save"),  # checked, added to
        *("init_hf_repo", "_push_from_checkpoint", "_finish_current_push", "push_to_hub"),  # the Hub
        *("train", "_run_epoch", "save_model", "_save_checkpoint", "_save_rng_state"),  # checkpoints
        *("training_step", "_get_grad_norm"),  # finite numbers
        *("_prepare_inputs", "compute_loss", "_generate"),  # micro-batches, their weight, and clocks
        *("_generate_and_score_completions", "_get_per_token_logps_and_entropies"),  # passes over micro-batches
    },
}


def overridden(mixin, until=object):
    """Members of TRL's trainers that `mixin` or a base of it below `until` defines anew."""
    names = {name for cls in mixin.__mro__[: mixin.__mro__.index(until)] for name in vars(cls)}
    theirs = {name for trainer in (GRPOTrainer, RLOOTrainer) for name in dir(trainer)}
    return {name for name in names & theirs if not name.startswith("__")}


@pytest.mark.parametrize(
    ("mixin", "until"),
    [
        (LossPassMixin, object),
        (PolicyReadingMixin, object),
        (EntropyControlMixin, PolicyReadingMixin),
        (Services, object),
    ],
)
def test_a_mixin_overrides_what_it_needs_and_no_more(mixin, until):
    attributes = {"_name", "_paper", "_tag_names"}
    assert overridden(mixin, until) - attributes == MAY_OVERRIDE[mixin]


def test_the_method_and_the_services_share_nothing():
    assert not set(EntropyControlMixin.__mro__) & set(Services.__mro__) - {object}
    method, services = ({n for n in dir(m) if not n.startswith("__")} for m in (EntropyControlMixin, Services))
    # Both weigh the loss in `compute_loss`, by keys of which a micro-batch has those of one: see `normalisation.py`.
    # Passes that the method listens to are asked for entropies, and those do not wait: see `deferred_passes.py`.
    hooks = {"compute_loss", "_generate_and_score_completions", "_get_per_token_logps_and_entropies"}
    assert not method & services - {"_config_class", "_name", "_paper", "_tag_names", "card_section"} - hooks


@pytest.mark.parametrize("trainer", [EntrocraftGRPOTrainer, EntrocraftRLOOTrainer])
def test_the_trainers_are_nothing_but_their_parts(trainer):
    assert trainer.__bases__[:2] == (EntropyControlMixin, Services)
    assert {name for name in vars(trainer) if not name.startswith("__")} <= {"_tag_names", "_config_class", "_name"}
