"""The canvas of all figures: size, colours, title with facts, legend, escaped texts; and tables of coloured cells."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from numpy.typing import NDArray

from repedit.edit import Edit
from repedit.errors import ArgumentError, NotFinite, ShapeError
from repedit.escaping import for_mathtext, for_terminal, shortened
from repedit.linear_maps import Diagonal
from repedit.sites import Point, Site

FORGET, RETAIN, NEUTRAL = "#D55E00", "#0072B2", "#595959"
SERIES = (RETAIN, FORGET, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DIVERGING, SEQUENTIAL = "PuOr_r", "cividis"
TITLE, SMALL = 10, 8.5
"""Font sizes in points; nothing in a figure is smaller than 8."""
LONGEST = 60
"""Maximum letters of a name; a longer name is shortened in the middle."""
FORMULA = r"$\mathdefault{"
"""Start of the labels that matplotlib writes on a logarithmic axis."""
POINT_NAMES = {
    Point.MLP_NEURONS: "MLP neurons", Point.ATTN_NEURONS: "attention neurons", Point.MIXER_NEURONS: "mixer neurons",
    Point.PLE_NEURONS: "per-layer embedding neurons",
}  # fmt: skip


# --- The canvas


class Canvas(Figure):
    """A Figure that a notebook shows without pyplot; a letter that the font lacks is a box, without a warning."""

    def finish(self, title: str, facts: Iterable[str], *, legend: Axes | None = None, columns: int = 2) -> Figure:
        """The figure with its title, the facts below the title, and a legend; all texts appear literally.

        Args:
            legend: list the labelled artists of these axes below the figure.
            columns: of the legend.
        """
        if legend is not None:
            legend_below(self, legend, columns)
        set_title(self, title, facts)
        escape_figure(self)
        return self

    def draw(self, renderer: object) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from")
            # A mixed raster and vector renderer is not a RendererBase.
            super().draw(cast(RendererBase, renderer))

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def canvas(width: float, height: float) -> Canvas:
    """An empty figure of a size in inches with a layout that makes room for all texts."""
    return Canvas(figsize=(width, height), layout="constrained")


def label_text(text: object, most: int = LONGEST) -> str:
    """A given name as a label: one line, shortened, without anything that matplotlib reads as TeX."""
    return for_mathtext(shortened(for_terminal(text), most))


def escape_figure(figure: Figure) -> None:
    """Show every text literally: no dollar sign starts a formula, no control character has an effect.

    Labels of ticks and legends, which matplotlib creates while it draws, must be passed through `label_text`.
    """
    for text in figure.findobj(Text):
        words = re.sub(r"(?<!\\)\$", r"\\$", for_terminal(text.get_text(), lines=True))
        if words != text.get_text() and not text.get_text().startswith(FORMULA):
            text.set_text(words)


def set_title(figure: Figure, head: str, facts: Iterable[str]) -> None:
    """Set the title, with the facts below it, wrapped to the width of the figure."""
    # 13 characters an inch: at 10 points a character of DejaVu Sans is 5.4 points wide on average.
    room = int(13 * figure.get_figwidth())
    # No-break spaces inside a fact, so that lines break between facts if possible.
    listed = "; ".join(label_text(fact, 2 * LONGEST).replace(" ", "\u00a0") for fact in dict.fromkeys(facts))
    lines = [
        line
        for text in (for_mathtext(shortened(head, 4 * LONGEST)), listed)
        for line in textwrap.wrap(text, room, break_on_hyphens=False)
    ]
    figure.suptitle("\n".join(lines).replace("\u00a0", " "), fontsize=TITLE)


def legend_below(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """List the labelled artists of the axes below the figure."""
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False
    )


# --- Texts from provenances and sites


def provenance_facts(provenance: Mapping[str, Any]) -> list[str]:
    """Method, fraction pruned, texts with their token counts, and model, as far as a provenance has them."""
    options, facts = provenance.get("options", {}), []
    if "importance" in options:
        facts.append(f"{options.get('combine')} of {options['importance']}")
    if provenance.get("method") == "random control":
        facts.append("random neurons")
    if "fraction" in options:
        facts.append(f"{percent(options['fraction'])} pruned")
    return [*facts, *data_facts(provenance), *model_facts(provenance)]


def data_facts(provenance: Mapping[str, Any]) -> list[str]:
    """Names of both sets with their numbers of collected tokens, if a provenance has them."""
    return [
        f"{role} {data['name']}, {data['tokens']:,} tokens"
        for role, data in provenance.get("data", {}).items()
        if isinstance(data, Mapping) and {"name", "tokens"} <= set(data)
    ]


def model_facts(provenance: Mapping[str, Any]) -> list[str]:
    """The first digits of the model's fingerprint, if a provenance has it."""
    return [f"model {provenance['model'][:8]}"] if provenance.get("model") else []


def percent(fraction: float) -> str:
    """ "2.5 %" of 0.025."""
    return f"{100 * fraction:.3g} %"


def describe_sites(sites: Iterable[Site]) -> str:
    """Points with their layers, such as "MLP neurons of layers 0-29"."""
    groups = by_point(sites).items()
    return ", ".join(f"{point_title(point)} of {_layers([s.layer for s in group])}" for point, group in groups)


def by_point(sites: Iterable[Site]) -> dict[Point, list[Site]]:
    """Sites by point, in forward order; layers ascend."""
    ordered = sorted(sites)
    points = sorted({site.point for site in ordered}, key=lambda point: point.order)
    return {point: [site for site in ordered if site.point is point] for point in points}


