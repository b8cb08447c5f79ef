"""Halves of facts that share no entity: what an attacker may train on, and what it is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from repedit.data.domains import Fact, Facts, drawn
from repedit.data.grading import normalized
from repedit.errors import ArgumentError, FractionError, NotEnoughRows, OverlapError, check_seed


@dataclass(frozen=True)
class Splits:
    """Facts by their role in an attack."""

    train: tuple[Fact, ...]
    """T: answers the attacker may use."""
    test: tuple[Fact, ...]
    """V: what the attack is scored on."""
    retain: tuple[Fact, ...] = ()
    unrelated: Any = None
    """Text that has nothing to do with the facts."""
    holdout: Any = None
    """Text or facts the model never saw."""

    @classmethod
    def of(cls, facts: Facts | Sequence[Fact], *, fold: int = 0, train_fraction: float = 0.5, seed: int = 0) -> Splits:
        """Split the facts to forget by entity; membership depends on the seed and the entities alone.

        A fact whose `split` is "T" or "V" stays there with its entity, the other entities are divided. Fold 1 swaps
        the sides of fold 0, so that over both folds every fact is tested once.

        Raises:
            FractionError: unless the fraction is strictly between 0 and 1.
            ArgumentError: if the fold is neither 0 nor 1.
            NotEnoughRows: if a side would be empty.
            OverlapError: if the facts fix one entity on both sides.
        """
        if not 0 < train_fraction < 1:
            raise FractionError(f"train_fraction={train_fraction}; give a fraction strictly between 0 and 1")
        check_seed(seed=seed)
        if fold not in (0, 1):
            raise ArgumentError(f"fold={fold}; there are two, 0 and 1")
        items, retain = (facts.forget, facts.retain) if isinstance(facts, Facts) else (tuple(facts), ())
        train = _train_entities(items, train_fraction, seed)
        sides = tuple(tuple(fact for fact in items if (entity_of(fact) in train) == side) for side in (True, False))
        if not all(sides):
            raise NotEnoughRows(
                f"{len({entity_of(fact) for fact in items})} entities give {len(sides[0])} facts to train on and "
                f"{len(sides[1])} to test; both sides need one"
            )
        first, second = reversed(sides) if fold else sides
        return cls(first, second, retain)


def _train_entities(items: Sequence[Fact], fraction: float, seed: int) -> set[str]:
    fixed = {side: {entity_of(fact) for fact in items if fact.split == side} for side in ("T", "V")}
    both = sorted(fixed["T"] & fixed["V"])
    if both:
        raise OverlapError(f"{len(both)} entities are fixed both in T and in V, such as {both[:5]}")
    free = drawn({entity_of(fact) for fact in items} - fixed["T"] - fixed["V"], str(seed))
    return fixed["T"] | set(free[: min(max(round(fraction * len(free)), 1), max(len(free) - 1, 0))])


def entity_of(fact: Fact) -> str:
    """What a fact is about, for splitting: its normalised entity, or its id where it names none."""
    return normalized(fact.entity) or fact.id
