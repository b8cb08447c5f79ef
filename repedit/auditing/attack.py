"""What an attack is: how it asks facts, the model copy it may change, its record, its settings and its finding."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repedit.arguments import checked
from repedit.data import Fact, Splits
from repedit.errors import ArgumentError, ShapeError, UnknownName, check_choice, during, nearest
from repedit.metrics.facts import FactsAccuracy, facts_accuracy
from repedit.models.subject import Subject
from repedit.sites import Point, Site

__all__ = [
    "Attack", "AttackRecord", "AttackResult", "Finding", "Setting", "Setup", "Work", "ask", "deep_copy", "register",
    "reworded", "skipped",
]  # fmt: skip
"""What an attack of your own needs; the rest serves those of the package."""

# --- The record of an attack: what is known before it is built


QUICK = "quick"
BUDGETS = (QUICK, "fast", "standard", "full")
"""Each includes the attacks of those before it; "quick" is too small for a pass."""
SEEDS = {QUICK: (0,), "fast": (0,), "standard": (0, 1, 2), "full": (0, 1, 2)}
INVENTED_FACTS = {QUICK: 48, "fast": 96, "standard": 256, "full": 256}
"""Invented facts asked at most."""
RETAIN_FACTS = {QUICK: 96, "fast": 160, "standard": None, "full": None}
"""Retain facts asked at most."""


@dataclass(frozen=True, eq=False)
@checked
class Setup:
    """What building an attack may need to know."""

    budget: str = "fast"
    layers: int = 0
    """Layers of the model."""
    edited_layers: tuple[int, ...] | None = None
    """Layers that were edited; None where they are unknown."""
    scale: float = 1.0
    """Multiplies every learning rate: tiny models need larger ones."""
    steps: int = 40
    """Training steps of `rtt`."""
    original: Subject | None = None
    """The original model, for attacks that compare with it."""

    @property
    def small(self) -> bool:
        """Whether attacks try few settings."""
        return self.budget in (QUICK, "fast")


@dataclass(frozen=True)
@checked
class AttackRecord:
    """One attack: its name, what it costs, and how an audit builds it.

    Registering the record where the attack is written is all it takes to add one: budgets, verdicts, estimates, reports
    and the command line read the records.
    """

    name: str
    cost: int = 0
    """Place in the order from the cheapest attack (asking) to the most expensive one (searching for an input)."""
    budget: str = "full"
    """The smallest budget that includes it."""
    build: Callable[[Setup], Sequence[Attack]] = lambda setup: ()
    level: str = "B"
    """ "B": prompts and samples only. "W": the weights."""
    uses_train: bool = False
    """Whether the answers of T are used; otherwise every fact is asked at once."""
    four_fifths: bool = False
    """Whether T is four fifths of the entities, in five folds, where it otherwise is what the audit was told, half of them."""
    trains: bool = False
    """Whether it trains another model, or an input, and asks that."""
    draws: bool = True
    """Whether the seed matters; an attack that draws nothing runs with one seed."""
    decides: bool = True
    """False for what is shown beside the verdict and never enters it."""
    may_skip: bool = False
    """Whether it may have nothing to work on, such as facts without translations; skipping it then blocks no pass."""
    compares: bool = False
    """Whether it reads the original model beside the one attacked."""
    unchanged: Callable[[Subject], AttackResult | None] | None = None
    """The result without answers on a model that the attack would leave as it is, and None on others: a model that is asked
    the facts as they are again gives the answers of `direct`, so that an audit asks it once."""
    questions: Callable[[Sequence[Fact]], tuple[Fact, ...]] | None = None
    """What it asks in the place of the facts, under their ids, where the answers are other ones: the guesses that are its floor
    are then made for those."""
    attributes: bool = False
    """Whether it trains on other facts about the entities of V, which narrow the answers down even for a model that never
    knew them: its floor is the same training with an invented name in the place of each entity."""


_RECORDS: dict[str, AttackRecord] = {}


@checked
def register(record: AttackRecord) -> AttackRecord:
    """Add an attack to those that budgets include; one of your own replaces one of your own with the same name.

    Raises:
        ArgumentError: if the name is that of an attack of the package, or there is no such budget.
    """
    if not _of_package(record.build):
        import_attacks()
    if record.name in _RECORDS and _of_package(_RECORDS[record.name].build):
        raise ArgumentError(f"attack {record.name!r} is registered already; give another name")
    if record.budget not in BUDGETS:
        raise ArgumentError(f"attack {record.name!r}: budget {record.budget!r}; {nearest(record.budget, BUDGETS)}")
    _RECORDS[record.name] = record
    return record


@cache
def import_attacks() -> None:
    """Register the attacks of the package."""
    package = import_module(f"{__package__}.attacks")
    for module in iter_modules(package.__path__, f"{package.__name__}."):
        import_module(module.name)


def _of_package(function: Callable[..., Any]) -> bool:
    return str(getattr(function, "__module__", None)).partition(".")[0] == __name__.partition(".")[0]


# --- Which attacks a budget includes: the registered records in order of cost


def records() -> Mapping[str, AttackRecord]:
    """Every registered attack by name, the cheapest first."""
    import_attacks()
    return {record.name: record for record in sorted(_RECORDS.values(), key=lambda record: (record.cost, record.name))}


def record_of(attack: str) -> AttackRecord | None:
    """The record of an attack by the name of its findings, such as "probe-mlp" or "rtt, LoRA"; None of an unknown one."""
    registered = records()
    return registered.get(attack) or registered.get(attack.partition("-")[0].partition(",")[0])


def planned(budget: str, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """The attacks of a budget, or those named, the cheapest first; "direct" is always among them.

    Raises:
        UnknownName: if there is no such budget or attack.
    """
    check_choice(BUDGETS, budget=budget)
    registered = records()
    if isinstance(names, str):
        raise UnknownName(f"attacks={names!r} is one text; give a list of names")
    for name in names or ():
        if name not in registered:
            raise UnknownName(f"no attack is called {name!r}; {nearest(name, registered)}")
    included = BUDGETS[: BUDGETS.index(budget) + 1]
    return tuple(
        name
        for name, record in registered.items()
        if name == "direct" or (record.budget in included if names is None else name in names)
    )


def built(names: Sequence[str], setup: Setup) -> tuple[Attack, ...]:
    """The attacks of these names, built for a setup."""
    registered = records()
    return tuple(attack for name in names for attack in registered[name].build(setup))


# --- Settings and findings


class Setting(str):
    """One setting of an attack: the text that findings store, such as "lr=5e-05 step=40", with its parts as fields."""

    step: int | None
    """Training steps, or epochs, after which V was asked; None where nothing was trained."""
    site: Site | None
    """Where answers were read, as in "resid.post 3"; None where an attack reads no site."""

    def __new__(cls, text: str, *, step: int | None = None, site: Site | None = None) -> Setting:
        setting = super().__new__(cls, text)
        setting.step, setting.site = step, site
        return setting

    @classmethod
    @checked
    def at(cls, site: Site) -> Setting:
        """The setting that reads a site."""
        return cls(f"{site.point} {site.layer}", site=site)

    @classmethod
    @checked
    def parse(cls, text: str) -> Setting:
        """The setting of a stored finding; any text is one, with the fields it names."""
        if isinstance(text, Setting):
            return text
        step = re.search(r"(?:^|\s)(?:step|epoch)=(\d+)", text)
        point, _, layer = text.partition(" ")
        site = Site(int(layer), Point(point)) if layer.isdecimal() and point in set(Point) else None
        return cls(text, step=int(step[1]) if step else None, site=site)

    @property
    def words(self) -> list[str]:
        """The words and numbers of the text."""
        return re.split(r"[ ,:=@]+", self)


LONGER = 4
"""How many times the steps a training gets that has not learned what it was taught."""


def lengthened(setting: Setting) -> Setting:
    """The setting of the same training with `LONGER` times the steps: "lr=5e-05 step=160" for "lr=5e-05 step=40"."""
    if setting.step is None:
        raise ArgumentError(f"setting {str(setting)!r} names no step, so nothing can be trained for longer")
    steps = LONGER * setting.step
    return Setting(re.sub(r"(^|\s)(step|epoch)=\d+", rf"\g<1>\g<2>={steps}", setting, count=1), step=steps)


RAN, FAILED, UNINFORMATIVE, SKIPPED = "ran", "failed to train", "uninformative", "skipped"
STATUSES = (RAN, FAILED, UNINFORMATIVE, SKIPPED)


@dataclass(frozen=True, eq=False)
@checked
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
    """One `Setting` a row, such as "lr=5e-05 step=40"; plain texts are parsed."""
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
        object.__setattr__(self, "settings", tuple(map(Setting.parse, self.settings)))

    @property
    def accuracy(self) -> Mapping[Setting, float]:
        """Share of the facts that were right, by setting."""
        return {Setting.parse(name): float(row.mean()) for name, row in zip(self.settings, self.correct, strict=True)}

    @checked
    def restricted(self, items: Collection[str]) -> Finding:
        """The finding for some of its facts."""
        columns = [i for i, item in enumerate(self.items) if item in items]
        if len(columns) == len(self.items):
            return self
        return replace(
            self, items=tuple(self.items[i] for i in columns), correct=self.correct[:, columns],
            graded=self.graded[:, columns],
        )  # fmt: skip


def merged_folds(parts: Sequence[Finding]) -> Finding:
    """The findings of both folds as one: the settings and the items of all.

    In a fold whose T was learned in time no training was lengthened; there the end of the same training stands for the longer one.

    Raises:
        ArgumentError: if the parts are of different attacks or settings, or ask a fact twice.
    """
    if len(parts) == 1:
        return parts[0]
    settings = tuple(dict.fromkeys(name for part in parts for name in part.settings))
    parts = [_with_longer(part, settings) for part in parts]
    first = parts[0]
    worst = next((p for p in parts if p.status in (SKIPPED, FAILED)), first)
    if worst.status == SKIPPED:
        return worst
    items = tuple(item for part in parts for item in part.items)
    if any((p.attack, p.seed, p.settings) != (first.attack, first.seed, first.settings) for p in parts):
        raise ArgumentError(f"findings of {[(p.attack, p.seed, p.settings) for p in parts]} cannot be joined")
    if len(set(items)) < len(items):
        raise ArgumentError(f"attack {first.attack!r}: {len(items) - len(set(items))} facts were asked in both folds")
    accuracies = [p.train_accuracy for p in parts if p.train_accuracy is not None]
    return replace(
        first, status=worst.status, reason=worst.reason, items=items,
        correct=np.concatenate([p.correct for p in parts], 1), graded=np.concatenate([p.graded for p in parts], 1),
        train_accuracy=min(accuracies, default=None), tokens=sum(p.tokens for p in parts),
        seconds=sum(p.seconds for p in parts), details={"folds": [dict(p.details) for p in parts]},
    )  # fmt: skip


def _with_longer(part: Finding, settings: Sequence[str]) -> Finding:
    """The finding with these settings, where the missing ones are longer trainings than it has."""
    own = {str(name): row for row, name in enumerate(part.settings)}
    ends = {str(lengthened(s)): own[s] for s in map(Setting.parse, part.settings) if s.step}
    chosen = [row for name in settings if (row := own.get(name, ends.get(name))) is not None]
    if len(chosen) < len(settings) or len(settings) == len(part.settings):
        return part
    return replace(part, settings=tuple(settings), correct=part.correct[chosen], graded=part.graded[chosen])


# --- An attack, ready to be carried out
#
# It asks a model the facts of V after doing something to it, in one or several settings. It works on a copy: the model
# it is given is never changed.


class AttackResult(NamedTuple):
    """What the function of an attack returns."""

    answers: Mapping[str, FactsAccuracy]
    """By setting; every setting asks the same facts in the same order. Empty where the attack could not be done."""
    reason: str = ""
    train_accuracy: float | None = None
    tokens: int = 0
    details: Mapping[str, Any] = {}
    status: str = RAN


class Work(NamedTuple):
    """What an attack makes a model do, for estimates of its duration."""

    questions: float | int
    """Times each fact is asked, in units of asking it plainly; longer prompts count more."""
    steps: float | int = 0
    """Training steps of a fold, in units of one on facts."""


@dataclass(frozen=True)
@checked
class Attack:
    """Something done to a model before it is asked; called with a model and splits, it gives a `Finding`."""

    record: AttackRecord
    options: Mapping[str, Any]
    """What it was built with, as plain JSON values; two attacks of one name and options do the same."""
    run: Callable[[Subject, Splits, int], AttackResult]
    """(model, splits, seed) -> result. It must leave the model as it was, also after an exception."""
    work: Work
    seed: int = 0
    label: str = ""
    """Its name where that is not the record's: it tells two of a kind apart in one audit."""
    applies: Callable[[Subject], bool] | None = None
    """Whether a model gives the attack anything to work on; None where every model does."""
    folds: int | None = None
    """How many of the folds it is made on: with 1, V is one half of the facts; None for all."""

    def __call__(self, subject: Subject, splits: Splits) -> Finding:
        """Attack the model with T and ask it V.

        Raises:
            RepeditError: what the attack raised, with its name put before; nothing becomes "no recovery".
        """
        start = time.perf_counter()
        name = f"attack {self.name!r}"
        if not (self.record.uses_train or splits.train or _of_package(self.run)):
            splits = _untaught(splits)
        with during(name, f"in {name} with {dict(self.options)}, seed {self.seed}"):
            result = self.run(subject, splits, self.seed)
        return _finding(self, result, splits, time.perf_counter() - start)

    @property
    def storable(self) -> bool:
        """Whether its name and options say what it does: only of the package's attacks is the code part of what findings
        are stored by.
        """
        return _of_package(self.run)

    @property
    def name(self) -> str:
        """The name under which findings are stored."""
        return self.label or self.record.name

    @checked
    def at(self, seed: int) -> Attack:
        """The same attack with another seed."""
        return replace(self, seed=seed)


