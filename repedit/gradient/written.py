"""A recipe written in TOML: it mirrors the dataclass, and may start from a recipe that has a name.

base = "small:npo_gdr"          # or none, with terms of its own
lr = 5e-4
[options]                       # of the base
beta = 0.1
[[terms]]                       # in place of the base's; what else a table holds goes to the loss
loss = "npo"
role = "forget"
[combiner]
name = "blur"
gamma = 1.0
[parameters]
layers = "20-29"
modules = ["mlp.out"]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from repedit.errors import ArgumentError, RepeditError, UnknownName, check_names, nearest
from repedit.gradient import combine, losses, sampling, schedule
from repedit.gradient.parameters import Lora, Parameters
from repedit.gradient.recipe import Optimiser, Saliency, Term, UnlearnRecipe
from repedit.io.text import read_toml

COMBINERS = (combine.weighted_sum, combine.blur, combine.conflict_only, combine.norm_diff, combine.primal_dual)
SAMPLERS = (sampling.paired, sampling.round_robin, sampling.chunked)
STOPS = (schedule.steps, schedule.epochs, schedule.loss_above, schedule.collapse)


def read(path: str | Path, named: Callable[..., Any]) -> UnlearnRecipe:
    """The recipe in a TOML file.

    Args:
        named: finds the base by its name.
    Raises:
        DataError: if the file cannot be read.
        UnknownName: if a key, loss, combiner, sampler or rule has no such name, with the nearest.
        ArgumentError: if a value is missing or out of range, or the base merges several trainings.
    """
    table = read_toml(path)
    try:
        return recipe(table, named, name=Path(path).stem)
    except RepeditError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise ArgumentError(f"{path}: a value is of another kind than its key needs: {error}") from error


def recipe(table: Mapping[str, Any], named: Callable[..., Any], *, name: str = "written") -> UnlearnRecipe:
    """The recipe of a parsed TOML table; see `read`."""
    given = dict(table)
    base, options, title = given.pop("base", None), given.pop("options", {}), given.pop("name", name)
    valid = [f.name for f in fields(UnlearnRecipe)]
    check_names(f"recipe {title!r}", given, ["base", "options", *valid], "key")
    built = {key: PARTS.get(key, _plain)(value) for key, value in given.items()}
    if base is None:
        if options or "terms" not in built:
            raise ArgumentError(
                f"recipe {title!r} names no base; give base, or at least one [[terms]] and no [options]"
            )
        return _checked(UnlearnRecipe, {"name": title, **built}, f"recipe {title!r}")
    start = named(base, **options)
    if not isinstance(start, UnlearnRecipe):
        raise ArgumentError(f"recipe {title!r}: {base!r} merges several trainings; a file describes a single one")
    if "parameters" in given:
        built["parameters"] = _parameters(given["parameters"], start.parameters)
    return _checked(UnlearnRecipe, {"name": title, **built}, f"recipe {title!r}", start)


def _term(table: Mapping[str, Any]) -> Term:
    rest = dict(table)
    loss, role, weight = rest.pop("loss", ""), rest.pop("role", ""), rest.pop("weight", 1.0)
    return Term(_checked(losses.named(loss), rest, f"loss {loss!r}"), role, float(weight))


def _one_of(what: str, makers: tuple[Callable[..., Any], ...]) -> Callable[[Mapping[str, Any]], Any]:
    known = {make.__name__: make for make in makers}

    def build(table: Mapping[str, Any]) -> Any:
        rest = dict(table)
        name = rest.pop("name", "")
        if name not in known:
            raise UnknownName(f"{what} name={name!r}; {nearest(name, known)}")
        return _checked(known[name], rest, f"{what} {name!r}")

    return build


def _parameters(table: Mapping[str, Any], start: Parameters | None = None) -> Parameters:
    given = dict(table)
    if "lora" in given:
        given["lora"] = _checked(Lora, given["lora"], "[parameters.lora]")
    if "mask" in given:
        raise UnknownName("[parameters] mask is made of tensors; write [saliency] for SURE, or give the mask in Python")
    return _checked(Parameters, given, "[parameters]", start)


def _saliency(table: Mapping[str, Any]) -> Saliency:
    given = dict(table)
    loss = {"loss": losses.named(given.pop("loss"))()} if "loss" in given else {}
    return _checked(Saliency, given | loss, "[saliency]")


def _checked(make: Callable[..., Any], table: Mapping[str, Any], what: str, start: Any = None) -> Any:
    """Call a maker with the values of a table after a look at its parameters, or change the value it starts from."""
    valid = inspect.signature(make).parameters
    check_names(what, table, valid)
    missing = [n for n, p in valid.items() if p.default is p.empty and n not in table]
    if missing and start is None:
        raise ArgumentError(f"{what} needs {', '.join(missing)}; give {'them' if missing[1:] else 'it'}")
    wide = {n for n, p in valid.items() if str(p.annotation).startswith("float")}
    values = {key: float(v) if key in wide and isinstance(v, int) else _plain(v) for key, v in table.items()}
    return make(**values) if start is None else replace(start, **values)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


PARTS: Mapping[str, Callable[[Any], Any]] = {
    "terms": lambda tables: tuple(_term(table) for table in tables),
    "combiner": _one_of("combiner", COMBINERS),
    "sampler": _one_of("sampler", SAMPLERS),
    "stop": lambda tables: tuple(_one_of("stop", STOPS)(table) for table in tables),
    "parameters": _parameters,
    "saliency": _saliency,
    "optimiser": lambda table: _checked(Optimiser, table, "[optimiser]"),
    "schedule": lambda table: _checked(schedule.Schedule, table, "[schedule]"),
}
"""What builds the value of a key; the others are numbers and texts."""
