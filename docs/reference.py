"""The pages of the reference: every public name of the package and of its namespaces, and every verb of the command line."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import griffe

import repedit as rp
from repedit import cli
from repedit.cli.application import EXAMPLES, exit_codes

ROOT = Path(__file__).parents[1]
TASKS = {
    "load": "Load a model", "Site": "Places, maps and statistics", "collect": "Look at what is inside",
    "score": "Score and prune neurons", "Edit": "Edit: unlearn and project", "apply": "Rewrite weights and export",
    "compare": "Measure", "audit": "Audit what is left", "check_architecture": "Architectures",
}  # fmt: skip
"""The name that begins each group of the first page, and the heading above it."""
VALUES = ("__version__",)
"""Names of __all__ that need no docstring."""


def namespaces(module: ModuleType = rp) -> list[ModuleType]:
    """A module and the modules that it lists, and theirs."""
    values = [getattr(module, name) for name in getattr(module, "__all__", ())]
    return [module, *(found for value in values if isinstance(value, ModuleType) for found in namespaces(value))]


def public(module: ModuleType) -> list[str]:
    """The names that a module gives: those that it lists, or what is written in it."""
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__ and n[0] != "_"]
    names = getattr(module, "__all__", own)
    return [name for name in names if name not in VALUES and not isinstance(getattr(module, name), ModuleType)]


def shown(module: ModuleType) -> str:
    """The name under which users know a module: rp, rp.data, rp.recipes, rp.attack."""
    return module.__name__.replace("repedit", "rp", 1).replace("unlearning.", "").replace("auditing.", "")


@cache
def package() -> griffe.Module:
    """The package as its source describes it."""
    found = griffe.load("repedit", search_paths=[str(ROOT)], docstring_parser="google", resolve_aliases=True)
    assert isinstance(found, griffe.Module)
    return found


def entry(module: ModuleType, name: str) -> griffe.Object:
    """What the source says of a public name, where it is defined."""
    found = package()[f"{module.__name__}.{name}".removeprefix("repedit.")]
    if found.is_module:  # a function of a module of the same name, such as rp.arch.infer
        value = getattr(module, name)
        found = package()[f"{value.__module__}.{value.__qualname__}".removeprefix("repedit.")]
    return found.final_target if isinstance(found, griffe.Alias) else found  # type: ignore[return-value]


def docstring(module: ModuleType, name: str) -> str:
    """The docstring of a public name, empty if it has none."""
    found = entry(module, name).docstring
    return found.value if found else ""


@cache
def links() -> dict[str, str]:
    """What docstrings and pages call a thing -> its anchor; names of the first page and errors go without `rp.` too."""
    found = {}
    for module in namespaces():
        if module is not rp:
            found[shown(module)] = shown(module).replace(".", "")  # the anchor of the heading of its page
        for name in public(module):
            found[f"{shown(module)}.{name}"] = entry(module, name).path
            if module.__name__ in ("repedit", "repedit.errors") and not name[0].islower():
                found[name] = entry(module, name).path
    return found


# --- Pages


def pages() -> dict[str, str]:
    """The Markdown of every page of the reference, by its path."""
    found = {"reference/index.md": overview(), "reference/command-line.md": command_line()}
    seen: set[str] = set()
    for title, names in tasks().items():
        lines = [f"# {title}", "", *listing(rp, names), "", *entries(rp, names, seen)]
        found[f"reference/{slug(title)}.md"] = "\n".join(lines)
    for module in namespaces()[1:]:
        names = public(module)
        head = [f"# {shown(module)}", "", literal(module.__doc__ or "")]
        found[f"reference/{shown(module)}.md"] = "\n".join(
            [*head, "", *listing(module, names), "", *entries(module, names, seen)]
        )
    return found


def tasks() -> dict[str, list[str]]:
    """The names of the package by task."""
    found: dict[str, list[str]] = {}
    for name in public(rp):
        if name in TASKS:
            found[TASKS[name]] = []
        found[list(found)[-1]].append(name)
    return found


def navigation() -> list[Any]:
    """The pages of the reference as a part of the navigation."""
    by_task = [{title: f"reference/{slug(title)}.md"} for title in tasks()]
    by_module = [{shown(module): f"reference/{shown(module)}.md"} for module in namespaces()[1:]]
    first = ["reference/index.md", {"Command line": "reference/command-line.md"}]
    return [*first, {"Names by task": by_task}, {"Namespaces": by_module}]


def slug(title: str) -> str:
    """The file name of a title."""
    return re.sub(r"\W+", "-", title.lower())


def overview() -> str:
    """The first page: the names of the package by task, the namespaces, and the command line."""
    lines = [
        "# Reference",
        "",
        "`import repedit as rp`; every name below is `rp.NAME`. The [command line](command-line.md)",
    ]
    lines += ["has a page of its own."]
    for title, names in tasks().items():
        lines += ["", f"## {title}", "", *listing(rp, names)]
    lines += ["", "## Namespaces", "", "| namespace | what it holds |", "|---|---|"]
    lines += [f"| [`{shown(m)}`]({shown(m)}.md) | {first_line(m.__doc__ or '')} |" for m in namespaces()[1:]]
    return "\n".join(lines) + "\n"


def listing(module: ModuleType, names: list[str]) -> list[str]:
    """A table of names, with a link to the entry and the first line of each."""
    rows = [f"| [`{n}`][{entry(module, n).path}] | {first_line(docstring(module, n))} |" for n in names]
    return ["| name | what it is |", "|---|---|", *rows] if rows else []


def entries(module: ModuleType, names: list[str], seen: set[str]) -> list[str]:
    """The directives of mkdocstrings, under the name by which users know each; a name has one entry, on its first page."""
    lines = []
    for name in names:
        path = entry(module, name).path
        if path not in seen:
            lines += [f"::: {path}", "    options:", f"      heading: {shown(module)}.{name}"]
            lines += [f"      toc_label: {name}", "      heading_level: 2", ""]
        seen.add(path)
    return lines


def first_line(text: str) -> str:
    """The first line of a docstring in a cell of a table."""
    return cell(text.split("\n")[0])


def cell(text: str) -> str:
    """Text in a cell of a table, where a bar outside of code would end the cell."""
    parts = enumerate(_CODE.split(literal(" ".join(text.split()))))
    return "".join(part if i % 2 else part.replace("|", "\\|") for i, part in parts)


def command_line() -> str:
    """Every verb: what it does, one line that works, its options, and its exit codes."""
    lines = ["# Command line", "", "Every verb has `--help`, and `--json` for machines.", ""]
    for verb, command in cli.verbs().items():
        first, _, rest = command.help.strip().partition("\n\n")
        lines += [
            f"## repedit {verb}",
            "",
            literal(" ".join(first.split())),
            "",
            *([literal(rest), ""] if rest else []),
        ]
        lines += ["```bash", EXAMPLES[verb], "```", "", "| option | default | what it says |", "|---|---|---|"]
        lines += [option_row(parameter) for parameter in command.params]
        codes = "; ".join(f"`{code}` {text}" for code, text in exit_codes(verb).items())
        lines += ["", f"Exit codes: {codes}.", ""]
    return "\n".join(lines)


def option_row(parameter: Any) -> str:
    """The row of an option or argument: its names, its default and its help."""
    is_option = parameter.param_type_name == "option"
    names = ", ".join([*parameter.opts, *parameter.secondary_opts]) if is_option else parameter.name.upper()
    default = parameter.default
    if parameter.required:
        text = "needed"
    elif default is True:
        text = "yes"
    else:
        text = f"`{default}`" if default or (default == 0 and default is not False) else ""
    return f"| `{names}`{' (repeatable)' if parameter.multiple else ''} | {text} | {cell(parameter.help or '')} |"


# --- Docstrings as they are written: formulas are not Markdown, and names of the package become links


_CODE = re.compile(r"(`+[^`\n]+`+)")
_SPAN = re.compile(r"(?<!\[)`rp\.[\w.]+`(?![\]`])")
_NAME = re.compile(r"\brp(?:\.\w+)+")


def literal(text: str) -> str:
    """The text for Markdown: indented formulas stay code, and `rp.name` is a link where the reference has the name."""
    known = links()
    lines = []
    for line in text.split("\n"):
        parts = enumerate(_CODE.split(line))
        lines.append("".join(_linked(part, known) if i % 2 else _escaped(part, known) for i, part in parts))
    return "\n".join(lines)


def _escaped(text: str, known: dict[str, str]) -> str:
    """Plain text without what Markdown would read as markup."""
    text = re.sub(r"([*\[\]])", r"\\\1", text).replace("<", "&lt;")
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return _NAME.sub(lambda match: _link(f"`{match[0]}`", known.get(match[0])) if match[0] in known else match[0], text)


def with_links(page: str) -> str:
    """A page whose code spans `rp.name` link to the reference, outside of blocks, headings and links."""
    known, parts = links(), re.split(r"(^```.*?^```)", page, flags=re.S | re.M)
    return "".join(part if i % 2 else _SPAN.sub(lambda m: _linked(m[0], known), part) for i, part in enumerate(parts))


def _linked(code: str, known: dict[str, str]) -> str:
    """A code span, with a link if it is a name of the reference."""
    name = code.strip("`").split("(")[0]
    return _link(code, known.get(name) or known.get(f"rp.{name}"))


def _link(code: str, goal: str | None) -> str:
    return f"[{code}][{goal}]" if goal else code
