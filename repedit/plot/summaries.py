"""What is drawn of an audit: its attacks as lines, accuracies by training step, and by layer.

No figure is made here: the figures of this package and the pages of a report draw the same values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from repedit.attacks.attack import RAN, SKIPPED, Finding
from repedit.attacks.judging.evidence import Recovery, Report
from repedit.errors import UnknownSite
from repedit.sites import Site

LEVELS: Mapping[str, tuple[int, str]] = {
    "B": (2, "attacker has prompts only"),
    "W": (3, "attacker has the weights"),
}
"""What an attacker holds: the tone that says so, and its words."""
ROLES = ("edited", "original", "reference", "fresh facts")
KEPT = "retain"
"""The name of findings that are no attack but the check of what should have been kept."""
ENDS = (-0.3, 1.3)
"""The recovered fractions that are drawn; what lies beyond stands at the end, as an arrow."""


@dataclass(frozen=True)
class Line:
    """One attack on one model, as a row of a plot of recoveries."""

    name: str
    tone: int
    """Which colour and mark it has."""
    recovery: Recovery
    group: str = ""
    """The heading it stands under; empty for none."""

    @property
    def evidence(self) -> bool:
        """Whether it ran and counts."""
        return _counts(self.recovery)

    @property
    def note(self) -> str:
        """Why it is no evidence; empty where it is."""
        if self.recovery.status != RAN:
            return self.recovery.status
        return "" if self.recovery.decides else "shown, never deciding"


@dataclass(frozen=True)
class Chart:
    """Accuracies of several models along one axis."""

    name: str
    series: Mapping[str, tuple[tuple[int, float], ...]]
    """(x, accuracy on V) by model; what is called "floor" is a constant."""
    marked: frozenset[int] = field(default_factory=frozenset)
    """Values of x that are marked, such as edited layers."""


def span(recovery: Recovery) -> tuple[float, float]:
    """The interval that holds over all attacks at once; that of the attack alone where there is none."""
    return recovery.bound if measured(*recovery.bound) else recovery.interval


def measured(*values: float) -> bool:
    """Whether none of them is NaN; an infinite end of an interval is known."""
    return not any(np.isnan(values))


def clipped(value: float) -> float:
    """The value at which a recovered fraction is drawn."""
    return min(max(value, ENDS[0]), ENDS[1])


def lines(report: Report) -> list[Line]:
    """One line an attack, the strongest first; then those that are no evidence, then those that did not run."""
    return [Line(r.attack, LEVELS.get(r.level, (5, ""))[0], r) for r in ordered(report)]


def lines_of_several(reports: Mapping[str, Report]) -> list[Line]:
    """The attacks of several reports, one below the other; the attack that brings back most in any comes first.

    An attack that is evidence in none of them is left out.
    """
    found = {name: {r.attack: r for r in ordered(report)} for name, report in reports.items()}
    attacks = {attack: None for rows in found.values() for attack in rows}
    missing = Recovery("", SKIPPED, "not part of this audit")

    def strongest(attack: str) -> float:
        return min(_rank(rows[attack]) for rows in found.values() if attack in rows)

    return [
        Line(name, tone, rows.get(attack, missing), attack)
        for attack in sorted(attacks, key=strongest)
        if any(_counts(rows[attack]) for rows in found.values() if attack in rows)
        for tone, (name, rows) in enumerate(found.items())
    ]


def ordered(report: Report) -> list[Recovery]:
    """Every recovery, and every attack on the edited model that was skipped and has none; strongest first."""
    known = {r.attack for r in report.recoveries} | {KEPT}
    rest = {f.attack: f for f in report.findings.get("edited", ()) if f.attack not in known and f.status != RAN}
    more = [Recovery(f.attack, f.status, f.reason) for f in rest.values()]
    return sorted([*report.recoveries, *more], key=_rank)


def thresholds(report: Report) -> tuple[float, float]:
    """Material and clear: what counts as recovery, and below what none was found."""
    known = {**report.context, **report.context.get("thresholds", {})}
    return float(known.get("material", 0.1)), float(known.get("clear", 0.2))


def relearning_charts(report: Report) -> list[Chart]:
    """Accuracy against training steps, one chart an attack that names at least two steps in its settings.

    At every step the highest accuracy over all other settings, such as the learning rate, of the mean over seeds: the
    worst case for who wants the facts gone.
    """
    charts = []
    for name, roles in _by_attack(report, _STEP):
        series = {role: _worst(found) for role, found in roles.items()}
        if len({x for points in series.values() for x, _ in points}) > 1:
            charts.append(Chart(name, _with_floor(report, name, series)))
    return charts


def layer_charts(report: Report) -> list[Chart]:
    """Accuracy against layers, one chart an attack and stream, for settings such as "resid.post 3"."""
    sites = report.context.get("sites") or ()
    layers = frozenset(layer for layer in map(_layer, sites) if layer is not None)
    charts = []
    for name, roles in _by_attack(report, _LAYER):
        curves: dict[str, dict[str, tuple[tuple[int, float], ...]]] = {}
        for role, found in roles.items():
            for stream, points in _streams(found).items():
                curves.setdefault(stream, {})[role] = points
        charts += [Chart(f"{name}, {stream}", series, layers) for stream, series in curves.items()]
    return charts


def _layer(site: Any) -> int | None:
    """The layer of an edited site; None of a text that names none, such as one that is withheld."""
    try:
        return site if isinstance(site, int) else Site.parse(str(site)).layer
    except UnknownSite:
        return None


_STEP = r"(?:^|\s)(?:step|epoch)=(\d+)"
_LAYER = r"^([a-z][a-z._]*) (\d+)$"


def _counts(recovery: Recovery) -> bool:
    return recovery.status == RAN and recovery.decides


def _rank(recovery: Recovery) -> float:
    """Low for what comes first."""
    missing = 10.0 * (not recovery.decides) + 100.0 * (recovery.status != RAN) + 1000.0 * (recovery.status == SKIPPED)
    return missing + (5.0 if np.isnan(recovery.value) else -clipped(recovery.value))


def _by_attack(report: Report, pattern: str) -> Iterator[tuple[str, dict[str, list[Finding]]]]:
    """Attacks of which a setting has this form, with their findings by role; skipped ones have no settings."""
    names = {f.attack: None for role in ROLES for f in report.findings.get(role, ())}
    for name in names:
        roles = {role: [f for f in report.findings.get(role, ()) if f.attack == name and f.items] for role in ROLES}
        roles = {role: found for role, found in roles.items() if found}
        if any(re.search(pattern, setting) for found in roles.values() for f in found for setting in f.settings):
            yield name, roles


def _means(found: Sequence[Finding]) -> dict[str, float]:
    """Accuracy by setting, over seeds."""
    rows: dict[str, list[float]] = {}
    for finding in found:
        for setting, accuracy in finding.accuracy.items():
            rows.setdefault(setting, []).append(accuracy)
    return {setting: float(np.mean(values)) for setting, values in rows.items()}


def _worst(found: Sequence[Finding]) -> tuple[tuple[int, float], ...]:
    best: dict[int, float] = {}
    for setting, accuracy in _means(found).items():
        step = re.search(_STEP, setting)
        if step:
            best[int(step[1])] = max(accuracy, best.get(int(step[1]), 0.0))
    return tuple(sorted(best.items()))


def _with_floor(
    report: Report, attack: str, series: dict[str, tuple[tuple[int, float], ...]]
) -> dict[str, tuple[tuple[int, float], ...]]:
    """The series, with a floor that no model gives as a constant."""
    floor = next((r for r in report.recoveries if r.attack == attack), None)
    if floor is None or np.isnan(floor.floor) or {"reference", "fresh facts"} & set(series):
        return series
    ends = [x for points in series.values() for x, _ in points]
    return series | {"floor": ((min(ends), floor.floor), (max(ends), floor.floor))}


def _streams(found: Sequence[Finding]) -> dict[str, tuple[tuple[int, float], ...]]:
    points: dict[str, list[tuple[int, float]]] = {}
    for setting, accuracy in _means(found).items():
        named = re.search(_LAYER, setting)
        if named:
            points.setdefault(named[1], []).append((int(named[2]), accuracy))
    return {stream: tuple(sorted(rows)) for stream, rows in points.items()}
