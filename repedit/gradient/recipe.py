"""A recipe: everything that decides a gradient unlearning but the model and the data, as a frozen value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from repedit.errors import ArgumentError, UnknownName, check_names, nearest
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
        UnknownName: if there is no such role.
    """

    loss: Loss
    role: str
    weight: Weight = 1.0

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UnknownName(f"role={self.role!r}; {nearest(self.role, ROLES)}")

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
        UnknownName: if there is none of that name.
    """

    name: str = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if self.name not in OPTIMISERS:
            raise UnknownName(f"optimiser={self.name!r}; {nearest(self.name, OPTIMISERS)}")


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
        wrong = [name for name in ("lr", "epochs", "batch_size") if not getattr(self, name) > 0]
        wrong += ["steps"] if self.steps is not None and self.steps < 1 else []
        wrong += ["length"] if self.length < 2 else []
        wrong += [] if self.terms else ["terms"]
        if wrong:
            raise ArgumentError(
                f"recipe {self.name!r}: {', '.join(f'{n}={getattr(self, n)}' for n in wrong)} out of range; lr, epochs, "
                "batch_size and steps are above 0, length at least 2, and there is at least one term"
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
    return UnlearnRecipe(name, terms, **{**defaults, **changes})


CHANGEABLE = tuple(f.name for f in fields(UnlearnRecipe) if f.name not in ("name", "terms"))
"""What every recipe lets its caller change."""


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
