"""Figures of neurons: scores by layer, importances on two sets, activations of one neuron, and what edits prune."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import BoundaryNorm, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from repedit.activations.collection import Collection, batches, note_batch_on_error
from repedit.arch import hooks_at
from repedit.arguments import checked
from repedit.data import Batch, Batches
from repedit.edit import Edit
from repedit.errors import (
    ArgumentError,
    NotEnoughRows,
    NotFinite,
    SelectionError,
    ShapeError,
    UnknownName,
    UnsuitableImportance,
    check_whole,
    given,
    nearest,
)
from repedit.hooks import evaluating, installed
from repedit.models.subject import Subject
from repedit.neurons.scores import COMBINATIONS, IMPORTANCES, Scores, agreement
from repedit.neurons.selection import Keep, top
from repedit.neurons.trajectory import Trajectory
from repedit.plot.canvas import (
    DIVERGING,
    FORGET,
    MARKERS,
    RETAIN,
    SEQUENTIAL,
    SERIES,
    SMALL,
    by_point,
    canvas,
    describe_sites,
    draw_table,
    label_layers,
    label_text,
    legend_below,
    percent,
    point_title,
    provenance_facts,
    pruned_masks,
)
from repedit.sites import Point, Site

# --- Specialization: the score of every neuron by layer

Rows = NDArray[np.float64]
QUANTILE = 0.98
"""Fraction of neurons inside the colour scale; the others have its end colours."""
CONTOURS = {0.01: "-", 0.05: "--"}
"""Line styles of the boundaries, by fraction of all neurons."""


@checked
def specialization(scores: Scores) -> Figure:
    """The score of every neuron: one column per layer, layer 0 at the left, the most forget-specific neuron on top.

    Orange is forget-specific, purple retain-specific, white no preference. Lines bound the global top 1 % and 5 %,
    which `prune` would select; the square-root axis gives them room. Protected neurons are hatched. Attention and MLP
    neurons have separate panels.

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
    values = scale.shown(np.concatenate(list(columns.values())))
    ends = np.cumsum([len(column) for column in columns.values()])[:-1]
    shown = dict(zip(columns, np.split(values, ends), strict=True))
    middle, far = scale.neutral(values), reach(scale, values)
    norm, panels = Normalize(middle - far, middle + far), by_point(scores)
    boundaries = {share: top(scores, fraction=share) for share in CONTOURS if 1 <= math.floor(share * total) <= allowed}
    figure = canvas(min(12.0, max(6.5, 2 + 0.17 * len(scores))), 5.8)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (point, sites) in zip(row, panels.items(), strict=True):
        mesh = _heat(axes, [shown[site] for site in sites], norm)
        label_layers(axes, [site.layer for site in sites])
        axes.set_ylabel(f"rank of {point_title(point)} in the layer (square-root scale)")
        for share, keep in boundaries.items():
            _contour(axes, share, keep, sites)
    if allowed < total:
        name = f"protected, {total - allowed:,} neurons"
        row[0].fill_between([], [], facecolor="white", edgecolor="grey", hatch="////", label=name)
    bar = figure.colorbar(mesh, ax=list(row), extend="both", pad=0.02)
    bar.set_label(f"{scale.name}\nretain-specific  <   >  forget-specific")
    facts = [describe_sites(scores), f"{total:,} neurons", *provenance_facts(scores.provenance)]
    return figure.finish("How specific each neuron is to the forget set", facts, legend=row[0], columns=3)


class Scale(NamedTuple):
    """How the scores of a combination become colours."""

    name: str
    shown: Callable[[Rows], Rows]
    neutral: Callable[[Rows], float]
    """Returns the value of no preference."""


def _same(values: Rows) -> Rows:
    return np.where(values > -np.inf, values, np.nan)


def _log(values: Rows) -> Rows:
    positive = values[values > 0]
    least = positive.min() if len(positive) else 1.0
    return np.log(np.maximum(_same(values), least))


