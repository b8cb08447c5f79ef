"""Pages as HTML: sections, charts as SVG, and the document around them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from repedit.auditing.attack import SKIPPED
from repedit.auditing.report import HIDDEN, INCONCLUSIVE, NOT_FORGOTTEN, PASS, Report, Verdict
from repedit.escaping import for_html
from repedit.plot.reports import (
    ENDS,
    LEVELS,
    Chart,
    Line,
    clipped,
    layer_charts,
    lines,
    measured,
    relearning_charts,
    span,
    thresholds,
)
from repedit.report import tables
from repedit.report.redaction import redacted
from repedit.report.tables import Table, interval, number, plain

# --- SVG elements as text: attributes and words are escaped here, once


Length = float | int
MARKS = ("circle", "square", "triangle", "diamond", "cross", "star")


def element(name: str, *inside: str, **attributes: object) -> str:
    """One element around others; the attribute `text` is the words before them.

    Attributes are named as Python can: `class_`, `stroke_width`.
    """
    text = str(attributes.pop("text", ""))
    listed = "".join(f' {key.rstrip("_").replace("_", "-")}="{for_html(_value(v))}"' for key, v in attributes.items())
    return f"<{name}{listed}>{for_html(text)}{''.join(inside)}</{name}>"


def label(x: Length, y: Length, text: str, **attributes: object) -> str:
    """A text at a point."""
    return element("text", text=text, x=x, y=y, **attributes)


def line(x1: Length, y1: Length, x2: Length, y2: Length, **attributes: object) -> str:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def box(x: Length, y: Length, width: Length, height: Length, **attributes: object) -> str:
    """A rectangle; one of negative width is empty."""
    return element("rect", x=x, y=y, width=max(width, 0.0), height=height, **attributes)


def mark(x: Length, y: Length, kind: int, r: Length = 5.0, **attributes: object) -> str:
    """The mark of a tone: a shape repeats what its colour says; `r` is half its size."""
    shape = MARKS[kind % len(MARKS)]
    if shape == "circle":
        return element("circle", cx=x, cy=y, r=r, **attributes)
    if shape == "square":
        return box(x - 0.9 * r, y - 0.9 * r, 1.8 * r, 1.8 * r, **attributes)
    corners = {
        "triangle": [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
        "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        "cross": [(-0.4, -1.1), (0.4, -1.1), (0.4, -0.4), (1.1, -0.4), (1.1, 0.4), (0.4, 0.4), (0.4, 1.1), (-0.4, 1.1),
                  (-0.4, 0.4), (-1.1, 0.4), (-1.1, -0.4), (-0.4, -0.4)],
        "star": [(math.sin(math.pi * k / 5) * s, -math.cos(math.pi * k / 5) * s) for k, s in enumerate([1.3, 0.6] * 5)],
    }[shape]  # fmt: skip
    return polygon([(x + r * a, y + r * b) for a, b in corners], **attributes)


def arrow(x: Length, y: Length, right: bool, **attributes: object) -> str:
    """An arrow head: the value lies beyond the end."""
    side = 1 if right else -1
    return polygon([(x + 7 * side, y), (x - 3 * side, y - 6), (x - 3 * side, y + 6)], **attributes)


def polygon(points: list[tuple[Length, Length]], **attributes: object) -> str:
    """A closed shape."""
    return element("polygon", points=" ".join(f"{_value(x)},{_value(y)}" for x, y in points), **attributes)


def polyline(points: list[tuple[Length, Length]], **attributes: object) -> str:
    """An open line through points."""
    return element("polyline", points=" ".join(f"{_value(x)},{_value(y)}" for x, y in points), **attributes)


def hatching(name: str) -> str:
    """The pattern of what is no evidence; `name` is its id, one a drawing."""
    stroke = line(0, 0, 0, 7, class_="hatch")
    return element(
        "defs",
        element("pattern", stroke, id=name, width=7, height=7, patternUnits="userSpaceOnUse", patternTransform="rotate(45)"),
    )  # fmt: skip


def drawing(width: Length, height: Length, says: str, *inside: str, **attributes: object) -> str:
    """The root; `says` is what a screen reader reads. It grows by a third where there is room."""
    return element(
        "svg", *inside, viewBox=f"0 0 {_value(width)} {_value(height)}", role="img", aria_label=says,
        style=f"max-width:{_value(1.3 * width)}px", **attributes,
    )  # fmt: skip


def _value(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


# --- The parts of a page as HTML: tables, values of any shape, headings. Every word is escaped here


OPEN = 14
"""Rows of a table that are shown at once; longer ones are folded, which print unfolds."""
MOST = 400
"""Rows of a diagnostic on the page; audit.json has the rest."""
NUMBER = re.compile(r"-?[\d,]+(\.\d+)?(e[+-]?\d+)?%?|n/a|\[.*\]\*?|")


def section(title: str, *inside: str, level: str = "h2") -> str:
    """A heading and what stands under it; nothing where there is nothing."""
    return element("section", element(level, text=title), *inside) if any(inside) else ""


def note(text: str) -> str:
    """A line in small letters."""
    return element("p", text=text, class_="note") if text else ""


def table(found: Table, caption: str = "") -> str:
    """A table that scrolls sideways where it is too wide; columns of numbers are set to the right."""
    if not found.rows:
        return note(found.note)
    kinds = [_kind([row[n] for row in found.rows]) for n in range(len(found.columns))]
    head = element(
        "tr", *(element("th", text=c, class_=k, scope="col") for c, k in zip(found.columns, kinds, strict=True))
    )
    body = [
        element("tr", *(element("td", text=cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)))
        for row in found.rows
    ]
    drawn = element("div", element("table", element("thead", head), element("tbody", *body)), class_="scroll")
    if caption and len(body) > OPEN:
        drawn = element("details", element("summary", text=f"{caption}: {len(body)} rows"), drawn)
    return drawn + note(found.note)


def listed(items: Sequence[str], kind: str) -> str:
    """A list of words."""
    return element("ul", *(element("li", text=item) for item in items), class_=kind) if items else ""


def values(found: Mapping[str, Any]) -> str:
    """Whatever a mapping holds: single values in one table, tables for what is deeper."""
    flat = [[str(key), plain(value)] for key, value in found.items() if _single(value)]
    parts = [table(Table(("what", "value"), flat))] if flat else []
    for key, value in found.items():
        if not _single(value):
            parts += [element("h3", text=str(key)), table(tabled(value), str(key))]
    return "".join(parts)


def tabled(value: Any) -> Table:
    """A mapping or a list as a table: mappings with the same keys become its columns."""
    pairs = list(value.items() if isinstance(value, Mapping) else enumerate(value))
    rest = f"{len(pairs) - MOST} more rows are in audit.json." if len(pairs) > MOST else ""
    pairs = pairs[:MOST]
    first = pairs[0][1] if pairs else None
    if isinstance(first, Mapping) and all(isinstance(v, Mapping) and set(v) == set(first) for _, v in pairs):
        return Table(["", *map(str, first)], [[str(k), *(plain(v[name]) for name in first)] for k, v in pairs], rest)
    return Table(("", "value"), [[str(k), plain(v)] for k, v in pairs], rest)


def _single(value: Any) -> bool:
    """Whether a value stands in one cell: no mapping, and no list of lists or mappings."""
    if isinstance(value, Mapping):
        return False
    inner = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    return len(inner) <= 12 and not any(isinstance(v, Mapping | list | tuple) for v in inner)


def _kind(cells: Sequence[str]) -> str:
    if all(NUMBER.fullmatch(cell) for cell in cells) and any(cells):
        return "number"
    return "long" if max(map(len, cells)) > 30 else "text"


# --- The forest plot of a page: one row an attack, with its point and interval, drawn as SVG in two widths


TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
ACCURACIES = (0.0, 0.5, 1.0)
LETTER = 7.3
"""Pixels across a letter of a name at 13 px, on average, with room to spare."""
LONGEST = 30
"""Letters of a name that are drawn; the tables hold all of it."""


@dataclass(frozen=True)
class Frame:
    """Where things stand in a drawing, in pixels."""

    width: float
    left: float
    """Of the panel of recovered fractions."""
    right: float
    accuracy: tuple[float, float] | None
    """Ends of the panel of accuracies; None where there is no room for it."""
    step: float
    """Between rows."""

    def x(self, value: Length) -> float:
        """Where a recovered fraction stands."""
        return self.left + (clipped(float(value)) - ENDS[0]) / (ENDS[1] - ENDS[0]) * (self.right - self.left)

    def a(self, value: Length) -> float:
        """Where an accuracy stands."""
        assert self.accuracy is not None
        return self.accuracy[0] + min(max(value, 0.0), 1.0) * (self.accuracy[1] - self.accuracy[0])


def forest(rows: Sequence[Line], bands: tuple[float, float], legend: Mapping[int, str]) -> str:
    """Both drawings, of which a page shows the one that fits; `legend` says what the tones mean."""
    name = min(LETTER * max((min(len(row.name), LONGEST) for row in rows), default=8) + 14, 230.0)
    wide = Frame(820.0, name, 520.0, (550.0, 660.0), 26.0)
    narrow = Frame(360.0, 8.0, 352.0, None, 42.0)
    return "".join([
        element("div", _draw(rows, bands, wide, "wide"), class_="wide"),
        element("div", _draw(rows, bands, narrow, "narrow"), class_="narrow"),
        _key(legend, bands),
    ])  # fmt: skip


def _draw(rows: Sequence[Line], bands: tuple[float, float], frame: Frame, name: str) -> str:
    headed = [number == 0 or rows[number - 1].group != row.group for number, row in enumerate(rows)]
    tops, y = [], 26.0
    for row, first in zip(rows, headed, strict=True):
        y += 24 if row.group and first else 0
        tops.append(y)
        y += frame.step
    # Without a panel of accuracies the words stand above a row: there the ground is a strip a row, behind no words.
    strips = [(20.0, y)] if frame.accuracy else [(top + 18, top + 40) for top in tops]
    parts = [hatching(f"hatch-{name}"), *(_ground(bands, frame, *strip) for strip in strips), _axis(frame, y)]
    for row, top, first in zip(rows, tops, headed, strict=True):
        if row.group and first:
            parts.append(label(0, top - 8, row.group, class_="group"))
        parts.append(_row(row, top, frame, f"url(#hatch-{name})"))
    says = "Recovered fraction by attack: " + "; ".join(
        f"{row.group} {row.name} {number(row.recovery.value)}".strip() for row in rows
    )
    return drawing(frame.width, y + 40, says, *parts)


def _ground(bands: tuple[float, float], frame: Frame, top: float, bottom: float) -> str:
    """Bands and lines behind the points."""
    material, clear = bands
    parts = []
    for low, high, kind in ((material, clear, "material"), (clear, 1.0, "clear")):
        parts.append(box(frame.x(low), top, frame.x(high) - frame.x(low), bottom - top, class_=f"band {kind}"))
    for value in TICKS:
        x = frame.x(value)
        parts.append(line(x, top, x, bottom, class_="axis" if value in (0, 1) else "grid"))
    for value in ACCURACIES if frame.accuracy else ():
        parts.append(line(frame.a(value), top, frame.a(value), bottom, class_="grid"))
    return "".join(parts)


def _axis(frame: Frame, bottom: float) -> str:
    """Ticks, and what they are."""
    parts = []
    for value in TICKS:
        x = frame.x(value)
        parts.append(label(x, bottom + 15, f"{value:g}", class_="tick", text_anchor="middle"))
    parts.append(label(frame.x(0), 14, "never knew", class_="tick", text_anchor="middle"))
    parts.append(label(frame.x(1), 14, "original", class_="tick", text_anchor="middle"))
    parts.append(
        label((frame.left + frame.right) / 2, bottom + 33, "recovered fraction R", class_="tick", text_anchor="middle")
    )
    if frame.accuracy:
        for value in ACCURACIES:
            parts.append(label(frame.a(value), bottom + 15, f"{value:g}", class_="tick", text_anchor="middle"))
        parts.append(label(frame.a(0.5), bottom + 33, "accuracy after the attack", class_="tick", text_anchor="middle"))
    return "".join(parts)


def _row(row: Line, top: float, frame: Frame, hatch: str) -> str:
    """A name, its point and interval, the accuracies, and the numbers."""
    name = row.name if len(row.name) <= LONGEST else f"{row.name[: LONGEST - 1]}…"
    said = _text(row)
    if frame.accuracy:
        y = top + frame.step / 2
        words = [
            label(frame.left - 10, y + 4.5, name, text_anchor="end", class_="name"),
            label(frame.accuracy[1] + 14, y + 4.5, said, class_="value"),
        ]
    else:
        y = top + 29
        words = [
            label(0, top + 14, name, class_="name"),
            label(frame.width, top + 14, said, text_anchor="end", class_="value"),
        ]
    tone = f"tone-{row.tone % 6}" if row.evidence else "none"
    parts = [] if row.evidence else [box(frame.left, y - 9, frame.right - frame.left, 18, class_="empty", fill=hatch)]
    return element("g", *parts, *_point(row, y, frame, tone), *_accuracies(row, y, frame), *words, class_=tone)


def _point(row: Line, y: float, frame: Frame, tone: str) -> list[str]:
    found, (low, high), parts = row.recovery, span(row.recovery), []
    if found.status == SKIPPED:
        return []
    if measured(low, high):
        parts.append(line(frame.x(low), y, frame.x(high), y, class_="interval"))
    if measured(found.value):
        x, inside = frame.x(found.value), found.value == clipped(found.value)
        parts.append(mark(x, y, row.tone, class_="point") if inside else arrow(x, y, found.value > 0, class_="point"))
    return parts


def _accuracies(row: Line, y: float, frame: Frame) -> list[str]:
    """Floor and ceiling as ticks, the edited model between them as a dot."""
    found, parts = row.recovery, []
    if not frame.accuracy:
        return []
    if measured(found.floor, found.original):
        parts.append(line(frame.a(found.floor), y, frame.a(found.original), y, class_="range"))
    for value, role in ((found.floor, "floor"), (found.original, "original")):
        if measured(value):
            parts.append(line(frame.a(value), y - 7, frame.a(value), y + 7, class_=f"limit {role}"))
    if measured(found.edited):
        parts.append(element("circle", cx=frame.a(found.edited), cy=y, r=3.5, class_="edited"))
    return parts


def _text(row: Line) -> str:
    found = row.recovery
    if not measured(found.value):
        return row.note
    note = row.note.replace("shown, never", "not")
    return f"{number(found.value)} {interval(found) if row.evidence else note}".strip()


def _key(legend: Mapping[int, str], bands: tuple[float, float]) -> str:
    """The legend, as a list that wraps."""

    def entry(sign: str, words: str) -> str:
        picture = element("svg", sign, viewBox="0 0 22 16", width=22, height=16, aria_hidden="true")
        return element("li", picture, element("span", text=words))

    hatch = hatching("hatch-key")
    entries = [
        entry(element("g", mark(11, 8, tone, class_="point"), class_=f"tone-{tone % 6}"), words)
        for tone, words in legend.items()
    ]
    entries += [
        entry(hatch + box(0, 1, 22, 14, class_="empty", fill="url(#hatch-key)"), "no evidence"),
        entry(box(0, 1, 22, 14, class_="band material"), f"R above {bands[0]:.2f}: material"),
        entry(box(0, 1, 22, 14, class_="band clear"), f"R above {bands[1]:.2f}: too much for a pass"),
    ]
    accuracies = [
        entry(element("circle", cx=11, cy=8, r=3.5, class_="edited"), "edited"),
        entry(line(11, 1, 11, 15, class_="limit original"), "original, the ceiling"),
        entry(line(11, 1, 11, 15, class_="limit floor"), "floor"),
    ]
    return element("ul", *entries, class_="key") + element("ul", *accuracies, class_="key wide")


# --- Small charts of accuracy against steps or layers, as SVG


ROLES = {"edited": 0, "original": 1, "reference": 2, "fresh facts": 3, "floor": 2}
"""The mark of each model."""
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 300.0, 205.0, 36.0, 10.0, 42.0
"""Pixels of a chart, at about the size at which three stand side by side."""


def curves(charts: Sequence[Chart], x: str) -> str:
    """All charts side by side, as far as there is room, with one legend; `x` names their axis."""
    drawn = [element("figure", element("figcaption", text=chart.name), _chart(chart, x)) for chart in charts]
    used = [role for role in ROLES if any(role in chart.series for chart in charts)]
    return element("div", *drawn, class_="charts") + element("ul", *map(_entry, used), class_="key")


def _chart(chart: Chart, x: str) -> str:
    held = sorted({step for points in chart.series.values() for step, _ in points})
    low, high = held[0], max(held[-1], held[0] + 1)
    right, floor = WIDTH - 10, HEIGHT - BOTTOM

    def across(step: Length) -> float:
        return LEFT + (step - low) / (high - low) * (right - LEFT)

    def up(accuracy: Length) -> float:
        return floor - accuracy * (floor - TOP)

    half = (right - LEFT) / (high - low) / 2
    parts = [
        box(max(across(s) - half, LEFT), TOP, min(2 * half, right - across(s) + half), floor - TOP, class_="band clear")
        for s in sorted(chart.marked)
    ]
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(line(LEFT, up(value), right, up(value), class_="axis" if value == 0 else "grid"))
        parts.append(label(LEFT - 6, up(value) + 4, f"{value:g}", class_="tick", text_anchor="end"))
    for step in _ticks(held):
        parts.append(line(across(step), floor, across(step), floor + 4, class_="axis"))
        parts.append(label(across(step), floor + 17, str(step), class_="tick", text_anchor="middle"))
    parts.append(label((LEFT + right) / 2, HEIGHT - 6, x, class_="tick", text_anchor="middle"))
    for role, points in chart.series.items():
        at = [(across(step), up(accuracy)) for step, accuracy in points]
        dots = [] if role == "floor" else [mark(a, b, ROLES[role], 3.6, class_="dot") for a, b in at]
        parts.append(element("g", polyline(at), *dots, class_=_class(role)))
    ends = "; ".join(f"{role} {points[0][1]:.2f} to {points[-1][1]:.2f}" for role, points in chart.series.items())
    return drawing(WIDTH, HEIGHT, f"{chart.name}, accuracy by {x}: {ends}", *parts)


def _ticks(held: list[int]) -> list[int]:
    """Measured values that stand far enough apart to be read, both ends among them."""
    near = 0.09 * max(held[-1] - held[0], 1)
    found = [held[0]]
    for step in held[1:-1]:
        if step - found[-1] >= near and held[-1] - step >= near:
            found.append(step)
    return [*found, held[-1]] if len(held) > 1 else found


def _entry(role: str) -> str:
    sign = line(0, 8, 22, 8) + ("" if role == "floor" else mark(11, 8, ROLES[role], 3.6, class_="dot"))
    picture = element(
        "svg", element("g", sign, class_=_class(role)), viewBox="0 0 22 16", width=22, height=16, aria_hidden="true"
    )
    return element("li", picture, element("span", text=role))


def _class(role: str) -> str:
    return f"curve {role.replace(' ', '-')}"


# --- What a page and a Markdown text show of a classifier's audit: gaps to the retrained model in place of recoveries


RELEARNED = "Accuracy on forget images that were never trained on, while the other half of them is."
GAPS, TOLD, UNTRIED, SETTINGS = (
    "Gap to the retrained model", "Membership", "What was not tried, or counts for nothing", "Settings",
)  # fmt: skip


def classifier_tables(report: Report) -> dict[str, Table]:
    """The tables of an audit of a classifier, by title."""
    return {
        GAPS: tables.gaps(report), TOLD: tables.memberships(report), UNTRIED: tables.untried(report),
        SETTINGS: tables.settings(report),
    }  # fmt: skip


def sections(report: Report) -> list[str]:
    """The same as HTML, with the curves of relearning."""
    drawn = {title: section(title, table(found)) for title, found in classifier_tables(report).items()}
    charts = relearning_charts(report)
    curve = section("Relearning", curves(charts, "epoch"), note(RELEARNED)) if charts else ""
    return [drawn[GAPS], drawn[TOLD], curve, drawn[UNTRIED], drawn[SETTINGS]]


# --- One HTML page that holds everything: no network, no scripts, light and dark, and made to be printed


TONES: Mapping[str, str] = {PASS: "good", HIDDEN: "bad", NOT_FORGOTTEN: "bad", INCONCLUSIVE: "open"}
ASIDE = ("notes", "command", "withheld")
"""What of the context has a place of its own."""


def page(report: Report, *, hide_items: bool = False) -> str:
    """The text of audit.html: the verdict first, then what it rests on, then what was not tried.

    Args:
        hide_items: leave out the texts of facts, see `redacted`.
    """
    shown = redacted(report) if hide_items else report
    body = sections(shown) if shown.gaps else [*told(shown), *_details(shown)]
    return document(f"{shown.verdict.word}: audit", [opening(shown), *body, _origin(shown.context)])


def told(shown: Report, level: str = "h2") -> list[str]:
    """What an audit found: sections under headings of this level, the figure first."""
    levels = {r.level for r in shown.recoveries}
    legend = {tone: words for held, (tone, words) in LEVELS.items() if held in levels}
    plotted = forest(lines(shown), thresholds(shown), legend) if lines(shown) else ""
    examples = tables.examples(shown)
    parts = [
        ("What each attack brings back", plotted, note(tables.INTERVALS), table(tables.attacks(shown))),
        ("What was not tried, or counts for nothing", table(tables.untried(shown))),
        ("What should have been kept", table(tables.kept(shown))),
        _charts("Relearning", "training step", relearning_charts(shown), "Accuracy on facts that were never trained on; at every step the highest over learning rates."),
        _charts("Layer by layer", "layer", layer_charts(shown), "What can be read from each layer; grey bands are edited layers, where they are known."),
        ("Facts that came back", table(examples) if examples.rows or examples.note else ""),
    ]  # fmt: skip
    return [section(title, *inside, level=level) for title, *inside in parts]


def _details(shown: Report) -> list[str]:
    """How it was found."""
    return [
        section("Settings", table(tables.chosen(shown)), table(tables.settings(shown))),
        section("Guesses that need no knowledge", table(tables.guesses(shown))),
        section("Diagnostics, which decide nothing", values(shown.diagnostics) if shown.diagnostics else ""),
    ]


def document(title: str, body: list[str]) -> str:
    """A whole page with its style."""
    style = files("repedit.report").joinpath("page.css").read_text(encoding="utf-8")
    head = [
        '<meta charset="utf-8">', '<meta name="viewport" content="width=device-width, initial-scale=1">',
        element("title", text=title), f"<style>\n{style}</style>",
    ]  # fmt: skip
    inside = element("head", *head) + element("body", element("main", *body))
    return "<!DOCTYPE html>\n" + element("html", inside, lang="en") + "\n"


def heading(verdict: Verdict, level: str = "h1", before: str = "") -> str:
    """The word of a verdict, in the colour of good, bad or open."""
    return element(level, text=before + verdict.word, class_=TONES.get(verdict.word, "bad"))


def opening(report: Report, level: str = "h1", before: str = "") -> str:
    """The verdict with its sentence and rule, and what a reader must know beside it."""
    found = report.verdict
    parts = [
        heading(found, level, before),
        element("p", text=found.sentence, class_="lead"),
        element("p", text=f"Rule: {found.rule}.".replace("..", ".")),
    ]
    if found.settle:
        parts.append(element("p", text=f"What would settle it: {found.settle}"))
    return element("header", *parts, listed(tables.headline(report), "facts"))


def _charts(title: str, x: str, charts: list[Any], words: str) -> tuple[str, ...]:
    return (title, curves(charts, x), note(words)) if charts else (title,)


def _origin(context: Mapping[str, Any]) -> str:
    """The command that makes it again, and everything else that is known."""
    command = element("pre", text=str(context["command"])) if context.get("command") else ""
    rest = {key: value for key, value in context.items() if key not in ASIDE}
    return section("How this was made", command, values(rest) if rest else "")
