"""Samplers: which rows a step sees, from the seed and the step alone, so that a resumed run sees the same ones."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from repedit.errors import ArgumentError, check_positive, check_whole, is_finite

FORGET_SIDE, RETAIN_SIDE = ("forget", "outdated"), ("retain", "update")
"""Roles by the gradient they belong to. `outdated` are the forget rows whose prompt also stands in the update set."""
Topics = Mapping[str, Sequence[str]]
"""Role -> the topic of each of its rows."""


class Draw(NamedTuple):
    """What one step sees."""

    rows: Mapping[str, tuple[int, ...]]
    """Role -> numbers of its rows."""
    lr: float | None = None
    """In place of the recipe's."""


class Order(NamedTuple):
    """The order of all steps."""

    at: Callable[[int], Draw]
    epoch: int
    """Steps an epoch."""

    def steps_of(self, epochs: float) -> int:
        """Steps that so many epochs take."""
        return max(1, math.ceil(epochs * self.epoch))


@dataclass(frozen=True, eq=False)
class Sampler:
    """How steps draw rows."""

    name: str
    order: Callable[[Topics, int, int], Order]
    """(topics of the rows, batch size, seed) -> the order."""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options.items())})"


@dataclass(frozen=True)
class Phase:
    """A stretch of steps that see one role alone; terms of other roles are silent in it.

    Raises:
        ArgumentError: if epochs is not positive or share lies outside (0, 1].
    """

    role: str
    epochs: float = 1.0
    lr: float | None = None
    share: float = 1.0
    """Of the rows of the role, drawn anew for each chunk."""
    final: bool = False
    """Once in the end, in place of once a chunk."""

    def __post_init__(self) -> None:
        if not (is_finite(self.epochs) and self.epochs > 0) or not 0 < self.share <= 1:
            raise ArgumentError(f"{self}: epochs must be above 0 and share in (0, 1]")
        check_positive(lr=self.lr)


def paired(ratio: float = 1.0) -> Sampler:
    """Each step a batch of every role, each role shuffled by the seed and cycled; an epoch sees every forget row once.

    Args:
        ratio: retain rows a forget row.
    Raises:
        ArgumentError: if it is not above 0.
    """
    check_positive(ratio=ratio)

    def order(topics: Topics, size: int, seed: int) -> Order:
        def at(step: int) -> Draw:
            return Draw({role: _cycled(role, len(rows), wanted(role), step, seed) for role, rows in topics.items()})

        def wanted(role: str) -> int:
            return size if role in FORGET_SIDE else max(1, round(ratio * size))

        return Order(at, _longest(topics, size))

    return Sampler("paired", order, {"ratio": ratio})


def round_robin() -> Sampler:
    """As `paired`, of one topic a step, topics in turn; a role without the topic gives rows of all its topics."""

    def order(topics: Topics, size: int, seed: int) -> Order:
        names = list(dict.fromkeys(topics["forget"]))

        def at(step: int) -> Draw:
            topic, number = names[step % len(names)], step // len(names)
            found = {}
            for role, held in topics.items():
                rows = [i for i, t in enumerate(held) if t == topic] or list(range(len(held)))
                places = _cycled(f"{role}:{topic}", len(rows), size, number, seed)
                found[role] = tuple(rows[i] for i in places)
            return Draw(found)

        longest = max(list(topics["forget"]).count(name) for name in names)
        return Order(at, len(names) * math.ceil(longest / size))

    return Sampler("round_robin", order)


