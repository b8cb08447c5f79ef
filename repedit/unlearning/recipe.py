"""A recipe: everything that decides a gradient unlearning except the model and the data, as a frozen value or a TOML file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack, get_args, get_type_hints

from repedit.errors import (
    ArgumentError,
    RepeditError,
    UnknownName,
    check_choice,
    check_finite_numbers,
    check_names,
    is_finite,
    is_whole,
    nearest,
)
from repedit.io.text import read_toml
from repedit.unlearning import losses
from repedit.unlearning.combiners import COMBINERS, Combiner, weighted_sum
from repedit.unlearning.forget_gradient import ADVERSARIES, FILTERS, Adversary, Agreement, Fork, GradientFilter
from repedit.unlearning.losses import Loss, nll
from repedit.unlearning.noise import Noise
from repedit.unlearning.parameters import Lora, Parameters
from repedit.unlearning.sampling import FORGET_SIDE, RETAIN_SIDE, SAMPLERS, Exchange, Sampler, paired
from repedit.unlearning.schedule import STOP_RULES, Record, Schedule, Stop, collapse

ROLES = (*FORGET_SIDE, *RETAIN_SIDE)
OPTIMIZERS = ("adamw", "sgd", "adafactor")
Weight = float | Callable[[int, Sequence[Record]], float]
"""A number, or a function of the step and the log."""


@dataclass(frozen=True, eq=False)
class Term:
    """A loss on the rows of a role, with its weight.

    Raises:
        UnknownName: if there is no such role. ArgumentError: if the weight is not a finite number.
    """

    loss: Loss
    role: str
    weight: Weight = 1.0

    def __post_init__(self) -> None:
        check_choice(ROLES, role=self.role)
        if not callable(self.weight):
            check_finite_numbers(weight=self.weight)

    @property
    def name(self) -> str:
        """Its name in the log."""
        return f"{self.loss.name} {self.role}"

    def weight_at(self, step: int, log: Sequence[Record]) -> float:
        """The weight in a step."""
        return float(self.weight(step, log) if callable(self.weight) else self.weight)


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer of PyTorch to use.

    Raises:
        UnknownName: if there is none of that name. ArgumentError: if a number is out of range.
    """

    name: str = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""

    def __post_init__(self) -> None:
        check_choice(OPTIMIZERS, optimizer=self.name)
        if not (is_finite(self.weight_decay) and self.weight_decay >= 0):
            raise ArgumentError(f"weight_decay={self.weight_decay!r}; give a number, at least 0")
        if len(self.betas) != 2 or not all(is_finite(beta) and 0 <= beta < 1 for beta in self.betas):
            raise ArgumentError(f"betas={self.betas!r}; give two numbers in [0, 1)")


