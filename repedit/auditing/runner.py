"""Carrying attacks out: every attack on every model, seed and fold; models are loaded one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm.auto import tqdm

from repedit.activations.forward import is_out_of_memory
from repedit.auditing.attack import SKIPPED, Attack, AttackRecord, AttackResult, Finding, merged_folds
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
            layers = sorted({Site.parse(name).layer for name in dict(sites)})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the sites of {manifest} cannot be read: {error}; export again") from error
        return tuple(layers) or None


def check_pair(edited: Audited, original: Audited) -> None:
    """Refuse models that cannot be compared.

    Raises:
        FingerprintError: if architecture, vocabulary or tokenizer differ; with the first difference.
        NoOpEdit: if every weight is equal.
    """
    for name, value in edited.kind.items():
        if value != original.kind[name]:
            raise FingerprintError(
                f"{edited.role} and {original.role} are models of different kinds: {name} is {value!r} and "
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


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    text = json.dumps(sorted(tokenizer.get_vocab().items())) + repr(tokenizer("It is 7 o'clock, Zoë.")["input_ids"])
    return hashlib.sha256(text.encode()).hexdigest()


# --- Carrying attacks out: every attack on every model, seed and fold, kept on disk as it goes
#
# Where invented facts are the floor, the models that a training attack makes of the edited one are asked them as well:
# the floor is then the accuracy of the very model that was attacked, on facts nobody can know. Every other attack is
# made once more, with invented facts in the place of T and V.


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
    checks: tuple[tuple[Attack, Splits], ...] = ()
    """What is measured beside the attacks, with the facts that are asked for it."""
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
    total = sum(len(tasks) for role in roles for tasks in _tasks(role, seeds))
    names = [role.name for role in roles] + [FRESH for role in roles if role.invented is not None]
    findings_by_role: dict[str, list[Finding]] = {name: [] for name in names}
    with tqdm(total=total, desc="audit", leave=False, disable=None if progress is None else not progress) as bar:
        for role in roles:
            with role.model.opened() as subject:
                for name, finding in _findings(role, subject, seeds, store, bar):
                    findings_by_role[name].append(finding)
    return {name: tuple(findings) for name, findings in findings_by_role.items()}


class _Task(NamedTuple):
    """One attack with one seed on one fold."""

    role: str
    """The role whose findings it gives."""
    attack: Attack
    splits: Splits
    fold: int | None
    """None where everything is asked at once."""


def _findings(
    role: Role, subject: Subject, seeds: Sequence[int], store: FindingStore, bar: tqdm
) -> Iterator[tuple[str, Finding]]:
    """(role, finding): an attack and seed, its folds merged; invented facts are a role of their own."""
    for tasks in _tasks(role, seeds):
        folds: dict[tuple[str, int], list[Finding]] = {}
        for task in tasks:
            bar.set_postfix_str(f"{task.role}: {task.attack.name}")
            finding = _stored_or_attacked(role, task, subject, store)
            for name, items in _items_by_role(task, role.invented):
                # One training made both; its cost is counted once.
                part = finding if name == task.role else replace(finding, seconds=0.0, tokens=0)
                folds.setdefault((name, task.attack.seed), []).append(part.restricted(items))
            bar.update()
        yield from ((name, merged_folds(parts)) for (name, _), parts in folds.items())


def _items_by_role(task: _Task, invented: AuditData | None) -> list[tuple[str, frozenset[str]]]:
    """The facts asked, by the role they are asked for."""
    asked = {fact.id for fact in task.splits.test}
    fresh = {fact.id for fact in invented.forget} & asked if invented is not None and task.role != FRESH else set()
    return [(task.role, frozenset(asked - fresh)), *([(FRESH, frozenset(fresh))] if fresh else [])]


def _tasks(role: Role, seeds: Sequence[int]) -> Iterator[list[_Task]]:
    """For every attack its tasks, one a seed and fold, then those of the checks; what draws nothing runs with one seed."""
    for attack in role.attacks:
        record, tasks = attack.record, []
        for seed in seeds if record.draws else seeds[:1]:
            for fold, splits in _folds(record, role.data, role.invented if record.trains else None):
                tasks.append(_Task(role.name, attack.at(seed), splits, fold))
            if role.invented is not None and not record.trains:
                tasks += [_Task(FRESH, attack.at(seed), s, fold) for fold, s in _folds(record, role.invented, None)]
        yield tasks
    for check, splits in role.checks:
        yield [_Task(role.name, check.at(seeds[0]), splits, None)]


def _folds(record: AttackRecord, data: AuditData, also: AuditData | None) -> Iterator[tuple[int | None, Splits]]:
    """(fold, splits): each fold for an attack that uses T, else everything at once; V of `also` is asked with it."""
    kind = "fifths" if record.four_fifths else "folds"
    for number, splits in enumerate(getattr(data, kind)) if record.uses_train else [(None, data.whole)]:
        more = () if also is None else (also.whole if number is None else getattr(also, kind)[number]).test
        yield number, replace(splits, test=(*splits.test, *more))


def _stored_or_attacked(role: Role, task: _Task, subject: Subject, store: FindingStore) -> Finding:
    attack, fold = task.attack, "all" if task.fold is None else task.fold
    key = key_of(attack, role.model.fingerprint, task.splits)
    options = hashlib.sha256(repr(sorted(attack.options.items(), key=str)).encode()).hexdigest()[:6]
    name = f"{attack.name}-{task.role.replace(' ', '-')}-{attack.seed}-{fold}-{options}"
    stored = None if role.model.hooked else store.get(name, key, sharing=role.shared)
    if stored is not None:
        return stored
    place = f"attacking the {role.name} model"
    with during(place, f"while {place}"):
        finding = _attacked(attack, subject, task.splits)
    if not role.model.hooked and finding.reason != MEMORY:
        store.put(name, key, finding, sharing=role.shared)
    return finding


def _attacked(attack: Attack, subject: Subject, splits: Splits) -> Finding:
    try:
        return attack(subject, splits)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return replace(attack, run=lambda *_: AttackResult({}, MEMORY, status=SKIPPED))(subject, splits)
