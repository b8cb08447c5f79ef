"""What an attack is and what it found, how it asks facts, and a copy of a model that it may change."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repedit.data import Fact, Splits
from repedit.errors import ArgumentError, ShapeError, UnknownName, during, nearest
from repedit.metrics.facts import FactsAccuracy, facts_accuracy
from repedit.models.subject import Subject

# --- Asking a model facts, as every attack does: among choices where facts have them, else by what it writes


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


# --- A copy of a model that an attack may change, and put back between its settings


def copied(subject: Subject) -> Subject:
    """A deep copy, with everything somebody put on the model: hooks, parametrizations, masks.

    It is not wrapped anew: a parametrised weight has another name than the family table gives it.
    """
    # torch copies no tensor that carries a graph, such as the masked weight that torch.nn.utils.prune leaves behind.
    graphs = [v for m in subject.model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    model = copy.deepcopy(subject.model, {id(v): v.detach().clone() for v in graphs})
    return replace(subject, model=model, source=None)


class Scratch:
    """One deep copy of a model whose weights can be put back to those of the model it was made from.

    The model itself is the memory of what the weights were: it is never changed, so no second copy is kept.
    """

    def __init__(self, subject: Subject) -> None:
        self._source = subject
        self.subject = copied(subject)
        self.subject.model.eval()

    def restore(self) -> Subject:
        """The copy with every parameter as it was, without gradients."""
        named = dict(self.subject.model.named_parameters())
        with torch.no_grad():
            for name, value in self._source.model.named_parameters():
                named[name].copy_(value)
        for p in named.values():
            p.grad = None
            p.requires_grad_(False)
        return self.subject


# --- What an attack is, and what it found
#
# An attack asks a model the facts of V after doing something to it, in one or several settings. It holds the weights or
# only the prompts, and may use the answers of T. It works on a copy: the model it is given is never changed.


RAN, FAILED, UNINFORMATIVE, SKIPPED = "ran", "failed to train", "uninformative", "skipped"
STATUSES = (RAN, FAILED, UNINFORMATIVE, SKIPPED)


@dataclass(frozen=True, eq=False)
class Finding:
    """What one attack found on one model: which facts were right, in each of its settings.

    Raises:
        ArgumentError: if the status is none of the four.
        ShapeError: if the arrays are not settings x items.
    """

    attack: str
    seed: int
    status: str
    """ "ran", "failed to train" (no evidence), "uninformative" (the attack breaks the original too) or "skipped"."""
    reason: str
    """Why it did not run, or what a reader should know."""
    items: tuple[str, ...]
    """Ids of the facts asked, in the order of the columns."""
    settings: tuple[str, ...]
    """One name a row, such as "lr=5e-05 step=40"."""
    correct: NDArray[np.int8]
    """1 where the fact was right; settings x items."""
    graded: NDArray[np.float64]
    """Log-probability of the right answer, nats; settings x items. Of "sampling" the share of samples that are right."""
    train_accuracy: float | None = None
    """Of the best setting on T, for attacks that train on T."""
    tokens: int = 0
    """Tokens that went through the model in training."""
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values that explain the attack: the kind of a probe, the loss of each step."""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ArgumentError(f"finding {self.attack!r}: status {self.status!r}; it is one of {STATUSES}")
        shape = (len(self.settings), len(self.items))
        if self.correct.shape != shape or self.graded.shape != shape:
            raise ShapeError(
                f"finding {self.attack!r}: {self.correct.shape} answers and {self.graded.shape} grades for {shape[0]} settings "
                f"and {shape[1]} items"
            )

    @property
    def accuracy(self) -> Mapping[str, float]:
        """Share of the facts that were right, by setting."""
        return {name: float(row.mean()) for name, row in zip(self.settings, self.correct, strict=True)}


class Outcome(NamedTuple):
    """What the function of an attack returns."""

    answers: Mapping[str, FactsAccuracy]
    """By setting; every setting asks the same facts in the same order. Empty where the attack could not be done."""
    reason: str = ""
    train_accuracy: float | None = None
    tokens: int = 0
    details: Mapping[str, Any] = {}
    status: str = RAN


