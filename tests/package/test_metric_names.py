"""Metrics are spelled in one file, so that what is written is what is read, and a new name is new everywhere."""

import ast
import re
from pathlib import Path

import pytest

from entrocraft_trl import metric_names


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