SCALES: Mapping[str, Scale] = {
    name: Scale(
        combination.meaning,
        _log if combination.logarithmic else _same,
        (lambda v: float(np.nanmedian(v))) if combination.centered else (lambda _: 0.0),
    )
    for name, combination in COMBINATIONS.items()
}


def reach(scale: Scale, shown: Rows) -> float:
    """The distance of the ends of the colour scale from no preference."""
    distance = np.abs(shown - scale.neutral(shown))
    return float(np.nanquantile(distance, QUANTILE)) or float(np.nanmax(distance)) or 1.0


def _heat(axes: Axes, columns: Sequence[Rows], norm: Normalize) -> QuadMesh:
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
        [int((~keep[site]).sum()) for site in sites], np.arange(len(sites) + 1) - 0.5, baseline=None, color="black",
        linestyle=CONTOURS[share], linewidth=1.4,
        label=f"global top {percent(share)}, {sum(int((~mask).sum()) for mask in keep.values()):,} neurons",
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )  # fmt: skip


# --- Importances on two sets against each other

Values = Mapping[Site, NDArray[np.float64]]


@checked
def importances(forget: Collection, retain: Collection, *, importance: str = "abs", edit: Edit | None = None) -> Figure:
    """Forget against retain importance of every neuron, log-log; the colour is the layer.

    Neurons above the line are forget-specific. A neuron without importance on a set is drawn at half the smallest
    importance, at the edge.

    Args:
        edit: marks the neurons that it prunes with rings.
    Raises:
        UnknownName: if there is no such importance. UnsuitableImportance: if it is signed.
        SelectionError: if the edit prunes no collected neuron, or no neuron has importance on both sets.
        as `score`, for collections that do not match.
    """
    if importance not in IMPORTANCES:
        raise UnknownName(f"importance={importance!r} does not exist; {nearest(importance, IMPORTANCES)}")
    if IMPORTANCES[importance].signed:
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
    facts = [describe_sites(sites), f"median rank correlation over sites {rho:.2f}"]
    facts += [f"{dead:,} of {total:,} neurons without importance on a set, at the edge"] if dead else []
    if edit is not None:
        facts.append(_ring(axes, x, y, edit))
    facts += [f"{role} {c.corpus}, {c.counted:,} tokens" for role, c in (("forget", forget), ("retain", retain))]
    axes.set_xlabel(f"importance on retain ({label_text(retain.corpus, 30)}): {IMPORTANCES[importance].meaning}")
    axes.set_ylabel(f"importance on forget ({label_text(forget.corpus, 30)}): {IMPORTANCES[importance].meaning}")
    return figure.finish(
        f"Importance {importance!r} of each neuron on both sets", [*facts, f"model {forget.model[:8]}"], legend=axes,
        columns=4,
    )  # fmt: skip


def _lifted(values: Values) -> Values:
    """Zeros replaced by half the smallest positive value, for a logarithmic axis."""
    least = min(float(v[v > 0].min()) for v in values.values() if (v > 0).any()) / 2
    return {site: np.maximum(v, least) for site, v in values.items()}


def _draw(figure: Figure, axes: Axes, x: Values, y: Values) -> None:
    layers = [site.layer for site in x]
    for number, point in enumerate(dict.fromkeys(site.point for site in x)):
        sites = [site for site in x if site.point is point]
        layer = np.concatenate([np.full(len(x[s]), s.layer) for s in sites])
        # Drawn by layer, the last layer would hide the others; the order is fixed, so that a figure is reproducible.
        order = np.random.default_rng(0).permutation(len(layer))
        axes.scatter(
            np.concatenate([x[s] for s in sites])[order], np.concatenate([y[s] for s in sites])[order], c=layer[order],
            s=7 if len(layer) > 5000 else 16, alpha=0.7, cmap=SEQUENTIAL, vmin=min(layers), vmax=max(layers),
            marker=MARKERS[2 * number % len(MARKERS)], linewidths=0, rasterized=True, label=point_title(point),
        )  # fmt: skip
    axes.set(xscale="log", yscale="log")
    middle = float(np.sqrt(np.prod([np.median(np.concatenate(list(v.values()))) for v in (x, y)])))
    axes.axline((middle, middle), (2 * middle, 2 * middle), color="black", linestyle="--", label="no preference")
    shades = ScalarMappable(Normalize(min(layers), max(layers)), SEQUENTIAL)
    figure.colorbar(shades, ax=axes, pad=0.02, label="layer", ticks=MaxNLocator(integer=True))


