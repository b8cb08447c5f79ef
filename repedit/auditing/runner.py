"""Running the attacks: every attack on every model, seed and fold; models are loaded one at a time; and the progress bar."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from repedit.activations.forward import is_out_of_memory
from repedit.auditing.attack import SKIPPED, Attack, AttackResult, Finding, merged_folds
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
            # A tensor that two modules share is one parameter: a head that was untied is another.
            self.shapes = {name: tuple(p.shape) for name, p in subject.model.named_parameters()}
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
# made once more, with invented facts in the place of T and V; and so is one that trains on attributes of the entities, with
# invented names in the place of theirs, because the attributes alone narrow the answers down.


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
    renamed: AuditData | None = None
    """The facts and their attributes under invented names, for attacks that train on attributes."""


Findings = dict[str, tuple[Finding, ...]]
Judge = Callable[[Findings, tuple[str, ...]], tuple[str, bool]]
"""(findings so far, attacks not made yet) -> (the verdict so far, whether that is enough)."""


def run(
    roles: Sequence[Role],
    seeds: Sequence[int],
    store: FindingStore,
    *,
    progress: bool | None,
    judge: Judge | None = None,
) -> Findings:
    """The findings of every role; one an attack and seed, its folds joined.

    The facts simply asked and the checks come first, then each attack in turn on every model. One model is open at a
    time, and only if something of it is not stored; every second stage takes the models in reverse, so that the last
    one of a stage stays open.

    Args:
        judge: called before every stage but the first; the attacks end when it says that this is enough.
    Raises:
        RepeditError: what an attack raised, with model and attack named; nothing failed becomes "no recovery".
    """
    stages = _stages(roles, seeds, store)
    tasks = [task for stage in stages for task in stage.tasks]
    stored = [(task.part, task.stored.seconds) for task in tasks if task.stored is not None]
    collected: dict[tuple[str, str], list[Finding]] = {}
    with _OneModel() as model, Bar([task.part for task in tasks], stored, progress) as bar:
        for number, stage in enumerate(stages):
            if judge is not None and number:
                left = tuple(attack for later in stages[number:] for attack in later.attacks)
                bar.verdict, enough = judge(_in_order(roles, collected), left)
                if enough:
                    break
            asked = {role: findings[0] for (role, attack), findings in collected.items() if attack == "direct"}
            for key, finding in _findings(stage, asked, model, store, bar):
                collected.setdefault(key, []).append(finding)
    return _in_order(roles, collected)


@dataclass(frozen=True, eq=False)
class _Task:
    """One attack with one seed on one fold."""

    made_on: Role
    role: str
    """The role whose findings it gives."""
    attack: Attack
    splits: Splits
    fold: int | None
    """None where everything is asked at once."""
    stored: Finding | None = None
    """What was found at another time."""
    direct: Finding | None = None
    """What was found on the model when it was simply asked, if it was."""

    @cached_property
    def part(self) -> Part:
        """The task as the progress bar sees it."""
        return Part(self.role, self.attack, len(self.splits.test))

    @cached_property
    def key(self) -> str:
        """What the finding is stored by."""
        return key_of(self.attack, self.made_on.model.fingerprint, self.splits)

    @property
    def storable(self) -> bool:
        """Whether the finding may be stored, and a stored one be used."""
        return self.attack.storable and not self.made_on.model.hooked

    @property
    def name(self) -> str:
        """The name of the stored finding."""
        options = hashlib.sha256(repr(sorted(self.attack.options.items(), key=str)).encode()).hexdigest()[:6]
        fold = "all" if self.fold is None else self.fold
        return f"{self.attack.name}-{self.role.replace(' ', '-')}-{self.attack.seed}-{fold}-{options}"


class _Stage(NamedTuple):
    """What is made before the next look: one attack on every model, or the facts simply asked and the checks."""

    attacks: tuple[str, ...]
    tasks: tuple[_Task, ...]


class _OneModel:
    """The model that is attacked; another one is opened only after it is closed, and found unchanged."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._role: Role | None = None
        self._subject: Subject | None = None

    def __enter__(self) -> _OneModel:
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def of(self, role: Role) -> Subject:
        """The model of a role."""
        if self._subject is None or role is not self._role:
            self._opened.close()
            self._role, self._subject = role, self._opened.enter_context(role.model.opened())
        return self._subject


