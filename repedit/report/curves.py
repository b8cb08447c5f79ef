"""Small charts of accuracy against steps or layers, as SVG."""

from __future__ import annotations

from collections.abc import Sequence

from repedit.plot.summaries import Chart
from repedit.report.svg import Length, box, drawing, element, label, line, mark, polyline

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
