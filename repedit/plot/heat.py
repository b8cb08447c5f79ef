"""Where in the model the specific neurons are: every score, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from repedit.errors import ArgumentError
from repedit.importance.scoring import Scores
from repedit.importance.selection import Keep, top
from repedit.plot.canvas import (
    DIVERGING,
    SMALL,
    by_point,
    canvas,
    entitle,
    legend_below,
    name_layers,
    origin,
    percent,
    plain_texts,
    point_name,
    spans,
)
from repedit.sites import Site

Rows = NDArray[np.float64]
QUANTILE = 0.98
"""Share of neurons inside the colour scale; the few beyond it take its end colours."""
CONTOURS = {0.01: "-", 0.05: "--"}
"""Fractions of all neurons whose boundary is drawn, with their line styles."""


@plain_texts
def specialization(scores: Scores) -> Figure:
    """Every neuron's score: one column a layer, layer 0 at the left, the most forget-specific neuron on top.

    Orange is forget-specific, purple retain-specific, white no preference. Lines bound the global top 1 % and 5 %,
    which `prune` would take; the square-root axis gives them room. Protected neurons are hatched. One panel a point
    where scores mix attention and MLP.

    Raises:
        ArgumentError: if there is no score, or every neuron is protected.
    """
    if not len(scores):
        raise ArgumentError("specialization() was given no score to draw; pass what repedit.score returns")
    columns = {site: np.sort(score.values.numpy())[::-1] for site, score in scores.items()}
    total = sum(len(column) for column in columns.values())
    allowed = sum(int((column > -np.inf).sum()) for column in columns.values())
    if not allowed:
        raise ArgumentError(f"all {total} neurons of {len(scores)} sites are protected, so there is no score to draw")
    scale = SCALES[next(iter(scores.values())).combine]
    shown = dict(zip(columns, _split(scale.shown(np.concatenate(list(columns.values()))), columns), strict=True))
    boundaries = {share: top(scores, fraction=share) for share in CONTOURS if 1 <= math.floor(share * total) <= allowed}
    norm, panels = _norm(scale, np.concatenate(list(shown.values()))), by_point(scores)
    figure = canvas(min(12.0, max(6.5, 2 + 0.17 * len(scores))), 5.8)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (point, sites) in zip(row, panels.items(), strict=True):
        mesh = _heat(axes, [shown[site] for site in sites], norm)
        name_layers(axes, [site.layer for site in sites])
        axes.set_ylabel(f"rank of {point_name(point)} in the layer (square-root scale)")
        for share, keep in boundaries.items():
            _contour(axes, share, keep, sites)
    if allowed < total:
        name = f"protected, {total - allowed:,} neurons"
        row[0].fill_between([], [], facecolor="white", edgecolor="grey", hatch="////", label=name)
    bar = figure.colorbar(mesh, ax=list(row), extend="both", pad=0.02)
    bar.set_label(f"{scale.name}\nretain-specific  <   >  forget-specific")
    legend_below(figure, row[0], columns=3)
    facts = [spans(scores), f"{total:,} neurons", *origin(scores.provenance)]
    entitle(figure, "How specific each neuron is to the forget set", facts)
    return figure


class Scale(NamedTuple):
    """How the scores of one combination become colours."""

    name: str
    shown: Callable[[Rows], Rows]
    neutral: Callable[[Rows], float]
    """The value of no preference."""


def _same(values: Rows) -> Rows:
    return np.where(values > -np.inf, values, np.nan)


def _log(values: Rows) -> Rows:
    positive = values[values > 0]
    least = positive.min() if len(positive) else 1.0
    return np.log(np.maximum(_same(values), least))


SCALES: Mapping[str, Scale] = {
    "difference": Scale("score: share of forget - share of retain importance", _same, lambda _: 0.0),
    "logratio": Scale("score: log of forget / retain importance", _same, lambda _: 0.0),
    "ratio": Scale("log of the score, forget / retain importance", _log, lambda _: 0.0),
    "rank": Scale("score: sum of ranks, centred at its median", _same, lambda v: float(np.nanmedian(v))),
    "setdiff": Scale("score: set difference, centred at its median", _same, lambda v: float(np.nanmedian(v))),
}


def reach(scale: Scale, shown: Rows) -> float:
    """How far from no preference the colour scale goes."""
    away = np.abs(shown - scale.neutral(shown))
    return float(np.nanquantile(away, QUANTILE)) or float(np.nanmax(away)) or 1.0


def _split(values: Rows, like: Mapping[Site, Rows]) -> list[Rows]:
    return np.split(values, np.cumsum([len(column) for column in like.values()])[:-1])


def _norm(scale: Scale, shown: Rows) -> Normalize:
    middle, far = scale.neutral(shown), reach(scale, shown)
    return Normalize(middle - far, middle + far)


def _heat(axes: Axes, columns: Sequence[Rows], norm: Normalize) -> Any:
    rows = max(len(column) for column in columns)
    grid = np.full((rows, len(columns)), np.nan)
    for number, column in enumerate(columns):
        grid[: len(column), number] = column
    axes.patch.set(facecolor="white", edgecolor="grey", hatch="////")
    edges = np.arange(len(columns) + 1) - 0.5
    # rasterized: 46,080 cells are 9 MB as vectors.
    mesh = axes.pcolormesh(
        edges, np.arange(rows + 1), grid, cmap=colormaps[DIVERGING], norm=norm, rasterized=True, linewidth=0
    )
    axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
    axes.set_ylim(rows, 0)
    axes.set_yticks(sorted({round(share * rows) for share in (0, 0.01, 0.05, 0.2, 0.5, 1)}))
    axes.tick_params(labelsize=SMALL)
    return mesh


def _contour(axes: Axes, share: float, keep: Keep, sites: Sequence[Site]) -> None:
    """A step line below the selected neurons of each layer."""
    axes.stairs(
        [int((~keep[site]).sum()) for site in sites],
        np.arange(len(sites) + 1) - 0.5,
        baseline=None,
        color="black",
        linestyle=CONTOURS[share],
        linewidth=1.4,
        label=f"global top {percent(share)}, {sum(int((~mask).sum()) for mask in keep.values()):,} neurons",
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )
