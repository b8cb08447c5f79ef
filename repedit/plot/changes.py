"""How far a training moved each weight, and whether so small a step outlives four bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from repedit.delta import Delta, step
from repedit.errors import ArgumentError, FingerprintError
from repedit.models import Subject
from repedit.plot.canvas import MARKERS, SERIES, canvas, entitle, legend_below, model, name_layers, named, plain_texts
from repedit.plot.cells import counted
from repedit.plot.tensors import modules, place, short


@plain_texts
def delta(delta: Delta, subject: Subject, *, notes: Sequence[str] = ()) -> Figure:
    """The change of each weight over its spread, |dw| / std(w), by layer and module, and what four bits can hold.

    |dw| is a root mean square. The dashed line is half a step of 4-bit rounding, over std(w): the median over the changed
    matrices of a layer. What lies far below it is mostly rounded away, and the model is then what it was before.

    Args:
        subject: the model that the delta was trained from.
        notes: what else the title should tell.
    Raises:
        FingerprintError: if the delta was made for another model.
        ArgumentError: if it changes no tensor of a layer.
    """
    start = _started(delta, subject)
    moved = {name: _relative(value, start[name]) for name, value in delta.tensors.items()}
    moved = {name: size for name, size in moved.items() if place(name)[0] is not None and size > 0}
    if not moved:
        raise ArgumentError(f"the delta changes nothing inside a layer, of {counted(len(delta.tensors), 'tensor')}")
    layers = list(range(len(subject.anatomy.layers)))
    figure = canvas(8.5, 5.2)
    axes = figure.subplots()
    for number, module in enumerate(modules(moved)):
        values = _mean_by_layer({name: size for name, size in moved.items() if place(name)[1] == module})
        axes.plot(
            *zip(*sorted(values.items()), strict=True), color=SERIES[number % len(SERIES)], markersize=6, linewidth=1.0,
            marker=MARKERS[number % len(MARKERS)], linestyle="-", label=named(short(module)),
        )  # fmt: skip
    held = _thresholds({name: start[name] for name in moved if start[name].ndim > 1})
    if held:
        axes.plot(*zip(*held, strict=True), color="black", linestyle="--", linewidth=1.2, label="half a step of 4 bits")
    shown = [*moved.values(), *(value for _, value in held if value == value)]
    # A factor of 4 on both sides: a scale of less than a decade has ticks that nobody can read.
    axes.set_ylim(min(shown) / 4, max(shown) * 4)
    axes.set(yscale="log", ylabel="|dw| / std(w)", xlim=(-0.5, len(layers) - 0.5))
    name_layers(axes, layers)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    legend_below(figure, axes, columns=4)
    entitle(figure, "How far the training moved each weight", [*_facts(delta), *notes])
    return figure


def _started(delta: Delta, subject: Subject) -> dict[str, Tensor]:
    """The weights of the model by name, once they are known to be those the delta was trained from."""
    start = {name: subject.value(name) for name in subject.specs}
    for name, value in delta.tensors.items():
        found = tuple(start[name].shape) if name in start else "absent"
        if found != tuple(value.shape):
            raise FingerprintError(
                f"the delta was made for another model: its {name} has shape {tuple(value.shape)}, here it is {found}"
            )
    made, mine = delta.provenance.get("model"), subject.fingerprint()
    if made and made != mine:
        raise FingerprintError(f"the delta was made for model {made[:12]}, this one is {mine[:12]}; give the original")
    return start


def _relative(value: Tensor, weight: Tensor) -> float:
    """Root mean square of a difference over the standard deviation of the weight; a constant weight counts by its size."""
    spread = float(weight.double().std()) if weight.numel() > 1 else 0.0
    return float(value.double().square().mean().sqrt()) / (spread or float(weight.double().abs().mean()) or 1.0)


def _mean_by_layer(sizes: dict[str, float]) -> dict[int, float]:
    """Weight and bias, or experts, of a module as one point: the root of their mean square."""
    found: dict[int, list[float]] = {}
    for name, size in sizes.items():
        layer, _ = place(name)
        found.setdefault(-1 if layer is None else layer, []).append(size)
    return {layer: (sum(s * s for s in part) / len(part)) ** 0.5 for layer, part in found.items()}


def _thresholds(weights: dict[str, Tensor]) -> list[tuple[float, float]]:
    """Ends of a line for each layer: the median over its matrices of half a step, over the standard deviation."""
    found: dict[int, list[float]] = {}
    for name, weight in weights.items():
        layer, _ = place(name)
        half = float(step(weight, 4).double().median()) / 2
        found.setdefault(-1 if layer is None else layer, []).append(half / (float(weight.double().std()) or 1.0))
    # Each layer as a level stretch, so that a single layer shows too; NaN leaves a gap where nothing changed.
    return [
        (layer + end, median(found.get(layer, [math.nan])))
        for layer in range(max(found, default=-1) + 1)
        for end in (-0.5, 0.5)
    ]


def _facts(delta: Delta) -> list[str]:
    outside = [name for name in delta.tensors if place(name)[0] is None]
    facts = [str(delta.provenance["method"])] if delta.provenance.get("method") else []
    facts.append(counted(len(delta.tensors), "tensor") + " changed")
    facts += [f"{counted(len(outside), 'tensor')} outside the layers not shown"] if outside else []
    return [*facts, *model(delta.provenance)]
