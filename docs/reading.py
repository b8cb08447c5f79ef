"""A name -> what its entry says: its signature as it is written, its docstring, its members."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

SPECIAL = ("__call__", "__matmul__", "__or__", "__add__", "__mul__", "__neg__", "__getitem__")
"""Operators that are shown where they have a docstring of their own."""
WIDTH = 100


@dataclass(frozen=True)
class Entry:
    """One name with what is said of it."""

    name: str
    kind: str
    """function, class, error, value, field, property or method."""
    signature: str
    """What follows the name."""
    text: str
    """The docstring, without its indentation; empty where there is none."""
    members: tuple[Entry, ...] = ()

    @property
    def summary(self) -> str:
        """The first sentence."""
        return first_sentence(self.text)


def entry(name: str, value: Any, home: Any) -> Entry:
    """The entry of a public name.

    Args:
        home: the module that has it, whose source may hold a docstring after a plain value.
    """
    if isinstance(value, type) and not hasattr(value, "__origin__"):
        kind = "error" if issubclass(value, BaseException) else "class"
        return Entry(name, kind, _made(value), inspect.getdoc(value) or "", tuple(_members(value)))
    if inspect.isroutine(value):
        return Entry(name, "function", _called(value), inspect.getdoc(value) or "")
    return Entry(name, "value", f" = {_short(value)}", attribute_docs(_defined(name, home)).get(name, ""))


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, in one line."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    for end, letter in enumerate(paragraph):
        after = paragraph[end + 1 : end + 3]
        if letter in ".?!" and (not after or (after[0] == " " and (after[1:].isupper() or after[1:] == "`"))):
            return paragraph[: end + 1]
    return paragraph


def _defined(name: str, home: ModuleType) -> ModuleType:
    """The module that a value comes from: the one that has it, or the one that imports it from."""
    for node in ast.parse(inspect.getsource(home)).body:
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and name in [alias.asname or alias.name for alias in node.names]
        ):
            return _defined(name, importlib.import_module(node.module))
    return home


@cache
def attribute_docs(home: Any) -> dict[str, str]:
    """The docstrings that stand after the values of a module or the fields of a class."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(home)))
    except (OSError, TypeError):
        return {}
    body = tree.body if isinstance(home, ModuleType) else getattr(tree.body[0], "body", [])
    found = {}
    for node, after in pairwise(body):
        target = (
            node.target
            if isinstance(node, ast.AnnAssign)
            else node.targets[0]
            if isinstance(node, ast.Assign)
            else None
        )
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        if isinstance(target, ast.Name) and isinstance(text, str):
            found[target.id] = inspect.cleandoc(text)
    return found


def _made(value: type) -> str:
    """How an object of a class is made; nothing where it says nothing, as of errors, protocols and enumerations."""
    if not dataclasses.is_dataclass(value) and "__init__" not in vars(value):
        return ""
    return _called(value).removesuffix(" -> None")


def _called(function: Any, method: bool = False) -> str:
    """A signature with the annotations as they are written, over several lines where it is long."""
    found = inspect.signature(function)
    parts, kind = [], None
    for i, parameter in enumerate(found.parameters.values()):
        if i == 0 and method and parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and kind not in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL):
            parts.append("*")
        kind = parameter.kind
        parts.append(_parameter(parameter))
    back = "" if found.return_annotation is found.empty else f" -> {_written(found.return_annotation)}"
    line = f"({', '.join(parts)}){back}"
    return line if len(line) <= WIDTH else "(\n" + "".join(f"    {part},\n" for part in parts) + f"){back}"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    said = "" if parameter.annotation is parameter.empty else f": {_written(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return f"{stars}{parameter.name}{said}"
    return f"{stars}{parameter.name}{said}{' = ' if said else '='}{_short(parameter.default)}"


def _written(annotation: Any) -> str:
    """An annotation as the source has it."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.strip("'\"") if text[:1] == text[-1:] and text[:1] in "'\"" else text


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(repr(key) + ": ..." for key in value) + "}"
    if callable(value) and hasattr(value, "__name__"):
        return str(value.__name__)
    return repr(value).replace("typing.", "").replace("collections.abc.", "")


def _members(value: type) -> Iterator[Entry]:
    """Fields, then properties and methods, of those that have something to say."""
    own = [c for c in value.__mro__ if c.__module__.startswith("repedit")]
    texts = {name: text for c in reversed(own) for name, text in attribute_docs(c).items()}
    fields = (
        [f for f in dataclasses.fields(value) if not f.name.startswith("_")] if dataclasses.is_dataclass(value) else []
    )
    for field in fields:
        if field.name in texts:  # the signature has the others
            yield Entry(field.name, "field", f": {_written(field.type)}", texts[field.name])
    names = {field.name for field in fields}
    for name, member in ((n, m) for c in own for n, m in vars(c).items()):
        if name in names or (name.startswith("_") and name not in SPECIAL):
            continue
        found = _member(name, member)
        if found is not None and found.text:
            names.add(name)
            yield found


def _member(name: str, member: Any) -> Entry | None:
    function = (
        member.fget if isinstance(member, property) else getattr(member, "func", getattr(member, "__func__", member))
    )
    if not inspect.isfunction(function):
        return None
    text = inspect.getdoc(function) or ""
    if isinstance(member, property) or hasattr(member, "func"):
        back = inspect.signature(function).return_annotation
        return Entry(name, "property", "" if back is inspect.Signature.empty else f": {_written(back)}", text)
    return Entry(name, "method", _called(function, method=not isinstance(member, staticmethod)), text)