def _stages(roles: Sequence[Role], seeds: Sequence[int], store: FindingStore) -> list[_Stage]:
    attacks = roles[0].attacks
    asked = tuple(attack for attack in attacks if attack.name == "direct")
    stages = []
    for number, group in enumerate([asked, *((attack,) for attack in attacks if attack not in asked)]):
        tasks = []
        for role in roles if number % 2 == 0 else roles[::-1]:
            tasks += [task for attack in group for task in _tasks(role, attack, seeds)]
            if number == 0:
                tasks += [_Task(role, role.name, check.at(seeds[0]), splits, None) for check, splits in role.checks]
        stages.append(_Stage(tuple(a.name for a in group), tuple(_looked_up(task, store) for task in tasks)))
    return stages


def _tasks(role: Role, attack: Attack, seeds: Sequence[int]) -> Iterator[_Task]:
    """Of an attack on a model: one a seed and fold; what draws nothing runs with one seed."""
    record = attack.record
    for seed in seeds if record.draws else seeds[:1]:
        seeded = attack.at(seed)
        again = role.renamed if record.attributes else None
        if again is None and not record.trains:
            again = role.invented
        for fold, splits in _folds(seeded, role.data, role.invented if again is None else None):
            yield _Task(role, role.name, seeded, splits, fold)
        if again is not None:
            for fold, splits in _folds(seeded, again, None):
                yield _Task(role, FRESH, seeded, splits, fold)


def _folds(attack: Attack, data: AuditData, also: AuditData | None) -> Iterator[tuple[int | None, Splits]]:
    """(fold, splits): each fold for an attack that uses T, else everything at once; V of `also` is asked with it."""
    kind = "fifths" if attack.record.four_fifths else "folds"
    parts = enumerate(getattr(data, kind)[: attack.folds]) if attack.record.uses_train else [(None, data.whole)]
    for number, splits in parts:
        more = () if also is None else (also.whole if number is None else getattr(also, kind)[number]).test
        yield number, replace(splits, test=(*splits.test, *more))


def _looked_up(task: _Task, store: FindingStore) -> _Task:
    """The task with what is stored of it; of a model with hooks, which have no name, nothing is stored."""
    if not task.storable:
        return task
    return replace(task, stored=store.get(task.name, task.key, sharing=task.made_on.shared))


def _findings(
    stage: _Stage, asked: Mapping[str, Finding], model: _OneModel, store: FindingStore, bar: Bar
) -> Iterator[tuple[tuple[str, str], Finding]]:
    """((role, attack), finding), folds merged; invented facts are a role of their own."""
    folds: dict[tuple[str, str, int], list[Finding]] = {}
    for planned in stage.tasks:
        task = replace(planned, direct=asked.get(planned.role))
        bar.begin(task.part)
        finding = task.stored or _attacked_and_stored(task, model.of(task.made_on), store)
        bar.end(task.part, finding.seconds)
        for name, items in _items_by_role(task, task.made_on.invented):
            # One training made both; its cost is counted once.
            part = finding if name == task.role else replace(finding, seconds=0.0, tokens=0)
            folds.setdefault((name, task.attack.name, task.attack.seed), []).append(part.restricted(items))
    yield from (((name, attack), merged_folds(parts)) for (name, attack, _), parts in folds.items())


def _items_by_role(task: _Task, invented: AuditData | None) -> list[tuple[str, frozenset[str]]]:
    """The facts asked, by the role they are asked for."""
    asked = {fact.id for fact in task.splits.test}
    fresh = {fact.id for fact in invented.forget} & asked if invented is not None and task.role != FRESH else set()
    return [(task.role, frozenset(asked - fresh)), *([(FRESH, frozenset(fresh))] if fresh else [])]


def _in_order(roles: Sequence[Role], collected: Mapping[tuple[str, str], Sequence[Finding]]) -> Findings:
    """The findings by role, in the order of attacks and checks."""
    names = [(role, role.name) for role in roles] + [(role, FRESH) for role in roles if role.invented or role.renamed]
    return {
        name: tuple(f for a in (*role.attacks, *(c for c, _ in role.checks)) for f in collected.get((name, a.name), ()))
        for role, name in names
    }


