"""Carrying attacks out: every attack on every model, seed and fold; models are loaded one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from repedit.activations.forward import is_out_of_memory
from repedit.auditing.attack import SKIPPED, Attack, Finding, Outcome, joined, only
from repedit.auditing.attacks.unhook import wrapped
from repedit.auditing.data import AuditData
from repedit.auditing.store import FindingStore, key_of
from repedit.data import Splits
from repedit.errors import CheckpointError, FingerprintError, NoOpEdit, during
from repedit.hashing import fingerprint
from repedit.io.files import is_folder
from repedit.io.text import read_json
from repedit.models.subject import Subject, load
from repedit.sites import Site

# --- The models of an audit: loaded as plain transformers models, one at a time, checked to be of one kind


_FIELDS = ("model_type", "vocab_size", "num_hidden_layers", "n_layer")
"""What an edited model shares with the original; a slimmed or sliced one has other widths and other numbers of heads."""


class Audited:
    """A model in one role: a Subject that is at hand, or a directory that is read when it is needed and let go after."""

    def __init__(self, role: str, source: Subject | str | Path, device: str = "auto") -> None:
        self.role, self.live = role, isinstance(source, Subject)
        self._source, self._device = source, device
        with self.opened() as subject:
            self.fingerprint = fingerprint(subject.model)
            self.kind = {name: getattr(subject.model.config, name, None) for name in _FIELDS}
            self.tokenizer = _vocabulary(subject.need_tokenizer())
            self.layers, self.width = len(subject.layout.layers), subject.layout.width
            self.shapes = {name: spec.shape for name, spec in subject.specs.items()}
            # A hook is code: nothing names it, so what was found with it is not kept for another time.
            self.hooked = self.live and wrapped(subject)

    @property
    def path(self) -> Path | None:
        """The directory, where the model is one."""
        return None if isinstance(self._source, Subject) or not is_folder(self._source) else Path(self._source)

    @property
    def name(self) -> str:
        """What a reader calls the model."""
        return "a model in memory" if isinstance(self._source, Subject) else str(self._source)

    @contextmanager
    def opened(self) -> Iterator[Subject]:
        """The model; its weights must be the same afterwards.

        Raises:
            FingerprintError: if an attack changed it.
        """
        subject = self._source if isinstance(self._source, Subject) else load(self._source, device=self._device)
        before = fingerprint(subject.model)
        yield subject
        if fingerprint(subject.model) != before:
            raise FingerprintError(f"the {self.role} model changed while it was attacked; nothing found on it counts")

    def edited_layers(self) -> tuple[int, ...] | None:
        """The layers that repedit.json says were edited; None where there is no such file."""
        manifest = (self.path or Path("absent")) / "repedit.json"
        if not manifest.exists():
            return None
        sites = read_json(manifest, finite=False, remedy="export again").get("sites") or {}
        try:
            found = sorted({Site.parse(name).layer for name in dict(sites)})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the sites of {manifest} cannot be read: {error}; export again") from error
        return tuple(found) or None


def check_pair(edited: Audited, original: Audited) -> None:
    """Refuse models that cannot be compared.

    Raises:
        FingerprintError: if architecture, vocabulary or tokenizer differ; with the first difference.
        NoOpEdit: if every weight is equal.
    """
    for name, found in edited.kind.items():
        if found != original.kind[name]:
            raise FingerprintError(
                f"{edited.role} and {original.role} are models of different kinds: {name} is {found!r} and "
                f"{original.kind[name]!r}; give the checkpoint that was edited"
            )
    if edited.tokenizer != original.tokenizer:
        raise FingerprintError(
            f"{edited.role} and {original.role} have different tokenizers ({edited.tokenizer[:12]} and {original.tokenizer[:12]}); "
            "scores of different tokens cannot be compared"
        )
    if edited.fingerprint == original.fingerprint and not edited.hooked:
        raise NoOpEdit(
            f"every tensor of {edited.name} equals {original.role}'s; was the edit applied and saved? Nothing was attacked"
        )


def _vocabulary(tokenizer: Any) -> str:
    text = json.dumps(sorted(tokenizer.get_vocab().items())) + repr(tokenizer("It is 7 o'clock, Zoë.")["input_ids"])
    return hashlib.sha256(text.encode()).hexdigest()


# --- Carrying attacks out: every attack on every model, seed and fold, kept on disk as it goes
#
# Where invented facts are the floor, the models that a training attack makes of the edited one are asked them as well:
# the floor is then the accuracy of the very model that was attacked, on facts nobody can know. Every other attack is made
# once more, with invented facts in the place of T and V.


FRESH = "fresh facts"
"""The role of facts nobody can know."""
MEMORY = "ran out of memory, in smaller batches too; no pass is possible without this attack"


@dataclass(frozen=True, eq=False)
class Role:
    """A model, what it is asked, and the attacks on it."""

    name: str
    model: Audited
    data: AuditData
    attacks: tuple[Attack, ...]
    shared: bool = False
    """Whether other audits may use what is found: for originals and references, which do not change."""
    invented: AuditData | None = None
    """Facts nobody can know, asked of whatever the attacks make of the model."""


def run(
    roles: Sequence[Role], seeds: Sequence[int], store: FindingStore, *, progress: bool | None
) -> dict[str, tuple[Finding, ...]]:
    """The findings of every role; one an attack and seed, its folds joined.

    Raises:
        RepeditError: what an attack raised, with model and attack named; nothing failed becomes "no recovery".
    """
    jobs = [(role, attack) for role in roles for attack in role.attacks]
    total = sum(1 for role, attack in jobs for _ in _runs(attack, role.data, role.invented, seeds))
    names = [role.name for role in roles] + [FRESH for role in roles if role.invented is not None]
    found: dict[str, list[Finding]] = {name: [] for name in names}
    with tqdm(total=total, desc="audit", leave=False, disable=None if progress is None else not progress) as bar:
        for role in roles:
            with role.model.opened() as subject:
                for name, finding in _findings(role, subject, seeds, store, bar):
                    found[name].append(finding)
    return {name: tuple(findings) for name, findings in found.items()}


def _findings(
    role: Role, subject: Subject, seeds: Sequence[int], store: FindingStore, bar: tqdm
) -> Iterator[tuple[str, Finding]]:
    """(role, finding): an attack and seed, its folds joined; invented facts are a role of their own."""
    for attack in role.attacks:
        parts: dict[tuple[str, int], list[Finding]] = {}
        for name, seeded, splits, fold in _runs(attack, role.data, role.invented, seeds):
            bar.set_postfix_str(f"{name or role.name}: {attack.name}")
            found = _one(role, name, subject, seeded, splits, fold, store)
            for part, items in _sides(name or role.name, splits, role.invented):
                # One training made both; its cost is counted once.
                own = found if part == (name or role.name) else replace(found, seconds=0.0, tokens=0)
                parts.setdefault((part, seeded.seed), []).append(only(own, items))
            bar.update()
        yield from ((name, joined(found) if len(found) > 1 else found[0]) for (name, _), found in parts.items())


def _sides(name: str, splits: Splits, invented: AuditData | None) -> list[tuple[str, frozenset[str]]]:
    """The facts asked, by the role they are asked for."""
    asked = {fact.id for fact in splits.test}
    fresh = {fact.id for fact in invented.forget} & asked if invented is not None and name != FRESH else set()
    return [(name, frozenset(asked - fresh)), *([(FRESH, frozenset(fresh))] if fresh else [])]


def _runs(
    attack: Attack, data: AuditData, invented: AuditData | None, seeds: Sequence[int]
) -> Iterator[tuple[str, Attack, Splits, int | None]]:
    """(role if another, attack, what it is given, fold) for each seed and fold. One that draws nothing runs once."""
    invented = None if attack.family == "keeping" else invented
    for seeded in [attack.at(seed) for seed in (seeds if attack.draws else seeds[:1])]:
        if attack.name == "retain":
            yield "", seeded, Splits((), data.retain), None
            continue
        for number, splits in _given(seeded, data, invented if attack.trains else None):
            yield "", seeded, splits, number
        if invented is not None and not attack.trains:
            for number, splits in _given(seeded, invented, None):
                yield FRESH, seeded, splits, number


def _given(attack: Attack, data: AuditData, also: AuditData | None) -> Iterator[tuple[int | None, Splits]]:
    """(fold, splits): each fold for an attack that uses T, else everything at once; V of `also` is asked with it."""
    mine = enumerate(data.folds) if attack.uses_train else [(None, data.whole)]
    for number, splits in mine:
        more = () if also is None else (also.whole if number is None else also.folds[number]).test
        yield number, replace(splits, test=(*splits.test, *more))


def _one(
    role: Role, other: str, subject: Subject, attack: Attack, splits: Splits, fold: int | None, store: FindingStore
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
        if not is_out_of_memory(error):
            raise
        return replace(attack, run=lambda *_: Outcome({}, MEMORY, status=SKIPPED))(subject, splits)
