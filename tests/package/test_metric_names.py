"""Metrics are spelled in one file, so that what is written is what is read, and a new name is new everywhere."""

import ast
import re
from pathlib import Path

import pytest
import tiny

from entrocraft_trl import metric_names
from entrocraft_trl.control import diagnosis
from entrocraft_trl.microbatches import metrics


ROOT = Path(metric_names.__file__).parents[1]
# The prefix with a name behind it, or at the end, where an f-string or a sum puts one; "entrocraft/..." is prose.
SPELLED = re.compile(re.escape(metric_names.PREFIX) + r"(\w|$)")


def spelled_metrics(source: str) -> list[str]:
    """Strings in Python code that spell a metric; comments and docstrings may."""
    tree = ast.parse(source)
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.value for node in strings if id(node) not in prose and SPELLED.search(node.value)]


@pytest.mark.parametrize("folder", ["entrocraft_trl", "benchmarks"])
def test_no_other_file_spells_a_metric(folder):
    files = [file for file in sorted((ROOT / folder).rglob("*.py")) if file.name != "metric_names.py"]
    assert len(files) > 5
    found = {str(file.relative_to(ROOT)): spelled_metrics(file.read_text(encoding="utf-8")) for file in files}
    assert {file: names for file, names in found.items() if names} == {}


def test_a_spelled_metric_is_found():
    code = '"""Reads entrocraft/entropy."""\nlog["entrocraft/entropy"], f"entrocraft/{name}", "entrocraft/... stay"'
    assert spelled_metrics(code) == ["entrocraft/entropy", "entrocraft/"]


def test_every_metric_is_explained():
    rollouts = tiny.random_rollouts(8)
    engine = tiny.rollout_function(rollouts, logprobs=[[-0.5] * len(ids) for ids in rollouts])
    logged = set()
    # Two steps outside the band, since `realised_effect` compares with the batch before.
    for settings, arguments in (
        ({"rejection_rule": "entropy_change", **tiny.TOO_LOW}, {}),
        ({"rejection_rule": "influence", **tiny.TOO_LOW}, {}),
        ({"entropy_source": "sampling", **tiny.TOO_LOW}, {"rollout_func": engine}),
    ):
        trainer = tiny.build_trainer(args=tiny.build_config(max_steps=2, learning_rate=0.01, **settings), **arguments)
        trainer.train()
        logged |= {name for record in trainer.state.log_history for name in record}
    text = diagnosis.__doc__ + metrics.__doc__
    explained = re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^- .*\n(?:  .*\n)*", text, re.MULTILINE)))
    ours = {name for name in logged if name.startswith(metric_names.PREFIX)}
    assert {metric_names.key(name) for name in explained} == ours
