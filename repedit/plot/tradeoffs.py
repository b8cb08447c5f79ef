"""What a rank buys and costs: accuracy on both sets against the number of directions removed, method by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repedit.errors import ArgumentError, FractionError, RankError
from repedit.plot.canvas import MARKERS, NEUTRAL, SERIES, SMALL, canvas, entitle, named, plain_texts
from repedit.plot.cells import counted, wrapped

Interval = tuple[float, float]
PANEL = 2.6
"""Inches a panel is high, at least."""
LINE = 0.15
"""Inches a line of a label takes."""
MARGIN = 0.03
"""What an axis of accuracies shows beyond 0 and 1."""


@dataclass(frozen=True)
class TradeOff:
    """What one rank does: accuracies in [0, 1] on both sets, with the ends of their intervals where known."""

    rank: int
    """Directions removed at each site; 0 is the unedited model."""
    forget: float
    retain: float
    forget_interval: Interval | None = None
    retain_interval: Interval | None = None

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise RankError(f"rank {self.rank} is negative; the unedited model has rank 0")
        for name in ("forget", "retain"):
            value, ends = getattr(self, name), getattr(self, f"{name}_interval")
            if not 0 <= value <= 1:
                raise FractionError(f"{name} accuracy {value} lies outside [0, 1]; give a fraction, not per cent")
            if ends is not None and not 0 <= ends[0] <= value <= ends[1] <= 1:
                raise FractionError(f"{name}_interval {ends} does not hold the accuracy {value} within [0, 1]")


@plain_texts
def rank_tradeoff(
    results: Mapping[str, Sequence[TradeOff]], *, chance: float | None = None, notes: Sequence[str] = ()
) -> Figure:
    """Forget accuracy above, retain accuracy below, against the rank removed; one line a method, labelled at its end.

    Ranks are spaced as their logarithms, with rank 0, the unedited model, one step left of rank 1. A method whose name
    begins with "random" is the control, in grey. Bars are intervals.

    Args:
        results: method -> one value a rank, in any order.
        chance: the accuracy of guessing, drawn dashed.
        notes: what else the title should tell, such as the model and the sites.
    Raises:
        ArgumentError: if there is no method, one has no value, or a rank comes twice.
        FractionError: if chance lies outside [0, 1].
    """
    if not results:
        raise ArgumentError("rank_tradeoff() was given no method to draw; pass {method: [TradeOff(...), ...]}")
    for name, found in results.items():
        ranks = [point.rank for point in found]
        if not ranks:
            raise ArgumentError(f"method {name!r} has no value to draw; give one TradeOff a rank")
        if len(set(ranks)) < len(ranks):
            twice = next(rank for rank in ranks if ranks.count(rank) > 1)
            raise ArgumentError(f"method {name!r} has rank {twice} more than once; give the mean over seeds")
    check_chance(chance)
    lines = sum(wrapped(name).count("\n") + 1 for name in results) + (chance is not None)
    longest = max(len(line) for name in (*results, "chance 0.125") for line in wrapped(name).split("\n"))
    panel = max(PANEL, LINE * lines + 0.4)
    figure = canvas(5.6 + 0.085 * longest, 1.5 + 2 * panel)
    upper, lower = figure.subplots(2, 1, sharex=True)
    styles = _styles(list(results))
    for axes, side in ((upper, "forget"), (lower, "retain")):
        _panel(axes, side, results, styles, chance, panel)
    ranks = sorted({point.rank for found in results.values() for point in found})
    _name_ranks(lower, ranks)
    upper.tick_params(labelbottom=False)
    shown = f"ranks {ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
    bars = any(p.forget_interval or p.retain_interval for found in results.values() for p in found)
    facts = [counted(len(results), "method"), shown, *(["bars: intervals"] if bars else []), *notes]
    entitle(figure, "What is forgotten and what is kept, by rank removed", facts)
    return figure


def check_chance(chance: float | None) -> None:
    """Refuse a chance that is no fraction.

    Raises:
        FractionError: if it lies outside [0, 1].
    """
    if chance is not None and not 0 <= chance <= 1:
        raise FractionError(f"chance={chance} lies outside [0, 1]; of 8 answers it is 0.125")


def spread(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Heights nearest to the wanted ones, in [0, 1], at which labels of these sizes do not overlap.

    They keep their order; there must be room: sum(sizes) <= 1.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    found, floor = [0.0] * len(wanted), 0.0
    for i in order:
        found[i] = max(wanted[i], floor + sizes[i] / 2)
        floor = found[i] + sizes[i] / 2
    ceiling = 1.0
    for i in reversed(order):
        found[i] = min(found[i], ceiling - sizes[i] / 2)
        ceiling = found[i] - sizes[i] / 2
    return found


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line by method: grey for the control, and the series for the others."""
    found: dict[str, dict[str, Any]] = {}
    number = 0
    for name in names:
        if name.lower().startswith("random"):
            found[name] = {"color": NEUTRAL, "marker": "x", "linestyle": ":"}
            continue
        found[name] = {
            "color": SERIES[number % len(SERIES)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": ("-", "--", "-.")[number // len(SERIES) % 3],
        }
        number += 1
    return found


def _panel(
    axes: Axes,
    side: str,
    results: Mapping[str, Sequence[TradeOff]],
    styles: Mapping[str, dict[str, Any]],
    chance: float | None,
    inches: float,
) -> None:
    # Symmetric, so that rank 0 has a place; 0.5: it is one doubling away from rank 1.
    axes.set_xscale("symlog", base=2, linthresh=1, linscale=0.5)
    axes.set_ylim(-MARGIN, 1 + MARGIN)
    axes.set_ylabel(f"{side} accuracy")
    axes.grid(alpha=0.25)
    labels: list[tuple[str, int | None, float, str]] = []
    for name, found in results.items():
        ordered = sorted(found, key=lambda point: point.rank)
        values = [getattr(point, side) for point in ordered]
        axes.plot([p.rank for p in ordered], values, markersize=5, linewidth=1.4, label=named(name), **styles[name])
        for point in ordered:
            ends = getattr(point, f"{side}_interval")
            if ends is not None:
                axes.vlines(point.rank, *ends, color=styles[name]["color"], linewidth=1, alpha=0.6)
        labels.append((wrapped(named(name)), ordered[-1].rank, values[-1], styles[name]["color"]))
    if chance is not None:
        axes.axhline(chance, color="black", linestyle="--", linewidth=0.9, label="chance")
        labels.append((f"chance {chance:.3g}", None, chance, "black"))
    one = LINE * (1 + 2 * MARGIN) / inches
    sizes = [one * (text.count("\n") + 1) for text, *_ in labels]
    beside = axes.get_yaxis_transform()
    for (text, rank, value, colour), height in zip(labels, spread([v for *_, v, _ in labels], sizes), strict=True):
        start, where = ((1.0, value), beside) if rank is None else ((rank, value), "data")
        axes.text(1.04, height, text, transform=beside, va="center", fontsize=SMALL)
        # Faint: a method that ends at a small rank must not look as if it went on.
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6, "shrinkA": 1, "shrinkB": 0}
        axes.annotate("", start, (1.035, height), xycoords=where, textcoords=beside, arrowprops=leader)


def _name_ranks(axes: Axes, ranks: Sequence[int]) -> None:
    """A tick at every rank, named where its name does not run into the next."""
    at = [float(np.log2(rank)) if rank else -1.0 for rank in ranks]
    # 5 inches hold about 16 names of three digits.
    room = (at[-1] - at[0]) / 16
    named = [len(ranks) - 1]
    for i in reversed(range(len(ranks) - 1)):
        if at[named[-1]] - at[i] >= room:
            named.append(i)
    axes.set_xticks([ranks[i] for i in sorted(named)], [str(ranks[i]) for i in sorted(named)])
    axes.set_xticks([rank for i, rank in enumerate(ranks) if i not in named], minor=True)
    axes.set_xlabel("rank: directions removed at each site")
