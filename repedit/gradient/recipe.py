"""A recipe: everything that decides a gradient unlearning but the model and the data, as a frozen value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from repedit.errors import ArgumentError, UnknownName, check_finite, check_names, is_finite, is_whole, nearest
from repedit.gradient.combine import Combiner, weighted_sum
from repedit.gradient.losses import Loss, nll
from repedit.gradient.parameters import Parameters
from repedit.gradient.sampling import FORGET_SIDE, RETAIN_SIDE, Sampler, paired
from repedit.gradient.schedule import Record, Schedule, Stop, collapse

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
            check_finite(weight=self.weight)

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