def point_title(point: Point) -> str:
    """The name of a point in a figure."""
    return POINT_NAMES.get(point, str(point))


def pruned_masks(edit: Edit) -> dict[Site, NDArray[np.bool_]]:
    """Masks by site, True for the neurons that an edit prunes.

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
    """Label the columns 0, 1, ... of an axis with layers; only every second or third if there are many."""
    every = 1 + (len(layers) - 1) // 16
    axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.set_xlabel("layer")


def text_color(shade: Sequence[float] | NDArray[np.float64]) -> str:
    """Black or white, whichever is easier to read on an (r, g, b, a) colour."""
    return "black" if np.dot(shade[:3], (0.299, 0.587, 0.114)) > 0.5 else "white"


def _layers(layers: list[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return f"layers {layers[0]}-{layers[-1]}" if whole else f"{len(layers)} layers in {layers[0]}-{layers[-1]}"


# --- Layer and module of a tensor, from its name


def layer_and_module(name: str) -> tuple[int | None, str]:
    """Layer and module of a tensor: (3, "mlp.down_proj") of "model.layers.3.mlp.down_proj.weight".

    The layer is None outside the blocks. A bias belongs to its module.
    """
    module = re.sub(r"\.(weight|bias)$", "", name)
    match = re.search(r"\.(\d+)\.(.+)$", module)
    return (int(match[1]), match[2]) if match else (None, module)


def layer_modules(names: Iterable[str]) -> list[str]:
    """The modules inside layers, in the order of their tensors."""
    return list(dict.fromkeys(module for layer, module in map(layer_and_module, names) if layer is not None))


def short_module(module: str) -> str:
    """A short name: "down_proj" of "mlp.down_proj"; "attn.c_proj" keeps its branch, which distinguishes it."""
    head, _, tail = module.rpartition(".")
    return tail if not head or (tail.endswith("_proj") and tail != "c_proj") else f"{head.rpartition('.')[2]}.{tail}"


# --- Tables of numbers as coloured cells


Table = NDArray[np.float64]
Rows = Sequence[Sequence[float]] | Table
"""A table as users pass it: lists of rows, or an array."""
CELL = 0.66
"""Width of a cell in inches: room for "0.123" and for upright tick labels."""
LETTER = 0.082
"""Mean width of a letter of a tick label in inches; no word of a test was wider."""
MISSING = "n/a"
"""Text of a cell without a number."""


def checked_table(name: str, values: Rows, shape: tuple[int, int], needed: str) -> Table:
    """The values as an array of this shape, with NaN for values that were not measured.

    Raises:
        ShapeError: if they are ragged, or of another shape. NotFinite: if one is infinite.
        ArgumentError: if there is no value to draw.
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


def table_figure(rows: Sequence[str], columns: int, *, height: float = 0.5, below: float = 1.9) -> Canvas:
    """An empty figure for a table: wide enough for its row labels and columns, `height` inches per row."""
    labels = 1.7 + LETTER * max(min(len(line), LONGEST) for row in rows for line in row.split("\n"))
    return canvas(max(6.0, labels + CELL * columns), below + height * max(len(rows), 2))


def draw_table(
    axes: Axes,
    values: Table,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    ends: tuple[float, float],
    form: str = "{:.2f}",
) -> AxesImage:
    """Draw the cells with their numbers, the first row on top, hatched where there is no number."""
    axes.patch.set(facecolor="white", edgecolor="grey", hatch="////")
    image = axes.imshow(values, cmap=SEQUENTIAL, vmin=ends[0], vmax=ends[1], aspect="auto")
    shades = image.to_rgba(values)
    for (row, column), value in np.ndenumerate(values):
        measured = bool(np.isfinite(value))
        text = axes.text(
            column, row, form.format(value) if measured else MISSING, ha="center", va="center", fontsize=9,
            color=text_color(shades[row, column]) if measured else "black",
        )  # fmt: skip
        if not measured:
            text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    columns, rows = ([_lines(name) for name in names] for names in (columns, rows))
    # A column is at least CELL wide; neighbouring labels keep a letter between them.
    upright = all(LETTER * (len(name) + 1) <= CELL for name in columns)
    slanted: dict[str, Any] = {} if upright else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), columns, **slanted)
    axes.set_yticks(range(len(rows)), rows)
    return image


def outline_cells(
    axes: Axes, cells: Sequence[tuple[int, int]], label: str, *, linewidth: float, linestyle: str = "-"
) -> None:
    """A black frame on white inside each (row, column), visible on dark and light cells, with one label for all."""
    for number, (row, column) in enumerate(cells):
        # 0.06: neighbouring frames do not touch.
        left, right, top, bottom = column - 0.44, column + 0.44, row - 0.42, row + 0.42
        axes.plot(
            [left, right, right, left, left], [top, top, bottom, bottom, top], color="black",
            linewidth=linewidth, linestyle=linestyle,
            path_effects=[withStroke(linewidth=linewidth + 2, foreground="white")],
            label="" if number else label,
        )  # fmt: skip


def count_text(number: int, noun: str) -> str:
    """ "1 layer", "2 layers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def wrapped(name: str, room: int = 24) -> str:
    """A name in at most four lines of at most `room` letters."""
    return "\n".join(textwrap.wrap(shortened(for_terminal(name), 4 * room - room // 2), room)) or for_terminal(name)


def _lines(name: str) -> str:
    """A label of a row or column, line by line."""
    return "\n".join(map(label_text, name.split("\n")))
