"""Figures of audits: recovered fractions, accuracy during relearning, accuracy by layer; and the small charts of a run.

`ForestRow` and `Curves` hold the values that are drawn. The figures of this module, the HTML pages, which embed them,
and the Markdown texts all take their values from there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repedit.arguments import checked
from repedit.auditing.attack import RAN, SKIPPED, Finding, Setting
from repedit.auditing.report import COMPLETE, RETAIN_CHECK, Recovery, Report
from repedit.errors import ArgumentError, UnknownSite
from repedit.plot.canvas import (
    FORGET,
    MARKERS,
    NEUTRAL,
    RETAIN,
    SERIES,
    SMALL,
    Canvas,
    canvas,
    escape_figure,
    label_text,
    legend_below,
)
from repedit.sites import Site

# --- Values: the rows of a forest plot, and accuracies by training step or by layer


LEVELS: Mapping[str, tuple[int, str]] = {"B": (2, "attacker has prompts only"), "W": (3, "attacker has the weights")}
"""What an attacker has access to: the index of its colour and marker, and its name in the legend."""
ROLES = ("edited", "original", "reference", "fresh facts")
R_LIMITS = (-0.3, 1.3)
"""Range of the axis of recovered fractions; values outside are drawn as arrows at its ends."""
Points = tuple[tuple[int, float], ...]
"""(x, accuracy on V), with x ascending."""


@dataclass(frozen=True)
class ForestRow:
    """One attack on one model, as a row of a forest plot."""

    name: str
    series: int
    """Index of its colour and marker."""
    recovery: Recovery
    group: str = ""
    """The heading above it; empty for none."""

    @property
    def evidence(self) -> bool:
        """Whether the attack ran and counts towards the verdict."""
        return _is_evidence(self.recovery)

    @property
    def label(self) -> str:
        """R with its interval, or the reason why the attack is not evidence."""
        recovery = self.recovery
        reason = recovery.status if recovery.status != RAN else "" if recovery.decides else "not deciding"
        if not is_measured(recovery.value):
            return reason
        return f"{recovery.value:.2f} {reason or interval_text(recovery)}".strip()


@dataclass(frozen=True)
class Curves:
    """Accuracies of several models against training steps or layers."""

    name: str
    series: Mapping[str, Points]
    """Points by model; "floor" is a constant."""
    marked: frozenset[int] = field(default_factory=frozenset)
    """Highlighted values of x, such as the edited layers."""


def is_measured(*values: float) -> bool:
    """Whether none of the values is NaN; an infinite end of an interval is a measured value."""
    return not any(np.isnan(values))


def shown_interval(recovery: Recovery) -> tuple[float, float]:
    """The simultaneous interval over all attacks; the interval of this attack alone if there is none."""
    return recovery.bound if is_measured(*recovery.bound) else recovery.interval


def interval_text(recovery: Recovery) -> str:
    """ "[0.31, 0.55]", with a star if it holds for this attack alone; empty if there is no interval or R is undefined."""
    low, high = shown_interval(recovery)
    if not is_measured(recovery.value, low, high):
        return ""
    return f"[{low:.2f}, {high:.2f}]" + ("" if is_measured(*recovery.bound) else "*")


def recoveries_by_strength(report: Report) -> list[Recovery]:
    """All recoveries, strongest first, and the attacks on the edited model that were skipped and have none."""
    measured = {r.attack for r in report.recoveries} | {RETAIN_CHECK}
    skipped = {f.attack: f for f in report.findings.get("edited", ()) if f.attack not in measured and f.status != RAN}
    others = [Recovery(f.attack, f.status, f.reason) for f in skipped.values()]
    return sorted([*report.recoveries, *others], key=_rank)


def forest_rows(report: Report) -> list[ForestRow]:
    """One row per attack: strongest first, then attacks that are not evidence, then those that did not run."""
    return [ForestRow(r.attack, LEVELS.get(r.level, (5, ""))[0], r) for r in recoveries_by_strength(report)]


def grouped_forest_rows(reports: Mapping[str, Report]) -> list[ForestRow]:
    """The attacks of several reports under one heading each; the attack with the largest recovery in any report first.

    Attacks that are not evidence in any report are left out.
    """
    by_report = {name: {r.attack: r for r in recoveries_by_strength(report)} for name, report in reports.items()}
    attacks = {attack: None for recoveries in by_report.values() for attack in recoveries}
    missing = Recovery("", SKIPPED, "not part of this audit")

    def strongest(attack: str) -> float:
        return min(_rank(recoveries[attack]) for recoveries in by_report.values() if attack in recoveries)

    return [
        ForestRow(name, series, recoveries.get(attack, missing), attack)
        for attack in sorted(attacks, key=strongest)
        if any(_is_evidence(recoveries[attack]) for recoveries in by_report.values() if attack in recoveries)
        for series, (name, recoveries) in enumerate(by_report.items())
    ]


def thresholds(report: Report) -> tuple[float, float]:
    """The recovery threshold and the pass threshold, also of a report that an earlier version wrote."""
    values = {**report.context, **report.context.get("thresholds", {})}
    recovery_threshold = values.get("recovery_threshold", values.get("material", 0.1))
    pass_threshold = values.get("pass_threshold", values.get("clear", 0.2))
    return float(recovery_threshold), float(pass_threshold)


def relearning_curves(report: Report) -> list[Curves]:
    """Accuracy against training steps, for each attack whose settings name at least two steps.

    Each point is the highest accuracy at that step over all other settings, such as the learning rate, of the mean over
    seeds: the worst case for the edit.
    """
    charts = []
    for attack, findings_by_role in _findings_by_attack(report, lambda setting: setting.step is not None):
        series = {role: _best_by_step(findings) for role, findings in findings_by_role.items()}
        if len({x for points in series.values() for x, _ in points}) > 1:
            charts.append(Curves(attack, _with_floor(report, attack, series)))
    return charts


def layer_curves(report: Report) -> list[Curves]:
    """Accuracy against layers, for each attack and stream with settings such as "resid.post 3"."""
    sites = report.context.get("sites") or ()
    edited = frozenset(layer for layer in map(_layer, sites) if layer is not None)
    charts = []
    for attack, findings_by_role in _findings_by_attack(report, lambda setting: setting.site is not None):
        by_stream: dict[str, dict[str, Points]] = {}
        for role, findings in findings_by_role.items():
            for stream, points in _points_by_stream(findings).items():
                by_stream.setdefault(stream, {})[role] = points
        charts += [Curves(f"{attack}, {stream}", series, edited) for stream, series in by_stream.items()]
    return charts


def _layer(site: object) -> int | None:
    """The layer of an edited site; None for a text that is not a site, such as a redacted one."""
    try:
        return site if isinstance(site, int) else Site.parse(str(site)).layer
    except UnknownSite:
        return None


def _is_evidence(recovery: Recovery) -> bool:
    return recovery.status == RAN and recovery.decides


def _clip(value: float) -> float:
    """Where a recovered fraction is drawn."""
    return min(max(value, R_LIMITS[0]), R_LIMITS[1])


def _rank(recovery: Recovery) -> float:
    """Sort key: low for what comes first."""
    penalty = 10.0 * (not recovery.decides) + 100.0 * (recovery.status != RAN) + 1000.0 * (recovery.status == SKIPPED)
    return penalty + (5.0 if np.isnan(recovery.value) else -_clip(recovery.value))


def _findings_by_attack(
    report: Report, wanted: Callable[[Setting], bool]
) -> Iterator[tuple[str, dict[str, list[Finding]]]]:
    """Attacks with a wanted setting, and their findings by role; skipped attacks have no settings."""
    attacks = {f.attack: None for role in ROLES for f in report.findings.get(role, ())}
    for attack in attacks:
        by_role = {role: [f for f in report.findings.get(role, ()) if f.attack == attack and f.items] for role in ROLES}
        by_role = {role: findings for role, findings in by_role.items() if findings}
        if any(wanted(setting) for findings in by_role.values() for f in findings for setting in f.accuracy):
            yield attack, by_role


def _mean_accuracies(findings: Sequence[Finding]) -> dict[Setting, float]:
    """Accuracy by setting, averaged over seeds."""
    by_setting: dict[Setting, list[float]] = {}
    for finding in findings:
        for setting, accuracy in finding.accuracy.items():
            by_setting.setdefault(setting, []).append(accuracy)
    return {setting: float(np.mean(accuracies)) for setting, accuracies in by_setting.items()}


def _best_by_step(findings: Sequence[Finding]) -> Points:
    best: dict[int, float] = {}
    for setting, accuracy in _mean_accuracies(findings).items():
        if setting.step is not None:
            best[setting.step] = max(accuracy, best.get(setting.step, 0.0))
    return tuple(sorted(best.items()))


def _points_by_stream(findings: Sequence[Finding]) -> dict[str, Points]:
    points: dict[str, list[tuple[int, float]]] = {}
    for setting, accuracy in _mean_accuracies(findings).items():
        if setting.site is not None:
            points.setdefault(str(setting.site.point), []).append((setting.site.layer, accuracy))
    return {stream: tuple(sorted(rows)) for stream, rows in points.items()}


def _with_floor(report: Report, attack: str, series: dict[str, Points]) -> dict[str, Points]:
    """The series, with the floor as a constant where no model stands for it."""
    recovery = next((r for r in report.recoveries if r.attack == attack), None)
    if recovery is None or np.isnan(recovery.floor) or {"reference", "fresh facts"} & set(series):
        return series
    steps = [x for points in series.values() for x, _ in points]
    return series | {"floor": ((min(steps), recovery.floor), (max(steps), recovery.floor))}


# --- The figures of an audit


STYLES: Mapping[str, Mapping[str, Any]] = {
    "edited": {"color": FORGET, "linestyle": "-", "marker": "o"},
    "original": {"color": RETAIN, "linestyle": "--", "marker": "s"},
    "reference": {"color": NEUTRAL, "linestyle": ":", "marker": "^"},
    "fresh facts": {"color": NEUTRAL, "linestyle": "-.", "marker": "D"},
    "floor": {"color": NEUTRAL, "linestyle": ":", "marker": ""},
}
"""Line style of each model of an audit."""
NO_EVIDENCE: Mapping[str, Any] = {"facecolor": "white", "edgecolor": "#d0d0d0", "hatch": "///", "linewidth": 0}
"""Fill of a row that is not evidence."""


@checked
def recovery(report: Report) -> Figure:
    """Recovered fractions: one row per attack, the strongest first, beside the accuracies they are computed from.

    Left, R = (edited - floor) / (original - floor) with its simultaneous interval over all attacks; right, the
    accuracies of the edited model, the original and the floor after the attack. Hatched rows are not evidence.

    Raises:
        ArgumentError: if the report holds no attack.
    """
    return recovery_forest(report).finish(f"{report.verdict.word}: what each attack brings back", _facts(report))


@checked
def audits(reports: Mapping[str, Report]) -> Figure:
    """The recovered fractions of several reports in one figure, attack by attack; the colour is the report.

    Raises:
        ArgumentError: if there is no report, or none holds an attack.
    """
    if not reports:
        raise ArgumentError("audits() was given no report to draw; pass {name: report}")
    title = f"What each attack brings back from {len(reports)} models"
    return audits_forest(reports).finish(title, _facts(next(iter(reports.values()))))


@checked
def relearning(report: Report) -> Figure:
    """Accuracy on held-out facts or images against training steps or epochs, for attacks that fine-tune.

    Every point is the worst case, the highest accuracy over learning rates at that step; for several retrained
    classifiers it is the mean.

    Raises:
        ArgumentError: if no attack names two steps in its settings, as in "lr=5e-05 step=40".
    """
    charts = relearning_curves(report)
    if not charts:
        raise ArgumentError(
            "no attack of this report has settings of at least two steps, such as 'lr=5e-05 step=40'; audit with an attack that fine-tunes"
        )
    title = (
        "Relearning: one half of the forget set is trained on, V is the other"
        if report.gaps
        else "Relearning: worst case over learning rates at each step"
    )
    return _panels(charts, 3, "epoch" if report.gaps else "training step", title, _facts(report))


@checked
def lenses(report: Report) -> Figure:
    """Accuracy of what is read from each layer, one panel per attack and stream; grey bands are the edited layers.

    Raises:
        ArgumentError: if no attack names layers in its settings, as in "resid.post 3".
    """
    charts = layer_curves(report)
    if not charts:
        raise ArgumentError(
            "no attack of this report has settings such as 'resid.post 3'; audit with logit_lens or probe"
        )
    facts = _facts(report) + (["grey: edited layers"] if charts[0].marked else [])
    streams = Counter(chart.name.split(",")[0] for chart in charts)
    return _panels(charts, min(max(streams.values()), 4), "layer", "What can be read from each layer", facts)


def recovery_forest(report: Report, *, width: float = 10.0) -> Canvas:
    """The forest plot of `recovery` without its title, as pages show it; see `_forest` for the width."""
    rows = forest_rows(report)
    levels = {row.recovery.level for row in rows}
    legend = {series: name for level, (series, name) in LEVELS.items() if level in levels}
    return _forest(rows, legend, thresholds(report), width)


def audits_forest(reports: Mapping[str, Report], *, width: float = 10.0) -> Canvas:
    """The forest plot of `audits` without its title, as pages show it; see `_forest` for the width."""
    legend = {series: f"{name}: {report.title}" for series, (name, report) in enumerate(reports.items())}
    return _forest(grouped_forest_rows(reports), legend, thresholds(next(iter(reports.values()))), width)


def curves(chart: Curves, x: str) -> Figure:
    """One panel of `relearning` or `lenses` without its title, as pages show it."""
    figure = canvas(*CHART_SIZE)
    axes = figure.subplots()
    _draw_curves(axes, chart, x)
    axes.set_ylabel("accuracy on V")
    _add_role_legend(figure, axes, [chart], columns=3)
    ends = "; ".join(f"{role} {points[0][1]:.2f} to {points[-1][1]:.2f}" for role, points in chart.series.items())
    figure.set_label(f"{chart.name}, accuracy by {x}: {ends}")
    escape_figure(figure)
    return figure


def _facts(report: Report) -> list[str]:
    """What a title says of an audit: its budget, the number of facts, and the floor."""
    context = report.context
    facts = [] if report.state == COMPLETE else [f"{report.state}, {len(report.recoveries)} attacks made"]
    facts += [f"budget {context['budget']}"] if "budget" in context else []
    facts += [f"{context['n_test']:,} facts tested"] if "n_test" in context else []
    floors = sorted({r.floor_name for r in report.recoveries if r.floor_name})
    return facts + ([f"floor: {', '.join(floors)}"] if floors else [])


def _forest(rows: Sequence[ForestRow], legend: Mapping[int, str], bands: tuple[float, float], width: float) -> Canvas:
    """The rows with a legend below, `width` inches wide.

    Below `NARROW` inches there is no panel of accuracies, and the names stand above the rows. The label of the figure
    tells its values to screen readers.
    """
    if not rows:
        raise ArgumentError("the report holds no attack to draw; was the audit finished?")
    heights, headings = _heights(rows)
    count = max(heights) + 1
    if width < NARROW:
        figure = canvas(width, 2.2 + 0.42 * count)
        left = figure.subplots()
        _name_above(left, rows, heights, headings)
        left.set(xlabel="recovered fraction R")
    else:
        figure = canvas(width, 2.4 + 0.27 * count)
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(5, 2))
        for y, row in zip(heights, rows, strict=True):
            _draw_interval(left, y, row, height=0.72)
        _draw_accuracies(right, rows, heights)
        _name_beside(left, rows, heights, headings)
        left.set(xlabel="recovered fraction R: 0 never knew, 1 the original")
    _draw_bands(left, bands)
    for series, name in legend.items():
        left.plot([], [], **_marker(series), linestyle="", label=label_text(name))
    left.fill_between([], [], [], **NO_EVIDENCE, label="no evidence")
    if width >= NARROW:
        _explain_accuracies(left)
    left.set(xlim=R_LIMITS, ylim=(count - 0.4, -0.6))
    legend_below(figure, left, columns=3 if width >= NARROW else 1)
    values = (f"{row.group} {row.name} {_number(row.recovery.value)}".strip() for row in rows)
    figure.set_label(f"Recovered fraction by attack: {'; '.join(values)}")
    escape_figure(figure)
    return figure


NARROW = 6.0
"""Inches below which a forest plot has one panel."""
CHART_SIZE = (3.1, 2.6)
"""Inches of a small chart of a page."""


def _number(value: float) -> str:
    return f"{value:.2f}" if is_measured(value) else "n/a"


def _heights(rows: Sequence[ForestRow]) -> tuple[list[float], dict[float, str]]:
    """The height of each row, and the headings of groups by their height."""
    heights: list[float] = []
    headings: dict[float, str] = {}
    for number, row in enumerate(rows):
        if row.group and (number == 0 or rows[number - 1].group != row.group):
            headings[float(len(heights) + len(headings))] = row.group
        heights.append(float(len(heights) + len(headings)))
    return heights, headings


def _name_beside(
    axes: Axes, rows: Sequence[ForestRow], heights: Sequence[float], headings: Mapping[float, str]
) -> None:
    """Names of attacks and headings as the labels of the vertical axis."""
    names = {**headings, **{y: row.name for y, row in zip(heights, rows, strict=True)}}
    ticks = sorted(names)
    axes.set_yticks(ticks, [label_text(names[y], 40) for y in ticks], fontsize=9)
    for y, label in zip(ticks, axes.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if y in headings else "normal")


def _name_above(axes: Axes, rows: Sequence[ForestRow], heights: Sequence[float], headings: Mapping[float, str]) -> None:
    """Each row below a line with its name and R."""
    background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    style: dict[str, Any] = {"va": "center", "fontsize": 9, "zorder": 5, "bbox": background}
    style["transform"] = axes.get_yaxis_transform()
    for y, name in headings.items():
        axes.text(0.01, y, label_text(name, 40), fontweight="bold", **style)
    for y, row in zip(heights, rows, strict=True):
        axes.text(0.01, y - 0.25, label_text(row.name, 28), **style)
        axes.text(0.99, y - 0.25, row.label, ha="right", **style)
        _draw_interval(axes, y + 0.22, row, height=0.4)
    axes.set_yticks([])


def _draw_bands(axes: Axes, bands: tuple[float, float]) -> None:
    recovery_threshold, pass_threshold = bands
    for low, high, alpha, meaning in (
        (recovery_threshold, pass_threshold, 0.08, f"above the recovery threshold {recovery_threshold:.2f}"),
        (pass_threshold, 1, 0.16, f"above the pass threshold {pass_threshold:.2f}"),
    ):
        axes.axvspan(low, high, color=NEUTRAL, alpha=alpha, linewidth=0, label=meaning)
    for x in (0, 1):
        axes.axvline(x, color="black", linewidth=0.9)


def _marker(series: int) -> dict[str, Any]:
    return {"color": SERIES[series % len(SERIES)], "marker": MARKERS[series % len(MARKERS)], "markersize": 6.5}


def _draw_interval(axes: Axes, y: float, row: ForestRow, *, height: float) -> None:
    """Point and interval; a row that is not evidence is grey, hollow and hatched."""
    value, (low, high) = row.recovery.value, shown_interval(row.recovery)
    style = _marker(row.series)
    if not row.evidence:
        axes.axhspan(y - height / 2, y + height / 2, **NO_EVIDENCE, zorder=1.5)
        style |= {"color": NEUTRAL, "fillstyle": "none"}
    if row.recovery.status == SKIPPED:
        return
    if is_measured(low, high):
        axes.plot([_clip(low), _clip(high)], [y, y], color=style["color"], linewidth=2.2, zorder=3)
    if is_measured(value):
        if value != _clip(value):
            style["marker"] = ">" if value > 1 else "<"
        axes.plot([_clip(value)], [y], linestyle="", zorder=4, clip_on=False, **style)


_ACCURACIES = (("reference", "|", 11.0), ("original", "|", 11.0), ("edited", "o", 5.0))
"""Role, marker and size of the accuracies beside a forest plot; the floor has the colour of the reference."""


def _draw_accuracies(axes: Axes, rows: Sequence[ForestRow], heights: Sequence[float]) -> None:
    """Floor and original as ticks, the edited model as a dot, and R as text."""
    for y, row in zip(heights, rows, strict=True):
        values = {"reference": row.recovery.floor, "original": row.recovery.original, "edited": row.recovery.edited}
        axes.plot([values["reference"], values["original"]], [y, y], color="#bdbdbd", linewidth=1.2, zorder=1)
        for role, marker, size in _ACCURACIES:
            color, edge = STYLES[role]["color"], 2 if marker == "|" else 1
            axes.plot(values[role], y, marker, color=color, markersize=size, markeredgewidth=edge)
        axes.text(1.03, y, row.label, transform=axes.get_yaxis_transform(), va="center", fontsize=SMALL)
    axes.grid(axis="x", alpha=0.25)
    axes.set(xlim=(-0.03, 1.03), xlabel="accuracy after the attack")


def _explain_accuracies(axes: Axes) -> None:
    """Legend entries for the markers of `_draw_accuracies`."""
    names = {"edited": "edited", "original": "original (ceiling)", "reference": "floor"}
    for role, marker, size in reversed(_ACCURACIES):
        edge = 2 if marker == "|" else 1
        axes.plot([], [], marker, color=STYLES[role]["color"], markersize=size, markeredgewidth=edge, label=names[role])


def _panels(charts: Sequence[Curves], columns: int, x: str, title: str, facts: Sequence[str]) -> Figure:
    """Panels of accuracy curves with one legend."""
    columns = min(len(charts), columns)
    rows = math.ceil(len(charts) / columns)
    figure = canvas(max(6.0, 3.6 * columns), 1.5 + 2.5 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, chart in zip(grid.flat, charts, strict=False):
        _draw_curves(axes, chart, x)
        axes.set_title(label_text(chart.name, 40), fontsize=9.5)
    for axes in grid.flat[len(charts) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy on V")
    _add_role_legend(figure, grid[0, 0], charts, columns=5)
    return figure.finish(title, facts)


def _draw_curves(axes: Axes, chart: Curves, x: str) -> None:
    for layer in sorted(chart.marked):
        axes.axvspan(layer - 0.5, layer + 0.5, color=NEUTRAL, alpha=0.2, linewidth=0)
    for role, points in chart.series.items():
        steps, accuracies = np.array(points).T
        axes.plot(steps, accuracies, **STYLES[role], linewidth=1.5, markersize=3.5)
    axes.set(ylim=(-0.03, 1.03), xlabel=x)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.25)


def _add_role_legend(figure: Figure, axes: Axes, charts: Sequence[Curves], columns: int) -> None:
    for role, style in STYLES.items():
        if any(role in chart.series for chart in charts):
            axes.plot([], [], **style, markersize=3.5, label=role)
    legend_below(figure, axes, columns)


# --- Small charts for the page of a run; the label of a figure tells its values to screen readers


def bars(values: Mapping[int, float], x: str, y: str) -> Figure:
    """One bar, from 0, at each integer of the x axis."""
    figure, axes = _small_chart(x, y)
    axes.bar(list(values), list(values.values()), width=0.7, color=FORGET)
    largest = max(values, key=lambda at: values[at])
    figure.set_label(f"{y} by {x}: {len(values)} values, the largest {values[largest]:.4g} at {x} {largest}")
    return figure


def ranges(values: Mapping[int, tuple[float, float, float, float]], x: str, y: str) -> Figure:
    """(low, median, high, maximum) at each integer of the x axis: a line with a stroke at the median, and a dot."""
    figure, axes = _small_chart(x, y)
    low, median, high, maximum = np.array(list(values.values())).T
    at = np.array(list(values))
    axes.vlines(at, low, high, color=FORGET, linewidth=1.6)
    axes.hlines(median, at - 0.35, at + 0.35, color=FORGET, linewidth=1.6)
    axes.plot(at, maximum, "o", color=FORGET, markersize=3.5)
    figure.set_label(f"{y} by {x}; the largest, {maximum.max():.4g}, is at {x} {at[maximum.argmax()]}")
    return figure


def drops(rows: Sequence[tuple[str, str, float, float, float]]) -> Figure:
    """(edit, set, drop, low, high) as a dot with its interval on one line each, per cent; NaN bounds draw no interval."""
    figure = canvas(CHART_SIZE[0], 1.1 + 0.32 * len(rows))
    axes = figure.subplots()
    colours = dict(zip(dict.fromkeys(row[1] for row in rows), (FORGET, RETAIN, *SERIES[2:]), strict=False))
    for y, (_, of, drop, low, high) in enumerate(rows):
        colour = colours.get(of, NEUTRAL)
        axes.plot([low, high], [y, y], color=colour, linewidth=1.6)
        axes.plot([drop], [y], "o", color=colour, markersize=5)
    axes.axvline(0, color=NEUTRAL, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [label_text(f"{edit}: {of}", 34) for edit, of, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("relative drop of top-1 accuracy, %")
    axes.grid(axis="x", alpha=0.25)
    values = ", ".join(f"{edit} on {of} {drop:.1f} ({low:.1f} to {high:.1f})" for edit, of, drop, low, high in rows)
    figure.set_label(f"relative drop of top-1 accuracy, per cent: {values}")
    return figure


def course(name: str, values: Sequence[float]) -> Figure:
    """Values over training steps, from step 1; the line has a gap where a value is not finite."""
    figure, axes = _small_chart("training step", "")
    finite = np.isfinite(values)
    steps, line = np.arange(1, len(values) + 1), np.where(finite, values, np.nan)
    axes.plot(steps, line, color=FORGET, linewidth=1.5)
    neighbours = np.concatenate([[False], finite, [False]])
    alone = finite & ~neighbours[:-2] & ~neighbours[2:]  # a line of one point would not be seen
    axes.plot(steps[alone], line[alone], "o", color=FORGET, markersize=3.5)
    first, last = (f"{value:.4g}" if math.isfinite(value) else "n/a" for value in (values[0], values[-1]))
    gaps = f"; {(~finite).sum()} not finite" if not finite.all() else ""
    figure.set_label(f"{name}: {first} at the first of {len(values)} steps, {last} at the last{gaps}")
    return figure


def _small_chart(x: str, y: str) -> tuple[Figure, Axes]:
    figure = canvas(CHART_SIZE[0], 2.3)
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes
