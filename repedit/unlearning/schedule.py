"""The learning rate over the steps of a training, and the rules that stop it early."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from repedit.errors import (
    ArgumentError,
    check_choice,
    check_finite_numbers,
    check_positive,
    check_whole,
    given,
    is_finite,
    is_whole,
)
from repedit.models.subject import Subject

Record = Mapping[str, Any]
"""What one step wrote into the log."""
SHAPES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the steps, as a factor in [0, 1].

    Raises:
        UnknownName: if there is no such shape. ArgumentError: if the warm-up is negative.
    """

    shape: str = "constant"
    """"constant", or falling to 0: "linear", "cosine"."""
    warmup: float = 0.0
    """Fraction of the steps if below 1, otherwise number of steps, over which the rate rises linearly."""

    def __post_init__(self) -> None:
        check_choice(SHAPES, shape=self.shape)
        if not is_finite(self.warmup) or self.warmup < 0:
            raise ArgumentError(f"warmup={self.warmup}; give a fraction of the steps, or a number of them, at least 0")

    def factor(self, step: int, total: int) -> float:
        """The factor of a step, the first being 0."""
        warm = math.ceil(self.warmup * total) if self.warmup < 1 else round(self.warmup)
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, total - warm)
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.shape]


class Progress(NamedTuple):
    """What a stop rule may use."""

    step: int
    """Number of steps taken."""
    epoch: float
    log: Sequence[Record]
    subject: Callable[[], Subject]
    """The model as it is now."""


@dataclass(frozen=True, eq=False)
class Stop:
    """A rule that stops a training."""

    name: str
    reason: Callable[[Progress], str]
    """Why to stop, with the numbers; empty to continue."""
    options: Mapping[str, Any] = field(default_factory=dict)
    watches: tuple[str, ...] = ()
    """Roles whose NLL the log must hold."""

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options.items())})"


def steps(n: int) -> Stop:
    """Stop after n steps, at least 1."""
    check_whole(n=n)
    return Stop("steps", lambda p: f"{p.step} steps taken" if p.step >= n else "", {"n": n})


def epochs(n: float) -> Stop:
    """Stop after n epochs, above 0."""
    check_positive(n=n)
    return Stop("epochs", lambda p: f"{p.epoch:.3g} epochs seen" if p.epoch >= n else "", {"n": n})


def loss_above(role: str, value: float) -> Stop:
    """Stop once the NLL of a role, averaged over the tokens of a step, exceeds a value."""
    check_finite_numbers(value=value)

    def reason(p: Progress) -> str:
        nll = p.log[-1]["nll"].get(role)
        return f"{role} NLL {nll:.3f} is above {value}" if nll is not None and nll > value else ""

    return Stop("loss_above", reason, {"role": role, "value": value}, (role,))


def metric(
    fn: Callable[[Subject], float], *, above: float | None = None, below: float | None = None, every: int = 20
) -> Stop:
    """Stop once fn(subject), called every so many steps, is above or below a value.

    Raises:
        ArgumentError: unless exactly one of above and below is given.
    """
    if (above is None) == (below is None) or not is_whole(every):
        raise ArgumentError(f"above={above}, below={below}, every={every}; give one of the first two, and every >= 1")
    check_finite_numbers(**given(above=above, below=below))
    name = getattr(fn, "__name__", type(fn).__name__)

    def reason(p: Progress) -> str:
        if p.step % every:
            return ""
        value = fn(p.subject())
        if above is not None and value > above:
            return f"{name} is {value:.4g} (above {above})"
        return f"{name} is {value:.4g} (below {below})" if below is not None and value < below else ""

    return Stop("metric", reason, {"fn": name, "above": above, "below": below, "every": every})


def collapse(retain_ratio: float = 3.0) -> Stop:
    """Stop once the retain NLL of the last 5 steps exceeds that of the first 5 by this factor, and by 1 nat."""
    check_positive(retain_ratio=retain_ratio)

    def reason(p: Progress) -> str:
        nll = [record["nll"]["retain"] for record in p.log if "retain" in record["nll"]]
        if len(nll) < 10:
            return ""
        first, last = sum(nll[:5]) / 5, sum(nll[-5:]) / 5
        if last > retain_ratio * first and last > first + 1:
            return (
                f"retain NLL rose from {first:.3f} (first 5 steps) to {last:.3f} (last 5), above {retain_ratio} times"
            )
        return ""

    return Stop("collapse", reason, {"retain_ratio": retain_ratio}, ("retain",))


STOP_RULES = (steps, epochs, loss_above, collapse)
"""Rules that recipe files can name."""
