"""A name for code: results that were made with other code are not taken for those of this one."""

import ast
import hashlib
import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType


PACKAGE = __package__.split(".")[0]


def code_version(modules: Collection[str], wings: Collection[str]) -> str:
    """
    12 hexadecimal digits that change once a statement does, in one of `modules` of this package or in those they take
    anything from, as far as they lie in `wings`. Comments, docstrings and layout do not count: who mends a sentence
    keeps the runs.

    Args:
        modules (`Collection[str]`): Names of imported modules; others than this package's are passed over.
        wings (`Collection[str]`): Wings of this package, or modules at its top, that count.
    """
    found: dict[str, ModuleType] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        parts = name.split(".")
        if name in found or parts[0] != PACKAGE or len(parts) < 2 or parts[1] not in wings:
            continue
        module = found[name] = sys.modules[name]
        for value in vars(module).values():
            waiting.append(
                value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
            )
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(f"{name}\n{statements(Path(found[name].__file__).read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()[:12]


def statements(source: str) -> str:
    """The syntax tree of Python code as text, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