@dataclass(frozen=True, eq=False)
class Saliency:
    """Which units SURE trains: those with the largest forget gradient at the start weights.

    Raises:
        ArgumentError: if the percentile is not in [0, 100]. UnknownName: if there is no such unit.
    """

    percentile: float = 90.0
    unit: str = "row"
    loss: Loss = field(default_factory=nll)

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100:
            raise ArgumentError(f"percentile={self.percentile}; give a number in [0, 100]")
        check_choice(("row", "module"), unit=self.unit)


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
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
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
    adversary: Adversary | None = None
    """The weights at which the forget gradient is taken; those of the model when None."""
    gradient_filter: GradientFilter | None = None
    """The directions that are removed from the forget gradient."""
    agreement: Agreement | None = None
    """Which entries of the forget gradient remain beside the retain gradient."""
    exchange: Exchange = field(default_factory=Exchange)
    """How terms with role exchanged get the answers of other subjects."""
    noise: Noise | None = None
    """What is added to the trained weights before the first step."""
    scale: float = 1.0
    """Factor of the differences at the end."""
    formula: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for name, kind in _COMPOSITE.items():
            value = getattr(self, name)
            if not all(isinstance(part, kind) for part in (value if name in ("terms", "stop") else (value,))):
                raise ArgumentError(
                    f"recipe {self.name!r}: {name}={value!r} is not made of {getattr(kind, '__name__', kind)} values; write a recipe file, which "
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
                f"recipe {self.name!r}: {', '.join(f'{n}={getattr(self, n)!r}' for n in wrong)} out of range; lr and epochs "
                "must be finite and above 0, batch_size and steps whole numbers of at least 1, length one of at least 2, "
                "scale must not be 0, and there must be at least one term"
            )
        self._check_forget_gradient()

    def _check_forget_gradient(self) -> None:
        """Refuse a way to take the forget gradient that the other fields do not allow."""
        chosen = [n for n in ("adversary", "gradient_filter", "agreement") if getattr(self, n) is not None]
        if chosen and not self.combiner.separate:
            raise ArgumentError(
                f"recipe {self.name!r}: {chosen[0]} needs the forget gradient by itself, and the combiner {self.combiner} adds "
                "the gradients up as they come; give one with separate=True"
            )
        other = [t.name for t in self.terms if t.role in FORGET_SIDE and t.role != "forget"]
        if other and (isinstance(self.adversary, Fork) or self.gradient_filter is not None):
            raise ArgumentError(
                f"recipe {self.name!r}: a fork and a gradient filter work on the forget rows, and there is a term {other[0]!r}; "
                "give terms with role forget"
            )
        if self.agreement is not None and not any(t.role in RETAIN_SIDE for t in self.terms):
            raise ArgumentError(f"recipe {self.name!r}: agreement needs a retain gradient; add a term with role retain")
        if self.noise is not None and not any(t.role == "retain" for t in self.terms):
            raise ArgumentError(f"recipe {self.name!r}: noise spares what retain rows use; add a term with role retain")

    def __repr__(self) -> str:
        return f"{self.name}: {self.formula} [{self.combiner}; lr {self.lr:g}]"

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of its terms."""
        return tuple(role for role in ROLES if any(term.role == role for term in self.terms))

    def plain(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values."""
        weights = {
            t.name: getattr(t.weight, "__name__", "function") if callable(t.weight) else t.weight for t in self.terms
        }
        return {
            "recipe": self.name,
            "terms": {term.name: {"loss": repr(term.loss), "weight": weights[term.name]} for term in self.terms},
            "combiner": repr(self.combiner),
            "sampler": repr(self.sampler),
            "parameters": self.parameters.plain(),
            # The spelling of earlier versions, so that their files are continued and compared.
            "optimiser": vars(self.optimizer),
            "lr": self.lr,
            "schedule": vars(self.schedule),
            "epochs": self.epochs,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "length": self.length,
            "stop": [repr(rule) for rule in self.stop],
            "saliency": None if self.saliency is None else {k: str(v) for k, v in vars(self.saliency).items()},
            "scale": self.scale,
            # Absent where they are not used, so that files of earlier versions are continued.
            **{name: repr(v) for name in _OPTIONAL if (v := getattr(self, name)) is not None},
            **({"exchange": vars(self.exchange)} if "exchanged" in self.roles else {}),
        }


class Changes(TypedDict, total=False):
    """What every recipe lets its caller change: the fields of `UnlearnRecipe` except name and terms."""

    combiner: Combiner
    sampler: Sampler
    parameters: Parameters
    optimizer: OptimizerConfig
    lr: float
    schedule: Schedule
    epochs: float
    steps: int | None
    batch_size: int
    length: int
    stop: tuple[Stop, ...]
    saliency: Saliency | None
    adversary: Adversary | None
    gradient_filter: GradientFilter | None
    agreement: Agreement | None
    exchange: Exchange
    noise: Noise | None
    scale: float
    formula: str
    source: str


RECIPE_FIELDS = tuple(Changes.__annotations__)
_COMPOSITE: Mapping[str, Any] = {
    "terms": Term, "combiner": Combiner, "sampler": Sampler, "parameters": Parameters, "optimizer": OptimizerConfig,
    "schedule": Schedule, "stop": Stop, "saliency": Saliency | None, "adversary": Adversary | None,
    "gradient_filter": GradientFilter | None, "agreement": Agreement | None, "exchange": Exchange,
    "noise": Noise | None,
}  # fmt: skip
"""The fields of a recipe that are not plain numbers, and their types."""
_OPTIONAL = ("adversary", "gradient_filter", "agreement", "noise")
"""Fields that most recipes leave out."""


