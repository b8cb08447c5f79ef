"""The model, the facts and the questions of `bench.removal`, which edits and attacks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import repedit as rp
from bench.mrp import Bench, seen
from repedit.auditing.data import check_no_leak
from repedit.data import Fact, entity_of, with_paraphrases
from repedit.models.subject import Subject

FORGET, ATTRIBUTES = "capitals", "languages"
OTHERS = ("symbols", "opposites", "past_tenses", "cities", "us_cities", "nouns")
"""Domains about other subjects; languages are about the same countries."""
CACHE = Path(".cache/bench-removal")
"""Where edits are kept."""
UNSEEN = 3
"""The number of the wording that no training sees."""


class Rows(Bench):
    """The model, its facts and halves, and what is measured of an edited model."""

    def __init__(self) -> None:
        super().__init__()
        self.capitals, self.languages = self.facts[FORGET], self.facts[ATTRIBUTES]
        check_no_leak(self.languages, self.capitals)

    def asked(self, lm: Subject, items: Sequence[Fact], wording: int = 0) -> dict[str, bool]:
        """Entity -> whether its fact is right in one wording."""
        scored = rp.facts_accuracy(lm, with_paraphrases(items, only=[wording]))
        return {entity_of(fact): bool(right) for fact, right in zip(items, scored.correct, strict=True)}


def share(right: Mapping[str, bool], entities: Sequence[str] | None = None) -> float:
    """Share of right answers, over some entities."""
    found = list(right.values()) if entities is None else [right[name] for name in entities]
    return sum(found) / len(found)


def names(right: Mapping[str, bool]) -> list[str]:
    """The entities that are right."""
    return sorted(name for name, value in right.items() if value)


def others(rows: Rows) -> tuple[Fact, ...]:
    """The training half of the domains about other subjects."""
    return seen([fact for name, items in rows.train.items() if name not in (FORGET, "languages") for fact in items])


def places(rows: Rows) -> tuple[Fact, ...]:
    """Those about places."""
    return seen([fact for name in ("cities", "us_cities") for fact in rows.train[name]])
