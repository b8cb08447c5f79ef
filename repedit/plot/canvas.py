"""What all figures share: size, colours, titles, and the words a provenance gives to a title."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, ParamSpec

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

from repedit.edit import Edit
from repedit.errors import ArgumentError
from repedit.foreign_text import for_mathtext, for_terminal, shortened
from repedit.maps import Diagonal
from repedit.sites import Point, Site

FORGET, RETAIN, NEUTRAL = "#D55E00", "#0072B2", "#595959"
SERIES = (RETAIN, FORGET, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DIVERGING, SEQUENTIAL = "PuOr_r", "cividis"
TITLE, SMALL = 10, 8.5
"""Points; nothing in a figure is smaller than 8."""
LONGEST = 60
"""Letters of a name that are drawn; a longer one is shortened in the middle."""
FORMULA = r"$\mathdefault{"
"""What the labels of a logarithmic axis begin with, which matplotlib writes itself."""
P = ParamSpec("P")
POINT_NAMES = {Point.MLP_NEURONS: "MLP neurons", Point.ATTN_NEURONS: "attention neurons"}


class Canvas(Figure):
    """A Figure that a notebook shows without pyplot; a letter that the font lacks is a box, without a warning."""

    def draw(self, renderer: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from")
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def canvas(width: float, height: float) -> Figure:
    """An empty figure of a size in inches that makes room for all its texts."""
    return Canvas(figsize=(width, height), layout="constrained")


def named(text: object, most: int = LONGEST) -> str:
    """A name that somebody gave, as a label: in one line, shortened, and without anything matplotlib reads as TeX."""
    return for_mathtext(shortened(for_terminal(text), most))


def plain_texts(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """A function whose figure shows every text as it is: no dollar sign begins a formula, no character is obeyed.

    Labels of ticks and legends are made by matplotlib while it draws; those take their names through `named`.
    """

    @wraps(draw)
    def drawn(*args: P.args, **options: P.kwargs) -> Figure:
        figure = draw(*args, **options)
        for text in figure.findobj(Text):
            words = re.sub(r"(?<!\\)\$", r"\\$", for_terminal(text.get_text(), lines=True))
            if words != text.get_text() and not text.get_text().startswith(FORMULA):
                text.set_text(words)
        return figure

    return drawn


def entitle(figure: Figure, head: str, facts: Iterable[str]) -> None:
    """The title: what is shown, and below it what is known of where it comes from, wrapped to the figure."""
    # 13 characters an inch: at 10 points a character of DejaVu Sans is 5.4 points wide on average.
    room = int(13 * figure.get_figwidth())
    # No-break spaces inside a fact: a line ends between facts where it can.
    listed = "; ".join(named(fact, 2 * LONGEST).replace(" ", "\u00a0") for fact in dict.fromkeys(facts))
    lines = [
        line
        for text in (for_mathtext(shortened(head, 4 * LONGEST)), listed)
        for line in textwrap.wrap(text, room, break_on_hyphens=False)
    ]
    figure.suptitle("\n".join(lines).replace("\u00a0", " "), fontsize=TITLE)


def legend_below(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """The labelled things of `axes`, listed below the figure, where they hide nothing."""
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False
    )


def origin(provenance: Mapping[str, Any]) -> list[str]:
    """Method, share pruned, texts with their token counts and model, as far as a provenance tells."""
    options, facts = provenance.get("options", {}), []
    if "importance" in options:
        facts.append(f"{options.get('combine')} of {options['importance']}")
    if provenance.get("method") == "random control":
        facts.append("random neurons")
    if "fraction" in options:
        facts.append(f"{percent(options['fraction'])} pruned")
    return [*facts, *texts(provenance), *model(provenance)]


def texts(provenance: Mapping[str, Any]) -> list[str]:
    """Both sets with the number of tokens they were collected on, where a provenance tells."""
    return [
        f"{role} {known['name']}, {known['tokens']:,} tokens"
        for role, known in provenance.get("data", {}).items()
        if isinstance(known, Mapping) and {"name", "tokens"} <= set(known)
    ]


def model(provenance: Mapping[str, Any]) -> list[str]:
    """The first digits of the model's fingerprint, where a provenance tells."""
    return [f"model {provenance['model'][:8]}"] if provenance.get("model") else []


def percent(fraction: float) -> str:
    """ "2.5 %" of 0.025."""
    return f"{100 * fraction:.3g} %"


def spans(sites: Iterable[Site]) -> str:
    """Points with their layers, such as "MLP neurons of layers 0-29"."""
    found = by_point(sites)
    return ", ".join(f"{point_name(point)} of {_layers([s.layer for s in held])}" for point, held in found.items())


def by_point(sites: Iterable[Site]) -> dict[Point, list[Site]]:
    """Sites by point, in forward order; layers ascend."""
    ordered = sorted(sites)
    points = sorted({site.point for site in ordered}, key=lambda point: point.order)
    return {point: [site for site in ordered if site.point is point] for point in points}


def point_name(point: Point) -> str:
    """What a reader calls a point."""
    return POINT_NAMES.get(point, str(point))


def removed(edit: Edit) -> dict[Site, NDArray[np.bool_]]:
    """Masks by site, True for the neurons an edit prunes.

    Raises:
        ArgumentError: if a map of the edit is not a mask of neurons.
    """
    for site, map_ in edit.maps.items():
        if not isinstance(map_, Diagonal):
            raise ArgumentError(
                f"{site} holds a {type(map_).__name__}, which prunes no single neurons; give an edit made by repedit.prune"
            )
    return {site: ~map_.kept.cpu().numpy() for site, map_ in edit.maps.items() if isinstance(map_, Diagonal)}


def name_layers(axes: Axes, layers: list[int]) -> None:
    """Name the columns 0, 1, ... of an axis after layers; every second or third where there are many."""
    every = 1 + (len(layers) - 1) // 16
    axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.set_xlabel("layer")


def ink(shade: Any) -> str:
    """Black or white, whichever reads better on an (r, g, b, a) colour."""
    return "black" if np.dot(shade[:3], (0.299, 0.587, 0.114)) > 0.5 else "white"


def _layers(layers: list[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return f"layers {layers[0]}-{layers[-1]}" if whole else f"{len(layers)} layers in {layers[0]}-{layers[-1]}"
