"""Write the reference with pdoc: `python -m docs.build [folder]`; build/docs by default, where no file of it is kept by git."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pdoc.search
from jinja2 import pass_context
from jinja2.runtime import Context
from markupsafe import Markup, escape
from pdoc.doc import Module
from pdoc.render import env
from pdoc.render_helpers import link, linkify

import repedit as rp
from repedit import cli
from repedit.cli.application import EXAMPLES, exit_codes

TASKS = {
    "load": "Load a model", "Site": "Places, maps and statistics", "collect": "Look at what is inside",
    "score": "Score and prune neurons", "Edit": "Edit: unlearn and project", "apply": "Rewrite weights and export",
    "compare": "Measure", "audit": "Audit what is left", "check_architecture": "Architectures",
}  # fmt: skip
"""The name that begins each group of the first page, and the heading above it."""
_SECTION = re.compile(r"^(Args|Raises|Warns|Returns|Yields|Example|Reference):", re.MULTILINE)
_DOT = '</span><span class="o">.</span><span class="n">'
_NAME = re.compile(r"\brp(?:\.\w+)+|(?<=<code>)\w+(?=</code>|\()|\b[A-Z]+[a-z]\w*[A-Z]\w*\b")


def build(folder: Path) -> dict[str, Module]:
    """Every page, in a folder that is made anew; returns the modules that have one, by name."""
    modules = {room.__name__: documented(room) for room in rooms(rp)}
    members = [(module.modulename, doc) for module in modules.values() for doc in module.members.values()]
    kinds = {".".join(doc.taken_from): f"{home}.{doc.name}" for home, doc in reversed(members)}
    warnings.filterwarnings(
        "ignore", "Error parsing type annotation Bool"
    )  # pdoc shows jaxtyping's "..." as it is written
    pdoc.render.configure(show_source=False, template_directory=Path(__file__).with_name("templates"))
    env.filters |= {"literal": literal, "linkify": linked}
    env.globals.update(tasks=TASKS, verbs=cli.verbs(), examples=EXAMPLES, exit_codes=exit_codes, version=rp.__version__)
    env.globals.update(kinds=kinds, spots=spots(modules))
    pages = {name.replace(".", "/"): pdoc.render.html_module(module, modules) for name, module in modules.items()}
    pages["index"] = pdoc.render.html_index(modules)
    beside = Module(ModuleType("command-line"))
    pages["command-line"] = env.get_template("verbs.html.jinja2").render(module=beside, all_modules=modules)
    shutil.rmtree(folder, ignore_errors=True)
    for slug, text in pages.items():
        (folder / slug).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{slug}.html").write_text(text, encoding="utf-8")
    pdoc.search.to_html = lambda text: str(escape(text))  # the results of a search show docstrings as they are, too
    (folder / "search.js").write_text(pdoc.render.search_index(modules), encoding="utf-8")
    return modules


def rooms(module: ModuleType) -> list[ModuleType]:
    """A module and those it lists, and theirs; every lazy name is put where pdoc looks for it."""
    values = {name: getattr(module, name) for name in getattr(module, "__all__", ())}
    vars(module).update(values)
    return [module, *(room for value in values.values() if isinstance(value, ModuleType) for room in rooms(value))]


def documented(room: ModuleType) -> Module:
    """A module whose values have their docstrings, which pdoc does not find where they are imported from elsewhere."""
    module = Module(room)
    for node in ast.parse(inspect.getsource(room)).body:
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            doc = module.members.get(alias.asname or alias.name)
            if doc is not None and doc.kind == "variable" and not doc.docstring:
                doc.docstring = documented(sys.modules[str(node.module)]).members[alias.name].docstring
    return module


def spots(modules: dict[str, Module]) -> dict[str, tuple[str, str]]:
    """What docstrings call a thing -> its module and name there; first names and errors go without rp. as well."""
    found = {}
    for home, module in modules.items():
        shown = home.replace("repedit", "rp", 1).replace("gradient.", "")
        found[shown] = (home, "")
        for doc in module.members.values():
            found[f"{shown}.{doc.name}"] = (home, doc.name)
            if home in ("repedit", "repedit.errors"):
                found[doc.name] = (home, doc.name)
    return found


@pass_context
def literal(context: Context, text: str, namespace: str = "") -> Markup:
    """Text of a docstring as it is written, since * and _ are formulas in ours; code, sections and names are marked."""
    module: Module = context["module"]
    own = {*module.members, *getattr(module.get(namespace.partition(".")[0]), "members", ())}

    def known(match: re.Match[str]) -> str:
        word, spot = match[0], context["spots"].get(match[0])
        return word if spot is None or word in own else str(link(context, spot, word))

    marked = re.sub(r"`+([^`\n]+)`+", r"<code>\1</code>", _SECTION.sub(r"<b>\1</b>", str(escape(text))))
    marked = re.sub(r"(^|\n\n)(    .+(?:\n.+)*)", r"\1<samp>\2</samp>", marked)  # a paragraph set in is aligned
    return Markup(linkify(context, _NAME.sub(known, marked), namespace, False))


@pass_context
def linked(context: Context, code: str, namespace: str = "", shorten: bool = True) -> Markup:
    """pdoc's links, for types by the name they are public under and not by the file they are written in."""
    plain = str(code).replace(_DOT, ".")
    plain = re.sub(r"\brepedit(?:\.\w+)+", lambda m: context["kinds"].get(m[0], m[0]), plain)
    shown = linkify(context, re.sub(r"\b(?:typing|jaxtyping|torch|pathlib)\.(?=[A-Z])", "", plain), namespace, shorten)
    return Markup(re.sub(r"(?<=>)repedit\.(?=\w)", "rp.", shown))


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "build" / "docs"
    print(f"{len(build(place))} modules in {place}")
