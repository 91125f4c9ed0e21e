"""Does the stand-in SDK have the names and signatures of the real ``cuvis`` package?

The real package cannot be imported without the SDK's C library, so its source is read.
"""

from __future__ import annotations

import ast
import importlib.machinery
import inspect
import sys
from pathlib import Path

import cuvis as standin
import pytest

CLASSES = {"SessionFile": "SessionFile.py", "ProcessingContext": "ProcessingContext.py"}


def real_package() -> Path:
    standin_parent = str(Path(standin.__file__).parents[1])
    search = [p for p in sys.path if p != standin_parent]
    spec = importlib.machinery.PathFinder.find_spec("cuvis", search)
    if spec is None or spec.origin is None:
        pytest.skip("the cuvis package is not installed")
    return Path(spec.origin).parent


def functions(tree: ast.AST) -> dict[str, list[str]]:
    return {
        node.name: [a.arg for a in node.args.args]
        for node in ast.iter_child_nodes(tree)
        if isinstance(node, ast.FunctionDef)
    }


def test_every_public_name_is_exported_by_the_real_package():
    source = ast.parse((real_package() / "__init__.py").read_text())
    exported = {
        alias.asname or alias.name
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    ours = {
        name
        for name, value in vars(standin).items()
        if getattr(value, "__module__", None) == "cuvis" and name != "write_session"
    }
    assert ours - {"SDKException"} <= exported


@pytest.mark.parametrize(("name", "file"), CLASSES.items())
def test_signatures(name, file):
    tree = ast.parse((real_package() / file).read_text())
    real_class = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name)
    real = functions(real_class)
    for method, function in vars(getattr(standin, name)).items():
        if inspect.isfunction(function):
            ours = list(inspect.signature(function).parameters)
            assert method in real, f"{name}.{method} is not in the SDK"
            assert ours == real[method][: len(ours)], f"{name}.{method}"


def test_enum_members():
    tree = ast.parse((real_package() / "cuvis_types.py").read_text())
    text = ast.unparse(tree)
    for enum in (standin.ReferenceType, standin.ProcessingMode):
        for member in enum:
            assert member.name in text, f"{enum.__name__}.{member.name}"


def test_init():
    real = functions(ast.parse((real_package() / "General.py").read_text()))["init"]
    assert list(inspect.signature(standin.init).parameters) == real[:3]
