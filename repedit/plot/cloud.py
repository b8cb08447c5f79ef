"""The two importances of every neuron against each other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from repedit.activations.collection import Collection
from repedit.edit import Edit
from repedit.errors import SelectionError, UnknownName, UnsuitableImportance, nearest
from repedit.importance.scoring import IMPORTANCES, agreement
from repedit.plot.canvas import (
    MARKERS,
    SEQUENTIAL,
    canvas,
    entitle,
    legend_below,
    named,
    plain_texts,
    point_name,
    removed,
    spans,
)
from repedit.sites import Site

Values = Mapping[Site, NDArray[np.float64]]
MEANINGS = {
    "abs": "mean |z|",
    "rms": "root mean square of z",
    "std": "standard deviation of z",
    "frequency": "share of tokens with z > 0",
    "gxa": "mean |z dL/dz|, nats",
    "taylor": "|mean z dL/dz|, nats",
    "fisher": "mean (z dL/dz)^2, nats^2",
}
"""Importances that a logarithmic axis can hold, in words and units; z is an activation."""


@plain_texts
def importances(forget: Collection, retain: Collection, *, importance: str = "abs", edit: Edit | None = None) -> Figure:
    """Forget against retain importance of every neuron, log-log; colour is the layer, above the line is forget-specific.

    A neuron without importance on a set is drawn at the edge, at half the smallest importance there is.

    Args:
        edit: the neurons it prunes are ringed.
    Raises:
        UnknownName: if there is no such importance. UnsuitableImportance: if it is signed.
        SelectionError: if the edit prunes no collected neuron, or no neuron has importance on both sets.
        as `score`, for collections that do not belong together.
    """
    if importance not in IMPORTANCES:
        raise UnknownName(f"importance={importance!r} does not exist; {nearest(importance, IMPORTANCES)}")
    if importance not in MEANINGS:
        raise UnsuitableImportance(f"importance={importance!r} is signed, logarithmic axes are not; use 'abs' or 'gxa'")
    rho = float(np.median(list(agreement(forget, retain, importance=importance).values())))
    sites = sorted(forget)
    raw = [{s: IMPORTANCES[importance](c[s]).numpy() for s in sites} for c in (retain, forget)]
    dead = sum(int(((raw[0][s] <= 0) | (raw[1][s] <= 0)).sum()) for s in sites)
    total = sum(len(values) for values in raw[0].values())
    if dead == total:
        raise SelectionError(f"none of {total} neurons has importance on both sets; collect on more text")
    x, y = (_lifted(side) for side in raw)
    figure = canvas(7.0, 6.2)
    axes = figure.subplots()
    _draw(figure, axes, x, y)
    facts = [spans(sites), f"median rank correlation over sites {rho:.2f}"]
    facts += [f"{dead:,} of {total:,} neurons without importance on a set, at the edge"] if dead else []
    if edit is not None:
        facts.append(_ring(axes, x, y, edit))
    facts += [f"{role} {c.corpus}, {c.counted:,} tokens" for role, c in (("forget", forget), ("retain", retain))]
    axes.set_xlabel(f"importance on retain ({named(retain.corpus, 30)}): {MEANINGS[importance]}")
    axes.set_ylabel(f"importance on forget ({named(forget.corpus, 30)}): {MEANINGS[importance]}")
    legend_below(figure, axes, columns=4)
    entitle(figure, f"Importance {importance!r} of each neuron on both sets", [*facts, f"model {forget.model[:8]}"])
    return figure


def _lifted(values: Values) -> Values:
    """Zeros raised to half the smallest positive value, which a logarithmic axis can show."""
    least = min(float(v[v > 0].min()) for v in values.values() if (v > 0).any()) / 2
    return {site: np.maximum(v, least) for site, v in values.items()}


def _draw(figure: Figure, axes: Axes, x: Values, y: Values) -> None:
    layers = [site.layer for site in x]
    for number, point in enumerate(dict.fromkeys(site.point for site in x)):
        sites = [site for site in x if site.point is point]
        layer = np.concatenate([np.full(len(x[s]), s.layer) for s in sites])
        # Drawn layer by layer the last layer would hide the others; the order is fixed, so a figure is repeatable.
        order = np.random.default_rng(0).permutation(len(layer))
        axes.scatter(
            np.concatenate([x[s] for s in sites])[order],
            np.concatenate([y[s] for s in sites])[order],
            c=layer[order],
            s=7 if len(layer) > 5000 else 16,
            alpha=0.7,
            cmap=SEQUENTIAL,
            vmin=min(layers),
            vmax=max(layers),
            marker=MARKERS[2 * number % len(MARKERS)],
            linewidths=0,
            rasterized=True,
            label=point_name(point),
        )
    axes.set(xscale="log", yscale="log")
    middle = float(np.sqrt(np.prod([np.median(np.concatenate(list(v.values()))) for v in (x, y)])))
    axes.axline((middle, middle), (2 * middle, 2 * middle), color="black", linestyle="--", label="no preference")
    shades = ScalarMappable(Normalize(min(layers), max(layers)), SEQUENTIAL)
    figure.colorbar(shades, ax=axes, pad=0.02, label="layer", ticks=MaxNLocator(integer=True))


def _ring(axes: Axes, x: Values, y: Values, edit: Edit) -> str:
    masks = {site: mask for site, mask in removed(edit).items() if site in x and mask.any()}
    if not masks:
        raise SelectionError(
            f"the edit prunes none of the collected neurons; it touches {spans(edit.maps) or 'no site'}"
        )
    across, up = (np.concatenate([side[site][mask] for site, mask in masks.items()]) for side in (x, y))
    name = f"pruned, {len(across):,} neurons"
    axes.scatter(across, up, s=20, facecolors="none", edgecolors="black", linewidths=0.6, rasterized=True, label=name)
    return f"{len(across):,} of {sum(len(v) for v in x.values()):,} neurons pruned"
