"""The shape of the house: imports go one way, without a cycle, and no room holds more than twenty modules."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pruners", "eval", "experiments", "analysis", "slurm")
ALLOWED = {
    "pruners": set(),
    "eval": {"pruners"},
    "experiments": {"pruners", "eval"},
    "slurm": {"pruners", "experiments"},
    "analysis": {"pruners", "eval", "experiments"},
}


def modules() -> dict[str, Path]:
    """By dotted name; a package's is that of its __init__."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imports(path: Path, known: set[str]) -> Iterator[str]:
    """Every module of this project that the file imports, inside functions and TYPE_CHECKING, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in inner if name in known)
            if node.module in known and not all(name in known for name in inner):
                yield node.module


def test_imports_follow_the_arrows():
    known = modules()
    against = [
        f"{name} imports {other}"
        for name, path in known.items()
        for other in imports(path, set(known))
        if (here := name.partition(".")[0]) != (there := other.partition(".")[0]) and there not in ALLOWED[here]
    ]
    assert not against


def test_no_module_imports_itself_by_a_detour():
    known = modules()
    graph = {name: set(imports(path, set(known))) - {name} for name, path in known.items()}
    TopologicalSorter(graph).prepare()  # CycleError names the modules


def test_no_folder_has_more_than_twenty_modules():
    halls = {folder: n for folder, n in Counter(path.parent for path in modules().values()).items() if n > 20}
    assert not halls


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is(package):
    silent = [
        n for n, p in modules().items() if n.startswith(package) and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not silent