class _Untaught(Splits):
    """Splits whose T may not be read.

    With an empty T, an attack would train on nothing, and it would seem that training recovers nothing.
    """

    @property
    def train(self) -> tuple[Fact, ...]:
        raise ArgumentError(
            "splits.train is read, and the record says uses_train=False, so that T is empty; register "
            "AttackRecord(..., uses_train=True)"
        )


def _untaught(splits: Splits) -> Splits:
    unread = object.__new__(_Untaught)
    unread.__dict__.update(vars(splits))
    return unread


@checked
def skipped(reason: str) -> AttackResult:
    """The result of an attack that cannot be done here; the report lists it and no pass is possible by it."""
    return AttackResult({}, reason, status=SKIPPED)


def _finding(attack: Attack, result: AttackResult, splits: Splits, seconds: float) -> Finding:
    asked = tuple(fact.id for fact in splits.test)
    for name, answers in result.answers.items():
        if answers.ids != asked:
            raise ShapeError(f"attack {attack.name!r}, {name!r}: {len(answers.ids)} facts asked, V has {len(asked)}")
    items = asked if result.answers else ()
    rows = list(result.answers.values())
    return Finding(
        attack=attack.name, seed=attack.seed, status=result.status, reason=result.reason,
        items=items, settings=tuple(result.answers),
        correct=np.array([r.correct for r in rows], dtype=np.int8).reshape(len(rows), len(items)),
        graded=np.array([r.graded for r in rows], dtype=np.float64).reshape(len(rows), len(items)),
        train_accuracy=result.train_accuracy, tokens=result.tokens, seconds=seconds, details=result.details,
    )  # fmt: skip


