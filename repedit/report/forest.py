"""The forest plot of a page: one row an attack, with its point and interval, drawn as SVG in two widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from repedit.attacks.attack import SKIPPED
from repedit.plot.summaries import ENDS, Line, clipped, measured, span
from repedit.report.svg import Length, arrow, box, drawing, element, hatching, label, line, mark
from repedit.report.tables import interval, number

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
