"""Which neurons edits remove: counts by layer, overlaps, and the effect on every set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from repedit.edit import Edit
from repedit.errors import ArgumentError, SelectionError, ShapeError
from repedit.importance.trajectories import Trajectory
from repedit.plot.canvas import (
    SEQUENTIAL,
    SERIES,
    SMALL,
    by_point,
    canvas,
    entitle,
    ink,
    legend_below,
    name_layers,
    named,
    origin,
    percent,
    plain_texts,
    point_name,
    removed,
    spans,
)
from repedit.sites import Point, Site

Table = NDArray[np.float64]


@plain_texts
def pruned_per_layer(
    edit_or_trajectory: Edit | Trajectory, control: Edit | None = None, *, layers: int | None = None
) -> Figure:
    """Neurons pruned in each layer, one panel a point; stacked over the steps of a trajectory.

    Args:
        control: an edit drawn beside it, hatched.
        layers: number of layers of the model; up to the last pruned one when None.
    Raises:
        SelectionError: if nothing is pruned. ArgumentError: if an edit is not made of neuron masks.
    """
    steps = _steps(edit_or_trajectory)
    counts = [{site: int(mask.sum()) for site, mask in found.items()} for _, found in steps]
    beside = {} if control is None else {site: int(mask.sum()) for site, mask in removed(control).items()}
    total = sum(sum(found.values()) for found in counts)
    if not total:
        raise SelectionError("no neuron is pruned, so there is no bar to draw; raise the fraction")
    panels = by_point({site for found in (*counts, beside) for site, n in found.items() if n})
    depth = max(layers or 0, 1 + max(site.layer for sites in panels.values() for site in sites))
    figure = canvas(max(6.5, min(12.0, 2.5 + 0.22 * depth)), 1.6 + 2.7 * len(panels))
    column = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    shades = colormaps[SEQUENTIAL].resampled(len(counts))
    colours = [shades(i) for i in range(len(counts))] if len(counts) > 1 else [to_rgba(SERIES[0])]
    for axes, point in zip(column, panels, strict=True):
        _bars(axes, point, depth, counts, beside if control is not None else None, colours)
    if len(counts) > 1:
        norm = BoundaryNorm(np.arange(len(counts) + 1) + 0.5, len(counts))
        bar = figure.colorbar(ScalarMappable(norm, shades), ax=list(column), pad=0.02)
        shown = np.unique(np.linspace(1, len(counts), min(len(counts), 10)).round().astype(int)).tolist()
        bar.set_ticks(shown, labels=[steps[i - 1][0] for i in shown], fontsize=SMALL)
        bar.minorticks_off()
        bar.set_label("share pruned after the step")
    if control is not None:
        legend_below(figure, column[0])
    last = edit_or_trajectory if isinstance(edit_or_trajectory, Edit) else edit_or_trajectory.steps[-1].edit
    facts = [f"{total:,} neurons", spans(site for sites in panels.values() for site in sites), *origin(last.provenance)]
    entitle(figure, "Neurons pruned in each layer", facts)
    return figure


@plain_texts
def transfer(matrix: Table, names: Sequence[str], overlap: Table | None = None) -> Figure:
    """What removing the neurons of one set does to another: rows removed, columns evaluated, cells drop in per cent.

    Args:
        matrix: drops of top-1 accuracy in per cent, (n, n), rows the set whose neurons were removed.
        names: the n sets.
        overlap: Jaccard overlap of the removed neurons, (n, n), as `overlap` returns; drawn beside.
    Raises:
        ArgumentError: if there is no set. ShapeError: if a matrix does not fit the names.
    """
    n = len(names)
    if not n:
        raise ArgumentError("transfer() was given no set to draw; pass a matrix of drops and one name a row")
    for name, found in (("matrix", matrix), ("overlap", overlap)):
        if found is not None and np.shape(found) != (n, n):
            raise ShapeError(f"{name} has shape {np.shape(found)}, {n} names need ({n}, {n})")
    panels = 1 if overlap is None else 2
    figure = canvas((2.6 + 0.75 * n) * panels, 2.6 + 0.6 * n)
    row = figure.subplots(1, panels, squeeze=False)[0]
    drops = np.asarray(matrix, dtype=np.float64)
    low, high = min(0.0, float(np.nanmin(drops))), max(100.0, float(np.nanmax(drops)))
    _table(figure, row[0], drops, names, (low, high), "{:.1f}", "drop of top-1 accuracy, %")
    row[0].set(ylabel="neurons removed for", xlabel="evaluated on")
    if overlap is not None:
        _table(figure, row[1], np.asarray(overlap, dtype=np.float64), names, (0.0, 1.0), "{:.2f}", "Jaccard overlap")
        row[1].set(ylabel="neurons removed for", xlabel="neurons removed for")
    beside = [] if overlap is None else ["right: Jaccard overlap of the removed neurons"]
    entitle(figure, "Removing the neurons of one set, measured on another", [f"{n} sets", *beside])
    return figure


def overlap(edits: Sequence[Edit]) -> Table:
    """Jaccard overlap of the neurons that edits prune: |A and B| / |A or B|, shape (n, n), 1 on the diagonal.

    Raises:
        ArgumentError: if there is no edit, or one is not made of neuron masks. SelectionError: if one prunes nothing.
    """
    sets = [{(site, int(i)) for site, mask in removed(edit).items() for i in np.flatnonzero(mask)} for edit in edits]
    if not sets:
        raise ArgumentError("overlap() was given no edit to compare")
    if not all(sets):
        raise SelectionError(f"edit {sets.index(set())} prunes no neuron, so its overlap is not defined")
    return np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])


def _steps(source: Edit | Trajectory) -> list[tuple[str, dict[Site, NDArray[np.bool_]]]]:
    """What each step prunes that no step before it did, with its name."""
    if isinstance(source, Edit):
        return [("pruned", removed(source))]
    gone: dict[Site, NDArray[np.bool_]] = {}
    found = []
    for step in source.steps[1:]:
        now = removed(step.edit)
        found.append((percent(step.fraction), {s: m & ~gone.get(s, np.zeros_like(m)) for s, m in now.items()}))
        gone |= {site: mask | gone.get(site, np.zeros_like(mask)) for site, mask in now.items()}
    return found


def _bars(
    axes: Axes,
    point: Point,
    depth: int,
    counts: Sequence[dict[Site, int]],
    control: dict[Site, int] | None,
    colours: Sequence[tuple[float, ...]],
) -> None:
    def heights(found: dict[Site, int]) -> NDArray[np.int64]:
        return np.array([found.get(Site(layer, point), 0) for layer in range(depth)])

    at, width, base = np.arange(depth), 0.8 if control is None else 0.42, np.zeros(depth, dtype=np.int64)
    shift = 0.0 if control is None else width / 2
    for found, colour in zip(counts, colours, strict=True):
        name = "edit" if len(counts) == 1 else ""
        axes.bar(at - shift, heights(found), width, bottom=base, color=colour, label=name)
        base += heights(found)
    if control is not None:
        axes.bar(at + shift, heights(control), width, color="white", edgecolor="black", hatch="////", label="control")
    name_layers(axes, list(range(depth)))
    axes.set_xlim(-0.7, depth - 0.3)
    axes.set_ylabel(f"pruned {point_name(point)}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _table(
    figure: Figure, axes: Axes, values: Table, names: Sequence[str], ends: tuple[float, float], form: str, unit: str
) -> None:
    image = axes.imshow(values, cmap=SEQUENTIAL, vmin=ends[0], vmax=ends[1])
    shades = image.to_rgba(values)
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, form.format(value), ha="center", va="center", color=ink(shades[row, column]), fontsize=9)
    names = [named(name, 30) for name in names]
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=axes, label=unit, fraction=0.05, pad=0.03)
