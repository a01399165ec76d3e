"""Checks that files do not import or include each other in a circle, or files of a higher layer."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Layer, a folder or module of the package or of csrc -> the only others that it uses directly.
MAY_USE = {
    "vne_kernels/_core": {"vne_kernels/_triton", "vne_kernels/common"},  # Triton on first use
    "vne_kernels/_triton": {"vne_kernels/_core"},
    "vne_kernels/common": set(),
    "vne_kernels/functional": {f"vne_kernels/{x}" for x in ("_core", "common", "distributed")},
    "csrc/common": {"csrc/emulation"},  # whose headers replace those of torch and CUDA
    "csrc/ops": {"csrc/common"},
    "csrc/cpu": {"csrc/common", "csrc/ops"},
    "csrc/cuda": {"csrc/common", "csrc/ops", "csrc/emulation"},
}


def python_imports() -> dict[str, set[str]]:
    """Module -> the names it imports, under TYPE_CHECKING and in functions too."""
    paths = sorted((ROOT / "vne_kernels").rglob("*.py"))
    names = [str(p.relative_to(ROOT).with_suffix("")).removesuffix("/__init__") for p in paths]
    graph: dict[str, set[str]] = {name: set() for name in names}
    for name, path in zip(names, paths, strict=True):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name.replace(".", "/") for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = str(node.module).replace(".", "/")
                members = [f"{module}/{alias.name}" for alias in node.names]
                graph[name] |= {x if x in graph else module for x in members}
    return graph


def native_includes() -> dict[str, set[str]]:
    """File of csrc -> the names it includes."""
    paths = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu")]
    found = {p: re.findall(r'#include "(.+)"', p.read_text()) for p in paths}
    return {str(p.relative_to(ROOT)): {f"csrc/{x}" for x in found[p]} for p in paths}


@pytest.mark.parametrize("graph", [python_imports(), native_includes()], ids=["Python", "C++"])
def test_no_circle_and_no_way_up(graph: dict[str, set[str]]) -> None:
    used = {name: (graph[name] & graph.keys()) - {name} for name in graph}
    assert any(used.values())
    try:
        TopologicalSorter(used).prepare()
    except CycleError as error:
        pytest.fail("circle: " + " -> ".join(reversed(error.args[1])))
    layer = {name: "/".join(name.split("/")[:2]) for name in graph}
    for name in (name for name in graph if layer[name] in MAY_USE):
        up = {x for x in used[name] if layer[x] not in {layer[name], *MAY_USE[layer[name]]}}
        assert not up, f"{name} must not use {up}"
