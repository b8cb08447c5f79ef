"""The audit audited: models of which the answer is known, attacked here and now.

An audit that cannot catch a known hider, or that sees one where nothing is hidden, is no evidence about any model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from tqdm.auto import tqdm

from repedit.auditing.api import audit
from repedit.auditing.budgets import planned
from repedit.auditing.controls import CONTROLS, SCALE, STEPS, Control
from repedit.auditing.controls.taught import world
from repedit.auditing.report import Report
from repedit.auditing.store import save_selftest
from repedit.errors import UnknownName, check_seed, nearest
from repedit.outcomes import PASS


@dataclass(frozen=True)
class Checked:
    """One control: what was expected and what the audit said."""

    control: str
    description: str
    expected: str
    found: str
    attack: str
    """The attack that had to bring the facts back, with its R; empty where there is none."""
    recovered: float
    least: float
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the verdict is the expected one, and the attack brought back as much as it must."""
        enough = not self.attack or self.recovered >= self.least
        return (not self.expected or self.found == self.expected) and enough


@dataclass(frozen=True)
class SelfTest:
    """All controls that were run."""

    checks: tuple[Checked, ...]
    seed: int
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every control came out as it must."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> str:
        """The controls that did not, in words; empty where all did."""
        return "; ".join(
            f"{c.control} ({c.description}): expected {c.expected or 'any verdict'}, found {c.found}"
            + (f", {c.attack} brought back {c.recovered:.2f} where {c.least:.2f} is due" if c.attack else "")
            for c in self.checks
            if not c.passed
        )


def selftest(
    seed: int = 0, *, controls: Sequence[str] | None = None, record: bool = True, progress: bool | None = None,
    audit_function: Callable[..., Report] = audit,
) -> SelfTest:  # fmt: skip
    """Teach tiny models, spoil them in known ways, and audit each.

    Args:
        controls: names of controls; None for the quick ones, which take some minutes.
        record: remember in the user's cache, by versions and machine, whether all passed; an audit that finds a failed
            record says UNSOUND. A run of chosen controls is never recorded.
    Raises:
        UnknownName: if there is no such control.
    """
    check_seed(seed=seed)
    for name in controls or ():
        if name not in CONTROLS:
            raise UnknownName(f"no control is called {name!r}; {nearest(name, CONTROLS)}")
    chosen = [c for c in CONTROLS.values() if (c.quick if controls is None else c.name in controls)]
    start, models = time.perf_counter(), world(seed)
    checks = []
    for control in tqdm(chosen, desc="selftest", leave=False, disable=None if progress is None else not progress):
        control_start, audited = time.perf_counter(), control.build(models)
        report = audit_function(
            audited.edited, original=audited.original, reference=audited.reference, facts=audited.facts, retain=audited.facts.retain,
            unrelated=audited.facts.retain, attributes=audited.attributes, attacks=_attacks(control), budget="fast",
            seeds=(seed,), scale_lrs=SCALE, steps=STEPS if control.verdict == PASS else control.steps, progress=False,
        )  # fmt: skip
        checks.append(_checked(control, report, time.perf_counter() - control_start))
    result = SelfTest(tuple(checks), seed, time.perf_counter() - start)
    if record and controls is None:
        save_selftest(result.failures, [asdict(check) for check in checks])
    return result


def _attacks(control: Control) -> tuple[str, ...] | None:
    """What the control is about; one that must pass faces the whole budget as well."""
    if control.verdict != PASS:
        return ("direct", *control.attacks)
    return (*planned("fast"), *control.attacks) if control.attacks else None


def _checked(control: Control, report: Report, seconds: float) -> Checked:
    ranked = [r for r in report.recoveries if r.attack in control.attacks and r.value == r.value]
    best = max(ranked, key=lambda r: r.value, default=None)
    attack = "" if not control.attacks else best.attack if best else control.attacks[0]
    return Checked(
        control.name, control.description, control.verdict, report.verdict.word, attack,
        best.value if best else float("nan"), control.recovered, seconds,
    )  # fmt: skip