def _ring(axes: Axes, x: Values, y: Values, edit: Edit) -> str:
    masks = {site: mask for site, mask in pruned_masks(edit).items() if site in x and mask.any()}
    if not masks:
        raise SelectionError(
            f"the edit prunes none of the collected neurons; it touches {describe_sites(edit.maps) or 'no site'}"
        )
    across, up = (np.concatenate([side[site][mask] for site, mask in masks.items()]) for side in (x, y))
    name = f"pruned, {len(across):,} neurons"
    axes.scatter(across, up, s=20, facecolors="none", edgecolors="black", linewidths=0.6, rasterized=True, label=name)
    return f"{len(across):,} of {sum(len(v) for v in x.values()):,} neurons pruned"


# --- Activations of one neuron on both sets

Activations = NDArray[np.float64]


@checked
def activations(
    subject: Subject,
    site: Site | str,
    neuron: int,
    forget: Batches,
    retain: Batches,
    *,
    edit: Edit | None = None,
    bins: int = 100,
    log: bool = True,
    length: int = 128,
    batch_size: int = 8,
    limit_tokens: int | None = None,
    progress: bool | None = None,
) -> Figure:
    """Histograms of one neuron's activation on both sets, in shared bins, with marks at zero, mean and peak.

    The peak is the centre of the fullest bin. Padding and first positions do not count.

    Args:
        edit: an edit that is active during the forward passes.
        log: use a logarithmic density axis, which shows rare large activations.
        limit_tokens: stop after the batch that reaches this number of counted tokens.
    Raises:
        UnknownSite: if the model has no such site. ArgumentError: if it has no such neuron.
        NotEnoughRows: if no token of a set counts. NotFinite: if an activation is not finite.
    """
    site = subject.select(Site.parse(site))[0]
    width = subject.layout.width_of(site.layer, site.point)
    if not 0 <= neuron < width:
        raise ArgumentError(f"{site} has no neuron {neuron}; its neurons are 0..{width - 1}")
    if bins < 1:
        raise ArgumentError(f"bins={bins}; a histogram needs at least 1")
    sides = []
    for corpus in (forget, retain):
        items = batches(subject, corpus, length, batch_size, progress, "activations")
        with edit.hooked(subject) if edit else nullcontext():
            sides.append(_values(subject, site, neuron, items, limit_tokens))
        _check_values(sides[-1], corpus, site, neuron)
    edges = np.histogram_bin_edges(np.concatenate(sides), bins)
    figure = canvas(7.0, 4.8)
    axes = figure.subplots()
    facts: list[str] = []
    axes.axvline(0, color="black", linewidth=1, label="zero")
    for role, corpus, values in zip(("forget", "retain"), (forget, retain), sides, strict=True):
        _histogram(axes, f"{role} ({corpus.name})", role, values, edges)
        facts.append(f"{role} {corpus.name}, {len(values):,} tokens")
    axes.set(
        xlabel=f"activation z of neuron {neuron}", ylabel="density, per unit of z", yscale="log" if log else "linear"
    )
    settings = [f"{bins} bins", f"model {subject.fingerprint()[:8]}"] + (["edited"] if edit else [])
    return figure.finish(f"Activation of neuron {neuron} of {site} on both sets", [*facts, *settings], legend=axes)


