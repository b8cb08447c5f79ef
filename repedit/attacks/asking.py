"""Asking a model facts, as every attack does: among choices where facts have them, else by what it writes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np

from repedit.data import Fact
from repedit.errors import ArgumentError, UnknownName, nearest
from repedit.metrics.probability import FactsAccuracy, facts_accuracy
from repedit.models import Subject


def ask(subject: Subject, facts: Sequence[Fact]) -> FactsAccuracy:
    """Which facts the model gets right: the answer likeliest among the choices, ties wrong; without choices, the
    normalised answer stands in a greedy continuation. Facts of both kinds may be mixed.
    """
    bare = np.array([not fact.choices for fact in facts])
    if not bare.any() or bare.all():
        return facts_accuracy(subject, facts, how="greedy" if bare.any() else "choice")
    correct, graded = np.zeros(len(facts), dtype=bool), np.zeros(len(facts))
    for kind in (False, True):
        part = facts_accuracy(
            subject, [f for f, b in zip(facts, bare, strict=True) if b == kind], how="greedy" if kind else "choice"
        )
        correct[bare == kind], graded[bare == kind] = part.correct, part.graded
    return FactsAccuracy(correct, graded, tuple(fact.id for fact in facts))


def reworded(facts: Iterable[Fact], wording: Callable[[Fact], str]) -> tuple[Fact, ...]:
    """The facts under their own ids with another prompt; `wording` gives it."""
    return tuple(replace(fact, prompt=wording(fact), paraphrases=()) for fact in facts)


def ways(what: str, names: Sequence[str] | None, known: Collection[str]) -> tuple[str, ...]:
    """The ways to ask that are named, or all that are known where `names` is None; `what` is one of them in words.

    Raises:
        UnknownName: if one is not known.
        ArgumentError: if none is named.
    """
    found = tuple(known if names is None else names)
    bad = next((name for name in found if name not in known), None)
    if bad is not None:
        raise UnknownName(f"{what} {bad!r}; {nearest(bad, known)}")
    if not found:
        raise ArgumentError(f"no {what} to ask in; give some of {list(known)}")
    return found
