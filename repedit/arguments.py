"""The types of the arguments of public functions, checked against their annotations before anything is done.

`checked` stands above a public function or below `@dataclass`. It compares outer types, and the items of lists and dicts; shapes,
ranges and names are checked by the functions themselves.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cache, wraps
from numbers import Integral, Number, Real
from os import PathLike
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, TypeVar, Union, Unpack, get_args, get_origin, get_type_hints, is_typeddict

from repedit.errors import ArgumentError, DataError, NotAModel, RepeditError, check_names, plain_scalar, shown

_F = TypeVar("_F", bound=Callable[..., Any])
_S = TypeVar("_S")
ADVICE: Mapping[str, tuple[type[RepeditError], str]] = {
    "Subject": (NotAModel, "make one with repedit.load(path) or with repedit.wrap(model, tokenizer)"),
    "Facts": (DataError, "give repedit.data.facts(name)"),
    "Fact": (DataError, "repedit.data.facts(name).forget is a list of facts"),
    "Batches": (
        DataError,
        "give a corpus, such as repedit.data.read(path or list of texts), repedit.data.code() or repedit.data.facts(name)",
    ),
    "Edit": (ArgumentError, "repedit.prune, repedit.mrp and repedit.Edit.load return an Edit"),
    "Delta": (ArgumentError, "repedit.unlearn and repedit.Delta.load return a Delta"),
    "Collection": (ArgumentError, "give what repedit.collect(model, corpus) returns"),
    "Scores": (ArgumentError, "give what repedit.score(forget, retain) returns"),
    "Moments": (ArgumentError, "give repedit.collect(model, corpus, sites, statistic=repedit.Moments)[site]"),
    "Report": (ArgumentError, "give what repedit.audit or repedit.Report.load returns"),
    "UnlearnRecipe": (ArgumentError, "give one of repedit.recipes, such as repedit.recipes.npo()"),
    "Tokenizer": (ArgumentError, "give what transformers.AutoTokenizer.from_pretrained returns"),
    "Site": (ArgumentError, "give a site such as '7.mlp.neurons'"),
}
"""Name of a class -> the error for something else in its place, and what to do."""
_WORDS: Mapping[object, str] = {
    int: "a whole number", float: "a number", str: "a str", bool: "True or False", Path: "a path", NoneType: "None", complex: "a number", type: "a class", "Batches": "a corpus",
}  # fmt: skip

_NUMBERS: Mapping[object, type] = {int: Integral, float: Real, complex: Number}
"""What stands for a type of numbers: those of numpy, too."""


def checked(target: _F) -> _F:
    """Check the arguments of a function, or the fields of the dataclass that a class becomes.

    Raises:
        RepeditError: when the function is called with an argument of another type; ArgumentError unless `ADVICE` names another.
    """
    return _checked_class(target) if isinstance(target, type) else _checked_function(target)  # type: ignore[return-value]


def check_type(name: str, value: object, annotation: object) -> None:
    """Refuse a value that does not have the type of an annotation.

    Raises:
        RepeditError: with the name, the type that was given and the type that is needed.
    """
    if type(value) is annotation or (fault := _fault(name, value, annotation)) is None:
        return
    place, value, annotation = fault
    advised = [ADVICE[item] for part in _members(annotation) for item in _class_names(part) if item in ADVICE]
    error = advised[0][0] if advised else ArgumentError
    advice = "; ".join(dict.fromkeys(text for _, text in advised))
    given = "None" if value is None else _with_article(type(value).__name__)
    raise error(
        f"{place}{_shown(value)}: {given} was given where {_words(annotation)} is needed"
        + (f"; {advice}" if advice else "")
    )


def check_fields(value: Any) -> None:
    """Refuse an object of a dataclass with a field of another type.

    Raises:
        RepeditError: as `check_type`.
    """
    hints = parameter_types(value.__class__)
    for field in fields(value):
        if field.init:
            own = getattr(value, field.name)
            check_type(field.name, own, hints[field.name])
            if (plain := plain_scalar(own)) is not own:
                object.__setattr__(value, field.name, plain)


@cache
def parameter_types(target: Any) -> dict[str, Any]:
    """Name of a parameter, or of a field of a dataclass -> its type; the options of a TypedDict stand beside the others."""
    if isinstance(target, type):
        return get_type_hints(target)
    # What is returned may have a type that is imported for type checkers only.
    notes = {name: note for name, note in target.__annotations__.items() if name != "return"}
    hints = get_type_hints(SimpleNamespace(__annotations__=notes), target.__globals__)
    for name in [name for name, hint in hints.items() if get_origin(hint) is Unpack]:
        hints |= get_type_hints(get_args(hints.pop(name))[0])
    return hints


def with_changes(settings: _S, config: _S | Mapping[str, object] | None) -> _S:
    """The settings, a dataclass, with those changed that a table names; or what is given in their place.

    Raises:
        UnknownName: if there is no such setting; and what the settings raise for a value out of range.
    """
    if config is None or isinstance(config, type(settings)):
        return config or settings
    check_names("config", config, asdict(settings), "key")  # type: ignore[call-overload, arg-type]
    return replace(settings, **config)  # type: ignore[type-var, arg-type]


def _checked_function(function: Callable[..., Any]) -> Callable[..., Any]:
    plain = inspect.unwrap(function)
    parameters = inspect.signature(plain).parameters.values()
    places = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = {p.kind: p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    repeated = rest.get(inspect.Parameter.VAR_POSITIONAL, "")
    options = "Unpack" in str(plain.__annotations__.get(rest.get(inspect.Parameter.VAR_KEYWORD, ""), ""))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        hints = parameter_types(plain)
        # A number of numpy would otherwise end in a record that cannot be written.
        args = tuple(map(plain_scalar, args))
        kwargs = {name: plain_scalar(value) for name, value in kwargs.items()}
        for name, value in zip(places, args, strict=False):
            check_type(name, value, hints.get(name, Any))
        for value in args[len(places) :] if repeated else ():
            check_type(repeated, value, hints.get(repeated, Any))
        if options:
            check_names(plain.__qualname__, kwargs, hints)
        for name, value in kwargs.items():
            check_type(name, value, hints.get(name, Any))
        return function(*args, **kwargs)

    return call


def _checked_class(cls: type) -> type:
    after = getattr(cls, "__post_init__", None)

    def __post_init__(self: Any) -> None:
        check_fields(self)
        if after is not None:
            after(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return cls


def _fault(name: str, value: object, annotation: object) -> tuple[str, object, object] | None:
    """The first value that has another type, with its place and the type it needs."""
    members = [member for member in _members(annotation) if _fits(value, member)]
    if not members:
        return name, value, annotation
    faults = [_fault_inside(name, value, member) for member in members]
    if None in faults:
        return None
    return faults[0] if len(faults) == 1 else (name, value, annotation)


def _fault_inside(name: str, value: Any, annotation: object) -> tuple[str, object, object] | None:
    arguments = () if _is_of_numpy(annotation) else get_args(annotation)
    if not arguments or not isinstance(value, list | tuple | set | frozenset | dict):
        return None
    if isinstance(value, dict):
        inside = [(f"a key of {name}", key, arguments[0]) for key in value]
        if len(arguments) == 2 and get_origin(annotation) is not tuple:
            inside += [(f"{name}[{key!r}]", item, arguments[1]) for key, item in value.items()]
    elif get_origin(annotation) is tuple and arguments[-1] is not Ellipsis:
        if len(arguments) != len(value):
            return name, value, annotation
        inside = [(f"{name}[{i}]", item, part) for i, (item, part) in enumerate(zip(value, arguments, strict=True))]
    else:
        inside = [(f"{name}[{i}]", item, arguments[0]) for i, item in enumerate(value)]
    return next((fault for row in inside if (fault := _fault(*row)) is not None), None)


def _members(annotation: object) -> tuple[object, ...]:
    """The parts of a union, or the annotation alone; what bounds a type variable stands for it."""
    if isinstance(annotation, TypeVar):
        annotation = annotation.__bound__ or Any
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _fits(value: object, annotation: Any) -> bool:
    """Whether the outer type of a value is that of an annotation which is no union; what cannot be checked fits."""
    outer = get_origin(annotation) or annotation
    if outer is Literal:
        return any(value is item or value == item for item in get_args(annotation))
    if outer in _NUMBERS:
        return isinstance(value, _NUMBERS[outer]) and not isinstance(value, bool)
    if outer is bool:
        return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")
    if outer is Path:
        return isinstance(value, PathLike)
    if outer is NoneType or outer is None:
        return value is None
    if outer is Callable:
        return callable(value)
    if not isinstance(outer, type) or outer is Any:
        return True
    return _fits_class(value, outer, get_args(annotation))


def _fits_class(value: object, outer: type, arguments: tuple[object, ...]) -> bool:
    if isinstance(value, str | bytes) and not issubclass(outer, str | bytes) and issubclass(outer, Iterable):
        # A text is a sequence of texts, but one name in place of a list of names is not what was meant.
        return isinstance(value, str) and outer is Iterable and bool(arguments) and str in _members(arguments[0])
    if outer in (Sequence, tuple) and hasattr(value, "__array__"):
        return True
    if outer in (list, tuple):
        return isinstance(value, list | tuple)
    if hasattr(outer, "array_type"):
        return isinstance(value, outer.array_type)
    return isinstance(value, Mapping if is_typeddict(outer) else outer)


def _words(annotation: object) -> str:
    """The types of an annotation in words: "an Edit, a Delta or a list"."""
    words = list(dict.fromkeys(_word(member) for member in _members(annotation)))
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _word(annotation: Any) -> str:
    outer = get_origin(annotation) or annotation
    words = _WORDS.get(outer) or _WORDS.get(getattr(outer, "__name__", ""))
    if words is not None:
        return words
    if outer is Literal:
        return " or ".join(repr(value) for value in get_args(annotation))
    if outer is Callable:
        return "a function"
    if getattr(outer, "array_type", None) is not None:
        return "a tensor"
    if _is_of_numpy(annotation):
        return "an array"
    if isinstance(outer, type) and issubclass(outer, Mapping) and not outer.__module__.startswith("repedit."):
        return "a dict"
    if isinstance(outer, type) and outer.__module__ in ("builtins", "collections.abc"):
        arguments = get_args(annotation)
        if outer is tuple and ... not in arguments:
            return f"a list of {len(arguments)}"
        names = [getattr(get_origin(item) or item, "__name__", "") for held in arguments[:1] for item in _members(held)]
        are_classes = bool(names) and all(name.isidentifier() and name != "Any" for name in names)
        return ("an iterator" if outer is Iterator else "a list") + (f" of {' or '.join(names)}" if are_classes else "")
    return _with_article(getattr(outer, "__name__", str(outer)))


def _with_article(name: str) -> str:
    if name[0].isupper() and name.endswith("s") and not name.endswith("ss"):
        return name  # a plural, such as Facts and Scores
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _is_of_numpy(annotation: object) -> bool:
    """Whether a type is one of numpy, such as the protocols that `ArrayLike` is made of."""
    return getattr(get_origin(annotation) or annotation, "__module__", "").startswith("numpy")


def _class_names(annotation: object) -> Iterator[str]:
    """The name of a class, and those of what a list of it holds."""
    outer = get_origin(annotation) or annotation
    if not isinstance(outer, type):
        return
    if outer.__module__.startswith("repedit."):
        yield outer.__name__
    elif issubclass(outer, Iterable):
        for argument in get_args(annotation):
            for member in _members(argument):
                yield from _class_names(member)


def _shown(value: object) -> str:
    """ "=0.5": a text or a number, shortened; no other value, whose `repr` may be long."""
    return f"={shown(value)}" if isinstance(value, str | bytes | int | float) else ""
