"""Which units a gradient unlearning may move: a mask by layer and module, beside what pruning would have picked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from repedit.errors import ArgumentError
from repedit.gradient.parameters import Mask
from repedit.importance.scoring import Scores
from repedit.importance.selection import top
from repedit.plot.canvas import by_point, canvas, entitle, model, percent, plain_texts, point_name
from repedit.plot.cells import CELL, Table, counted, table
from repedit.plot.tensors import modules, place, short

_Panel = tuple[Table, list[str], str]


@plain_texts
def saliency(mask: Mask, score: Scores | None = None, *, notes: Sequence[str] = ()) -> Figure:
    """The share of units of each layer and module that a mask lets move; beside it the neurons that pruning would pick.

    The right half, drawn where scores are given, has the same share of all neurons, those with the highest scores: where
    both halves are bright, gradients and activations agree on where the forget set lives. Shares are in per cent.

    Args:
        mask: of `repedit.gradient.masks.saliency`, or another one.
        score: of `repedit.score`.
        notes: what else the title should tell, such as the forget set.
    Raises:
        ArgumentError: if the mask holds no tensor of a layer, or selects nothing.
    """
    held: dict[tuple[int, str], list[int]] = {}
    for name, chosen in mask.tensors.items():
        layer, module = place(name)
        if layer is not None:
            sums = held.setdefault((layer, module), [0, 0])
            sums[0] += int(chosen.sum())
            sums[1] += chosen.numel()
    if not held or not any(picked for picked, _ in held.values()):
        raise ArgumentError(
            f"the mask of {counted(len(mask.tensors), 'tensor')} selects nothing inside a layer; draw one that does"
        )
    columns = modules(mask.tensors)
    layers = sorted({layer for layer, _ in held} | {site.layer for site in score or ()})
    grid = np.full((len(layers), len(columns)), np.nan)
    for (layer, module), (picked, total) in held.items():
        grid[layers.index(layer), columns.index(module)] = 100 * picked / total
    panels: list[_Panel] = [(grid, [short(module) for module in columns], "may move")]
    share = sum(c for c, _ in held.values()) / sum(n for _, n in held.values())
    if score is not None:
        panels.append(_pruned(score, share, layers))
    figure = _drawn(panels, layers)
    entitle(figure, "Units that a mask lets move", [f"{percent(share)} of the units", *_origin(mask), *notes])
    return figure


def _pruned(score: Scores, share: float, layers: list[int]) -> _Panel:
    """The same share of the neurons, by importance."""
    keep, sites = top(score, fraction=share), by_point(score)
    grid = np.full((len(layers), len(sites)), np.nan)
    for column, found in enumerate(sites.values()):
        for site in found:
            grid[layers.index(site.layer), column] = 100 * float((~keep[site]).double().mean())
    return grid, [point_name(point) for point in sites], "pruning would pick"


def _drawn(panels: list[_Panel], layers: list[int]) -> Figure:
    widths = [max(len(columns), 1.5) for _, columns, _ in panels]
    # 3.2: labels of layers, a colour bar and slanted names; 2.4: title and slanted names.
    figure = canvas(max(6.0, 3.2 + CELL * sum(widths)), 2.4 + 0.25 * max(len(layers), 3))
    row = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths, sharey=True)[0]
    end = max(float(np.nanmax(grid)) for grid, _, _ in panels)
    for axes, (grid, columns, head) in zip(row, panels, strict=True):
        image = table(axes, grid, [str(layer) for layer in layers], columns, ends=(0.0, end), form="{:.3g}")
        axes.set_title(head, fontsize=9)
    row[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(row), label="share of the units, %", pad=0.02)
    return figure


def _origin(mask: Mask) -> list[str]:
    known = mask.provenance
    facts = [f"unit: {known['unit']}"] if "unit" in known else []
    facts += [f"percentile {known['percentile']:g} of {known['loss']}"] if {"percentile", "loss"} <= set(known) else []
    outside = [name for name in mask.tensors if place(name)[0] is None]
    facts += [f"{counted(len(outside), 'tensor')} outside the layers not shown"] if outside else []
    return [*facts, *model(known)]
