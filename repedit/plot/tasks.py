"""Deletion requests one after another: what each leaves of every task, and how the removed spans lie to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from repedit.edit import Edit
from repedit.errors import ArgumentError, FractionError, ShapeError
from repedit.fit import principal_angles as cosines
from repedit.maps import LowRank
from repedit.plot.canvas import entitle, legend_below, plain_texts
from repedit.plot.cells import CELL, Rows, Table, checked, counted, outline, sheet, table, wrapped
from repedit.plot.tradeoffs import check_chance
from repedit.sites import Site


@plain_texts
def continual(
    matrix: Rows,
    tasks: Sequence[str],
    *,
    chance: float | None = None,
    untouched: Sequence[str] = (),
    rows: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> Figure:
    """Accuracy on every task (columns) after each was unlearnt in turn (rows); untouched domains stand apart, right.

    A solid frame is the task just forgotten, a dashed one a task forgotten earlier, which must stay low.

    Args:
        matrix: accuracies in [0, 1], (rows, tasks + untouched); NaN where nothing was measured.
        chance: the accuracy of guessing, a line in the colour bar.
        rows: the task unlearnt before each row, in order; the first may have another name, such as "original". When
            None, the first tasks in their order.
        notes: what else the title should tell.
    Raises:
        ArgumentError: if there is no task, a name comes twice, or a row is no task. ShapeError: if the matrix does not
            fit. FractionError: if an accuracy or chance lies outside [0, 1].
    """
    columns = [*tasks, *untouched]
    if not tasks:
        raise ArgumentError("continual() was given no task to draw; pass the tasks in the order they were unlearnt")
    _check_distinct("tasks and untouched", columns)
    check_chance(chance)
    named = _row_names(len(matrix), tasks, rows)
    needed = (
        f"{counted(len(named), 'row')}, {counted(len(tasks), 'task')} and {counted(len(untouched), 'untouched domain')}"
    )
    grid = checked("matrix", matrix, (len(named), len(columns)), needed)
    if np.nanmin(grid) < 0 or np.nanmax(grid) > 1:
        wrong = next(v for v in grid.flat if v < 0 or v > 1)
        raise FractionError(f"matrix holds {wrong:g}, outside [0, 1]; give accuracies as fractions, not per cent")
    figure = _drawn(grid, named, tasks, untouched, chance)
    trained = [tasks.index(name) for name in named if name in tasks]
    facts = [
        f"{len(trained)} of {len(tasks)} tasks unlearnt" if len(trained) < len(tasks) else counted(len(tasks), "task")
    ]
    earlier = grid[-1, trained[:-1]]
    if np.isfinite(earlier).any():
        facts.append(f"earlier tasks end at {np.nanmax(earlier):.2f} or below")
    facts += [] if chance is None else [f"chance {chance:.3g}"]
    entitle(figure, "Accuracy on each task as tasks are unlearnt one after another", [*facts, *notes])
    return figure


@plain_texts
def principal_angles(edits: Mapping[str, Edit], *, notes: Sequence[str] = ()) -> Figure:
    """How much of what one task removes another removes too: mean squared cosines of principal angles at shared sites.

    1 where one span holds the other, 0 where they are orthogonal, and max(k, j) / d in the mean for random spans of
    ranks k and j. Give the edit of each task alone: the edits of a continual series hold those of earlier tasks.

    Args:
        edits: task -> its projections. Two tasks without a shared site get a hatched cell.
        notes: what else the title should tell.
    Raises:
        ArgumentError: if there are fewer than two edits, a map is no projection, or no two share a site.
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
                found = [_alike(a, b, site, *pair) for site, pair in pairs.items()]
                grid[i, j] = grid[j, i] = np.mean(found)
                random.append(float(np.mean([max(p.u.shape[1], q.u.shape[1]) / p.width for p, q in pairs.values()])))
                shared.add(len(pairs))
    if not random:
        raise ArgumentError(f"no two of the {len(names)} edits share a site, so there is no angle to draw")
    rows = [wrapped(name) for name in names]
    figure = sheet(rows, len(names), below=2.3)
    axes = figure.subplots()
    image = table(axes, grid, rows, rows, ends=(0.0, 1.0), form="{:.3f}")
    axes.set(xlabel="removed for", ylabel="removed for")
    bar = figure.colorbar(image, ax=axes, label="mean squared cosine", pad=0.02)
    bar.ax.axhline(float(np.mean(random)), color="white", linestyle="--", linewidth=1.5)
    facts = [f"sites shared by a pair: {_range(sorted(shared), '{:d}')}"]
    facts.append(f"random subspaces: {_range(sorted(random), '{:.3f}')} (k/d), dashed in the colour bar")
    inside = int((grid[np.tril_indices(len(names), -1)] > 1 - 1e-6).sum())
    facts += [f"{counted(inside, 'pair')} where one span holds the other"] if inside else []
    entitle(figure, "How much the removed subspaces of two tasks have in common", [*facts, *notes])
    return figure


def _check_distinct(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ArgumentError(f"{what} hold {name!r} more than once; give each column its own name")


def _row_names(found: int, tasks: Sequence[str], rows: Sequence[str] | None) -> list[str]:
    if rows is None:
        if found > len(tasks):
            raise ShapeError(
                f"matrix has {found} rows for {len(tasks)} tasks; name them if the first is the original: "
                "rows=['original', ...]"
            )
        return list(tasks[:found])
    if len(rows) != found:
        raise ShapeError(f"matrix has {found} rows, rows= names {len(rows)}; give one name a row")
    for name in rows[1:]:
        if name not in tasks:
            raise ArgumentError(f"row {name!r} is no task; only the first row may be another, tasks are {list(tasks)}")
    if len(set(rows)) < len(rows):
        raise ArgumentError(f"rows={list(rows)} names a task twice; each is unlearnt once")
    return list(rows)


def _drawn(
    grid: Table, named: Sequence[str], tasks: Sequence[str], untouched: Sequence[str], chance: float | None
) -> Figure:
    rows, n = [wrapped(name) for name in named], len(tasks)
    figure = sheet(rows, len(tasks) + len(untouched), below=2.9)
    ratios = [n, len(untouched)] if untouched else [n]
    panels = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    for axes, part, names in zip(panels, (grid[:, :n], grid[:, n:]), (tasks, untouched), strict=False):
        image = table(axes, part, rows, [wrapped(name) for name in names], ends=(0.0, 1.0))
    panels[0].set(ylabel="after unlearning", xlabel="accuracy on tasks")
    if untouched:
        panels[1].set_yticks([])
        panels[1].set_xlabel("on untouched\ndomains" if CELL * len(untouched) < 1.4 else "on untouched domains")
    figure.align_xlabels()
    column = {name: number for number, name in enumerate(tasks)}
    just = [(row, column[name]) for row, name in enumerate(named) if name in column]
    held = [(row, before) for row in range(len(named)) for at, before in just if at < row]
    outline(panels[0], just, "just forgotten", linewidth=2.2)
    outline(panels[0], held, "forgotten earlier, must stay low", linewidth=1.2, linestyle="--")
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


def _alike(a: str, b: str, site: Site, first: LowRank, second: LowRank) -> float:
    if first.width != second.width:
        raise ShapeError(
            f"{site}: {a!r} has width {first.width}, {b!r} has width {second.width}; are they of one model?"
        )
    return float(cosines(first.u, second.u).square().mean())


def _range(values: Sequence[float | int], form: str) -> str:
    low, high = form.format(values[0]), form.format(values[-1])
    return low if low == high else f"{low} to {high}"
