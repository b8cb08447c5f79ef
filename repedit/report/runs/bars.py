"""Small charts of a run: a bar a layer, a spread a layer, a line over steps; as SVG of the size of those of an audit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from repedit.report.svg import Length, box, drawing, element, label, line, mark, polyline

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 300.0, 205.0, 46.0, 12.0, 42.0
RIGHT, FLOOR = WIDTH - 10, HEIGHT - BOTTOM


def bars(name: str, values: Mapping[int, float], x: str, y: str) -> str:
    """One bar an integer of the x axis, from 0."""
    axes = _Axes(list(values), [0.0, *values.values()], half=0.5)
    wide = 0.7 * (axes.x(1) - axes.x(0))
    drawn = [
        box(axes.x(at) - wide / 2, axes.y(value), wide, FLOOR - axes.y(value), class_="bar")
        for at, value in values.items()
    ]
    most = max(values, key=lambda at: values[at])
    says = f"{y} by {x}: {len(values)} values, the largest {values[most]:.4g} at {x} {most}"
    return _figure(name, axes.drawn(says, x, y, drawn))


def spreads(name: str, values: Mapping[int, tuple[float, float, float, float]], x: str, y: str) -> str:
    """(low, middle, high, largest) at each integer of the x axis: a line, a stroke on it, a dot."""
    axes = _Axes(list(values), [v for held in values.values() for v in held], half=0.5)
    wide = 0.35 * (axes.x(1) - axes.x(0))
    drawn = []
    for at, (low, middle, high, most) in values.items():
        here = axes.x(at)
        drawn.append(line(here, axes.y(low), here, axes.y(high), class_="spread"))
        drawn.append(line(here - wide, axes.y(middle), here + wide, axes.y(middle), class_="spread"))
        drawn.append(mark(here, axes.y(most), 0, 2.6, class_="dot"))
    most = max(values, key=lambda at: values[at][3])
    says = f"{y} by {x}; the largest, {values[most][3]:.4g}, is at {x} {most}"
    return _figure(name, axes.drawn(says, x, y, [element("g", *drawn, class_="curve edited")]))


def course(name: str, values: Sequence[float]) -> str:
    """Values over steps, from step 1; where one is not finite the line has a gap."""
    finite = [value for value in values if math.isfinite(value)]
    axes = _Axes([1, len(values)], finite or [0.0])
    runs: list[list[tuple[Length, Length]]] = [[]]
    for step, value in enumerate(values, 1):
        if math.isfinite(value):
            runs[-1].append((axes.x(step), axes.y(value)))
        else:
            runs.append([])
    drawn = [
        polyline(points) if len(points) > 1 else mark(*points[0], 0, 2.6, class_="dot") for points in runs if points
    ]
    gaps = len(values) - len(finite)
    says = f"{name}: {_said(values[0])} at the first of {len(values)} steps, {_said(values[-1])} at the last" + (
        f"; {gaps} not finite" if gaps else ""
    )
    return _figure(name, axes.drawn(says, "training step", "", [element("g", *drawn, class_="curve edited")]))


def charts(*drawn: str) -> str:
    """Charts side by side, as far as there is room."""
    return element("div", *drawn, class_="charts") if any(drawn) else ""


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axes:
    """Where values stand in a chart."""

    def __init__(self, across: Sequence[int], up: Sequence[float], half: float = 0.0) -> None:
        self._steps = (min(across), max(across))
        self._left, self._right = min(across) - half, max(max(across), min(across) + (0 if half else 1)) + half
        low, high = min(up), max(up)
        margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
        self._low = low if low == 0 else low - margin
        self._high = high + margin

    def x(self, at: Length) -> float:
        return LEFT + (at - self._left) / (self._right - self._left) * (RIGHT - LEFT)

    def y(self, value: Length) -> float:
        return FLOOR - (value - self._low) / (self._high - self._low) * (FLOOR - TOP)

    def drawn(self, says: str, x: str, y: str, inside: Sequence[str]) -> str:
        """The chart with its axes."""
        parts = []
        for value in ticks(self._low, self._high):
            parts.append(line(LEFT, self.y(value), RIGHT, self.y(value), class_="axis" if value == 0 else "grid"))
            parts.append(label(LEFT - 6, self.y(value) + 4, f"{value:.4g}", class_="tick", text_anchor="end"))
        parts.append(line(LEFT, FLOOR, RIGHT, FLOOR, class_="axis"))
        first, last = self._steps
        for at in dict.fromkeys([first, *(int(t) for t in ticks(float(first), float(last)) if self._apart(t)), last]):
            parts.append(line(self.x(at), FLOOR, self.x(at), FLOOR + 4, class_="axis"))
            parts.append(label(self.x(at), FLOOR + 17, str(at), class_="tick", text_anchor="middle"))
        parts.append(
            label((LEFT + RIGHT) / 2, HEIGHT - 6, f"{x}; up: {y}" if y else x, class_="tick", text_anchor="middle")
        )
        return drawing(WIDTH, HEIGHT, says, *parts, *inside)

    def _apart(self, at: float) -> bool:
        """Whether a tick is whole and stands far enough from both ends to be read."""
        return at == int(at) and min(self.x(at) - self.x(self._steps[0]), self.x(self._steps[1]) - self.x(at)) > 22


def _said(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "n/a"


def _figure(name: str, drawn: str) -> str:
    return element("figure", element("figcaption", text=name), drawn)
