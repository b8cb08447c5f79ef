"""What all figures share: size, colours, titles, the words a provenance gives to a title, and tables of coloured cells."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from numpy.typing import NDArray

from repedit.edit import Edit
from repedit.errors import ArgumentError, NotFinite, ShapeError
from repedit.escaping import for_mathtext, for_terminal, shortened
from repedit.linear_maps import Diagonal
from repedit.sites import Point, Site

# --- What all figures share: size, colours, titles, and the words a provenance gives to a title


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


def label_text(text: object, most: int = LONGEST) -> str:
    """A name that somebody gave, as a label: in one line, shortened, and without anything matplotlib reads as TeX."""
    return for_mathtext(shortened(for_terminal(text), most))


def escape_texts(draw: Callable[P, Figure]) -> Callable[P, Figure]:
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


def set_title(figure: Figure, head: str, facts: Iterable[str]) -> None:
    """The title: what is shown, and below it what is known of where it comes from, wrapped to the figure."""
    # 13 characters an inch: at 10 points a character of DejaVu Sans is 5.4 points wide on average.
    room = int(13 * figure.get_figwidth())
    # No-break spaces inside a fact: a line ends between facts where it can.
    listed = "; ".join(label_text(fact, 2 * LONGEST).replace(" ", "\u00a0") for fact in dict.fromkeys(facts))
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


def provenance_facts(provenance: Mapping[str, Any]) -> list[str]:
    """Method, share pruned, texts with their token counts and model, as far as a provenance tells."""
    options, facts = provenance.get("options", {}), []
    if "importance" in options:
        facts.append(f"{options.get('combine')} of {options['importance']}")
    if provenance.get("method") == "random control":
        facts.append("random neurons")
    if "fraction" in options:
        facts.append(f"{percent(options['fraction'])} pruned")
    return [*facts, *data_facts(provenance), *model_facts(provenance)]


def data_facts(provenance: Mapping[str, Any]) -> list[str]:
    """Both sets with the number of tokens they were collected on, where a provenance tells."""
    return [
        f"{role} {known['name']}, {known['tokens']:,} tokens"
        for role, known in provenance.get("data", {}).items()
        if isinstance(known, Mapping) and {"name", "tokens"} <= set(known)
    ]


def model_facts(provenance: Mapping[str, Any]) -> list[str]:
    """The first digits of the model's fingerprint, where a provenance tells."""
    return [f"model {provenance['model'][:8]}"] if provenance.get("model") else []


def percent(fraction: float) -> str:
    """ "2.5 %" of 0.025."""
    return f"{100 * fraction:.3g} %"


def describe_sites(sites: Iterable[Site]) -> str:
    """Points with their layers, such as "MLP neurons of layers 0-29"."""
    found = by_point(sites)
    return ", ".join(f"{point_title(point)} of {_layers([s.layer for s in held])}" for point, held in found.items())


def by_point(sites: Iterable[Site]) -> dict[Point, list[Site]]:
    """Sites by point, in forward order; layers ascend."""
    ordered = sorted(sites)
    points = sorted({site.point for site in ordered}, key=lambda point: point.order)
    return {point: [site for site in ordered if site.point is point] for point in points}


def point_title(point: Point) -> str:
    """What a reader calls a point."""
    return POINT_NAMES.get(point, str(point))


def pruned_masks(edit: Edit) -> dict[Site, NDArray[np.bool_]]:
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


def label_layers(axes: Axes, layers: list[int]) -> None:
    """Name the columns 0, 1, ... of an axis after layers; every second or third where there are many."""
    every = 1 + (len(layers) - 1) // 16
    axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.set_xlabel("layer")


def text_color(shade: Any) -> str:
    """Black or white, whichever reads better on an (r, g, b, a) colour."""
    return "black" if np.dot(shade[:3], (0.299, 0.587, 0.114)) > 0.5 else "white"


def _layers(layers: list[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return f"layers {layers[0]}-{layers[-1]}" if whole else f"{len(layers)} layers in {layers[0]}-{layers[-1]}"


# --- Where a tensor stands, read from its name: which layer, and which module of it


def layer_and_module(name: str) -> tuple[int | None, str]:
    """Layer and module of a tensor: (3, "mlp.down_proj") of "model.layers.3.mlp.down_proj.weight".

    The layer is None outside the blocks. A bias counts to its module.
    """
    module = re.sub(r"\.(weight|bias)$", "", name)
    found = re.search(r"\.(\d+)\.(.+)$", module)
    return (int(found[1]), found[2]) if found else (None, module)


def layer_modules(names: Iterable[str]) -> list[str]:
    """The modules that stand in layers, in the order in which their tensors are named."""
    return list(dict.fromkeys(module for layer, module in map(layer_and_module, names) if layer is not None))


def short_module(module: str) -> str:
    """What a reader calls a module: "down_proj" of "mlp.down_proj"; "attn.c_proj" keeps its branch, which tells it apart."""
    head, _, tail = module.rpartition(".")
    return tail if not head or (tail.endswith("_proj") and tail != "c_proj") else f"{head.rpartition('.')[2]}.{tail}"


# --- A table of numbers as coloured cells with the numbers in them: what several figures are made of


Table = NDArray[np.float64]
Rows = Sequence[Sequence[float]] | Table
"""What users give as a table: lists of rows, or an array."""
CELL = 0.66
"""Inches across a cell: room for "0.123" and for ticks that stand upright."""
LETTER = 0.082
"""Inches across a letter of a tick label, on average; no word of a test was wider."""
MISSING = "n/a"
"""What a cell says that holds no number."""


def checked_table(name: str, values: Rows, shape: tuple[int, int], needed: str) -> Table:
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


def table_figure(rows: Sequence[str], columns: int, *, height: float = 0.5, below: float = 1.9) -> Figure:
    """An empty figure for a table: as wide as its row labels and columns need, `height` inches a row."""
    beside = 1.7 + LETTER * max(min(len(line), LONGEST) for row in rows for line in row.split("\n"))
    return canvas(max(6.0, beside + CELL * columns), below + height * max(len(rows), 2))


def draw_table(
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
            color=text_color(shades[row, column]) if known else "black",
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


def outline_cells(axes: Axes, cells: Sequence[tuple[int, int]], label: str, **style: Any) -> None:
    """A black frame on white inside each (row, column), which shows on dark and light cells; one label for all."""
    for number, (row, column) in enumerate(cells):
        # 0.06: neighbouring frames do not touch.
        left, right, top, bottom = column - 0.44, column + 0.44, row - 0.42, row + 0.42
        axes.plot(
            [left, right, right, left, left], [top, top, bottom, bottom, top], color="black", **style,
            path_effects=[withStroke(linewidth=style.get("linewidth", 1.5) + 2, foreground="white")],
            label="" if number else label,
        )  # fmt: skip


def count_text(number: int, noun: str) -> str:
    """ "1 layer", "2 layers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def wrapped(name: str, room: int = 24) -> str:
    """A name in lines of at most `room` letters, four lines at most."""
    return "\n".join(textwrap.wrap(shortened(for_terminal(name), 4 * room - room // 2), room)) or for_terminal(name)


def _lines(name: str) -> str:
    """A label of a row or column, each of its lines as it is."""
    return "\n".join(map(label_text, name.split("\n")))
