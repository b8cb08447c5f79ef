"""A table of numbers as coloured cells with the numbers in them: what several figures are made of."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from repedit.errors import ArgumentError, NotFinite, ShapeError
from repedit.foreign_text import for_terminal, shortened
from repedit.plot.canvas import LONGEST, SEQUENTIAL, canvas, ink, named

Table = NDArray[np.float64]
Rows = Sequence[Sequence[float]] | Table
"""What users give as a table: lists of rows, or an array."""
CELL = 0.66
"""Inches across a cell: room for "0.123" and for ticks that stand upright."""
LETTER = 0.082
"""Inches across a letter of a tick label, on average; no word of a test was wider."""
MISSING = "n/a"
"""What a cell says that holds no number."""


def checked(name: str, values: Rows, shape: tuple[int, int], needed: str) -> Table:
    """The values as an array of this shape; NaN stands for what was not measured.

    Raises:
        ShapeError: if they are ragged, or of another shape. NotFinite: if one is infinite.
        ArgumentError: if there is none to draw.
    """
    if 0 in shape:
        raise ArgumentError(f"{name} has no cell to draw: {needed}")
    lengths = {np.size(row) for row in values}
    if len(lengths) > 1:
        raise ShapeError(
            f"{name} has rows of {sorted(lengths)} values; give every row {shape[1]}, NaN where unmeasured"
        )
    table = np.asarray(values, dtype=np.float64)
    if table.shape != shape:
        raise ShapeError(f"{name} has shape {table.shape}, {needed} need {shape}")
    if np.isinf(table).any():
        row, column = np.argwhere(np.isinf(table))[0].tolist()
        raise NotFinite(f"{name} is infinite at ({row}, {column}); give NaN for what was not measured")
    if np.isnan(table).all():
        raise ArgumentError(f"{name} holds no number to draw; all {table.size} values are NaN")
    return table


def sheet(rows: Sequence[str], columns: int, *, height: float = 0.5, below: float = 1.9) -> Figure:
    """An empty figure for a table: as wide as its row labels and columns need, `height` inches a row."""
    beside = 1.7 + LETTER * max(min(len(line), LONGEST) for row in rows for line in row.split("\n"))
    return canvas(max(6.0, beside + CELL * columns), below + height * max(len(rows), 2))


def table(
    axes: Axes,
    values: Table,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    ends: tuple[float, float],
    form: str = "{:.2f}",
) -> Any:
    """Draw the cells, first row on top, with a number in each, hatched where there is none; returns the image."""
    axes.patch.set(facecolor="white", edgecolor="grey", hatch="////")
    image = axes.imshow(values, cmap=SEQUENTIAL, vmin=ends[0], vmax=ends[1], aspect="auto")
    shades = image.to_rgba(values)
    for (row, column), value in np.ndenumerate(values):
        known = bool(np.isfinite(value))
        text = axes.text(
            column, row, form.format(value) if known else MISSING, ha="center", va="center", fontsize=9,
            color=ink(shades[row, column]) if known else "black",
        )  # fmt: skip
        if not known:
            text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    columns, rows = ([_lines(name) for name in names] for names in (columns, rows))
    # A column is at least CELL wide; two labels in a row keep a letter between them.
    upright = all(LETTER * (len(name) + 1) <= CELL for name in columns)
    slanted: dict[str, Any] = {} if upright else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), columns, **slanted)
    axes.set_yticks(range(len(rows)), rows)
    return image


def outline(axes: Axes, cells: Sequence[tuple[int, int]], label: str, **style: Any) -> None:
    """A black frame on white inside each (row, column), which shows on dark and light cells; one label for all."""
    for number, (row, column) in enumerate(cells):
        # 0.06: neighbouring frames do not touch.
        left, right, top, bottom = column - 0.44, column + 0.44, row - 0.42, row + 0.42
        axes.plot(
            [left, right, right, left, left], [top, top, bottom, bottom, top], color="black", **style,
            path_effects=[withStroke(linewidth=style.get("linewidth", 1.5) + 2, foreground="white")],
            label="" if number else label,
        )  # fmt: skip


def counted(number: int, noun: str) -> str:
    """ "1 layer", "2 layers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def wrapped(name: str, room: int = 24) -> str:
    """A name in lines of at most `room` letters, four lines at most."""
    return "\n".join(textwrap.wrap(shortened(for_terminal(name), 4 * room - room // 2), room)) or for_terminal(name)


def _lines(name: str) -> str:
    """A label of a row or column, each of its lines as it is."""
    return "\n".join(map(named, name.split("\n")))
