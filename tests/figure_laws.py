"""What every figure must be, and what tests read from one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

Quantifier = Callable[[Iterable[object]], bool]


def check_legible(figure: Figure, *, slanted: bool = False, labelled: Quantifier = all) -> None:
    """No text is small, cut off or under another; the figure and each axis that is drawn say what they show.

    Args:
        slanted: whether tick labels are slanted; their boxes are larger than their letters, so they are not compared.
        labelled: `any` if panels share labels.
    """
    assert not outside(figure)
    assert not overlapping(figure, slanted=slanted)
    assert figure.get_suptitle()
    assert labelled(axes.get_xlabel() or axes.get_ylabel() or not axes.axison for axes in figure.axes)


def laid_out(figure: Figure) -> Figure:
    """The figure with its layout done."""
    figure.draw_without_rendering()
    return figure


def outside(figure: Figure) -> list[Bbox]:
    """Boxes of text that reach over the edge of the page."""
    page = figure.bbox.padded(1)
    every = [box for found in boxes(figure).values() for box in found]
    return [box for box in every if not (page.contains(*box.min) and page.contains(*box.max))]


def boxes(figure: Figure) -> dict[str, list[Bbox]]:
    """Where the visible texts are: those of each axis, then all others."""
    axes = [axis for a in figure.axes for axis in (a.xaxis, a.yaxis)]
    ticks = {i: [*axis.get_major_ticks(), *axis.get_minor_ticks()] for i, axis in enumerate(axes)}
    held = {id(text) for found in ticks.values() for tick in found for text in (tick.label1, tick.label2)}
    found = {
        f"axis {i}": [t.label1 for t in ticks[i] if min(v) <= t.get_loc() <= max(v) and t.label1.get_visible()]
        for i, v in enumerate(axis.get_view_interval() for axis in axes)
    }
    found["others"] = [t for t in figure.findobj(Text) if t.get_visible() and id(t) not in held]
    assert all(t.get_fontsize() >= 8 for texts in found.values() for t in texts)
    return {key: [t.get_window_extent() for t in texts if t.get_text().strip()] for key, texts in found.items()}


def overlapping(figure: Figure, *, slanted: bool) -> list[tuple[Bbox, Bbox]]:
    """Pairs of texts whose boxes overlap; tick labels are left out where they are slanted."""
    found = boxes(figure)
    groups = [found["others"]] if slanted else found.values()
    return [(a, b) for group in groups for i, a in enumerate(group) for b in group[i + 1 :] if a.overlaps(b)]


def title(figure: Figure) -> str:
    return " ".join(figure.get_suptitle().split())


def line(figure: Figure, label: str, axes: int = 0) -> np.ndarray:
    found = next(item for item in figure.axes[axes].lines if str(item.get_label()).startswith(label))
    return np.array(found.get_data(), dtype=float)