@dataclass(frozen=True)
class Attack:
    """Something done to a model before it is asked; called with a model and splits, it gives a `Finding`."""

    name: str
    family: str
    level: str
    """ "B": prompts and samples only. "W": the weights."""
    uses_train: bool
    """Whether the answers of T are used; else every fact can be asked at once."""
    settings: Mapping[str, Any]
    """What it was built with, as plain JSON values; two attacks of one name and settings do the same."""
    run: Callable[[Subject, Splits, int], Outcome]
    """(model, splits, seed) -> outcome. It must leave the model as it was, also after an exception."""
    seed: int = 0
    decides: bool = True
    """False for what is shown beside the verdict and never enters it."""
    draws: bool = True
    """Whether the seed matters; what draws nothing is run with one seed."""

    def __call__(self, subject: Subject, splits: Splits) -> Finding:
        """Attack the model with T and ask it V.

        Raises:
            RepeditError: what the attack raised, with its name put before; nothing becomes "no recovery".
        """
        start = time.perf_counter()
        name = f"attack {self.name!r}"
        with during(name, f"in {name} with {dict(self.settings)}, seed {self.seed}"):
            found = self.run(subject, splits, self.seed)
        return _finding(self, found, splits, time.perf_counter() - start)

    @property
    def trains(self) -> bool:
        """Whether it makes another model of the one it is given, and asks that."""
        return self.family in ("finetune", "optimise")

    def at(self, seed: int) -> Attack:
        """The same attack with another seed."""
        return replace(self, seed=seed)


def skipped(reason: str) -> Outcome:
    """The outcome of an attack that cannot be done here; the report lists it and no pass is possible by it."""
    return Outcome({}, reason, status=SKIPPED)


def only(finding: Finding, items: Collection[str]) -> Finding:
    """The finding for some of its facts."""
    columns = [i for i, item in enumerate(finding.items) if item in items]
    if len(columns) == len(finding.items):
        return finding
    return replace(
        finding, items=tuple(finding.items[i] for i in columns), correct=finding.correct[:, columns],
        graded=finding.graded[:, columns],
    )  # fmt: skip


def joined(parts: Sequence[Finding]) -> Finding:
    """The findings of both folds as one: the settings of the first, the items of all.

    Raises:
        ArgumentError: if the parts are of different attacks or settings, or ask a fact twice.
    """
    first = parts[0]
    bad = next((p for p in parts if p.status in (SKIPPED, FAILED)), first)
    if bad.status == SKIPPED:
        return bad
    items = tuple(item for part in parts for item in part.items)
    if any((p.attack, p.seed, p.settings) != (first.attack, first.seed, first.settings) for p in parts):
        raise ArgumentError(f"findings of {[(p.attack, p.seed, p.settings) for p in parts]} cannot be joined")
    if len(set(items)) < len(items):
        raise ArgumentError(f"attack {first.attack!r}: {len(items) - len(set(items))} facts were asked in both folds")
    trained = [p.train_accuracy for p in parts if p.train_accuracy is not None]
    return replace(
        first, status=bad.status, reason=bad.reason, items=items,
        correct=np.concatenate([p.correct for p in parts], 1), graded=np.concatenate([p.graded for p in parts], 1),
        train_accuracy=min(trained, default=None), tokens=sum(p.tokens for p in parts),
        seconds=sum(p.seconds for p in parts), details={"folds": [dict(p.details) for p in parts]},
    )  # fmt: skip


def _finding(attack: Attack, found: Outcome, splits: Splits, seconds: float) -> Finding:
    asked = tuple(fact.id for fact in splits.test)
    for name, answers in found.answers.items():
        if answers.ids != asked:
            raise ShapeError(f"attack {attack.name!r}, {name!r}: {len(answers.ids)} facts asked, V has {len(asked)}")
    items = asked if found.answers else ()
    rows = list(found.answers.values())
    return Finding(
        attack=attack.name, seed=attack.seed, status=found.status, reason=found.reason,
        items=items, settings=tuple(found.answers),
        correct=np.array([r.correct for r in rows], dtype=np.int8).reshape(len(rows), len(items)),
        graded=np.array([r.graded for r in rows], dtype=np.float64).reshape(len(rows), len(items)),
        train_accuracy=found.train_accuracy, tokens=found.tokens, seconds=seconds, details=found.details,
    )  # fmt: skip
