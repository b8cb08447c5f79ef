"""Imports only go down: the AST of every module against the table of layers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "repedit"
LAYERS = (
    ("errors", "sites", "maps", "kernels", "ranks", "io", "foreign_text"),
    ("arch", "hooks", "stats", "data", "fetching", "fingerprints", "ragged", "opening", "models"),
    ("plan", "edit", "delta", "naming", "lower", "activations", "importance", "fit"),
    ("rewrite", "gradient", "vision"),
    ("bridges", "metrics", "attacks"),
    ("plot", "explore", "report", "walkthrough"),
    ("console", "cli", "__main__"),
)  # fmt: skip
LEVEL = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
# Inside a layer an import is allowed where this table lists it, so no cycle can appear.
INSIDE = {
    "sites": {"errors"}, "maps": {"errors", "kernels"}, "kernels": {"errors"}, "ranks": {"errors"},
    "arch": {"hooks"}, "ragged": {"arch"},
    "fingerprints": {"arch"}, "opening": {"arch", "fetching", "ragged"},
    "models": {"arch", "fetching", "fingerprints", "ragged", "opening"},
    "naming": {"delta", "plan"}, "lower": {"edit", "delta", "plan", "naming"}, "activations": {"edit"}, "importance": {"activations", "edit", "fit"},
    "fit": {"activations", "edit"}, "vision": {"rewrite"}, "explore": {"plot"}, "walkthrough": {"plot"}, "attacks": {"metrics"}, "report": {"plot"}, "cli": {"console"}, "__main__": {"cli"},
}  # fmt: skip
# Libraries with side effects or long imports, and the only rooms that may import them at the top of a module.
ONLY_IN = {
    "matplotlib": {"plot"}, "typer": {"cli"}, "rich": {"console"}, "triton": {"kernels"},
    "transformers": set(), "plotly": {"explore"}, "transformer_lens": set(), "nnsight": set(),
}  # fmt: skip
# Where transformers may be imported inside a function.
TRANSFORMERS_IN = {
    "attacks",
    "gradient",
    "models",
    "opening",
    "fetching",
    "rewrite",
    "metrics",
    "bridges",
    "cli",
    "arch",
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of every import in a tree."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def violations(path: Path) -> list[str]:
    """Imports of a module that go up, or sideways without leave."""
    mine, found = room(path), []
    for name in imported(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] != "repedit" or parts[1] == mine or parts[1] == "__version__":
            continue
        other = parts[1]
        allowed = LEVEL[other] < LEVEL[mine] or other == "errors" or other in INSIDE.get(mine, set())
        found += [] if allowed else [f"{path.name} ({mine}) imports {name}"]
    return found


def top_level(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name.split(".")[0] for name in imported(tree)}


def test_every_room_has_a_layer():
    assert {room(path) for path in FILES} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_go_down(path):
    assert violations(path) == []


def test_an_upward_import_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_layers.PACKAGE", tmp_path)
    (tmp_path / "maps.py").write_text("from repedit.edit import Edit\n")
    assert violations(tmp_path / "maps.py") == ["maps.py (maps) imports repedit.edit.Edit"]


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_libraries_stay_in_their_rooms(library):
    assert {room(path) for path in FILES if library in top_level(path)} <= ONLY_IN[library]


def test_transformers_is_imported_where_the_design_says():
    users = {
        room(path)
        for path in FILES
        if any(n.split(".")[0] == "transformers" for n in imported(ast.parse(path.read_text())))
    }
    assert users <= TRANSFORMERS_IN


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from `def` to its end, without the docstring."""
    documented = ast.get_docstring(function) is not None
    docstring = (function.body[0].end_lineno or 0) - function.body[0].lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def long_functions(tree: ast.AST) -> list[str]:
    """Functions of more than 60 lines; a file may be as long as its subject is deep."""
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [f"{node.name}: {body_lines(node)} lines" for node in functions if body_lines(node) > 60]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_have_at_most_60_lines(path):
    assert long_functions(ast.parse(path.read_text())) == []


def test_a_long_function_is_caught():
    body = "\n".join(["    x = 1"] * 60)
    assert long_functions(ast.parse(f'def f():\n    """One\n    two."""\n{body}\n')) == ["f: 61 lines"]
