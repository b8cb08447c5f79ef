"""The names that options take, read from the sources of the tables that define them: importing those would load torch."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLES = {
    "attacks": ("attacks/budgets.py", "_BUILDERS"),
    "budgets": ("attacks/budgets.py", "BUDGETS"),
    "combinations": ("importance/combination.py", "COMBINATIONS"),
    "domains": ("data/catalogue.py", "DOMAINS"),
    "fits": ("fit/methods.py", "FITS"),
    "importances": ("importance/scoring.py", "IMPORTANCES"),
    "metrics": ("metrics/benchmarks.py", "SUITES"),
    "recipes": ("gradient/recipes/__init__.py", "RECIPES"),
    "texts": ("data/sources.py", "BUILTIN"),
}
"""Table -> the file of the package that assigns it, and its name there."""


@cache
def names(table: str) -> tuple[str, ...]:
    """The names in a table of `TABLES`, in their order.

    Raises:
        LookupError: if the source assigns no such table.
    """
    file, name = TABLES[table]
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return tuple(_name(item) for item in _items(node.value))  # type: ignore[attr-defined]
    raise LookupError(f"{file} assigns no {name}")


def _items(value: ast.expr) -> list[ast.expr | None]:
    """Keys of a dictionary, or elements of a sequence, or of what a comprehension goes over."""
    if isinstance(value, ast.Dict):
        return list(value.keys)
    if isinstance(value, ast.DictComp):
        return _items(value.generators[0].iter)
    return list(value.elts) if isinstance(value, ast.Tuple | ast.List) else []


def _name(item: ast.expr | None) -> str:
    """A string, or the name of a function, whose table is by __name__."""
    return item.id if isinstance(item, ast.Name) else str(getattr(item, "value", item))
