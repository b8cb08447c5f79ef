"""The best setting of an attack, chosen on one half of the facts and scored on the other.

An attacker has many settings and reports the best. The best of fifty useless ones looks useful on the facts that chose
it, so no fact is ever scored under a setting it helped to choose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from repedit.attacks.attack import FAILED, RAN, SKIPPED, UNINFORMATIVE, Finding
from repedit.data.domains import drawn
from repedit.errors import ArgumentError, DataError, NotEnoughRows, ShapeError

Values = NDArray[np.float64]


class Selected(NamedTuple):
    """What a finding shows once its setting is chosen elsewhere."""

    values: NDArray[np.int8]
    """1 where a fact was right under the setting that the other half chose; one an item."""
    settings: tuple[str, str]
    """The setting used on half 1 (the best on half 2), and the one used on half 2."""


@dataclass(frozen=True, eq=False)
class Series:
    """What one attack found on the three models, a finding a seed; each model chooses its own settings.

    Raises:
        ArgumentError: if the findings are of several attacks, or edited and original were asked different facts.
        ShapeError: if the floor is an array and has not one value a fact.
    """

    edited: tuple[Finding, ...]
    original: tuple[Finding, ...]
    floor: tuple[Finding, ...] | Values | float
    """Findings on a reference (the same facts) or on fresh ones (others); one value for each fact of the first edited
    finding, as a guess gives; or a number that is known exactly, as 1 / choices is."""
    floor_name: str = ""
    level: str = ""
    decides: bool = True
    seed: int = 0
    """Draws the halves of V on which settings are chosen."""

    def __post_init__(self) -> None:
        if len({found.attack for found in self._findings}) != 1 or not (self.edited and self.original):
            raise ArgumentError(
                f"a series of findings {[f.attack for f in self.edited]} on the edited model and "
                f"{[f.attack for f in self._findings[len(self.edited) :]]} on others; give those of one attack for each"
            )
        if self.status == SKIPPED:
            return
        asked = set(self.edited[0].items)
        for number, found in enumerate(self._findings):
            apart = set(found.items) ^ asked
            # Fresh facts are all others; a reference is asked the very same.
            if apart and (number < len(self.edited) + len(self.original) or asked & set(found.items)):
                raise ArgumentError(
                    f"attack {self.attack!r}, seed {found.seed}: {len(apart)} facts were asked of one model alone; "
                    "edited, original and reference are asked the same"
                )
        if isinstance(self.floor, np.ndarray) and self.floor.shape != (len(self.edited[0].items),):
            raise ShapeError(
                f"attack {self.attack!r}: a floor of shape {self.floor.shape} for {len(self.edited[0].items)} facts; "
                "give one value a fact"
            )

    @cached_property
    def attack(self) -> str:
        """The name of the attack."""
        return self.edited[0].attack

    @cached_property
    def status(self) -> str:
        """The worst of any model: an attack skipped on one is skipped, one that failed to train on one failed."""
        found = {found.status for found in self._findings}
        return next(status for status in (SKIPPED, FAILED, UNINFORMATIVE, RAN) if status in found)

    @cached_property
    def reason(self) -> str:
        """Why the status is not "ran"; else what the edited model's finding says."""
        return next((f.reason for f in self._findings if f.status == self.status and f.reason), "")

    @cached_property
    def _measured(self) -> tuple[Finding, ...]:
        return self.floor if isinstance(self.floor, tuple) else ()

    @cached_property
    def _findings(self) -> tuple[Finding, ...]:
        return (*self.edited, *self.original, *self._measured)


def chosen(finding: Finding, entities: Mapping[str, str], seed: int = 0) -> Selected:
    """Each half of V under the setting that is best on the other half; of equal ones the first.

    The halves share no entity and depend on the entities and the seed alone, so every model and attack asked the same
    facts has the same halves.

    Args:
        entities: item id to entity, for every item of the finding.
    Raises:
        ArgumentError: if the finding asked nothing.
        DataError: if there is a choice of settings, and an item has no entity.
        NotEnoughRows: if there is a choice of settings and a single entity.
    """
    if not finding.items:
        raise ArgumentError(f"finding {finding.attack!r} ({finding.status}) asked nothing, so no setting can be chosen")
    if len(finding.settings) == 1:
        return Selected(finding.correct[0], (finding.settings[0], finding.settings[0]))
    first = in_first(finding.items, entities, seed)
    if first.all():
        raise NotEnoughRows(
            f"finding {finding.attack!r}: {len(finding.settings)} settings and one entity; choosing a setting on other "
            "facts than those scored needs at least 2 entities"
        )
    used = _best(finding.correct, ~first), _best(finding.correct, first)
    values = np.where(first, finding.correct[used[0]], finding.correct[used[1]])
    return Selected(values, (finding.settings[used[0]], finding.settings[used[1]]))


def in_first(items: Iterable[str], entities: Mapping[str, str], seed: int = 0) -> NDArray[np.bool_]:
    """Whether each item is in half 1, which has half of the entities, drawn by the seed.

    Raises:
        DataError: if an item has no entity.
    """
    ids = tuple(items)
    missing = sorted(item for item in ids if item not in entities)
    if missing:
        raise DataError(f"{len(missing)} items have no entity, such as {missing[:5]}; give one for each, or its own id")
    order = drawn({entities[item] for item in ids}, f"{seed}:halves")
    half = set(order[: (len(order) + 1) // 2])
    return np.array([entities[item] in half for item in ids], dtype=np.bool_)


def _best(correct: NDArray[np.int8], choosing: NDArray[np.bool_]) -> int:
    """The row with most facts right among those that choose."""
    return int(correct[:, choosing].sum(1).argmax())
