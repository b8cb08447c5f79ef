"""Figures of projections: energy by direction, results by layer and rank, sequential deletion requests, and leakage."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from repedit.arguments import checked
from repedit.edit import Edit
from repedit.errors import ArgumentError, FractionError, RankError, ShapeError
from repedit.fit import Spectra
from repedit.fit import principal_angles as cosines
from repedit.kernels.dispatch import LEAK_LIMITS
from repedit.linear_maps import LowRank
from repedit.metrics.location import Location
from repedit.plot.canvas import (
    CELL,
    FORGET,
    MARKERS,
    NEUTRAL,
    RETAIN,
    SERIES,
    SMALL,
    Canvas,
    Rows,
    Table,
    canvas,
    checked_table,
    count_text,
    draw_table,
    label_text,
    legend_below,
    outline_cells,
    percent,
    table_figure,
    wrapped,
)
from repedit.rewrite.certificate import Certificate, TensorCertificate
from repedit.sites import Site

# --- Spectra: the energy of two sets by direction, and the cut of a projection

NEGLIGIBLE = 1e-12
"""Energies below this fraction of the largest are rounding error of float64 eigenvalues and are not drawn."""


@checked
def spectra(spectra: Spectra, *, notes: Sequence[str] = ()) -> Figure:
    """Energy along the principal directions of forget, of retain, and of forget outside the cut; log-log.

    Each set has its own directions, numbered from 1 in descending order. The cut follows the last retain direction that
    `residual_pca` avoids; what it removes is at the left end of "forget outside the cut".

    Args:
        notes: further facts for the title, such as the site and the texts.
    Raises:
        ArgumentError: if no direction has energy.
    """
    series = {
        "forget": spectra.forget.cpu().numpy(),
        "retain": spectra.retain.cpu().numpy(),
        "forget outside the cut": spectra.residual.cpu().numpy(),
    }
    largest = max((float(values.max()) for values in series.values() if len(values)), default=0.0)
    if not largest > 0:
        raise ArgumentError("no direction has energy, so there is no line to draw; were the statistics collected?")
    figure = canvas(7.5, 4.8)
    axes = figure.subplots()
    styles = zip((FORGET, RETAIN, FORGET), ("-", "-", "--"), ("o", "s", "^"), strict=True)
    hidden = 0
    for (name, values), (colour, line, marker) in zip(series.items(), styles, strict=True):
        shown = values > NEGLIGIBLE * largest
        hidden += int((~shown).sum())
        axes.plot(
            1 + np.flatnonzero(shown), values[shown], color=colour, linestyle=line, marker=marker, markersize=3.5,
            linewidth=1.4, label=name, fillstyle="none" if line == "--" else "full",
            markevery=_sparse(int(shown.sum())),
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", ylabel="energy E (uᵀx)²", xlabel="direction, by descending energy")
    axes.set_xlim(0.8, 1.2 * len(spectra.forget))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    if spectra.cut:
        _mark(axes, spectra)
    outside = f"{percent(spectra.share)} of forget energy outside the cut" if spectra.cut else "no cut"
    facts = [f"{len(spectra.forget)} directions", outside]
    facts += [f"{hidden} energies below {NEGLIGIBLE:.0e} of the largest not drawn"] if hidden else []
    return figure.finish("Where the energy of both sets lies", [*facts, *notes], legend=axes, columns=4)


def _sparse(n: int) -> list[int]:
    """About 40 of n positions, evenly spaced on a logarithmic axis, including the first and the last."""
    return sorted({int(i) - 1 for i in np.geomspace(1, n, 40).round()}) if n else []


def _mark(axes: Axes, spectra: Spectra) -> None:
    """The cut as a line after its last direction, with its number and the share of retain energy before it."""
    at = spectra.cut + 0.5
    axes.axvline(at, color="black", linestyle=":", linewidth=1.4, label="cut")
    share = float(spectra.retain[: spectra.cut].sum() / spectra.retain.sum())
    # All lines descend, so the corner below them and left of the cut is free, but too narrow if the cut is small.
    right = at < len(spectra.forget) ** 0.5
    axes.annotate(
        f"cut: first {spectra.cut}\nhold {percent(share)}\nof retain", (at, 0.03), (5 if right else -5, 0),
        xycoords=axes.get_xaxis_transform(), textcoords="offset points", va="bottom", ha="left" if right else "right",
        fontsize=SMALL, path_effects=[withStroke(linewidth=3, foreground="white")],
    )  # fmt: skip


# --- Results by layer and rank


@checked
def layer_rank(
    values: Rows, *, layers: Sequence[int | str], ranks: Sequence[int], label: str, notes: Sequence[str] = ()
) -> Figure:
    """A heat map of one value, such as forget accuracy, with a row per layer and a column per rank.

    Args:
        values: (layers, ranks); NaN for values that were not measured, which are hatched.
        layers: layers, or the names of several, such as "8-20".
        label: what the value is, with its unit.
        notes: further facts for the title.
    Raises:
        ArgumentError: if there is no layer, no rank, or no value. ShapeError: if the values do not fit them.
        NotFinite: if a value is infinite.
    """
    if not layers or not ranks:
        raise ArgumentError(f"layer_rank() was given {len(layers)} layers and {len(ranks)} ranks; at least 1 of each")
    single = all(isinstance(layer, int) for layer in layers)
    needed = f"{count_text(len(layers), 'layer' if single else 'range')} and {count_text(len(ranks), 'rank')}"
    grid = checked_table("values", values, (len(layers), len(ranks)), needed)
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    ends = (low, high) if low < high else (low - 0.5, high + 0.5)
    rows = [wrapped(str(layer)) for layer in layers]
    tall = max(row.count("\n") + 1 for row in rows)
    figure = table_figure(rows, len(ranks), height=max(0.5 if len(rows) < 9 else 0.24, 0.18 * tall))
    axes = figure.subplots()
    digits = "{:.2f}" if 0.1 <= max(abs(low), abs(high)) < 10 else "{:.3g}"
    image = draw_table(axes, grid, rows, [str(rank) for rank in ranks], ends=ends, form=digits)
    axes.set(ylabel="layer" if single else "layers", xlabel="rank")
    figure.colorbar(image, ax=axes, label=label, pad=0.02)
    missing = int(np.isnan(grid).sum())
    facts = [needed, *([f"{count_text(missing, 'cell')} not measured"] if missing else []), *notes]
    return figure.finish(f"{label[:1].upper()}{label[1:]} by layer and rank", facts)


@checked
def ablations(location: Location, *, on: str = "facts", notes: Sequence[str] = ()) -> Figure:
    """A heat map of the accuracy that `repedit.locate` measured: a row per range of layers, a column per point and position.

    Args:
        on: the set of facts: "facts", "same subjects" or "other subjects".
        notes: further facts for the title, such as the model.
    Raises:
        UnknownName: if the set was not measured. ArgumentError: if there is no row.
    """
    layers, columns, values = location.grid(on)
    grid = checked_table("accuracies", values, (len(layers), len(columns)), f"{count_text(len(layers), 'range')}")
    rows = [wrapped(name) for name in layers]
    figure = table_figure(rows, len(columns), below=2.9)
    axes = figure.subplots()
    image = draw_table(axes, grid, rows, [column.replace("_", " ") for column in columns], ends=(0.0, 1.0))
    axes.set(ylabel="layers")
    figure.colorbar(image, ax=axes, label=f"accuracy on {label_text(on)}", pad=0.02)
    facts = [f"{location.before[on]:.2f} without an ablation", count_text(location.counts[on], "fact"), location.how]
    return figure.finish(f"Accuracy on {on} with an output ablated", [*facts, *notes])


# --- Trade-off by rank: accuracy on both sets against the number of removed directions

Interval = tuple[float, float]
PANEL = 2.6
"""Minimum height of a panel in inches."""
LINE = 0.15
"""Height of a line of a label in inches."""
MARGIN = 0.03
"""Margin of an axis of accuracies beyond 0 and 1."""


@dataclass(frozen=True)
@checked
class TradeOff:
    """The accuracies in [0, 1] on both sets at one rank, with their intervals if known."""

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


@checked
def rank_tradeoff(
    results: Mapping[str, Sequence[TradeOff]], *, chance: float | None = None, notes: Sequence[str] = ()
) -> Figure:
    """Forget accuracy above, retain accuracy below, against the removed rank; one line per method, labelled at its end.

    The axis of ranks is logarithmic, with rank 0, the unedited model, one step left of rank 1. A method whose name
    begins with "random" is the control, in grey. Bars are intervals.

    Args:
        results: method -> one value per rank, in any order.
        chance: the accuracy of guessing, drawn dashed.
        notes: further facts for the title, such as the model and the sites.
    Raises:
        ArgumentError: if there is no method, one has no value, or a rank appears twice.
        FractionError: if chance lies outside [0, 1].
    """
    if not results:
        raise ArgumentError("rank_tradeoff() was given no method to draw; pass {method: [TradeOff(...), ...]}")
    for name, points in results.items():
        ranks = [point.rank for point in points]
        if not ranks:
            raise ArgumentError(f"method {name!r} has no value to draw; give one TradeOff per rank")
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
    ranks = sorted({point.rank for points in results.values() for point in points})
    _name_ranks(lower, ranks)
    upper.tick_params(labelbottom=False)
    shown = f"ranks {ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
    bars = any(p.forget_interval or p.retain_interval for points in results.values() for p in points)
    facts = [count_text(len(results), "method"), shown, *(["bars: intervals"] if bars else []), *notes]
    return figure.finish("What is forgotten and what is kept, by rank removed", facts)


def check_chance(chance: float | None) -> None:
    """Refuse a chance that is not a fraction.

    Raises:
        FractionError: if it lies outside [0, 1].
    """
    if chance is not None and not 0 <= chance <= 1:
        raise FractionError(f"chance={chance} lies outside [0, 1]; of 8 answers it is 0.125")


def spread(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Heights in [0, 1] nearest to the wanted ones at which labels of these sizes do not overlap.

    The order is kept; requires sum(sizes) <= 1.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    heights, floor = [0.0] * len(wanted), 0.0
    for i in order:
        heights[i] = max(wanted[i], floor + sizes[i] / 2)
        floor = heights[i] + sizes[i] / 2
    ceiling = 1.0
    for i in reversed(order):
        heights[i] = min(heights[i], ceiling - sizes[i] / 2)
        ceiling = heights[i] - sizes[i] / 2
    return heights


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line by method: grey for the control, the series for the others."""
    styles: dict[str, dict[str, Any]] = {}
    number = 0
    for name in names:
        if name.lower().startswith("random"):
            styles[name] = {"color": NEUTRAL, "marker": "x", "linestyle": ":"}
            continue
        styles[name] = {
            "color": SERIES[number % len(SERIES)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": ("-", "--", "-.")[number // len(SERIES) % 3],
        }
        number += 1
    return styles


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
    for name, points in results.items():
        ordered = sorted(points, key=lambda point: point.rank)
        values = [getattr(point, side) for point in ordered]
        axes.plot(
            [p.rank for p in ordered], values, markersize=5, linewidth=1.4, label=label_text(name), **styles[name]
        )
        for point in ordered:
            ends = getattr(point, f"{side}_interval")
            if ends is not None:
                axes.vlines(point.rank, *ends, color=styles[name]["color"], linewidth=1, alpha=0.6)
        labels.append((wrapped(label_text(name)), ordered[-1].rank, values[-1], styles[name]["color"]))
    if chance is not None:
        axes.axhline(chance, color="black", linestyle="--", linewidth=0.9, label="chance")
        labels.append((f"chance {chance:.3g}", None, chance, "black"))
    one = LINE * (1 + 2 * MARGIN) / inches
    sizes = [one * (text.count("\n") + 1) for text, *_ in labels]
    edge = axes.get_yaxis_transform()
    for (text, rank, value, colour), height in zip(labels, spread([v for *_, v, _ in labels], sizes), strict=True):
        start, where = ((1.0, value), edge) if rank is None else ((rank, value), "data")
        axes.text(1.04, height, text, transform=edge, va="center", fontsize=SMALL)
        # Faint: a method that ends at a small rank must not seem to continue.
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6, "shrinkA": 1, "shrinkB": 0}
        axes.annotate("", start, (1.035, height), xycoords=where, textcoords=edge, arrowprops=leader)