def _values(subject: Subject, site: Site, neuron: int, items: Iterable[Batch], limit: int | None) -> Activations:
    """The activations of one neuron at counted tokens."""
    parts: list[Tensor] = []
    mask = torch.empty(0)

    def visit(x: Tensor, at: slice, tokens: Tensor | None) -> None:
        column = neuron - (at.start or 0)
        # An expert has some of the neurons and processes some of the tokens.
        if 0 <= column < x.shape[-1]:
            counts = mask.reshape(-1).to(x.device)
            parts.append(x[..., column].reshape(-1)[counts if tokens is None else counts[tokens]].double().cpu())

    hooks = hooks_at(subject.model, subject.layout, site, visit, replaces=False)
    with evaluating(subject.model), installed(subject.model, hooks), torch.no_grad():
        counted = 0
        for number, batch in enumerate(items):
            attention_mask = batch.attention_mask
            mask = attention_mask & (attention_mask.cumsum(1) > 1)
            with note_batch_on_error(number):
                subject.model.base_model(
                    input_ids=batch.input_ids, attention_mask=attention_mask.long(), use_cache=False
                )
            counted += int(mask.sum())
            if limit is not None and counted >= limit:
                break
    return torch.cat(parts).numpy() if parts else np.empty(0)


def _check_values(values: Activations, corpus: Batches, site: Site, neuron: int) -> None:
    if not len(values):
        raise NotEnoughRows(
            f"corpus {corpus.name!r}: no counted token reaches neuron {neuron} of {site} (padding and first positions do "
            "not count); give longer text"
        )
    if not np.isfinite(values).all():
        raise NotFinite(f"neuron {neuron} of {site} is not finite on {corpus.name!r}; load the model in float32?")


def _histogram(axes: Axes, name: str, role: str, values: Activations, edges: Activations) -> None:
    """Forget is filled with a dashed line at the mean; retain is an outline with a dotted line."""
    density, _ = np.histogram(values, edges, density=True)
    fullest = int(density.argmax())
    mean, peak = float(values.mean()), float(edges[fullest : fullest + 2].mean())
    forget = role == "forget"
    colour = FORGET if forget else RETAIN
    axes.stairs(density, edges, color=colour, fill=forget, alpha=0.5 if forget else 1.0, linewidth=1.4, label=name)
    axes.axvline(mean, color=colour, linestyle="--" if forget else ":", linewidth=1.6, label=f"{role} mean {mean:.3g}")
    axes.plot(
        peak, density[fullest], "v" if forget else "^", color=colour, markeredgecolor="black", markersize=8,
        label=f"{role} peak {peak:.3g}",
    )  # fmt: skip


# --- Pruned neurons: counts by layer, overlaps, and the effect on every set

Table = NDArray[np.float64]


@checked
def pruned_per_layer(
    edit_or_trajectory: Edit | Trajectory, control: Edit | None = None, *, layers: int | None = None
) -> Figure:
    """Neurons pruned in each layer, with one panel per point; stacked over the steps of a trajectory.

    Args:
        control: another edit, drawn next to it with hatching.
        layers: number of layers of the model; up to the last pruned layer when None.
    Raises:
        SelectionError: if nothing is pruned. ArgumentError: if an edit is not made of neuron masks.
    """
    check_whole(**given(layers=layers))
    steps = _steps(edit_or_trajectory)
    counts = [{site: int(mask.sum()) for site, mask in masks.items()} for _, masks in steps]
    controls = {} if control is None else {site: int(mask.sum()) for site, mask in pruned_masks(control).items()}
    total = sum(sum(step.values()) for step in counts)
    if not total:
        raise SelectionError("no neuron is pruned, so there is no bar to draw; raise the fraction")
    panels = by_point({site for step in (*counts, controls) for site, n in step.items() if n})
    depth = max(layers or 0, 1 + max(site.layer for sites in panels.values() for site in sites))
    figure = canvas(max(6.5, min(12.0, 2.5 + 0.22 * depth)), 1.6 + 2.7 * len(panels))
    column = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    shades = colormaps[SEQUENTIAL].resampled(len(counts))
    colours = [shades(i) for i in range(len(counts))] if len(counts) > 1 else [to_rgba(SERIES[0])]
    for axes, point in zip(column, panels, strict=True):
        _bars(axes, point, depth, counts, controls if control is not None else None, colours)
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
    facts = [
        f"{total:,} neurons",
        describe_sites(site for sites in panels.values() for site in sites),
        *provenance_facts(last.provenance),
    ]
    return figure.finish("Neurons pruned in each layer", facts)


