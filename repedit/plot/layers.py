"""Where to project and how much: one value for every layer and rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from repedit.errors import ArgumentError
from repedit.plot.canvas import entitle, plain_texts
from repedit.plot.cells import Rows, checked, counted, sheet, table, wrapped


@plain_texts
def layer_rank(
    values: Rows, *, layers: Sequence[int | str], ranks: Sequence[int], label: str, notes: Sequence[str] = ()
) -> Figure:
    """A heat map of one value, such as forget accuracy: a row a layer, a column a rank, numbers in the cells.

    Args:
        values: (layers, ranks); NaN where nothing was measured, drawn hatched.
        layers: layers, or the names of several, such as "8-20".
        label: what the value is, with its unit.
        notes: what else the title should tell.
    Raises:
        ArgumentError: if there is no layer, no rank, or no value. ShapeError: if the values do not fit them.
        NotFinite: if a value is infinite.
    """
    if not layers or not ranks:
        raise ArgumentError(f"layer_rank() was given {len(layers)} layers and {len(ranks)} ranks; at least 1 of each")
    single = all(isinstance(layer, int) for layer in layers)
    needed = f"{counted(len(layers), 'layer' if single else 'range')} and {counted(len(ranks), 'rank')}"
    grid = checked("values", values, (len(layers), len(ranks)), needed)
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    ends = (low, high) if low < high else (low - 0.5, high + 0.5)
    rows = [wrapped(str(layer)) for layer in layers]
    tall = max(row.count("\n") + 1 for row in rows)
    figure = sheet(rows, len(ranks), height=max(0.5 if len(rows) < 9 else 0.24, 0.18 * tall))
    axes = figure.subplots()
    digits = "{:.2f}" if 0.1 <= max(abs(low), abs(high)) < 10 else "{:.3g}"
    image = table(axes, grid, rows, [str(rank) for rank in ranks], ends=ends, form=digits)
    axes.set(ylabel="layer" if single else "layers", xlabel="rank")
    figure.colorbar(image, ax=axes, label=label, pad=0.02)
    missing = int(np.isnan(grid).sum())
    facts = [needed, *([f"{counted(missing, 'cell')} not measured"] if missing else []), *notes]
    entitle(figure, f"{label[:1].upper()}{label[1:]} by layer and rank", facts)
    return figure
