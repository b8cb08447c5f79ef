"""What attacks bring back: recovered fractions, accuracy while relearning, and what each layer still holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repedit.attacks.attack import SKIPPED
from repedit.attacks.judging.evidence import Report
from repedit.errors import ArgumentError
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
from repedit.plot.summaries import (
    ENDS,
    LEVELS,
    Chart,
    Line,
    clipped,
    layer_charts,
    lines,
    lines_of_several,
    measured,
    relearning_charts,
    span,
    thresholds,
)

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
