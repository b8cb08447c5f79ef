"""Figures of pruning: trajectories of forget and retain drops, and selectivities of several methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from repedit.arguments import checked
from repedit.errors import ArgumentError, SelectionError, UnknownName, nearest
from repedit.neurons.trajectory import Trajectory
from repedit.plot.canvas import MARKERS, NEUTRAL, SERIES, SMALL, canvas, data_facts, label_text, model_facts, percent

Points = Sequence[tuple[float, float]] | NDArray[np.float64]
KINDS: Mapping[str, dict[str, Any]] = {
    "mlp": {"color": SERIES[0], "linestyle": "-", "marker": "o"},
    "attention": {"color": SERIES[1], "linestyle": "--", "marker": "s"},
    "random": {"color": "black", "linestyle": "-", "marker": "D"},
}
"""Styles of `selectivity_strip` by kind of pruning."""
NAMES = {"mlp": "MLP neurons", "attention": "attention neurons", "random": "random control"}


@checked
def trajectory(
    *trajectories: Trajectory,
    labels: Sequence[str] | None = None,
    control: Points | None = None,
    limit: float | None = 10.0,
) -> Figure:
    """Forget drop and selectivity against retain drop, with one marker per step and a ring at the best step in the limit.

    The left panel shows the forget drop, the right panel selectivity = forget drop - retain drop; drops are in per cent
    of the original top-1 accuracy. The dashed line is no selectivity.

    Args:
        labels: one name per trajectory; its importance and combination when None.
        control: (retain drop, forget drop) of random prunings; the band is their mean selectivity +- 2 standard
            deviations.
        limit: the largest acceptable retain drop in per cent; None for no limit.
    Raises:
        ArgumentError: if no trajectory is given, the control is empty, or labels do not match.
        SelectionError: if a trajectory has no step that prunes.
    """
    if not trajectories:
        raise ArgumentError("trajectory() was given no trajectory to draw; pass at least one repedit.Trajectory")
    for number, one in enumerate(trajectories):
        if len(one.steps) < 2:
            raise SelectionError(f"trajectory {number} has {len(one.steps)} step, none that prunes; run more steps")
    if control is not None and not len(control):
        raise ArgumentError("control holds no point to draw; pass (retain drop, forget drop) pairs, or None")
    names = _names(trajectories, labels)
    figure = canvas(9.0, 5.0)
    left, right = figure.subplots(1, 2)
    for number, (name, one) in enumerate(zip(names, trajectories, strict=True)):
        _draw(left, right, number, name, one, limit)
    _frame(left, right, limit, control)
    return figure.finish("What pruning costs: forget and retain, step by step", _facts(trajectories), legend=left)


@checked
def selectivity_strip(results: Mapping[str, tuple[float, str]]) -> Figure:
    """Selectivities of several methods on a number line from 0 to 100; the best method has the lowest label.

    Args:
        results: label -> (selectivity, kind); kind is "mlp" (solid), "attention" (dashed) or "random" (black).
    Raises:
        ArgumentError: if there is no result, or a selectivity is not finite. UnknownName: for another kind.
    """
    if not results:
        raise ArgumentError("selectivity_strip() was given no result to draw; pass {label: (selectivity, kind)}")
    for label, (value, kind) in results.items():
        if kind not in KINDS:
            raise UnknownName(f"{label!r} has kind {kind!r}; {nearest(kind, KINDS)}")
        if not math.isfinite(value):
            raise ArgumentError(f"{label!r} has selectivity {value}; a finite number is needed")
    # A larger value has a shorter stem, so a label to the right of its stem crosses no other stem.
    ordered = sorted(results.items(), key=lambda item: -item[1][0])
    figure = canvas(9.0, 1.7 + 0.22 * len(ordered))
    axes = figure.subplots()
    used = {kind for _, kind in results.values()}
    for kind, style in KINDS.items():
        if kind in used:
            axes.plot([], [], **style, markersize=5, label=NAMES[kind])
    for height, (label, (value, kind)) in enumerate(ordered, 1):
        axes.plot([value, value], [0, height], **KINDS[kind], markersize=5, markevery=[1])
        text = f"{label_text(label)}, {value:.1f}"
        axes.annotate(text, (value, height), (6, 0), textcoords="offset points", va="center", fontsize=SMALL)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xlim(min(0.0, ordered[-1][1][0]) - 1.5, max(100.0, ordered[0][1][0]) + 1.5)
    axes.set_ylim(0, len(ordered) + 0.7)
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.set_xlabel("selectivity: forget drop - retain drop, points")
    return figure.finish(
        "Selectivity by method", [f"{len(ordered)} methods", "0 = no selectivity"], legend=axes, columns=3
    )


def _names(trajectories: Sequence[Trajectory], labels: Sequence[str] | None) -> list[str]:
    if labels is None:
        names = [" of ".join(str(t.provenance.get(k, "?")) for k in ("combine", "importance")) for t in trajectories]
        return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]
    if len(labels) != len(trajectories):
        raise ArgumentError(f"{len(labels)} labels for {len(trajectories)} trajectories; give one for each")
    return list(labels)


def _draw(left: Axes, right: Axes, number: int, name: str, trajectory: Trajectory, limit: float | None) -> None:
    retain, forget = np.array(trajectory.drops()).T
    style: dict[str, Any] = {
        "color": SERIES[number % len(SERIES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
    }
    style |= {"linewidth": 1.2, "linestyle": ("-", "--", "-.", ":")[number % 4]}
    ring = "best step" if limit is None else "best step within the limit"
    ring = "" if ring in left.get_legend_handles_labels()[1] else ring
    try:
        best = trajectory.steps.index(trajectory.best(limit))
        note = f"best {forget[best] - retain[best]:.1f} at {percent(trajectory.steps[best].fraction)} pruned"
        for axes, value in ((left, forget), (right, forget - retain)):
            axes.plot(
                retain[best], value[best], "o", color="black", fillstyle="none", markersize=11, zorder=4, label=ring
            )
    except SelectionError:
        note = "no step within the limit"
    left.plot(retain, forget, label=f"{label_text(name)}: {note}", **style)
    right.plot(retain, forget - retain, **style)


def _frame(left: Axes, right: Axes, limit: float | None, control: Points | None) -> None:
    if control is not None:
        _band(left, right, np.asarray(control, dtype=np.float64))
    left.axline((0, 0), slope=1, color="black", linestyle="--", linewidth=0.8, label="no selectivity")
    right.axhline(0, color="black", linestyle="--", linewidth=0.8)
    for axes, name in ((left, "forget drop, % of top-1 accuracy"), (right, "selectivity, points")):
        if limit is not None:
            axes.axvline(limit, color="black", linestyle=":", linewidth=1.2, label=f"retain limit, {limit:g} %")
        axes.set_xlabel("retain drop, % of top-1 accuracy")
        axes.set_ylabel(name)
        axes.grid(alpha=0.25)


def _band(left: Axes, right: Axes, control: NDArray[np.float64]) -> None:
    retain, gap = control[:, 0], control[:, 1] - control[:, 0]
    low, high = gap.mean() - 2 * gap.std(), gap.mean() + 2 * gap.std()
    ends = np.array(left.get_xlim())
    ends = np.array([min(ends[0], retain.min()), max(ends[1], retain.max())])
    name = f"random control, mean ± 2 sd of {len(gap)}"
    left.fill_between(ends, ends + low, ends + high, color=NEUTRAL, alpha=0.25, linewidth=0, label=name)
    right.fill_between(ends, low, high, color=NEUTRAL, alpha=0.25, linewidth=0)
    left.plot(retain, control[:, 1], "x", color=NEUTRAL, markersize=4)
    right.plot(retain, gap, "x", color=NEUTRAL, markersize=4)


def _facts(trajectories: Sequence[Trajectory]) -> list[str]:
    records = [t.provenance for t in trajectories]
    ends = [f"{len(t.steps) - 1} steps to {percent(t.steps[-1].fraction)} pruned" for t in trajectories]
    counts = [[int(p.count.sum()) for p in (t.steps[0].forget, t.steps[0].retain)] for t in trajectories]
    evaluated = [f"evaluated on {f:,} forget and {r:,} retain predictions" for f, r in counts]
    collected = [f"collected on {text}" for t in trajectories for text in data_facts(t.steps[-1].edit.provenance)]
    models = [fact for provenance in records for fact in model_facts(provenance)]
    return [*(f"sites {p['sites']}" for p in records if "sites" in p), *ends, *evaluated, *collected, *models]