def chunked(chunk: int = 32, retain_per_forget: int = 7, epochs_per_chunk: int = 7) -> Sampler:
    """One forget chunk at a time, each forget row followed by its retain rows, in order and not shuffled.

    Retain rows are taken cyclically; a chunk is gone through `epochs_per_chunk` times before the next one begins.
    """
    check_whole(chunk=chunk, epochs_per_chunk=epochs_per_chunk)
    check_whole(0, retain_per_forget=retain_per_forget)

    def order(topics: Topics, size: int, seed: int) -> Order:
        forget, retain = len(topics["forget"]), len(topics.get("retain", ()))
        batches: list[list[tuple[str, int]]] = []
        for first in range(0, forget, chunk):
            items: list[tuple[str, int]] = []
            for i in range(first, min(first + chunk, forget)):
                items.append(("forget", i))
                items += [
                    ("retain", (i * retain_per_forget + k) % retain) for k in range(retain_per_forget if retain else 0)
                ]
            batches += [items[i : i + size] for i in range(0, len(items), size)] * epochs_per_chunk

        def at(step: int) -> Draw:
            found: dict[str, tuple[int, ...]] = {}
            for role, i in batches[step % len(batches)]:
                found[role] = (*found.get(role, ()), i)
            return Draw(found)

        return Order(at, len(batches))

    return Sampler(
        "chunked", order, {"chunk": chunk, "retain_per_forget": retain_per_forget, "epochs_per_chunk": epochs_per_chunk}
    )


def alternate(*phases: Phase, chunk: int | None = None) -> Sampler:
    """Phases one after the other; an epoch is one pass over them.

    Args:
        chunk: forget rows a chunk; the phases are gone through for each chunk in turn. None for all rows at once.
    """
    check_whole(phases=len(phases), chunk=chunk)

    def order(topics: Topics, size: int, seed: int) -> Order:
        for phase in phases:
            if not topics.get(phase.role):
                raise ArgumentError(f"a phase asks for {phase.role!r} rows and there are none; give {phase.role}=...")
        forget = range(len(topics["forget"]))
        parts = [forget[i : i + (chunk or len(forget))] for i in range(0, len(forget), chunk or len(forget))]
        turns = [(phase, n, part) for n, part in enumerate(parts) for phase in phases if not phase.final]
        turns += [(phase, len(parts), forget) for phase in phases if phase.final]
        draws: list[Draw] = []
        for phase, number, part in turns:
            held = part if phase.role == "forget" else range(len(topics[phase.role]))
            drawn = _shuffle(f"{seed}:share:{number}", len(held))[: max(1, round(phase.share * len(held)))]
            n = min(size, len(drawn))
            for step in range(math.ceil(phase.epochs * len(drawn) / n)):
                places = _cycled(f"{phase.role}:{number}", len(drawn), n, step, seed)
                draws.append(Draw({phase.role: tuple(held[drawn[i]] for i in places)}, phase.lr))
        return Order(lambda step: draws[step % len(draws)], len(draws))

    return Sampler("alternate", order, {"phases": [vars(phase) for phase in phases], "chunk": chunk})


def in_turn(*roles: str) -> Sampler:
    """One role a step, roles in turn; an epoch sees every forget row once."""
    check_whole(roles=len(roles))

    def order(topics: Topics, size: int, seed: int) -> Order:
        def at(step: int) -> Draw:
            role = roles[step % len(roles)]
            return Draw({role: _cycled(role, len(topics[role]), size, step // len(roles), seed)})

        return Order(at, len(roles) * _longest(topics, size))

    return Sampler("in_turn", order, {"roles": list(roles)})


def _longest(topics: Topics, size: int) -> int:
    rows = max((len(topics[role]) for role in FORGET_SIDE if role in topics), default=max(map(len, topics.values())))
    return math.ceil(rows / min(size, rows))


def _cycled(role: str, count: int, size: int, step: int, seed: int) -> tuple[int, ...]:
    """The rows of a step, out of one order an epoch, without a break between epochs; never more than there are."""
    size = min(size, count)
    places = range(step * size, (step + 1) * size)
    return tuple(_shuffle(f"{seed}:{role}:{place // count}", count)[place % count] for place in places)


@lru_cache(maxsize=256)
def _shuffle(key: str, count: int) -> tuple[int, ...]:
    return tuple(random.Random(key).sample(range(count), count))
