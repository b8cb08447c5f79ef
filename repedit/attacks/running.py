"""Carrying attacks out: every attack on every model, seed and fold, kept on disk as it goes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from tqdm.auto import tqdm

from repedit.attacks.attack import SKIPPED, Attack, Finding, Outcome, joined
from repedit.attacks.material import Material
from repedit.attacks.models import Audited
from repedit.attacks.store import Store, key_of
from repedit.data import Splits
from repedit.errors import during
from repedit.models import Subject

MEMORY = "ran out of memory; no pass is possible without this attack"


@dataclass(frozen=True, eq=False)
class Role:
    """A model, what it is asked, and the attacks on it."""

    name: str
    model: Audited
    material: Material
    attacks: tuple[Attack, ...]
    shared: bool = False
    """Whether other audits may use what is found: for originals and references, which do not change."""


def run(
    roles: Sequence[Role], seeds: Sequence[int], store: Store, *, progress: bool | None
) -> dict[str, tuple[Finding, ...]]:
    """The findings of every role; one an attack and seed, its folds joined.

    Raises:
        RepeditError: what an attack raised, with model and attack named; nothing failed becomes "no recovery".
    """
    total = sum(1 for role in roles for attack in role.attacks for _ in _runs(attack, role.material, seeds))
    bar = tqdm(total=total, desc="audit", leave=False, disable=None if progress is None else not progress)
    with bar:
        return {role.name: tuple(_findings(role, seeds, store, bar)) for role in roles}


def _findings(role: Role, seeds: Sequence[int], store: Store, bar: tqdm) -> Iterator[Finding]:
    with role.model.opened() as subject:
        for attack in role.attacks:
            parts: dict[int, list[Finding]] = {}
            for seeded, splits, fold in _runs(attack, role.material, seeds):
                bar.set_postfix_str(f"{role.name}: {attack.name}")
                parts.setdefault(seeded.seed, []).append(_one(role, subject, seeded, splits, fold, store))
                bar.update()
            yield from (joined(found) if len(found) > 1 else found[0] for found in parts.values())


def _runs(attack: Attack, material: Material, seeds: Sequence[int]) -> Iterator[tuple[Attack, Splits, int | None]]:
    """An attack with each of its seeds, on each fold if it uses T. One that draws nothing runs once."""
    for seed in seeds if attack.draws else seeds[:1]:
        if attack.uses_train:
            yield from ((attack.at(seed), fold, number) for number, fold in enumerate(material.folds))
        elif attack.name == "retain":
            yield attack.at(seed), Splits((), material.retain), None
        else:
            yield attack.at(seed), material.whole, None


def _one(role: Role, subject: Subject, attack: Attack, splits: Splits, fold: int | None, store: Store) -> Finding:
    extra = {"role": role.name} if role.name == "fresh facts" else {}
    key = key_of(attack, role.model.fingerprint, splits, extra)
    options = hashlib.sha256(repr(sorted(attack.settings.items(), key=str)).encode()).hexdigest()[:6]
    name = f"{attack.name}-{role.name.replace(' ', '-')}-{attack.seed}-{'all' if fold is None else fold}-{options}"
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
    except (MemoryError, torch.OutOfMemoryError):
        return replace(attack, run=lambda *_: Outcome({}, MEMORY, status=SKIPPED))(subject, splits)