@dataclass(frozen=True, eq=False)
class MergedRecipe:
    """Several recipes run from the same start, their deltas merged by `Delta.ties`."""

    name: str
    parts: tuple[UnlearnRecipe, ...]
    weights: tuple[float, ...]
    density: float = 0.8
    formula: str = ""
    source: str = ""

    def plain(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values."""
        parts = [part.plain() for part in self.parts]
        return {"recipe": self.name, "parts": parts, "weights": list(self.weights), "density": self.density}


@dataclass(frozen=True, eq=False)
class Stage:
    """One training."""

    recipe: UnlearnRecipe
    after: tuple[int, ...] = ()
    """Numbers of the earlier stages whose changes the model has from which this one starts."""
    compares_with_original: bool = False
    """Whether losses compare with the model given, and not with the one from which this stage starts."""
    folds: tuple[int, int] | None = None
    """(i, k) forgets the first i of k folds of the forget set and retains the others."""


@dataclass(frozen=True, eq=False)
class StagedRecipe:
    """Trainings one after the other; the stages may depend on the number of layers of the model."""

    name: str
    stages: Callable[[int], tuple[Stage, ...]]
    """Number of layers -> the stages."""
    options: Mapping[str, Any] = field(default_factory=dict)
    formula: str = ""
    source: str = ""

    @property
    def example(self) -> tuple[Stage, ...]:
        """The stages for a model of 32 layers."""
        return self.stages(32)

    @property
    def parts(self) -> tuple[UnlearnRecipe, ...]:
        """The recipes of the stages for a model of 32 layers."""
        return tuple(stage.recipe for stage in self.example)

    def changed(self, change: Callable[[UnlearnRecipe], UnlearnRecipe]) -> StagedRecipe:
        """The same with every recipe changed."""

        def stages(depth: int) -> tuple[Stage, ...]:
            return tuple(replace(stage, recipe=change(stage.recipe)) for stage in self.stages(depth))

        return replace(self, stages=stages)

    def plain(self) -> dict[str, Any]:
        """Its name and options, as JSON values."""
        return {"recipe": self.name, **self.options}


AnyRecipe = UnlearnRecipe | MergedRecipe | StagedRecipe


def build_recipe(name: str, terms: tuple[Term, ...], changes: Changes, **defaults: Unpack[Changes]) -> UnlearnRecipe:
    """A recipe with its own defaults and the caller's changes.

    Raises:
        UnknownName: if a change does not name a field of a recipe.
    """
    check_names(f"recipe {name!r}", changes, RECIPE_FIELDS)
    return UnlearnRecipe(name, terms, **resolved_fields(defaults, changes))


def resolved_fields(defaults: Changes, changes: Changes) -> Changes:
    """The defaults with the changes applied; given epochs also replace a default number of steps.

    Raises:
        ArgumentError: if steps and epochs are both given.
    """
    steps, epochs = changes.get("steps"), changes.get("epochs")
    if steps is not None and epochs is not None:
        raise ArgumentError(f"steps={steps}, epochs={epochs}; give one of them")
    if epochs is not None:
        defaults = {**defaults, "steps": None}
    return {**defaults, **changes}


# --- Recipes in TOML: a file has the keys of `UnlearnRecipe`, and may start from a recipe that has a name
#
# base = "small:npo_gdr"          # or none, with its own terms
# lr = 5e-4
# [options]                       # of the base
# beta = 0.1
# [[terms]]                       # in place of the base's; further keys of the table are options of the loss
# loss = "npo"
# role = "forget"
# [combiner]
# name = "blur"
# gamma = 1.0
# [parameters]
# layers = "20-29"
# modules = ["mlp.out"]

ByName = Callable[..., AnyRecipe]
"""(name, **options) -> the recipe of that name."""
Table = Mapping[str, Any]


def recipe_from_file(path: str | Path, by_name: ByName) -> UnlearnRecipe | StagedRecipe:
    """The recipe in a TOML file.

    Raises:
        DataError: if the file cannot be read.
        UnknownName: if a key, loss, combiner, sampler or rule has no such name, with the nearest.
        ArgumentError: if a value is missing or out of range, or the base merges several trainings.
    """
    table = read_toml(path)
    try:
        return recipe_from_table(table, by_name, name=Path(path).stem)
    except RepeditError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise ArgumentError(f"{path}: the type of a value does not fit its key: {error}") from error


def recipe_from_table(table: Table, by_name: ByName, *, name: str = "written") -> UnlearnRecipe | StagedRecipe:
    """The recipe of a parsed TOML table; see `recipe_from_file`."""
    keys = dict(table)
    if "optimiser" in keys:  # the spelling of earlier versions
        if "optimizer" in keys:
            raise ArgumentError(f"recipe {name!r} has both [optimizer] and [optimiser]; keep the first")
        keys["optimizer"] = keys.pop("optimiser")
    base, options, title = keys.pop("base", None), keys.pop("options", {}), keys.pop("name", name)
    check_names(f"recipe {title!r}", keys, ["base", "options", *(f.name for f in fields(UnlearnRecipe))], "key")
    values = {key: _BUILDERS.get(key, _frozen)(value) for key, value in keys.items()}
    if base is None:
        if options or "terms" not in values:
            raise ArgumentError(
                f"recipe {title!r} names no base; give base, or at least one [[terms]] and no [options]"
            )
        return _checked(UnlearnRecipe, {"name": title, **values}, f"recipe {title!r}")
    start = by_name(base, **options)
    if isinstance(start, StagedRecipe):  # its keys are those of its trainings
        check_names(f"recipe {title!r}, which has several trainings,", values, RECIPE_FIELDS, "key")
        floats = {key: float(v) for key, v in values.items() if key in ("lr", "epochs", "scale")}
        changed = by_name(base, **options, **(values | floats))
        assert isinstance(changed, StagedRecipe)
        return replace(changed, name=title)
    if not isinstance(start, UnlearnRecipe):
        raise ArgumentError(f"recipe {title!r}: {base!r} merges several trainings; a file describes a single one")
    if "parameters" in keys:
        values["parameters"] = _parameters(keys["parameters"], start.parameters)
    return _checked(UnlearnRecipe, {"name": title, **values}, f"recipe {title!r}", start)


def _term(table: Table) -> Term:
    options = dict(table)
    loss, role, weight = options.pop("loss", ""), options.pop("role", ""), options.pop("weight", 1.0)
    return Term(_checked(losses.by_name(loss), options, f"loss {loss!r}"), role, float(weight))


def _one_of(
    what: str, makers: tuple[Callable[..., Any], ...] | Mapping[str, Callable[..., Any]]
) -> Callable[[Table], Any]:
    """What builds a value from the name of its maker and the maker's options."""
    by_name = makers if isinstance(makers, Mapping) else {make.__name__: make for make in makers}

    def build(table: Table) -> Any:
        options = dict(table)
        name = options.pop("name", "")
        if name not in by_name:
            raise UnknownName(f"{what} name={name!r}; {nearest(name, by_name)}")
        return _checked(by_name[name], options, f"{what} {name!r}")

    return build


def _parameters(table: Table, start: Parameters | None = None) -> Parameters:
    values = dict(table)
    if "lora" in values:
        values["lora"] = _checked(Lora, values["lora"], "[parameters.lora]")
    if "mask" in values:
        raise UnknownName("[parameters] mask is made of tensors; write [saliency] for SURE, or give the mask in Python")
    return _checked(Parameters, values, "[parameters]", start)


def _saliency(table: Table) -> Saliency:
    values = dict(table)
    if "loss" in values:
        values["loss"] = losses.by_name(values["loss"])()
    return _checked(Saliency, values, "[saliency]")


def _checked(make: Callable[..., Any], table: Table, what: str, start: Any | None = None) -> Any:
    """Call a maker with the values of a table after checking their names, or change the value it starts from."""
    parameters = inspect.signature(make).parameters
    check_names(what, table, parameters)
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in table]
    if missing and start is None:
        raise ArgumentError(f"{what} needs {', '.join(missing)}; give {'them' if missing[1:] else 'it'}")
    floats = {n for n, hint in get_type_hints(make).items() if float in (hint, *get_args(hint))}
    values = {key: float(v) if key in floats and isinstance(v, int) else _frozen(v) for key, v in table.items()}
    return make(**values) if start is None else replace(start, **values)


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


_BUILDERS: Mapping[str, Callable[[Any], Any]] = {
    "terms": lambda tables: tuple(_term(table) for table in tables),
    "combiner": _one_of("combiner", COMBINERS),
    "sampler": _one_of("sampler", SAMPLERS),
    "stop": lambda tables: tuple(_one_of("stop", STOP_RULES)(table) for table in tables),
    "parameters": _parameters,
    "saliency": _saliency,
    "adversary": _one_of("adversary", ADVERSARIES),
    "gradient_filter": _one_of("gradient_filter", FILTERS),
    "agreement": lambda table: _checked(Agreement, table, "[agreement]"),
    "exchange": lambda table: _checked(Exchange, table, "[exchange]"),
    "noise": lambda table: _checked(Noise, table, "[noise]"),
    "optimizer": lambda table: _checked(OptimizerConfig, table, "[optimizer]"),
    "schedule": lambda table: _checked(Schedule, table, "[schedule]"),
}
"""What builds the value of a key; values of other keys are numbers and texts."""
