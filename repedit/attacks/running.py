"""Carrying attacks out: every attack on every model, seed and fold, kept on disk as it goes.

Where invented facts are the floor, the models that a training attack makes of the edited one are asked them as well:
the floor is then the accuracy of the very model that was attacked, on facts nobody can know. Every other attack is made
once more, with invented facts in the place of T and V.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tqdm.auto import tqdm

from repedit.activations.memory import out_of_memory
from repedit.attacks.attack import SKIPPED, Attack, Finding, Outcome, joined, only
from repedit.attacks.material import Material
from repedit.attacks.models import Audited
from repedit.attacks.store import Store, key_of
from repedit.data import Splits
from repedit.errors import during
from repedit.models import Subject

FRESH = "fresh facts"
"""The role of facts nobody can know."""
MEMORY = "ran out of memory, in smaller batches too; no pass is possible without this attack"


@dataclass(frozen=True, eq=False)
class Role:
    """A model, what it is asked, and the attacks on it."""

    name: str
    model: Audited
    material: Material
    attacks: tuple[Attack, ...]
    shared: bool = False
    """Whether other audits may use what is found: for originals and references, which do not change."""
    invented: Material | None = None
    """Facts nobody can know, asked of whatever the attacks make of the model."""


def run(
    roles: Sequence[Role], seeds: Sequence[int], store: Store, *, progress: bool | None
) -> dict[str, tuple[Finding, ...]]:
    """The findings of every role; one an attack and seed, its folds joined.

    Raises:
        RepeditError: what an attack raised, with model and attack named; nothing failed becomes "no recovery".
    """
    jobs = [(role, attack) for role in roles for attack in role.attacks]
    total = sum(1 for role, attack in jobs for _ in _runs(attack, role.material, role.invented, seeds))
    names = [role.name for role in roles] + [FRESH for role in roles if role.invented is not None]
    found: dict[str, list[Finding]] = {name: [] for name in names}
    with tqdm(total=total, desc="audit", leave=False, disable=None if progress is None else not progress) as bar:
        for role in roles:
            with role.model.opened() as subject:
                for name, finding in _findings(role, subject, seeds, store, bar):
                    found[name].append(finding)
    return {name: tuple(findings) for name, findings in found.items()}


def _findings(
    role: Role, subject: Subject, seeds: Sequence[int], store: Store, bar: tqdm
) -> Iterator[tuple[str, Finding]]:
    """(role, finding): an attack and seed, its folds joined; invented facts are a role of their own."""
    for attack in role.attacks:
        parts: dict[tuple[str, int], list[Finding]] = {}
        for name, seeded, splits, fold in _runs(attack, role.material, role.invented, seeds):
            bar.set_postfix_str(f"{name or role.name}: {attack.name}")
            found = _one(role, name, subject, seeded, splits, fold, store)
            for part, items in _sides(name or role.name, splits, role.invented):
                # One training made both; its cost is counted once.
                own = found if part == (name or role.name) else replace(found, seconds=0.0, tokens=0)
                parts.setdefault((part, seeded.seed), []).append(only(own, items))
            bar.update()
        yield from ((name, joined(found) if len(found) > 1 else found[0]) for (name, _), found in parts.items())


def _sides(name: str, splits: Splits, invented: Material | None) -> list[tuple[str, frozenset[str]]]:
    """The facts asked, by the role they are asked for."""
    asked = {fact.id for fact in splits.test}
    fresh = {fact.id for fact in invented.forget} & asked if invented is not None and name != FRESH else set()
    return [(name, frozenset(asked - fresh)), *([(FRESH, frozenset(fresh))] if fresh else [])]


def _runs(
    attack: Attack, material: Material, invented: Material | None, seeds: Sequence[int]
) -> Iterator[tuple[str, Attack, Splits, int | None]]:
    """(role if another, attack, what it is given, fold) for each seed and fold. One that draws nothing runs once."""
    invented = None if attack.family == "keeping" else invented
    for seeded in [attack.at(seed) for seed in (seeds if attack.draws else seeds[:1])]:
        if attack.name == "retain":
            yield "", seeded, Splits((), material.retain), None
            continue
        for number, splits in _given(seeded, material, invented if attack.trains else None):
            yield "", seeded, splits, number
        if invented is not None and not attack.trains:
            for number, splits in _given(seeded, invented, None):
                yield FRESH, seeded, splits, number


def _given(attack: Attack, material: Material, also: Material | None) -> Iterator[tuple[int | None, Splits]]:
    """(fold, splits): each fold for an attack that uses T, else everything at once; V of `also` is asked with it."""
    mine = enumerate(material.folds) if attack.uses_train else [(None, material.whole)]
    for number, splits in mine:
        more = () if also is None else (also.whole if number is None else also.folds[number]).test
        yield number, replace(splits, test=(*splits.test, *more))


def _one(
    role: Role, other: str, subject: Subject, attack: Attack, splits: Splits, fold: int | None, store: Store
) -> Finding:
    key = key_of(attack, role.model.fingerprint, splits)
    options = hashlib.sha256(repr(sorted(attack.settings.items(), key=str)).encode()).hexdigest()[:6]
    name = f"{attack.name}-{(other or role.name).replace(' ', '-')}-{attack.seed}-{'all' if fold is None else fold}-{options}"
    known = None if role.model.hooked else store.get(name, key, sharing=role.shared)
    if known is not None:
        return known
    place = f"attacking the {role.name} model"
    with during(place, f"while {place}"):
        found = _attacked(attack, subject, splits)
    if not role.model.hooked and found.reason != MEMORY:
        store.put(name, key, found, sharing=role.shared)
    return found


def _attacked(attack: Attack, subject: Subject, splits: Splits) -> Finding:
    try:
        return attack(subject, splits)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return replace(attack, run=lambda *_: Outcome({}, MEMORY, status=SKIPPED))(subject, splits)
