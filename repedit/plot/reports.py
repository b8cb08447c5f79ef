"""What audits found: recovered fractions, accuracy while relearning, and what each layer still holds."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repedit.auditing.attack import RAN, SKIPPED, Finding
from repedit.auditing.report import Recovery, Report
from repedit.errors import ArgumentError, UnknownSite
from repedit.plot.canvas import (
    FORGET,
    MARKERS,
    NEUTRAL,
    RETAIN,
    SERIES,
    SMALL,
    canvas,
    entitle,
    legend_below,
    named,
    plain_texts,
)
from repedit.sites import Site

# --- What is drawn of an audit: its attacks as lines, accuracies by training step, and by layer
#
# No figure is made here: the figures of this package and the pages of a report draw the same values.


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
    """The recovery threshold and the pass threshold, of the context of this version or of an earlier one."""
    known = {**report.context, **report.context.get("thresholds", {})}
    return float(known.get("recovery_threshold", known.get("material", 0.1))), float(
        known.get("pass_threshold", known.get("clear", 0.2))
    )


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


# --- What attacks bring back: recovered fractions, accuracy while relearning, and what each layer still holds


STYLES: Mapping[str, dict[str, Any]] = {
    "edited": {"color": FORGET, "linestyle": "-", "marker": "o"},
    "original": {"color": RETAIN, "linestyle": "--", "marker": "s"},
    "reference": {"color": NEUTRAL, "linestyle": ":", "marker": "^"},
    "fresh facts": {"color": NEUTRAL, "linestyle": "-.", "marker": "D"},
    "floor": {"color": NEUTRAL, "linestyle": ":", "marker": ""},
}
"""How each model of an audit is drawn."""
EMPTY: Mapping[str, Any] = {"facecolor": "white", "edgecolor": "#d0d0d0", "hatch": "///", "linewidth": 0}
"""How a row is filled that is no evidence."""


@plain_texts
def recovery(report: Report) -> Figure:
    """Recovered fractions: one row an attack, the strongest first, with what they are made of on the right.

    Left, R = (edited - floor) / (original - floor) with the interval that holds over all attacks at once; right, the
    accuracies of edited, original and floor after the attack. Hatched rows are no evidence.

    Raises:
        ArgumentError: if the report holds no attack.
    """
    rows = lines(report)
    used = {row.recovery.level for row in rows}
    legend = {tone: words for level, (tone, words) in LEVELS.items() if level in used}
    return _forest(
        rows, legend, thresholds(report), f"{report.verdict.word}: what each attack brings back", _facts(report)
    )


@plain_texts
def audits(reports: Mapping[str, Report]) -> Figure:
    """The recoveries of several reports in one figure, attack by attack; the colour is the report.

    Raises:
        ArgumentError: if there is no report, or none holds an attack.
    """
    if not reports:
        raise ArgumentError("audits() was given no report to draw; pass {name: report}")
    legend = {tone: f"{name}: {report.verdict.word}" for tone, (name, report) in enumerate(reports.items())}
    first = next(iter(reports.values()))
    head = f"What each attack brings back from {len(reports)} models"
    return _forest(lines_of_several(reports), legend, thresholds(first), head, _facts(first))


@plain_texts
def relearning(report: Report) -> Figure:
    """Accuracy on facts or images never trained on, against training steps or epochs, for attacks that fine-tune.

    Every point is the worst case, the highest accuracy over learning rates at that step; of several retrained classifiers
    it is the mean.

    Raises:
        ArgumentError: if no attack names two steps in its settings, as "lr=5e-05 step=40".
    """
    charts = relearning_charts(report)
    if not charts:
        raise ArgumentError(
            "no attack of this report has settings of at least two steps, such as 'lr=5e-05 step=40'; audit with an attack that fine-tunes"
        )
    if report.gaps:
        return _charts(
            charts, 3, "epoch", "Relearning: one half of the forget set is trained on, V is the other", _facts(report)
        )
    return _charts(
        charts, 3, "training step", "Relearning: worst case over learning rates at each step", _facts(report)
    )


@plain_texts
def lenses(report: Report) -> Figure:
    """What is read from each layer, one panel an attack and stream; grey bands are the edited layers, where known.

    Raises:
        ArgumentError: if no attack names layers in its settings, as "resid.post 3".
    """
    charts = layer_charts(report)
    if not charts:
        raise ArgumentError(
            "no attack of this report has settings such as 'resid.post 3'; audit with logit_lens or probe"
        )
    facts = _facts(report)
    if charts[0].marked:
        facts.append("grey: edited layers")
    streams = Counter(chart.name.split(",")[0] for chart in charts)
    return _charts(charts, min(max(streams.values()), 4), "layer", "What can be read from each layer", facts)


def _facts(report: Report) -> list[str]:
    known = report.context
    facts = [f"budget {known['budget']}"] if "budget" in known else []
    facts += [f"{known['n_test']:,} facts tested"] if "n_test" in known else []
    floors = sorted({r.floor_name for r in report.recoveries if r.floor_name})
    return facts + ([f"floor: {', '.join(floors)}"] if floors else [])


def _forest(
    rows: Sequence[Line], legend: Mapping[int, str], bands: tuple[float, float], head: str, facts: Sequence[str]
) -> Figure:
    if not rows:
        raise ArgumentError("the report holds no attack to draw; was the audit finished?")
    names = _heights(rows)
    figure = canvas(10.0, 2.4 + 0.27 * (max(y for y, _ in names) + 1))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(5, 2))
    _bands(left, bands)
    for tone, words in legend.items():
        left.plot([], [], **_mark(tone), linestyle="", label=named(words))
    at = [y for y, name in names if name is not None]
    for y, row in zip(at, rows, strict=True):
        _interval(left, y, row)
        _accuracies(right, y, row)
        right.text(1.03, y, _text(row), transform=right.get_yaxis_transform(), va="center", fontsize=SMALL)
    _keys(left, right)
    headings = [
        (y, row.group) for y, row in zip(at, rows, strict=True) if y - 1 in {h for h, name in names if name is None}
    ]
    ticks = sorted(
        [*((y, row.name) for y, row in zip(at, rows, strict=True)), *((y - 1, group) for y, group in headings)]
    )
    left.set_yticks([y for y, _ in ticks], [named(name, 40) for _, name in ticks], fontsize=9)
    for label, (y, _) in zip(left.get_yticklabels(), ticks, strict=True):
        label.set_fontweight("bold" if y not in at else "normal")
    left.set(xlim=ENDS, ylim=(max(at) + 0.6, -0.6), xlabel="recovered fraction R: 0 never knew, 1 the original")
    right.set(xlim=(-0.03, 1.03), xlabel="accuracy after the attack")
    legend_below(figure, left, columns=3)
    entitle(figure, head, facts)
    return figure


def _heights(rows: Sequence[Line]) -> list[tuple[int, str | None]]:
    """(height, name) of each row; None for the heading of a group."""
    found: list[tuple[int, str | None]] = []
    for number, row in enumerate(rows):
        if row.group and (number == 0 or rows[number - 1].group != row.group):
            found.append((len(found), None))
        found.append((len(found), row.name))
    return found


def _bands(axes: Axes, bands: tuple[float, float]) -> None:
    material, clear = bands
    axes.axvspan(material, clear, color=NEUTRAL, alpha=0.08, linewidth=0, label=f"R above {material:.2f}: material")
    axes.axvspan(clear, 1, color=NEUTRAL, alpha=0.16, linewidth=0, label=f"R above {clear:.2f}: too much for a pass")
    for x in (0, 1):
        axes.axvline(x, color="black", linewidth=0.9)


def _mark(tone: int) -> dict[str, Any]:
    return {"color": SERIES[tone % len(SERIES)], "marker": MARKERS[tone % len(MARKERS)], "markersize": 6.5}


def _interval(axes: Axes, y: int, row: Line) -> None:
    """Point and interval; what is no evidence is grey, hollow and hatched."""
    value, (low, high) = row.recovery.value, span(row.recovery)
    if not row.evidence:
        axes.axhspan(y - 0.36, y + 0.36, **EMPTY, zorder=1.5)
    style = _mark(row.tone) if row.evidence else {**_mark(row.tone), "color": NEUTRAL, "fillstyle": "none"}
    if measured(low, high) and row.recovery.status != SKIPPED:
        axes.plot([clipped(low), clipped(high)], [y, y], color=style["color"], linewidth=2.2, zorder=3)
    if measured(value):
        if value != clipped(value):
            style["marker"] = ">" if value > 1 else "<"
        axes.plot([clipped(value)], [y], linestyle="", zorder=4, clip_on=False, **style)


def _accuracies(axes: Axes, y: int, row: Line) -> None:
    found = row.recovery
    axes.plot([found.floor, found.original], [y, y], color="#bdbdbd", linewidth=1.2, zorder=1)
    for role, value, mark in (
        ("reference", found.floor, "|"),
        ("original", found.original, "|"),
        ("edited", found.edited, "o"),
    ):
        size = 5 if mark == "o" else 11
        axes.plot(value, y, mark, color=STYLES[role]["color"], markersize=size, markeredgewidth=2 if size > 5 else 1)


def _text(row: Line) -> str:
    found = row.recovery
    if not measured(found.value):
        return row.note
    low, high = span(found)
    text = f"{found.value:.2f} [{low:.2f}, {high:.2f}]" if measured(low, high) else f"{found.value:.2f}"
    return f"{text} {row.note}".strip() if found.decides else f"{text} not deciding"


def _keys(left: Axes, right: Axes) -> None:
    """What the marks of the right panel mean, and hatches, in the legend of the left one."""
    left.fill_between([], [], [], **EMPTY, label="no evidence")
    left.plot([], [], "o", color=STYLES["edited"]["color"], markersize=5, label="edited")
    for name, role in (("original (ceiling)", "original"), ("floor", "reference")):
        left.plot([], [], "|", color=STYLES[role]["color"], markersize=11, markeredgewidth=2, label=name)
    right.grid(axis="x", alpha=0.25)


def _charts(charts: Sequence[Chart], columns: int, x: str, head: str, facts: Sequence[str]) -> Figure:
    """Panels of accuracy curves with one legend."""
    columns = min(len(charts), columns)
    rows = math.ceil(len(charts) / columns)
    figure = canvas(max(6.0, 3.6 * columns), 1.5 + 2.5 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, chart in zip(grid.flat, charts, strict=False):
        for layer in sorted(chart.marked):
            axes.axvspan(layer - 0.5, layer + 0.5, color=NEUTRAL, alpha=0.2, linewidth=0)
        for role, points in chart.series.items():
            across, up = np.array(points).T
            axes.plot(across, up, **STYLES[role], linewidth=1.5, markersize=3.5)
        axes.set_title(named(chart.name, 40), fontsize=9.5)
        axes.set(ylim=(-0.03, 1.03), xlabel=x)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
    for axes in grid.flat[len(charts) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy on V")
    for role in STYLES:
        if any(role in chart.series for chart in charts):
            grid[0, 0].plot([], [], **STYLES[role], markersize=3.5, label=role)
    legend_below(figure, grid[0, 0], columns=5)
    entitle(figure, head, facts)
    return figure
