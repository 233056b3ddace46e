"""What the source must look like: functions short enough to read at once."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = 60  # of a function, its docstring not counted
PACKAGES = ("cli", "data", "decoding", "drafters", "evaluation", "planning",
            "serving", "training", "trees")  # fmt: skip


def sources(folder):
    return {path: ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}


def length(function) -> int:
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    first = function.body[0]
    return lines - (first.end_lineno - first.lineno + 1)


def long_functions(trees):
    return {
        f"{path.relative_to(ROOT)}: {node.name}": length(node)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and length(node) > LINES
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_short(package):
    assert long_functions(sources(ROOT / "jaxspec" / package)) == {}


def test_a_long_function_would_be_found(tmp_path):
    body = "\n".join(["    x = 1"] * LINES)
    for name, text in (("short", body[: body.rfind("\n")]), ("long", body)):
        (tmp_path / f"{name}.py").write_text(
            f'def {name}():\n    """Not\n    counted."""\n{text}\n'
        )
    trees = {ROOT / path.name: tree for path, tree in sources(tmp_path).items()}
    assert long_functions(trees) == {"long.py: long": LINES + 1}


def test_an_installed_package_has_the_files_that_it_reads():
    """What lies beside modules and is no module is named in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = project["tool"]["setuptools"]["package-data"]
    for package in ("jaxspec", "pallas_kernels"):
        for path in (ROOT / package).rglob("*.*"):
            other = path.suffix in (".json", ".html", ".typed")
            if other and "shipped" not in path.parts:
                parent = ".".join(path.parent.relative_to(ROOT).parts)
                assert path.name in named.get(parent, ()), path
