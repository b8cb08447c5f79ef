"""From findings to a report: recovered fractions with their floors, the retain check, the verdict, examples and context."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypedDict

import numpy as np

from repedit.auditing.attack import FAILED, RAN, SKIPPED, Attack, AttackRecord, Finding, Setting, planned, records
from repedit.auditing.attacks.variants import RETRAINING
from repedit.auditing.data import AuditData
from repedit.auditing.floors import (
    CHOICES_ONLY,
    choices_only_name,
    heuristic_values,
    question_values,
    spelling_values,
)
from repedit.auditing.report import COMPLETE, INTERRUPTED, RETAIN_CHECK, Recovery, Report, RetainCheck, Verdict
from repedit.auditing.runner import FRESH, MEMORY, Role
from repedit.auditing.statistics import Series, Values, cross_fitted, knowledge, recoveries
from repedit.auditing.store import selftest_failures
from repedit.auditing.verdict import verdict
from repedit.data.corpus import row_hash
from repedit.data.fact_sets import entity_of
from repedit.errors import BadReference
from repedit.hashing import package_versions

Findings = Mapping[str, tuple[Finding, ...]]
EXAMPLES = 10
DISTILLATION = "the model is not distilled into another one"
SHORT, LONG = (
    "hundreds of steps, other optimisers and other data",
    "more than {} steps, and optimizers other than AdamW, Lion and SGD",
)
"""What training is left untried without attack "retraining", and with it."""


def untried(longest: int | None = None) -> dict[str, str]:
    """What no attack of an audit did, whatever its budget; every report says so.

    Args:
        longest: training steps of the longest variant of "retraining" that ran, with AdamW, Lion and SGD among them;
            None where that is not so.
    """
    return {"distillation": DISTILLATION, "long training": SHORT if longest is None else LONG.format(longest)}


class BootstrapOptions(TypedDict):
    """How intervals are drawn."""

    draws: int
    alpha: float
    seed: int


@dataclass(frozen=True, eq=False)
class CompletedAudit:
    """What an audit did so far, before anything is concluded."""

    roles: Sequence[Role]
    findings: Findings
    data: AuditData
    budget: str
    seeds: tuple[int, ...]
    draws: int
    alpha: float
    recovery_threshold: float
    pass_threshold: float
    allow_small: bool
    edited_layers: tuple[int, ...] | None
    planned: tuple[str, ...]
    command: str
    seconds: float = 0.0
    until: str = "all"
    pending: tuple[str, ...] = ()
    """Attacks that are planned and were not made."""
    state: str = COMPLETE

    @property
    def entities(self) -> dict[str, str]:
        """Item id to entity, over every role."""
        parts = [part for role in self.roles for part in (role.data, role.invented, role.renamed) if part is not None]
        return {item: entity for part in parts for item, entity in part.entities.items()}

    @property
    def attacks(self) -> tuple[Attack, ...]:
        """Those made."""
        return tuple(attack for attack in self.roles[0].attacks if attack.name not in self.pending)

    @property
    def undecided(self) -> tuple[str, ...]:
        """The pending attacks that decide."""
        return tuple(a.name for a in self.roles[0].attacks if a.name in self.pending and a.record.decides)

    @property
    def bootstrap(self) -> BootstrapOptions:
        """How intervals are drawn."""
        return {"draws": self.draws, "alpha": self.alpha, "seed": self.seeds[0]}

    def findings_of(self, role: str, attack: str) -> list[Finding]:
        """The findings of one attack on one model, one a seed."""
        return [f for f in self.findings.get(role, ()) if f.attack == attack]


class Judged(NamedTuple):
    """The verdict of an audit so far, and what it rests on."""

    verdict: Verdict
    recoveries: Sequence[Recovery]
    retain: RetainCheck
    guesses: Mapping[str, Values]
    knowledge_low: float


def judged(audit: CompletedAudit) -> Judged:
    """The verdict by the attacks made so far.

    Raises:
        BadReference: if the reference knows the facts.
    """
    guesses = _guesses(audit)
    series = [_series(audit, attack, guesses) for attack in audit.attacks if _asks_facts(audit, attack)]
    recovered = recoveries(series, audit.entities, pending=len(audit.undecided), **audit.bootstrap)
    direct = next(row for row in series if row.attack == "direct")
    _, knowledge_low, _ = knowledge(direct, audit.entities, **audit.bootstrap)
    _check_reference(audit, direct)
    retain = _retain(audit)
    decision = verdict(
        recovered, retain, knowledge_low=knowledge_low, n_test=len(audit.data.tested), budget=audit.budget, seeds=len(audit.seeds),
        recovery_threshold=audit.recovery_threshold, pass_threshold=audit.pass_threshold, alpha=audit.alpha,
        allow_small=audit.allow_small, not_run=_left_out(audit), pending=audit.undecided,
        unsound=selftest_failures() or "", excused=_excused(audit),
    )  # fmt: skip
    return Judged(decision, recovered, retain, guesses, knowledge_low)


def report_of(audit: CompletedAudit) -> Report:
    """The report of an audit.

    Raises:
        BadReference: if the reference knows the facts.
    """
    decision, recovered, retain, guesses, knowledge_low = judged(audit)
    not_counted = {r.attack: r.reason for r in recovered if r.status != RAN}
    return Report(
        verdict=decision, recoveries=tuple(sorted(recovered, key=lambda r: np.inf if np.isnan(r.value) else -r.value)),
        retain=retain, findings=audit.findings,
        not_run=not_counted | _not_made(audit, decision.word) | _left_out(audit) | _untried(audit),
        heuristics={name: float(values.mean()) for name, values in guesses.items()},
        examples=tuple(_examples(audit, recovered)), diagnostics=_diagnostics(audit), context=_context(audit, knowledge_low),
        state=audit.state,
    )  # fmt: skip


def _not_made(audit: CompletedAudit, word: str) -> dict[str, str]:
    """The pending attacks, and why they were not made."""
    reason = f"not needed, since no further attack changes the verdict {word}"
    return dict.fromkeys(audit.pending, "the audit was interrupted" if audit.state == INTERRUPTED else reason)


def _asks_facts(audit: CompletedAudit, attack: Attack) -> bool:
    """Whether the attack says which facts are right: membership inference tells sets apart, not facts."""
    return any(f.items or f.status == SKIPPED for f in audit.findings_of("edited", attack.name))


def _excused(audit: CompletedAudit) -> frozenset[str]:
    """Attacks that had nothing to work on; one that lacked memory is never excused."""
    starved = {f.attack for findings in audit.findings.values() for f in findings if f.reason == MEMORY}
    return frozenset(record.name for record in records().values() if record.may_skip) - starved


def _guesses(audit: CompletedAudit, record: AttackRecord | None = None) -> dict[str, Values]:
    """What guesses get right, fact by fact, in the order of V; among them the original shown the choices alone.

    Args:
        record: of an attack with questions of its own, about which the guesses are then made.
    """
    folds = audit.data.folds
    guesses = dict(heuristic_values(folds) if record is None else question_values(record, folds))
    for finding in audit.findings_of("original", choices_only_name(record)):
        right = {item: float(value) for item, value in zip(finding.items, finding.correct[0], strict=True)}
        guesses[CHOICES_ONLY.name] = np.array([right[fact.id] for fact in audit.data.tested])
    return guesses


def _series(audit: CompletedAudit, attack: Attack, guesses: Mapping[str, Values]) -> Series:
    edited, record = audit.findings_of("edited", attack.name), attack.record
    if record.questions is not None and edited[0].status != SKIPPED:
        guesses = _guesses(audit, record)
    floor, name = _floor(audit, edited, guesses)
    original = tuple(_attacked_or_direct(audit, "original", edited))
    return Series(tuple(edited), original, floor, name, record.level, record.decides, audit.seeds[0])


def _attacked_or_direct(audit: CompletedAudit, role: str, edited: Sequence[Finding]) -> list[Finding]:
    """The findings of an attack on a model; the direct ones where it has nothing to work on there, as a null space."""
    findings = audit.findings_of(role, edited[0].attack)
    if edited[0].status == SKIPPED or not findings or findings[0].status != SKIPPED:
        return findings
    return [replace(f, attack=edited[0].attack, settings=("as it is",)) for f in audit.findings_of(role, "direct")]


def _floor(
    audit: CompletedAudit, edited: Sequence[Finding], guesses: Mapping[str, Values]
) -> tuple[tuple[Finding, ...] | Values, str]:
    """The reference after the attack; else the larger of the invented facts and the best guess."""
    if audit.findings_of("reference", "direct"):
        return tuple(_attacked_or_direct(audit, "reference", edited)), "reference"
    name, best = max(guesses.items(), key=lambda item: float(item[1].mean()))
    fresh = _attacked_or_direct(audit, FRESH, edited)
    if fresh and fresh[0].status != SKIPPED and fresh[0].items:
        rate = np.mean([cross_fitted(f, audit.entities, audit.seeds[0]).values.mean() for f in fresh])
        if rate >= best.mean():
            return tuple(fresh), FRESH
    # The guess holds for V in the order of the folds; an attack may have asked it in another.
    column = {fact.id: i for i, fact in enumerate(audit.data.tested)}
    return np.array([best[column[item]] for item in edited[0].items], dtype=np.float64), name


def _check_reference(audit: CompletedAudit, direct: Series) -> None:
    if not isinstance(direct.floor, tuple) or direct.floor_name != "reference":
        return
    guess = float(1 / np.mean([len(fact.choices) or np.inf for fact in audit.data.tested]))
    (reference,) = recoveries([replace(direct, edited=direct.floor, floor=guess)], audit.entities, **audit.bootstrap)
    if reference.interval[0] > audit.recovery_threshold:
        raise BadReference(
            f"the reference knows the facts: {reference.edited:.3f} of them are right when simply asked, where guessing gives "
            f"{guess:.3f}; give a model that was trained without them"
        )


def _retain(audit: CompletedAudit) -> RetainCheck:
    sides = [audit.findings_of(role, RETAIN_CHECK)[0] for role in ("original", "edited")]
    accuracies = [float(f.correct.mean()) for f in sides if f.items]
    perplexities = [float(f.details["perplexity"]) for f in sides if "perplexity" in f.details]
    return RetainCheck(
        (accuracies[0], accuracies[1]) if accuracies else None, (perplexities[0], perplexities[1]) if perplexities else None,
        len(sides[0].items), int(sides[0].details.get("tokens", 0)),
    )  # fmt: skip


def _left_out(audit: CompletedAudit) -> dict[str, str]:
    """Deciding attacks of the budget that were not asked for."""
    missing = [name for name in planned(audit.budget) if name not in audit.planned and records()[name].decides]
    return dict.fromkeys(missing, "not asked for")


def _untried(audit: CompletedAudit) -> dict[str, str]:
    larger = [name for name in records() if name not in planned(audit.budget) and name not in audit.planned]
    return dict.fromkeys(larger, f"needs a larger budget than {audit.budget!r}") | untried(_longest(audit))


def _longest(audit: CompletedAudit) -> int | None:
    """Steps of the longest variant of retraining that ran; None unless Lion and SGD were among the variants."""
    ran = [f for f in audit.findings_of("edited", RETRAINING.name) if f.status in (RAN, FAILED)]
    settings = [Setting.parse(name) for finding in ran for name in finding.settings]
    optimizers = {word for setting in settings for word in setting.words}
    return max(setting.step or 0 for setting in settings) if {"lion", "sgd"} <= optimizers else None


def _examples(audit: CompletedAudit, recovered: Sequence[Recovery]) -> Iterator[Mapping[str, Any]]:
    """Facts that the original had right, the edited model had wrong and the strongest attacks bring back."""
    ranked = sorted(
        (r for r in recovered if r.decides and r.value > 0 and r.attack != "direct"), key=lambda r: -r.value
    )
    original, edited = (_answers(audit.findings_of(role, "direct")[0], 0) for role in ("original", "edited"))
    facts = {fact.id: fact for fact in audit.data.forget}
    shown: set[str] = set()
    for recovery in ranked:
        finding = audit.findings_of("edited", recovery.attack)[0]
        row = int(finding.correct.mean(1).argmax())
        for item, (right, grade) in _answers(finding, row).items():
            lost = original[item][0] and not edited[item][0]
            if right and lost and item not in shown and len(shown) < EXAMPLES:
                shown.add(item)
                yield {
                    "id": item, "prompt": facts[item].prompt, "answer": facts[item].answer, "attack": recovery.attack,
                    "setting": finding.settings[row], "log_probability": {
                        "original": original[item][1], "edited": edited[item][1], "attacked": grade,
                    },
                }  # fmt: skip


def _answers(finding: Finding, row: int) -> dict[str, tuple[bool, float]]:
    """By item whether it was right, and its grade, under one setting."""
    columns = zip(finding.items, finding.correct[row], finding.graded[row], strict=True)
    return {item: (bool(right), float(grade)) for item, right, grade in columns}


def _diagnostics(audit: CompletedAudit) -> dict[str, Any]:
    """The details of attacks that are shown beside the verdict and never decide."""
    shown = [attack.name for attack in audit.attacks if not attack.record.decides]
    return {
        name: dict(audit.findings_of("edited", name)[0].details) for name in shown if audit.findings_of("edited", name)
    }


def _notes(audit: CompletedAudit) -> list[str]:
    notes = list(audit.data.notes)
    if len(audit.seeds) == 1:
        notes.append("one seed: intervals exclude training noise")
    spelt = float(spelling_values(audit.data.tested).mean())
    if spelt > 0.3:
        notes.append(
            f"the choice that begins like the entity is right for {spelt:.2f} of the facts: no knowledge is needed"
        )
    if selftest_failures() is None:
        notes.append("the self-test was not run with this code on this machine: repedit audit --selftest")
    if any(fact.id.startswith("invented") for fact in audit.data.forget):
        notes.append("taught facts: robustness may be overstated")
    return notes


def _context(audit: CompletedAudit, knowledge_low: float) -> dict[str, Any]:
    models = {role.name: role.model for role in audit.roles}
    return {
        "budget": audit.budget, "until": audit.until, "attacks": list(audit.planned), "seeds": list(audit.seeds), "n_test": len(audit.data.tested),
        "n_entities": len({entity_of(f) for f in audit.data.tested}), "known": knowledge_low, "draws": audit.draws,
        "recovery_threshold": audit.recovery_threshold, "pass_threshold": audit.pass_threshold, "alpha": audit.alpha,
        "sites": audit.edited_layers, "notes": _notes(audit),
        "models": {role: {"name": m.name, "fingerprint": m.fingerprint, "live": m.live} for role, m in models.items()},
        "facts": row_hash(audit.data.forget), "retain": row_hash(audit.data.retain), "command": audit.command,
        "versions": package_versions("transformers", "numpy"), "machine": platform.machine(), "seconds": audit.seconds,
    }  # fmt: skip
