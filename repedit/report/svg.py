"""SVG elements as text: attributes and words are escaped here, once."""

from __future__ import annotations

import math

from repedit.foreign_text import for_html

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
