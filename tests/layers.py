"""The layers of the package as its imports show them, and as docs/design.md states them: `python -m tests.layers`."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "repedit"
DESIGN = Path(__file__).parents[1] / "docs" / "design.md"


def block(kind: str) -> list[str]:
    """Lines of a fenced block of docs/design.md."""
    return DESIGN.read_text().split(f"```{kind}\n")[1].split("```")[0].splitlines()


def stated_levels() -> dict[str, int]:
    """Part of the package -> number of its layer, as docs/design.md states it."""
    return {name: int(row.split()[0]) for row in block("layers") for name in row.split()[1:]}


def stated_inside() -> dict[str, set[str]]:
    """Part -> parts of the same layer that it may import, as docs/design.md states it."""
    return {row.split(":")[0]: set(row.split(":")[1].split()) for row in block("inside")}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    files = PACKAGE.rglob("*.py")
    return {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def part(name: str) -> str:
    """The top-level part that a dotted name belongs to: "fit" for "repedit.fit.mrp"."""
    return name.split(".")[1]


def imported_modules(name: str, files: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports, at its top or inside functions."""
    dependencies: set[str] = set()
    for node in ast.walk(ast.parse(files[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                dependencies.add(full if full in files else node.module)
        elif isinstance(node, ast.Import):
            dependencies |= {alias.name for alias in node.names}
    return {dependency for dependency in dependencies if dependency in files and "." in dependency} - {name}


def imports(files: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> modules that it imports; the public names of `repedit` itself are not counted."""
    return {name: imported_modules(name, files) for name in files if name != "repedit"}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of two or more nodes each of which reaches the others."""
    reach = {node: set(targets) for node, targets in graph.items()}
    for middle in graph:
        for node in graph:
            if middle in reach[node]:
                reach[node] |= reach[middle]
    groups = {tuple(sorted(n for n in graph if n in reach[node] and node in reach[n])) for node in graph}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def between_parts(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Part -> parts that it imports."""
    result: dict[str, set[str]] = {part(name): set() for name in graph}
    for name, targets in graph.items():
        result[part(name)] |= {part(target) for target in targets} - {part(name)}
    return result


def main() -> None:
    graph, levels = between_parts(imports(modules())), stated_levels()
    for level in sorted(set(levels.values()), reverse=True):
        print(level, *(name for name in graph if levels[name] == level))
    for name, targets in sorted(graph.items()):
        beside = sorted(target for target in targets if levels[target] == levels[name])
        if beside:
            print(f"{name}: {' '.join(beside)}")


if __name__ == "__main__":
    main()
