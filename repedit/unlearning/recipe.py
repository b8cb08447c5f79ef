"""A recipe: everything that decides a gradient unlearning but the model and the data, as a frozen value or a TOML file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from repedit.errors import (
    ArgumentError,
    RepeditError,
    UnknownName,
    check_finite_numbers,
    check_names,
    is_finite,
    is_whole,
    nearest,
)
from repedit.io.text import read_toml
from repedit.unlearning import combiners, losses, sampling, schedule
from repedit.unlearning.combiners import Combiner, weighted_sum
from repedit.unlearning.losses import Loss, nll
from repedit.unlearning.parameters import Lora, Parameters
from repedit.unlearning.sampling import FORGET_SIDE, RETAIN_SIDE, Sampler, paired
from repedit.unlearning.schedule import Record, Schedule, Stop, collapse

# --- A recipe: everything that decides a gradient unlearning but the model and the data, as a frozen value


ROLES = (*FORGET_SIDE, *RETAIN_SIDE)
OPTIMISERS = ("adamw", "sgd", "adafactor")
Weight = float | Callable[[int, Sequence[Record]], float]
"""A number, or a function of the step and the log."""


@dataclass(frozen=True, eq=False)
class Term:
    """A loss on the rows of a role, with its weight.

    Raises:
        UnknownName: if there is no such role. ArgumentError: if the weight is no finite number.
    """

    loss: Loss
    role: str
    weight: Weight = 1.0

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UnknownName(f"role={self.role!r}; {nearest(self.role, ROLES)}")
        if not callable(self.weight):
            check_finite_numbers(weight=self.weight)

    @property
    def name(self) -> str:
        """What the log calls it."""
        return f"{self.loss.name} {self.role}"

    def weight_at(self, step: int, log: Sequence[Record]) -> float:
        """The weight of a step."""
        return float(self.weight(step, log) if callable(self.weight) else self.weight)


@dataclass(frozen=True)
class Optimiser:
    """One of torch's optimisers.

    Raises:
        UnknownName: if there is none of that name. ArgumentError: if a number is out of range.
    """

    name: str = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if self.name not in OPTIMISERS:
            raise UnknownName(f"optimiser={self.name!r}; {nearest(self.name, OPTIMISERS)}")
        if not (is_finite(self.weight_decay) and self.weight_decay >= 0):
            raise ArgumentError(f"weight_decay={self.weight_decay!r}; give a number, at least 0")
        if len(self.betas) != 2 or not all(is_finite(beta) and 0 <= beta < 1 for beta in self.betas):
            raise ArgumentError(f"betas={self.betas!r}; give two numbers in [0, 1)")


@dataclass(frozen=True, eq=False)
class Saliency:
    """Which units SURE trains: those whose forget gradient at the start weights is largest.

    Raises:
        ArgumentError: if the percentile lies outside [0, 100]. UnknownName: if there is no such unit.
    """

    percentile: float = 90.0
    unit: str = "row"
    loss: Loss = field(default_factory=nll)

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100:
            raise ArgumentError(f"percentile={self.percentile}; give a number in [0, 100]")
        if self.unit not in ("row", "module"):
            raise UnknownName(f"unit={self.unit!r}; {nearest(self.unit, ('row', 'module'))}")


@dataclass(frozen=True, eq=False)
class UnlearnRecipe:
    """What `rp.unlearn` does.

    Raises:
        ArgumentError: if a number is out of range.
    """

    name: str
    terms: tuple[Term, ...]
    combiner: Combiner = field(default_factory=weighted_sum)
    sampler: Sampler = field(default_factory=paired)
    parameters: Parameters = field(default_factory=Parameters)
    optimiser: Optimiser = field(default_factory=Optimiser)
    lr: float = 1e-5
    schedule: Schedule = field(default_factory=Schedule)
    epochs: float = 10.0
    steps: int | None = None
    """In place of the epochs."""
    batch_size: int = 32
    length: int = 256
    """Largest number of tokens of a row; corpora are cut to it."""
    stop: tuple[Stop, ...] = field(default_factory=lambda: (collapse(),))
    saliency: Saliency | None = None
    scale: float = 1.0
    """What the differences are multiplied by in the end."""
    formula: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for name, kind in COMPOSITE.items():
            value = getattr(self, name)
            if not all(isinstance(part, kind) for part in (value if name in ("terms", "stop") else (value,))):
                raise ArgumentError(
                    f"recipe {self.name!r}: {name}={value!r} is not made of {kind.__name__} values; write a recipe file, which "
                    "has a table for it, or give the value in Python"
                )
        wrong = [n for n in ("lr", "epochs") if not (is_finite(getattr(self, n)) and getattr(self, n) > 0)]
        wrong += [] if is_whole(self.batch_size) else ["batch_size"]
        wrong += [] if self.steps is None or is_whole(self.steps) else ["steps"]
        wrong += [] if is_whole(self.length, 2) else ["length"]
        wrong += [] if is_finite(self.scale) and self.scale else ["scale"]
        wrong += [] if self.terms else ["terms"]
        if wrong:
            raise ArgumentError(
                f"recipe {self.name!r}: {', '.join(f'{n}={getattr(self, n)!r}' for n in wrong)} out of range; lr and epochs are "
                "finite and above 0, batch_size and steps whole numbers from 1 on, length one from 2 on, scale is not 0, and "
                "there is at least one term"
            )

    def __repr__(self) -> str:
        return f"{self.name}: {self.formula} [{self.combiner}; lr {self.lr:g}]"

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles its terms are about."""
        return tuple(role for role in ROLES if any(term.role == role for term in self.terms))

    def plain(self) -> dict[str, Any]:
        """Everything that decides the result, as plain JSON values."""
        weights = {
            t.name: getattr(t.weight, "__name__", "function") if callable(t.weight) else t.weight for t in self.terms
        }
        return {
            "recipe": self.name,
            "terms": {term.name: {"loss": repr(term.loss), "weight": weights[term.name]} for term in self.terms},
            "combiner": repr(self.combiner),
            "sampler": repr(self.sampler),
            "parameters": self.parameters.plain(),
            "optimiser": vars(self.optimiser),
            "lr": self.lr,
            "schedule": vars(self.schedule),
            "epochs": self.epochs,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "length": self.length,
            "stop": [repr(rule) for rule in self.stop],
            "saliency": None if self.saliency is None else {k: str(v) for k, v in vars(self.saliency).items()},
            "scale": self.scale,
        }


