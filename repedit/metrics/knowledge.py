"""What two models know, domain by domain, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from repedit.data import Fact, by_domain
from repedit.metrics.probability import FactsAccuracy, facts_accuracy
from repedit.models import Subject


@dataclass(frozen=True, eq=False)
class Knowledge:
    """Accuracy on the facts of one domain, before and after an edit."""

    before: FactsAccuracy
    after: FactsAccuracy
    chance: float
    """What guessing among the choices gets right, on average."""


def knowledge(base: Subject, edited: Subject, facts: Iterable[Fact], *, how: str = "choice") -> Mapping[str, Knowledge]:
    """Accuracy of both models on each domain of the facts, in the facts' own phrasing.

    Args:
        how: "choice" or "greedy", as in `facts_accuracy`.
    """
    found = {}
    for domain, items in by_domain(facts).items():
        before, after = (facts_accuracy(subject, items, how=how) for subject in (base, edited))
        guesses = [1 / len(fact.choices) for fact in items if fact.choices]
        found[domain] = Knowledge(before, after, sum(guesses) / len(guesses) if how == "choice" else 0.0)
    return found