# --- Asking a model facts, as every attack does


@checked
def ask(subject: Subject, facts: Sequence[Fact]) -> FactsAccuracy:
    """Which facts the model gets right.

    With choices the answer must be the likeliest of them, and ties are wrong; without choices the normalised answer must stand
    in a greedy continuation. Facts of both kinds may be mixed.
    """
    free = np.array([not fact.choices for fact in facts])
    if not free.any() or free.all():
        return facts_accuracy(subject, facts, how="greedy" if free.any() else "choice")
    correct, graded = np.zeros(len(facts), dtype=bool), np.zeros(len(facts))
    for is_free in (False, True):
        part = facts_accuracy(
            subject,
            [fact for fact, f in zip(facts, free, strict=True) if f == is_free],
            how="greedy" if is_free else "choice",
        )
        correct[free == is_free], graded[free == is_free] = part.correct, part.graded
    return FactsAccuracy(correct, graded, tuple(fact.id for fact in facts))


@checked
def reworded(facts: Iterable[Fact], wording: Callable[[Fact], str]) -> tuple[Fact, ...]:
    """The facts under their own ids with another prompt; `wording` gives it."""
    return tuple(replace(fact, prompt=wording(fact), paraphrases=()) for fact in facts)


def checked_names(kind: str, names: Sequence[str] | None, valid: Collection[str]) -> tuple[str, ...]:
    """The names that were given, or all valid ones where `names` is None; `kind` says what they name.

    Raises:
        UnknownName: if one is not valid.
        ArgumentError: if none is given.
    """
    selected = tuple(valid if names is None else names)
    unknown = next((name for name in selected if name not in valid), None)
    if unknown is not None:
        raise UnknownName(f"{kind} {unknown!r}; {nearest(unknown, valid)}")
    if not selected:
        raise ArgumentError(f"no {kind} to ask in; give some of {list(valid)}")
    return selected


# --- A copy of a model that an attack may change


@checked
def deep_copy(subject: Subject) -> Subject:
    """A copy with everything that was put on the model: hooks, parametrizations, masks.

    It is not wrapped anew: a parametrised weight has another name than the family table gives it.
    """
    # torch copies no tensor that carries a graph, such as the masked weight that torch.nn.utils.prune leaves behind.
    graphs = [v for m in subject.model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    model = copy.deepcopy(subject.model, {id(v): v.detach().clone() for v in graphs})
    return replace(subject, model=model, source=None)


class Scratch:
    """One copy of a model whose weights can be put back to those of the model it was made from.

    The model itself holds the original weights: it is never changed, so no second copy is kept.
    """

    def __init__(self, subject: Subject) -> None:
        self._source = subject
        self.subject = deep_copy(subject)
        self.subject.model.eval()

    def restore(self) -> Subject:
        """The copy with every parameter as it was, without gradients."""
        parameters = dict(self.subject.model.named_parameters())
        with torch.no_grad():
            for name, value in self._source.model.named_parameters():
                parameters[name].copy_(value)
        for p in parameters.values():
            p.grad = None
            p.requires_grad_(False)
        return self.subject
