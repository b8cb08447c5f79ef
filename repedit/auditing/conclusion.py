"""From findings to a report: recoveries with their floors, what was kept, the verdict, and what a reader should see."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np

from repedit.auditing.attack import RAN, SKIPPED, Attack, Finding
from repedit.auditing.budgets import NAMES, UNTRIED, planned
from repedit.auditing.data import AuditData
from repedit.auditing.floors import heuristic_values, spelling_values
from repedit.auditing.report import Recovery, Report, RetainCheck
from repedit.auditing.runner import FRESH, MEMORY, Role
from repedit.auditing.selftest_record import selftest_failures
from repedit.auditing.statistics import Series, chosen, knowledge, recoveries
from repedit.auditing.verdict import EXCUSED, verdict
from repedit.data.fact_sets import entity_of
from repedit.data.rows import row_hash
from repedit.errors import BadReference

Findings = Mapping[str, tuple[Finding, ...]]
EXAMPLES = 10
_PACKAGES = ("repedit", "torch", "transformers", "numpy")


@dataclass(frozen=True, eq=False)
class Case:
    """Everything an audit did, before anything is concluded."""

    roles: Sequence[Role]
    findings: Findings
    asked: AuditData
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
    seconds: float

    @property
    def entities(self) -> dict[str, str]:
        """Item id to entity, over every role."""
        asked = [part for role in self.roles for part in (role.data, role.invented) if part is not None]
        return {item: entity for part in asked for item, entity in part.entities.items()}

    @property
    def attacks(self) -> tuple[Attack, ...]:
        """Those made on the edited model, without the check of what was kept."""
        return tuple(attack for attack in self.roles[0].attacks if attack.name not in ("retain", "choices only"))

    def found(self, role: str, attack: str) -> list[Finding]:
        """The findings of one attack on one model, one a seed."""
        return [f for f in self.findings.get(role, ()) if f.attack == attack]


def concluded(case: Case) -> Report:
    """The report of a case.

    Raises:
        BadReference: if the reference knows the facts.
    """
    guesses = _guesses(case)
    rows = [_series(case, attack, guesses) for attack in case.attacks if _counts(case, attack)]
    options: dict[str, Any] = {"draws": case.draws, "alpha": case.alpha, "seed": case.seeds[0]}
    found = recoveries(rows, case.entities, **options)
    direct = next(row for row in rows if row.attack == "direct")
    _, low, _ = knowledge(direct, case.entities, **options)
    _check_reference(case, direct, options)
    retain = _retain(case)
    not_run = {r.attack: r.reason for r in found if r.status != RAN}
    said = verdict(
        found, retain, known=low, n_test=len(case.asked.tested), budget=case.budget, seeds=len(case.seeds),
        recovery_threshold=case.recovery_threshold, pass_threshold=case.pass_threshold, alpha=case.alpha, allow_small=case.allow_small,
        not_run=_missing(case), unsound=selftest_failures() or "", excused=_excused(case),
    )  # fmt: skip
    ordered = sorted(found, key=lambda r: -r.value if r.value == r.value else np.inf)
    return Report(
        verdict=said, recoveries=tuple(ordered), retain=retain, findings=case.findings,
        not_run=not_run | _missing(case) | _untried(case),
        heuristics={name: float(values.mean()) for name, values in guesses.items()},
        examples=tuple(_examples(case, found)), diagnostics=_diagnostics(case), context=_context(case, low),
    )  # fmt: skip


def _counts(case: Case, attack: Attack) -> bool:
    """Whether the attack says which facts are right: membership inference tells sets apart, not facts."""
    return any(f.items or f.status == SKIPPED for f in case.found("edited", attack.name))


def _excused(case: Case) -> frozenset[str]:
    """Attacks that had nothing to work on; one that lacked memory is never excused."""
    starved = {f.attack for found in case.findings.values() for f in found if f.reason == MEMORY}
    return EXCUSED - starved


def _guesses(case: Case) -> dict[str, Any]:
    """What guesses get right, fact by fact, in the order of V; among them the original shown the choices alone."""
    found = dict(heuristic_values(case.asked.folds))
    for blind in case.found("original", "choices only"):
        place = {item: float(right) for item, right in zip(blind.items, blind.correct[0], strict=True)}
        found["choices only"] = np.array([place[fact.id] for fact in case.asked.tested])
    return found


def _series(case: Case, attack: Attack, guesses: Mapping[str, Any]) -> Series:
    """One attack on edited, original and floor. Where it has nothing to work on in the original or the floor, such as a
    null space, they are as they are when simply asked."""
    edited = case.found("edited", attack.name)
    floor, name = _floor(case, edited, guesses)
    original = tuple(_or_direct(case, "original", edited))
    return Series(tuple(edited), original, floor, name, attack.level, attack.decides, case.seeds[0])


def _or_direct(case: Case, role: str, edited: Sequence[Finding]) -> list[Finding]:
    found = case.found(role, edited[0].attack)
    if edited[0].status == SKIPPED or not found or found[0].status != SKIPPED:
        return found
    return [replace(f, attack=edited[0].attack, settings=("as it is",)) for f in case.found(role, "direct")]


def _floor(case: Case, edited: Sequence[Finding], guesses: Mapping[str, Any]) -> tuple[Any, str]:
    """The reference after the attack; else the larger of the invented facts and the best guess."""
    if case.found("reference", "direct"):
        return tuple(_or_direct(case, "reference", edited)), "reference"
    name, best = max(guesses.items(), key=lambda item: float(item[1].mean()))
    fresh = _or_direct(case, FRESH, edited)
    if fresh and fresh[0].status != SKIPPED and fresh[0].items:
        rate = np.mean([chosen(f, case.entities, case.seeds[0]).values.mean() for f in fresh])
        if rate >= best.mean():
            return tuple(fresh), FRESH
    # The guess holds for V in the order of the folds; an attack may have asked it in another.
    place = {fact.id: i for i, fact in enumerate(case.asked.tested)}
    return np.array([best[place[item]] for item in edited[0].items], dtype=np.float64), name


def _check_reference(case: Case, direct: Series, options: Mapping[str, Any]) -> None:
    if direct.floor_name != "reference":
        return
    guess = 1 / np.mean([len(fact.choices) or np.inf for fact in case.asked.tested])
    assert isinstance(direct.floor, tuple)
    as_edited = replace(direct, edited=direct.floor, floor=float(guess))
    (found,) = recoveries([as_edited], case.entities, **options)
    if found.interval[0] > case.recovery_threshold:
        raise BadReference(
            f"the reference knows the facts: {found.edited:.3f} of them are right when simply asked, where guessing gives "
            f"{guess:.3f}; give a model that was trained without them"
        )


def _retain(case: Case) -> RetainCheck:
    sides = [case.found(role, "retain")[0] for role in ("original", "edited")]
    right = [float(f.correct.mean()) for f in sides if f.items]
    read = [float(f.details["perplexity"]) for f in sides if "perplexity" in f.details]
    return RetainCheck(
        (right[0], right[1]) if right else None, (read[0], read[1]) if read else None,
        len(sides[0].items), int(sides[0].details.get("tokens", 0)),
    )  # fmt: skip


def _missing(case: Case) -> dict[str, str]:
    """Deciding attacks of the budget that were left out by name."""
    return {name: "not asked for" for name in planned(case.budget) if name not in case.planned and name != "membership"}


def _untried(case: Case) -> dict[str, str]:
    rest = {name: f"needs a larger budget than {case.budget!r}" for name in NAMES if name not in planned(case.budget)}
    return {name: why for name, why in rest.items() if name not in case.planned} | UNTRIED


def _examples(case: Case, found: Sequence[Recovery]) -> Iterator[Mapping[str, Any]]:
    """Facts that the edited model had wrong and has right after the strongest attack, and the original had right."""
    ranked = sorted((r for r in found if r.decides and r.value > 0 and r.attack != "direct"), key=lambda r: -r.value)
    before = {role: _right(case.found(role, "direct")) for role in ("edited", "original")}
    facts = {fact.id: fact for fact in case.asked.forget}
    seen: set[str] = set()
    for recovery in ranked:
        for finding in case.found("edited", recovery.attack)[:1]:
            row = int(finding.correct.mean(1).argmax())
            for item, right, grade in zip(finding.items, finding.correct[row], finding.graded[row], strict=True):
                known = before["original"][item][0] and not before["edited"][item][0]
                if right and known and item not in seen and len(seen) < EXAMPLES:
                    seen.add(item)
                    yield {
                        "id": item, "prompt": facts[item].prompt, "answer": facts[item].answer, "attack": recovery.attack,
                        "setting": finding.settings[row], "log_probability": {
                            "original": before["original"][item][1], "edited": before["edited"][item][1], "attacked": float(grade),
                        },
                    }  # fmt: skip


def _right(found: Sequence[Finding]) -> dict[str, tuple[bool, float]]:
    first = found[0]
    return {i: (bool(c), float(g)) for i, c, g in zip(first.items, first.correct[0], first.graded[0], strict=True)}


def _diagnostics(case: Case) -> dict[str, Any]:
    found = case.found("edited", "membership")
    return {"membership": dict(found[0].details)} if found else {}


def _context(case: Case, known: float) -> dict[str, Any]:
    models = {role.name: role.model for role in case.roles}
    notes = list(case.asked.notes)
    if len(case.seeds) == 1:
        notes.append("one seed: intervals exclude training noise")
    spelt = float(spelling_values(case.asked.tested).mean())
    if spelt > 0.3:
        notes.append(
            f"the choice that begins like the entity is right for {spelt:.2f} of the facts: no knowledge is needed"
        )
    if selftest_failures() is None:
        notes.append("the self-test was not run with this code on this machine: repedit audit --selftest")
    if any(fact.id.startswith("invented") for fact in case.asked.forget):
        notes.append("taught facts: robustness may be overstated")
    return {
        "budget": case.budget, "attacks": list(case.planned), "seeds": list(case.seeds), "n_test": len(case.asked.tested),
        "n_entities": len({entity_of(f) for f in case.asked.tested}), "known": known, "draws": case.draws,
        "recovery_threshold": case.recovery_threshold, "pass_threshold": case.pass_threshold, "alpha": case.alpha, "sites": case.edited_layers, "notes": notes,
        "models": {role: {"name": m.name, "fingerprint": m.fingerprint, "live": m.live} for role, m in models.items()},
        "facts": row_hash(case.asked.forget), "retain": row_hash(case.asked.retain),
        "command": case.command, "versions": {name: version(name) for name in _PACKAGES}, "machine": platform.machine(), "seconds": case.seconds,
    }  # fmt: skip