@checked
def transfer(
    matrix: Sequence[Sequence[float]] | Table,
    names: Sequence[str],
    overlap: Sequence[Sequence[float]] | Table | None = None,
) -> Figure:
    """The effect of removing the neurons of one set (rows) on every set (columns), as a drop in per cent.

    Args:
        matrix: drops of top-1 accuracy in per cent, (n, n); rows are the sets whose neurons were removed.
        names: the n sets.
        overlap: Jaccard overlap of the removed neurons, (n, n), as `overlap` returns; drawn in a second panel.
    Raises:
        ArgumentError: if there is no set. ShapeError: if a matrix does not fit the names.
    """
    n = len(names)
    if not n:
        raise ArgumentError("transfer() was given no set to draw; pass a matrix of drops and one name a row")
    for name, values in (("matrix", matrix), ("overlap", overlap)):
        if values is not None and np.shape(values) != (n, n):
            raise ShapeError(f"{name} has shape {np.shape(values)}, {n} names need ({n}, {n})")
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
    overlap_fact = [] if overlap is None else ["right: Jaccard overlap of the removed neurons"]
    return figure.finish("Removing the neurons of one set, measured on another", [f"{n} sets", *overlap_fact])


@checked
def overlap(edits: Sequence[Edit]) -> Table:
    """Jaccard overlap of the neurons that edits prune: |A and B| / |A or B|, shape (n, n), 1 on the diagonal.

    Raises:
        ArgumentError: if there is no edit, or one is not made of neuron masks. SelectionError: if one prunes nothing.
    """
    sets = [
        {(site, int(i)) for site, mask in pruned_masks(edit).items() for i in np.flatnonzero(mask)} for edit in edits
    ]
    if not sets:
        raise ArgumentError("overlap() was given no edit to compare")
    if not all(sets):
        raise SelectionError(f"edit {sets.index(set())} prunes no neuron, so its overlap is not defined")
    return np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])


def _steps(source: Edit | Trajectory) -> list[tuple[str, dict[Site, NDArray[np.bool_]]]]:
    """(name, masks) of every step, with the neurons that no earlier step prunes."""
    if isinstance(source, Edit):
        return [("pruned", pruned_masks(source))]
    earlier: dict[Site, NDArray[np.bool_]] = {}
    steps = []
    for step in source.steps[1:]:
        masks = pruned_masks(step.edit)
        steps.append((percent(step.fraction), {s: m & ~earlier.get(s, np.zeros_like(m)) for s, m in masks.items()}))
        earlier |= {site: mask | earlier.get(site, np.zeros_like(mask)) for site, mask in masks.items()}
    return steps


def _bars(
    axes: Axes,
    point: Point,
    depth: int,
    counts: Sequence[dict[Site, int]],
    control: dict[Site, int] | None,
    colours: Sequence[tuple[float, ...]],
) -> None:
    def heights(step: dict[Site, int]) -> NDArray[np.int64]:
        return np.array([step.get(Site(layer, point), 0) for layer in range(depth)])

    at, width, base = np.arange(depth), 0.8 if control is None else 0.42, np.zeros(depth, dtype=np.int64)
    shift = 0.0 if control is None else width / 2
    for step, colour in zip(counts, colours, strict=True):
        name = "edit" if len(counts) == 1 else ""
        axes.bar(at - shift, heights(step), width, bottom=base, color=colour, label=name)
        base += heights(step)
    if control is not None:
        axes.bar(at + shift, heights(control), width, color="white", edgecolor="black", hatch="////", label="control")
    label_layers(axes, list(range(depth)))
    axes.set_xlim(-0.7, depth - 0.3)
    axes.set_ylabel(f"pruned {point_title(point)}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _table(
    figure: Figure, axes: Axes, values: Table, names: Sequence[str], ends: tuple[float, float], form: str, unit: str
) -> None:
    names = [label_text(name, 30) for name in names]
    image = draw_table(axes, values, names, names, ends=ends, form=form)
    figure.colorbar(image, ax=axes, label=unit, fraction=0.05, pad=0.03)
