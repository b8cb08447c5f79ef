"""Every public function, method and dataclass, and values that fit their annotations."""

from __future__ import annotations

import enum
import importlib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType, NoneType, UnionType
from typing import Any, NamedTuple

import numpy as np
import torch

import repedit as rp
from repedit.arguments import parameter_types


class Public(NamedTuple):
    """Something that a user can call."""

    call: Callable[..., Any]
    hints: dict[str, Any]
    """Parameter -> type."""
    fixed: tuple[Any, ...] = ()
    """What stands before the parameters: an object for a method."""
    repeated: str = ""
    """The parameter that takes any number of positional arguments."""
    ahead: Mapping[str, Any] = MappingProxyType({})
    """The parameters before that one, with their types."""
    positional: tuple[str, ...] = ()
    """Those that cannot be given by name."""


def public_callables() -> dict[str, Public]:
    """Dotted name -> callable."""
    return {name: public for space in _spaces() for name, public in _of_space(space)}


def sample(hint: Any) -> Any:
    """A value that has a type; an object of a class of repedit is empty."""
    outer, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if outer in (typing.Union, UnionType):
        return None if NoneType in arguments else sample(arguments[0])
    if outer is typing.Literal:
        return arguments[0]
    if outer in _SAMPLES:
        return _SAMPLES[outer]
    if hasattr(outer, "array_type"):
        return torch.zeros(2)
    if isinstance(outer, type) and outer.__module__ in ("builtins", "collections.abc"):
        if outer is tuple and Ellipsis not in arguments:
            return tuple(map(sample, arguments))
        return {} if "Mapping" in outer.__name__ or outer is dict else set() if "Set" in outer.__name__ else ()
    if isinstance(outer, type) and issubclass(outer, enum.Enum):
        return next(iter(outer))
    if isinstance(outer, type) and issubclass(outer, tuple):
        return tuple.__new__(outer)
    return object.__new__(outer) if isinstance(outer, type) and not _is_protocol(outer) else _Anything()


class _Anything:
    """Has every attribute."""

    def __getattr__(self, name: str) -> Any:
        return None


_SAMPLES: dict[Any, Any] = {
    int: 1, float: 0.5, str: "a", bool: False, Path: Path("a"), NoneType: None, Any: None, object: None, Callable: len, type: int,
    torch.Tensor: torch.zeros(2), torch.nn.Module: torch.nn.Linear(1, 1), np.ndarray: np.zeros(2), torch.dtype: torch.float32,
    rp.AffineMap: object.__new__(rp.LowRank), rp.data.Batches: rp.data.prose(), torch.device: torch.device("cpu"), slice: slice(None),
}  # fmt: skip


def _is_protocol(cls: type) -> bool:
    return getattr(cls, "_is_protocol", False)


def _spaces() -> list[ModuleType]:
    names = ("arch", "data", "explore", "fit", "plot", "report", "vision", "attack", "recipes")
    metrics = [getattr(rp.metrics, name) for name in rp.metrics.__all__]
    return [rp, *(getattr(rp, name) for name in names), *metrics, importlib.import_module("repedit.vision.recipes")]


def _of_space(space: ModuleType) -> Iterator[tuple[str, Public]]:
    own = [name for name, value in vars(space).items() if getattr(value, "__module__", "") == space.__name__]
    for name in getattr(space, "__all__", None) or [name for name in own if not name.startswith("_")]:
        value = getattr(space, name)
        if not getattr(value, "__module__", "").startswith("repedit."):
            continue
        if inspect.isfunction(value):
            yield f"{space.__name__}.{name}", _of_function(value)
        elif inspect.isclass(value) and not _is_free(value):
            yield from _of_class(f"{space.__name__}.{name}", value)


def _is_free(cls: type) -> bool:
    """Whether Python itself makes the objects, and checks nothing."""
    return (
        issubclass(cls, enum.Enum | tuple | BaseException)  # named tuples, which functions return
        or _is_protocol(cls)
        or typing.is_typeddict(cls)
    )


def _of_class(name: str, cls: Any) -> Iterator[tuple[str, Public]]:
    made = is_dataclass(cls) and cls.__dataclass_params__.init
    if made:
        hints = parameter_types(cls)
        yield name, Public(cls, {parameter: hints[parameter] for parameter in inspect.signature(cls).parameters})
    for key, member in vars(cls).items():
        function = getattr(member, "__func__", member)
        if not inspect.isfunction(function) or (key.startswith("_") and (made or key != "__init__")):
            continue
        first = () if isinstance(member, staticmethod) else (cls if isinstance(member, classmethod) else _empty(cls),)
        yield f"{name}.{key}", _of_function(function, first)


def _empty(cls: Any) -> Any:
    return object.__new__(cls) if not inspect.isabstract(cls) else object()


def _of_function(function: Any, fixed: tuple[Any, ...] = ()) -> Public:
    plain = inspect.unwrap(function)
    parameters = list(inspect.signature(plain).parameters.values())[len(fixed) :]
    options = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
    hints = {name: hint for name, hint in parameter_types(plain).items() if name not in options}
    positional = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_ONLY)
    for number, p in enumerate(parameters):
        if p.kind is p.VAR_POSITIONAL:
            ahead = {before.name: hints[before.name] for before in parameters[:number]}
            return Public(function, hints, fixed, p.name, ahead, positional)
    return Public(function, hints, fixed, positional=positional)
