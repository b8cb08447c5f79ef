"""Shape-checked imports of repedit: every annotation is an assertion.

jaxtyping binds and checks the arguments of each call twice, which makes small functions of texts ten times as slow.
Functions whose annotations contain no shape have nothing to bind: beartype checks them alone.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from types import CodeType, FunctionType
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

SHAPED = jaxtyping.jaxtyped
_CHECKED = "_checks_its_arguments"
_typed = beartype(conf=BeartypeConf(violation_type=TypeError))


def install() -> None:
    """Check every function and dataclass of repedit that is imported from now on."""
    jaxtyping.jaxtyped = _checked  # ty: ignore
    install_import_hook("repedit", "beartype.beartype")


def _checked(target: Any = None, **typechecker: Any) -> Any:
    if target is None:
        return functools.partial(_checked, **typechecker)
    if hasattr(target, _CHECKED):  # an inherited `__init__`, or one that a dataclass does not generate
        return target
    if inspect.isfunction(target) and not _has_shapes(target):
        return _without_shapes(target)
    if isinstance(target, type) and is_dataclass(target) and inspect.isfunction(target.__init__):
        target.__init__ = _checked(target.__init__, **typechecker)  # type: ignore[misc]
        return target
    if isinstance(target, classmethod | staticmethod):
        return type(target)(_checked(target.__func__, **typechecker))
    if isinstance(target, property) and target.fset is None and target.fdel is None and target.fget is not None:
        return property(_checked(target.fget, **typechecker))
    return SHAPED(target, **typechecker)


def _has_shapes(function: Callable[..., Any]) -> bool:
    """Whether an annotation contains a jaxtyping type or an alias of one, or a ParamSpec, which beartype alone refuses."""
    return any(
        "jaxtyping" in repr(note)
        or (isinstance(note, str) and any(name == "kwargs" or _is_shape(function, name) for name in _names(note)))
        for note in function.__annotations__.values()
    )


def _is_shape(function: Any, name: str) -> bool:
    namespace: Mapping[str, Any] = function.__globals__
    return name in namespace and "jaxtyping" in repr(namespace[name])


@functools.cache
def _names(annotation: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W\d]\w*", annotation))


def _without_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    typed, checkable = _check_of(function)
    if typed is function:
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        checked = not jaxtyping.config.jaxtyping_disable and checkable()
        return (typed if checked else function)(*args, **kwargs)

    setattr(call, _CHECKED, True)
    return call


_CHECKS: dict[int, tuple[CodeType, Any, Callable[[], bool]]] = {}
"""By the identity of the code: that of two dataclasses with other types can be equal."""


def _check_of(function: Any) -> tuple[Callable[..., Any], Callable[[], bool]]:
    """The checked function, and whether its annotations can be evaluated.

    beartype writes the check once for a function that is defined anew in every call of another.
    """
    code = function.__code__
    if id(code) not in _CHECKS:
        names = _free_names(function)
        checkable = functools.cache(lambda: all(_is_defined(function, name) for name in names))
        notes = dict(function.__annotations__)  # beartype replaces those that it cannot evaluate yet
        _CHECKS[id(code)] = code, _typed(function), checkable
        function.__annotations__ = notes
    _, first, checkable = _CHECKS[id(code)]
    if first.__code__ is code:  # there is nothing to check
        return function, checkable
    check = FunctionType(first.__code__, first.__globals__, first.__name__, first.__defaults__, first.__closure__)
    check.__kwdefaults__ = first.__kwdefaults__ | {"__beartype_func": function}
    return check, checkable


def _free_names(function: Any) -> set[str]:
    """The names in the annotations of a function, before beartype replaces them."""
    notes = [note for note in function.__annotations__.values() if isinstance(note, str)]
    nodes = (node for note in notes for node in ast.walk(ast.parse(note, mode="eval")))
    return {node.id for node in nodes if isinstance(node, ast.Name)}


def _is_defined(function: Any, name: str) -> bool:
    """Whether a name exists at run time; the command line imports some for type checkers only, and torch inside functions."""
    return name in function.__globals__ or hasattr(builtins, name)
