"""Imports only go down, no circle, no long function: the AST of every module against docs/design.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.layers import between_parts, circles, imports, modules, part, stated_inside, stated_levels

# Libraries with side effects or long imports, and the only parts that may import them at the top of a module.
ONLY_IN = {
    "matplotlib": {"plot", "report"}, "typer": {"cli"}, "rich": {"cli"}, "triton": {"kernels"},
    "transformers": set(), "plotly": {"explore"}, "transformer_lens": set(), "nnsight": set(),
}  # fmt: skip
# Where transformers may be imported inside a function.
TRANSFORMERS_IN = {"auditing", "unlearning", "models", "rewrite", "metrics", "bridges", "cli", "arch"}
FILES = {name: path for name, path in modules().items() if name != "repedit"}


def violations(graph: dict[str, set[str]]) -> list[str]:
    """Imports that go up, or sideways without leave."""
    levels, inside = stated_levels(), stated_inside()
    return [
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in sorted(targets)
        if levels[target] >= levels[name] and target not in inside.get(name, set())
    ]


def libraries(path: Path, *, top: bool) -> set[str]:
    """First names of the imports of a file, at its top only or anywhere but in imports for type checkers."""
    tree = ast.parse(path.read_text())
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    names: set[str] = set()
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names


def test_every_part_has_a_layer_in_the_design():
    assert {part(name) for name in FILES} == set(stated_levels())


def test_imports_only_go_down():
    assert violations(between_parts(imports(modules()))) == []


def test_the_design_allows_nothing_that_is_not_used():
    graph, levels = between_parts(imports(modules())), stated_levels()
    assert stated_inside() == {
        name: beside for name in graph if (beside := {t for t in graph[name] if levels[t] == levels[name]})
    }


def test_an_upward_import_is_caught():
    assert violations({"linear_maps": {"edit", "errors"}}) == ["linear_maps imports edit"]


def test_no_module_imports_itself_through_others():
    assert circles(imports(modules())) == []


def test_a_circle_is_caught():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_libraries_stay_in_their_parts(library):
    users = {part(name) for name, path in FILES.items() if library in libraries(path, top=True)}
    assert users <= ONLY_IN[library]


def test_transformers_is_imported_where_the_design_says():
    assert {part(n) for n, path in FILES.items() if "transformers" in libraries(path, top=False)} <= TRANSFORMERS_IN


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from `def` to its end, without the docstring."""
    documented = ast.get_docstring(function) is not None
    docstring = (function.body[0].end_lineno or 0) - function.body[0].lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def long_functions(tree: ast.AST) -> list[str]:
    """Functions of more than 60 lines; a file may be as long as its subject is deep."""
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [f"{node.name}: {body_lines(node)} lines" for node in functions if body_lines(node) > 60]


def test_functions_have_at_most_60_lines():
    assert {name: long for name, path in FILES.items() if (long := long_functions(ast.parse(path.read_text())))} == {}


def test_a_long_function_is_caught():
    body = "\n".join(["    x = 1"] * 60)
    assert long_functions(ast.parse(f'def f():\n    """One\n    two."""\n{body}\n')) == ["f: 61 lines"]