def _attacked_and_stored(task: _Task, subject: Subject, store: FindingStore) -> Finding:
    place = f"attacking the {task.made_on.name} model"
    with during(place, f"while {place}"):
        finding = _as_asked(task, subject) or _attacked(task.attack, subject, task.splits)
    if task.storable and finding.reason != MEMORY:
        store.put(task.name, task.key, finding, sharing=task.made_on.shared)
    return finding


def _as_asked(task: _Task, subject: Subject) -> Finding | None:
    """The answers of `direct`, for an attack that leaves the model as it is; None where it has to be made."""
    start, unchanged, direct = time.perf_counter(), task.attack.record.unchanged, task.direct
    if unchanged is None or direct is None or direct.items != tuple(fact.id for fact in task.splits.test):
        return None
    result = unchanged(subject)
    if result is None:
        return None
    seconds = time.perf_counter() - start
    return replace(
        direct, attack=task.attack.name, seed=task.attack.seed, reason=result.reason, details=result.details, tokens=0, seconds=seconds
    )  # fmt: skip


def _attacked(attack: Attack, subject: Subject, splits: Splits) -> Finding:
    try:
        return attack(subject, splits)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return replace(attack, run=lambda *_: AttackResult({}, MEMORY, status=SKIPPED))(subject, splits)


# --- The progress bar: the verdict so far, the running attack, and the time that is left


STEP = 20
"""Questions that take as long as a training step; used until a finding of either kind has been measured."""
_FORMAT = "{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Part(NamedTuple):
    """A part of an audit: an attack on one model, and how many facts it is asked."""

    model: str
    attack: Attack
    facts: int

    @property
    def work(self) -> float:
        """Its work in questions."""
        return float(self.attack.work.questions * self.facts + STEP * self.attack.work.steps)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What its rate is taken from, the most alike first: the same attack, those that train or do not, all."""
        same = f"{self.attack.name} {sorted(self.attack.options.items(), key=str)}"
        return same, "trains" if self.attack.record.trains else "asks", ""


class TimeLeft:
    """Seconds that parts of an audit take, learned from the seconds that others took.

    seconds = work * rate; the rate is seconds over work of the parts that were made with the same attack, else of those
    that train, or that do not, else of all.
    """

    def __init__(self) -> None:
        self._totals: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def learn(self, part: Part, seconds: float) -> None:
        """Take note of how long a part took."""
        for kind in part.kinds if seconds > 0 and part.work > 0 else ():
            total, work = self._totals[kind]
            self._totals[kind] = total + seconds, work + part.work

    def seconds(self, parts: Iterable[Part]) -> float | None:
        """How long these parts take; None before anything was learned."""
        rates = {kind: seconds / work for kind, (seconds, work) in self._totals.items()}
        if not rates:
            return None
        return float(sum(part.work * next(rates[kind] for kind in part.kinds if kind in rates) for part in parts))


class Bar:
    """A progress bar over the parts of an audit; those that are stored take no time, and teach how long others take."""

    def __init__(self, parts: Iterable[Part], stored: Iterable[tuple[Part, float]], shown: bool | None) -> None:
        self._left, self._time, self.verdict = list(parts), TimeLeft(), ""
        """The verdict so far, empty while there is none."""
        self._stored = set()
        for part, seconds in stored:
            self._time.learn(part, seconds)
            self._stored.add(id(part))
        disable = None if shown is None else not shown
        self._bar = tqdm(total=len(self._left), desc="audit", leave=False, disable=disable, bar_format=_FORMAT)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def begin(self, part: Part) -> None:
        """Show which part is at work."""
        seconds = self._time.seconds(p for p in self._left if id(p) not in self._stored)
        so_far = f"{self.verdict} so far" if self.verdict else ""
        left = "" if seconds is None else f"at most {_duration(seconds)} left"
        self._bar.set_postfix_str("; ".join(filter(None, (so_far, f"{part.model}: {part.attack.name}", left))))

    def end(self, part: Part, seconds: float) -> None:
        """Take note of a part that is done."""
        if id(part) not in self._stored:
            self._time.learn(part, seconds)
        self._left = [p for p in self._left if p is not part]
        self._bar.update()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