def made(name: str, terms: tuple[Term, ...], changes: Mapping[str, Any], **defaults: Any) -> UnlearnRecipe:
    """A recipe with its own defaults and the caller's changes.

    Raises:
        UnknownName: if a change names no field of a recipe.
    """
    check_names(f"recipe {name!r}", changes, CHANGEABLE)
    return UnlearnRecipe(name, terms, **settled(defaults, changes))


def settled(defaults: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults and the changes that win over them: epochs that are given also win over a default number of steps.

    Raises:
        ArgumentError: if steps and epochs are both given.
    """
    given = {name: changes[name] for name in ("steps", "epochs") if changes.get(name) is not None}
    if len(given) == 2:
        raise ArgumentError(f"steps={given['steps']}, epochs={given['epochs']}; give one of them")
    return {**defaults, **({"steps": None} if "epochs" in given else {}), **changes}


CHANGEABLE = tuple(f.name for f in fields(UnlearnRecipe) if f.name not in ("name", "terms"))
"""What every recipe lets its caller change."""
COMPOSITE: Mapping[str, Any] = {
    "terms": Term, "combiner": Combiner, "sampler": Sampler, "parameters": Parameters, "optimiser": Optimiser,
    "schedule": Schedule, "stop": Stop, "saliency": Saliency | None,
}  # fmt: skip
"""The fields of a recipe that are no plain numbers, and what each holds."""


@dataclass(frozen=True, eq=False)
class Merged:
    """Several recipes run from the same start, their deltas merged by `Delta.ties`."""

    name: str
    parts: tuple[UnlearnRecipe, ...]
    weights: tuple[float, ...]
    density: float = 0.8
    formula: str = ""
    source: str = ""

    def plain(self) -> dict[str, Any]:
        """Everything that decides the result, as plain JSON values."""
        parts: list[Mapping[str, Any]] = [part.plain() for part in self.parts]
        return {"recipe": self.name, "parts": parts, "weights": list(self.weights), "density": self.density}


# --- A recipe written in TOML: it mirrors the dataclass, and may start from a recipe that has a name
#
# base = "small:npo_gdr"          # or none, with terms of its own
# lr = 5e-4
# [options]                       # of the base
# beta = 0.1
# [[terms]]                       # in place of the base's; what else a table holds goes to the loss
# loss = "npo"
# role = "forget"
# [combiner]
# name = "blur"
# gamma = 1.0
# [parameters]
# layers = "20-29"
# modules = ["mlp.out"]


COMBINERS = (
    combiners.weighted_sum,
    combiners.blur,
    combiners.conflict_only,
    combiners.norm_diff,
    combiners.primal_dual,
)
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
