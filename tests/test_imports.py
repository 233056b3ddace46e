"""Imports point one way: the graph of jaxspec and pallas_kernels, read from their sources.

Imports inside functions count; those for type checkers, which never run, count
in the search for cycles alone.
"""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = ("jaxspec", "pallas_kernels")

# What a package, or a module beside the packages, may import beside itself.
ARROWS = {
    "pallas_kernels": "",  # its kernels
    "pallas_kernels.h100": "pallas_kernels",
    "arguments": "",
    "config": "arguments",
    "interrupts": "",
    "locks": "",
    "noise": "",
    "settings": "sharding",
    "sharding": "pallas_kernels",
    "tokenizer": "",
    "whole_files": "",
    "text_stream": "tokenizer",
    "trees": "config pallas_kernels",
    "models": "config trees pallas_kernels",
    "drafters": "arguments config models noise trees pallas_kernels",
    "decoding": "arguments config drafters models noise trees whole_files",
    "checkpoints": "config drafters models sharding tokenizer whole_files",
    "answer_text": "text_stream tokenizer",
    "data": "models tokenizer",
    "dtypes": "checkpoints whole_files",
    "kept_curves": "decoding dtypes",
    "loading": "arguments checkpoints config drafters dtypes models settings sharding",
    "pace": "arguments decoding drafters kept_curves loading models prompts settings sharding",
    "prompts": "data decoding models",
    "results": "decoding",
    "scoring": "arguments config decoding drafters models prompts settings trees",
    "api": "answer_text arguments decoding drafters interrupts loading models pace prompts"
    " results settings sharding",
    "planning": "config decoding drafters models sharding trees pallas_kernels"
    " pallas_kernels.h100",
    "serving": "answer_text arguments config decoding drafters models prompts sharding"
    " text_stream tokenizer trees",
    "evaluation": "jaxspec api arguments config data decoding drafters loading models noise"
    " prompts results settings trees",
    "training": "jaxspec api arguments checkpoints config data decoding drafters interrupts"
    " locks models prompts serving settings sharding tokenizer trees whole_files",
    "check": "config decoding drafters evaluation models prompts training",
    "cli": "jaxspec api check checkpoints config data decoding doctor drafters dtypes"
    " evaluation interrupts kept_curves loading"
    " models planning prompts results serving sharding training pallas_kernels.h100",
    "doctor": "checkpoints dtypes loading settings",
    "jaxspec": "",  # its names are imported on first use
    "__main__": "cli",
}


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for top in TOP:
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST, *, types: bool = False):
    """The dotted names that a module's source imports, when it runs or later.

    Args: types: count those for type checkers too.
    """
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING" and not types:
        return
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    elif isinstance(tree, ast.ImportFrom):
        assert tree.level == 0, "imports are absolute here"
        yield from (f"{tree.module}.{alias.name}" for alias in tree.names)
    for child in ast.iter_child_nodes(tree):
        yield from imported(child, types=types)


@functools.cache
def graph(*, types: bool = False) -> dict[str, set[str]]:
    """Per module the modules of ours that it imports; `types` as for `imported`."""

    def module_of(name: str) -> str:
        while name and name not in modules():
            name = name.rpartition(".")[0]
        return name

    found = {}
    for name, path in modules().items():
        names = imported(ast.parse(path.read_text("utf-8")), types=types)
        found[name] = {module_of(x) for x in names} - {"", name}
    return found


def package(module: str) -> str:
    """Where a module belongs in `ARROWS`."""
    top, *rest = module.split(".")
    if top == "pallas_kernels":
        return "pallas_kernels.h100" if rest[:1] == ["h100"] else top
    return rest[0] if rest else top


def test_the_graph_sees_deferred_imports():
    source = "def f():\n    if x:\n        from jaxspec.api import generate\n"
    assert list(imported(ast.parse(source))) == ["jaxspec.api.generate"]
    source = "if TYPE_CHECKING:\n    import jaxspec.api\n"
    assert list(imported(ast.parse(source))) == []
    assert list(imported(ast.parse(source), types=True)) == ["jaxspec.api"]
    assert "jaxspec.models.decoder" in graph()["jaxspec.decoding.round"]
    assert "jaxspec.planning.plan" in graph()["jaxspec.cli.plan"]  # inside a function


def test_no_cycles():
    # The package's own names come from everywhere, on first use.
    whole = graph(types=True) | {"jaxspec": graph()["jaxspec"]}
    graphlib.TopologicalSorter(whole).prepare()


@pytest.mark.parametrize("name", sorted({package(module) for module in modules()}))
def test_arrows_point_one_way(name):
    allowed = {name, *ARROWS[name].split()}
    found = {
        f"{module} -> {target}"
        for module, targets in graph().items()
        if package(module) == name
        for target in targets
        if package(target) not in allowed
    }
    assert not found


def test_the_arrows_themselves_have_no_cycle():
    assert ARROWS.keys() == {package(module) for module in modules()}
    graphlib.TopologicalSorter({k: v.split() for k, v in ARROWS.items()}).prepare()
