"""What unlearning buys and costs: each recipe as a point, forget against retain, in the regions that its place means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from repedit.errors import ArgumentError, FractionError
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
from repedit.plot.cells import counted

Points = Sequence[tuple[float, float]]
ORIGINAL, RETRAINED = "original", "retrained"
NEAR = 0.05
"""How near to the retrained model, on both axes, counts as like it."""
KEPT, LOST = 0.5, 0.25
"""Shares of the original's value: above the first the forget set is not forgotten, below the second the rest is lost."""
MARGIN = 0.06
"""What the axes show beyond 0 and 1; more than `NEAR`, so that its box is whole."""


@plain_texts
def tradeoff(results: Mapping[str, Points], *, notes: Sequence[str] = ()) -> Figure:
    """Forget against retain, a point a seed: the best place is beside the retrained model, at the upper left.

    Regions are those of the verdicts on metrics: "not forgotten" right of half of the original's forget value, "retain
    lost" below a quarter of its retain value, one of the two signs that a collapse needs. A box around the retrained
    model holds what cannot be told from it here.

    Args:
        results: name -> (forget, retain) of each seed, shares in [0, 1]. "original" must be among the names; "retrained"
            is the model that never saw the forget set.
        notes: what else the title should tell, such as the model and the facts.
    Raises:
        ArgumentError: if "original" is missing, there is nothing beside it, or a name has no point.
        FractionError: if a value lies outside [0, 1].
    """
    _check(results)
    figure = canvas(7.0, 6.4)
    axes = figure.subplots()
    start = _mean(results[ORIGINAL])
    _regions(axes, start)
    if RETRAINED in results:
        forget, retain = _mean(results[RETRAINED])
        box = Rectangle(
            (forget - NEAR, retain - NEAR), 2 * NEAR, 2 * NEAR, label=f"within {NEAR:g} of retrained", zorder=1,
            edgecolor="black", facecolor="none", linestyle="--", linewidth=1.0,
        )  # fmt: skip
        axes.add_patch(box)
    styles = {ORIGINAL: ("black", "*", 130.0), RETRAINED: ("black", "D", 55.0)}
    for number, name in enumerate(name for name in results if name not in styles):
        styles[name] = (SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)], 50.0)
    for name, points in results.items():
        color, marker, size = styles[name]
        forgotten, kept = zip(*points, strict=True)
        axes.scatter(
            forgotten, kept, color=color, marker=marker, s=size, label=named(name), zorder=3, alpha=0.85,
            edgecolors="white", linewidths=0.6, clip_on=False,
        )  # fmt: skip
    _count_shared(axes, results)
    axes.set(
        xlabel="forget: share still right (less is better)", ylabel="retain: share still right (more is better)",
        xlim=(-MARGIN, 1 + MARGIN), ylim=(-MARGIN, 1 + MARGIN),
    )  # fmt: skip
    axes.grid(alpha=0.25)
    legend_below(figure, axes, columns=4)
    seeds = max(len(points) for points in results.values())
    others = len(set(results) - {ORIGINAL, RETRAINED})
    entitle(figure, "What unlearning buys and costs", [counted(others, "recipe"), counted(seeds, "seed"), *notes])
    return figure


def _check(results: Mapping[str, Points]) -> None:
    if ORIGINAL not in results or len(results) < 2:
        raise ArgumentError(
            f"tradeoff() was given {sorted(results)}; give {ORIGINAL!r}, which the regions are measured by, and at least one other"
        )
    for name, points in results.items():
        if not len(points):
            raise ArgumentError(f"{name!r} has no point; give one (forget, retain) a seed")
        for point in points:
            if len(point) != 2 or not all(0 <= value <= 1 for value in point):
                raise FractionError(f"{name!r} holds {tuple(point)}; give (forget, retain), both in [0, 1]")


def _mean(points: Points) -> tuple[float, float]:
    forget, retain = zip(*points, strict=True)
    return sum(forget) / len(forget), sum(retain) / len(retain)


def _count_shared(axes: Axes, results: Mapping[str, Points]) -> None:
    """Say how many names lie under one mark, where some hide others."""
    places: dict[tuple[float, float], set[str]] = {}
    for name, points in results.items():
        for forget, retain in points:
            places.setdefault((round(forget, 2), round(retain, 2)), set()).add(name)
    for place, names in places.items():
        if len(names) > 1:
            axes.annotate(
                f"{len(names)} here", place, (0, -17), textcoords="offset points", ha="center", va="top", fontsize=SMALL,
                zorder=4, path_effects=[withStroke(linewidth=3, foreground="white")],
            )  # fmt: skip


def _regions(axes: Axes, start: tuple[float, float]) -> None:
    """Where the forget set is still known, and where everything else is gone too."""
    right, floor = KEPT * start[0], LOST * start[1]
    axes.axvspan(right, 1 + MARGIN, color=FORGET, alpha=0.10, linewidth=0, zorder=0)
    axes.axhspan(-MARGIN, floor, color=NEUTRAL, alpha=0.16, linewidth=0, zorder=0)
    axes.add_patch(
        Rectangle((-MARGIN, floor), right + MARGIN, 1 + MARGIN - floor, color=RETAIN, alpha=0.07, linewidth=0, zorder=0)
    )
    words = {
        "not forgotten": ((right + 1 + MARGIN) / 2, (floor + 1) / 2),
        "forgotten, retain kept in part or whole": ((right - MARGIN) / 2, (floor + 1) / 2),
        "retain lost, a sign of collapse": (0.5, (floor - MARGIN) / 2),
    }
    for text, (x, y) in words.items():
        axes.text(
            x,
            y,
            text.replace("n, ", "n,\n"),
            ha="center",
            va="center",
            fontsize=SMALL,
            color="0.25",
            zorder=2,
        )