def _name_ranks(axes: Axes, ranks: Sequence[int]) -> None:
    """A tick at every rank, labelled unless its label would overlap the next one."""
    at = [float(np.log2(rank)) if rank else -1.0 for rank in ranks]
    # 5 inches hold about 16 names of three digits.
    room = (at[-1] - at[0]) / 16
    labelled = [len(ranks) - 1]
    for i in reversed(range(len(ranks) - 1)):
        if at[labelled[-1]] - at[i] >= room:
            labelled.append(i)
    axes.set_xticks([ranks[i] for i in sorted(labelled)], [str(ranks[i]) for i in sorted(labelled)])
    axes.set_xticks([rank for i, rank in enumerate(ranks) if i not in labelled], minor=True)
    axes.set_xlabel("rank: directions removed at each site")


# --- Sequential deletion requests: accuracy on every task after each, and angles between the removed subspaces


@checked
def continual(
    matrix: Rows,
    tasks: Sequence[str],
    *,
    chance: float | None = None,
    untouched: Sequence[str] = (),
    rows: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> Figure:
    """Accuracy on every task (columns) after each was unlearnt in turn (rows); untouched domains are on the right.

    A solid frame marks the task just forgotten, a dashed frame a task forgotten earlier, which must stay low.

    Args:
        matrix: accuracies in [0, 1], (rows, tasks + untouched); NaN for values that were not measured.
        chance: the accuracy of guessing, a line in the colour bar.
        rows: the task unlearnt before each row, in order; the first may have another name, such as "original". When
            None, the first tasks in their order.
        notes: further facts for the title.
    Raises:
        ArgumentError: if there is no task, a name appears twice, or a row is not a task. ShapeError: if the matrix does
            not fit. FractionError: if an accuracy or chance lies outside [0, 1].
    """
    columns = [*tasks, *untouched]
    if not tasks:
        raise ArgumentError("continual() was given no task to draw; pass the tasks in the order they were unlearnt")
    repeated = next((name for name in columns if columns.count(name) > 1), None)
    if repeated is not None:
        raise ArgumentError(f"tasks and untouched hold {repeated!r} more than once; give each column its own name")
    check_chance(chance)
    row_names = _row_names(len(matrix), tasks, rows)
    needed = f"{count_text(len(row_names), 'row')}, {count_text(len(tasks), 'task')} and {count_text(len(untouched), 'untouched domain')}"
    grid = checked_table("matrix", matrix, (len(row_names), len(columns)), needed)
    if np.nanmin(grid) < 0 or np.nanmax(grid) > 1:
        wrong = next(v for v in grid.flat if v < 0 or v > 1)
        raise FractionError(f"matrix holds {wrong:g}, outside [0, 1]; give accuracies as fractions, not per cent")
    figure = _continual_figure(grid, row_names, tasks, untouched, chance)
    trained = [tasks.index(name) for name in row_names if name in tasks]
    facts = [
        f"{len(trained)} of {len(tasks)} tasks unlearnt"
        if len(trained) < len(tasks)
        else count_text(len(tasks), "task")
    ]
    earlier = grid[-1, trained[:-1]]
    if np.isfinite(earlier).any():
        facts.append(f"earlier tasks end at {np.nanmax(earlier):.2f} or below")
    facts += [] if chance is None else [f"chance {chance:.3g}"]
    return figure.finish("Accuracy on each task as tasks are unlearnt one after another", [*facts, *notes])


@checked
def principal_angles(edits: Mapping[str, Edit], *, notes: Sequence[str] = ()) -> Figure:
    """Overlap of the subspaces that tasks remove: mean squared cosines of principal angles at shared sites.

    The value is 1 if one subspace contains the other, 0 if they are orthogonal, and max(k, j) / d on average for random
    subspaces of ranks k and j. Pass the edit of each task alone: the edits of a continual series contain earlier ones.

    Args:
        edits: task -> its projections. Two tasks without a shared site get a hatched cell.
        notes: further facts for the title.
    Raises:
        ArgumentError: if there are fewer than two edits, a map is not a projection, or no two share a site.
        ShapeError: if the maps of a site differ in width.
    """
    if len(edits) < 2:
        raise ArgumentError(f"principal_angles() was given {len(edits)} edits; an angle needs at least 2")
    names = list(edits)
    spans = {name: _spans(name, edit) for name, edit in edits.items()}
    grid, random = np.full((len(names), len(names)), np.nan), []
    shared: set[int] = set()
    np.fill_diagonal(grid, 1.0)
    for i, a in enumerate(names):
        for j, b in enumerate(names[:i]):
            pairs = {site: (map_, spans[b][site]) for site, map_ in spans[a].items() if site in spans[b]}
            if pairs:
                grid[i, j] = grid[j, i] = np.mean([_overlap(a, b, site, *pair) for site, pair in pairs.items()])
                random.append(float(np.mean([max(p.u.shape[1], q.u.shape[1]) / p.width for p, q in pairs.values()])))
                shared.add(len(pairs))
    if not random:
        raise ArgumentError(f"no two of the {len(names)} edits share a site, so there is no angle to draw")
    rows = [wrapped(name) for name in names]
    figure = table_figure(rows, len(names), below=2.3)
    axes = figure.subplots()
    image = draw_table(axes, grid, rows, rows, ends=(0.0, 1.0), form="{:.3f}")
    axes.set(xlabel="removed for", ylabel="removed for")
    bar = figure.colorbar(image, ax=axes, label="mean squared cosine", pad=0.02)
    bar.ax.axhline(float(np.mean(random)), color="white", linestyle="--", linewidth=1.5)
    facts = [f"sites shared by a pair: {_range(sorted(shared), '{:d}')}"]
    facts.append(f"random subspaces: {_range(sorted(random), '{:.3f}')} (k/d), dashed in the colour bar")
    inside = int((grid[np.tril_indices(len(names), -1)] > 1 - 1e-6).sum())
    facts += [f"{count_text(inside, 'pair')} where one span holds the other"] if inside else []
    return figure.finish("How much the removed subspaces of two tasks have in common", [*facts, *notes])


def _row_names(count: int, tasks: Sequence[str], rows: Sequence[str] | None) -> list[str]:
    if rows is None:
        if count > len(tasks):
            raise ShapeError(
                f"matrix has {count} rows for {len(tasks)} tasks; name them if the first is the original: "
                "rows=['original', ...]"
            )
        return list(tasks[:count])
    if len(rows) != count:
        raise ShapeError(f"matrix has {count} rows, rows= names {len(rows)}; give one name per row")
    for name in rows[1:]:
        if name not in tasks:
            raise ArgumentError(
                f"row {name!r} is not a task; only the first row may have another name, tasks are {list(tasks)}"
            )
    if len(set(rows)) < len(rows):
        raise ArgumentError(f"rows={list(rows)} names a task twice; each is unlearnt once")
    return list(rows)


def _continual_figure(
    grid: Table, row_names: Sequence[str], tasks: Sequence[str], untouched: Sequence[str], chance: float | None
) -> Canvas:
    rows, n = [wrapped(name) for name in row_names], len(tasks)
    figure = table_figure(rows, len(tasks) + len(untouched), below=2.9)
    ratios = [n, len(untouched)] if untouched else [n]
    panels = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    for axes, part, names in zip(panels, (grid[:, :n], grid[:, n:]), (tasks, untouched), strict=False):
        image = draw_table(axes, part, rows, [wrapped(name) for name in names], ends=(0.0, 1.0))
    panels[0].set(ylabel="after unlearning", xlabel="accuracy on tasks")
    if untouched:
        panels[1].set_yticks([])
        panels[1].set_xlabel("on untouched\ndomains" if CELL * len(untouched) < 1.4 else "on untouched domains")
    figure.align_xlabels()
    column = {name: number for number, name in enumerate(tasks)}
    just = [(row, column[name]) for row, name in enumerate(row_names) if name in column]
    earlier = [(row, before) for row in range(len(row_names)) for at, before in just if at < row]
    outline_cells(panels[0], just, "just forgotten", linewidth=2.2)
    outline_cells(panels[0], earlier, "forgotten earlier, must stay low", linewidth=1.2, linestyle="--")
    bar = figure.colorbar(image, ax=list(panels), label="accuracy", pad=0.02)
    if chance is not None:
        bar.ax.axhline(chance, color="white", linestyle="--", linewidth=1.5)
        panels[0].plot([], [], color="grey", linestyle="--", linewidth=1.5, label=f"chance {chance:.3g}, in the bar")
    legend_below(figure, panels[0], columns=3)
    return figure


def _spans(name: str, edit: Edit) -> dict[Site, LowRank]:
    """The projections of an edit that remove something."""
    for site, map_ in edit.maps.items():
        if not isinstance(map_, LowRank):
            raise ArgumentError(
                f"{name!r}: {site} holds a {type(map_).__name__}, which removes no subspace; give projections"
            )
    return {site: m for site, m in edit.maps.items() if isinstance(m, LowRank) and m.u.shape[1]}


def _overlap(a: str, b: str, site: Site, first: LowRank, second: LowRank) -> float:
    if first.width != second.width:
        raise ShapeError(
            f"{site}: {a!r} has width {first.width}, {b!r} has width {second.width}; are they of one model?"
        )
    return float(cosines(first.u, second.u).square().mean())


def _range(values: Sequence[float | int], form: str) -> str:
    low, high = form.format(values[0]), form.format(values[-1])
    return low if low == high else f"{low} to {high}"


# --- Leakage: what remains of removed directions in each tensor

MOST = 32
"""Maximum number of tensors in a figure."""
STYLES: tuple[dict[str, Any], ...] = ({"color": "white", "edgecolor": NEUTRAL, "hatch": "////"}, {"color": RETAIN})
"""Styles of the bars before the cast and as stored."""


@checked
def leakage(certificate: Certificate, *, notes: Sequence[str] = ()) -> Figure:
    """Bars of ||V^T W'|| / ||V^T W|| by tensor, before and after the cast to the stored dtype, on a logarithmic axis.

    The line is what rounding alone can leave in a dtype. Of more than 32 tensors the worst of each layer is drawn, of
    more than 32 layers the worst layers; the title has the number of tensors not shown. The worst has the largest ratio
    to its limit.

    Args:
        certificate: from `repedit.certificate`.
        notes: further facts for the title, such as the model.
    Raises:
        ArgumentError: if the certificate lists no tensor.
    """
    if not certificate.tensors:
        raise ArgumentError(f"the certificate ({certificate.form}) lists no tensor, so there is no bar to draw")
    shown = _worst_tensors(certificate.tensors)
    figure = canvas(9.5, 2.2 + 0.27 * len(shown))
    axes = figure.subplots()
    _bars(axes, shown)
    n, beyond = len(certificate.tensors), sum(_beyond(row) > 1 for row in certificate.tensors.values())
    facts = [f"{certificate.form}, {certificate.exactness}"]
    facts += [f"{count_text(certificate.rank, 'direction')} over {count_text(n, 'tensor')}"]
    facts += [f"largest leak {_short(certificate.worst_leak)}"]
    facts += [f"{beyond} of {n} beyond the limit"] if beyond else []
    if len(shown) < n:
        all_layers = len(shown) == len({_layer(name) for name in certificate.tensors})
        which = "the worst of each layer" if all_layers else f"the worst of the {len(shown)} worst layers"
        facts.append(f"{which}, {n - len(shown)} tensors not shown")
    return figure.finish(
        "What is left of the removed directions in the weights", [*facts, *notes], legend=axes, columns=4
    )


def _worst_tensors(tensors: Mapping[str, TensorCertificate]) -> dict[str, TensorCertificate]:
    """All tensors, or the worst of each layer, or the worst of these; in their given order."""
    if len(tensors) <= MOST:
        return dict(tensors)
    worst: dict[str, str] = {}
    for name in sorted(tensors, key=lambda name: -_beyond(tensors[name])):
        worst.setdefault(_layer(name), name)
    selected = set(list(worst.values())[:MOST])
    return {name: row for name, row in tensors.items() if name in selected}


def _layer(name: str) -> str:
    """The part of a name up to its first number, such as "model.layers.7"; the whole name if there is none."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match[0] if match else name


def _limit(dtype: str) -> float | None:
    return LEAK_LIMITS.get(getattr(torch, dtype, None))  # type: ignore[arg-type]


def _beyond(row: TensorCertificate) -> float:
    return row.leak / (_limit(row.dtype) or max(LEAK_LIMITS.values()))


def _bars(axes: Axes, rows: Mapping[str, TensorCertificate]) -> None:
    limits = {dtype: _limit(dtype) for dtype in dict.fromkeys(row.dtype for row in rows.values())}
    sides = {
        "before the cast": np.array([row.leak_computed for row in rows.values()]),
        "as stored": np.array([row.leak for row in rows.values()]),
    }
    positive = [float(v) for side in sides.values() for v in side if v > 0]
    positive += [limit for limit in limits.values() if limit]
    left, right = min(positive, default=1e-9) / 10, max(positive, default=1.0) * 10
    at = np.arange(len(rows))
    axes.set_xscale("log")
    for (name, values), shift, style in zip(sides.items(), (-0.2, 0.2), STYLES, strict=True):
        axes.barh(at + shift, np.maximum(values - left, 0), 0.4, left=left, label=name, **style)
    for (dtype, limit), line in zip(limits.items(), ("--", "-.", ":", "-") * len(limits), strict=False):
        if limit:
            axes.axvline(limit, color="black", linestyle=line, linewidth=1.2, label=f"limit of {dtype}, {limit:.0e}")
    for y, row in enumerate(rows.values()):
        text = f"{_short(row.leak_computed)} → {_short(row.leak)}"
        axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=SMALL)
    axes.annotate(
        "before → stored", (1.01, 1), (0, 3), xycoords="axes fraction", textcoords="offset points", fontsize=SMALL
    )
    # Lines break after a dot.
    names = [
        wrapped(f"{label_text(name)}, {row.dtype}".replace(".", ". "), 60).replace(". ", ".")
        for name, row in rows.items()
    ]
    axes.set_yticks(at, names, fontsize=8)
    axes.set(xlim=(left, right), ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlabel("leak: norm along the removed directions, edited over original")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", alpha=0.25)


def _short(leak: float) -> str:
    return f"{leak:.1e}" if leak else "0"
