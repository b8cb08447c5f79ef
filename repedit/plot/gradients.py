"""Figures of gradient unlearning: losses by step, trade-offs, changed weights, salient units, and SemEval scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from repedit.arguments import checked
from repedit.data.benchmarks import TASKS
from repedit.delta import Delta
from repedit.errors import ArgumentError, FingerprintError, FractionError
from repedit.metrics.semeval import MEASURES, SIDES, SemEvalScore
from repedit.models.subject import Subject
from repedit.neurons.scores import Scores
from repedit.neurons.selection import top
from repedit.plot.canvas import (
    CELL,
    FORGET,
    MARKERS,
    NEUTRAL,
    RETAIN,
    SERIES,
    SMALL,
    Canvas,
    Table,
    by_point,
    canvas,
    count_text,
    draw_table,
    label_layers,
    label_text,
    layer_and_module,
    layer_modules,
    model_facts,
    percent,
    point_title,
    short_module,
)
from repedit.quantization import step_size
from repedit.unlearning.parameters import Mask

# --- Training: losses, and the angle between the two gradients, by step

_STYLES = ("-", "--", "-.", ":")


@checked
def training(delta: Delta, *, notes: Sequence[str] = ()) -> Figure:
    """The losses of a gradient unlearning by term and step; below, the cosine of the two gradients, and c.

    c = <g_r, g_f> / |g_f|^2 is the share of the forget gradient that BLUR removes from the retain gradient. The title
    gives the reason why training ended.

    Args:
        notes: further facts for the title, such as the data.
    Raises:
        ArgumentError: if the delta has no log; sums and scaled deltas have none.
    """
    if not delta.log:
        raise ArgumentError(
            "the delta has no log; draw one that repedit.unlearn returned, before it was scaled or added"
        )
    apart = any(record.get("cosine") is not None for record in delta.log)
    figure = canvas(8.5, 6.2 if apart else 3.9)
    axes = figure.subplots(2 if apart else 1, 1, sharex=True, squeeze=False, height_ratios=(3, 2) if apart else None)[
        :, 0
    ]
    _losses(axes[0], delta)
    if apart:
        _angles(axes[1], delta)
    axes[-1].set_xlabel("step")
    stopped = delta.provenance.get("stopped", {})
    facts = [f"ended: {stopped['reason']}"] if stopped.get("reason") else []
    return figure.finish(
        f"Training of {delta.provenance.get('method', 'a delta')}", [*facts, *model_facts(delta.provenance), *notes],
        legend=axes[0], columns=3,
    )  # fmt: skip


def _losses(axes: Axes, delta: Delta) -> None:
    steps = [record["step"] for record in delta.log]
    names = list(dict.fromkeys(name for record in delta.log for name in record["losses"]))
    others = iter(SERIES[2:] * len(names))
    colored: set[str] = set()
    for number, name in enumerate(names):
        role = name.rpartition(" ")[2]
        main = {"forget": FORGET, "retain": RETAIN}.get(role)
        color = main if main is not None and role not in colored else next(others)
        colored.add(role)
        points = [
            (step, record["losses"][name])
            for step, record in zip(steps, delta.log, strict=True)
            if name in record["losses"]
        ]
        style = _STYLES[number % len(_STYLES)]
        axes.plot(
            *zip(*points, strict=True), style, color=color, label=label_text(name), linewidth=1.4,
            marker="." if len(points) < 40 else None,
        )  # fmt: skip
    values = [value for record in delta.log for value in record["losses"].values()]
    if min(values) < 0 < max(values) or max(abs(v) for v in values) > 100 * (1e-3 + min(abs(v) for v in values)):
        axes.set_yscale("symlog", linthresh=1.0)
    axes.set_ylabel("loss, unweighted")
    axes.grid(alpha=0.25)
    if delta.provenance.get("stopped", {}).get("rule"):
        axes.axvline(steps[-1], color="black", linestyle=":", linewidth=1.2)
        rule = delta.provenance["stopped"]["rule"]
        axes.annotate(f"stopped: {rule}", (steps[-1], 1), (-4, -12), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="right", fontsize=SMALL)  # fmt: skip


def _angles(axes: Axes, delta: Delta) -> None:
    cosines = [(r["step"], r["cosine"]) for r in delta.log if r.get("cosine") is not None]
    axes.plot(*zip(*cosines, strict=True), "-", color=NEUTRAL, linewidth=1.4, label="cosine of the gradients")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(ylabel="cos(g_f, g_r)", ylim=(-1.05, 1.05))
    axes.grid(alpha=0.25)
    share = [(r["step"], r["c"]) for r in delta.log if r.get("c") is not None]
    other = axes.twinx()
    other.plot(*zip(*share, strict=True), "--", color=SERIES[3], linewidth=1.2, label="c")
    other.set_ylabel("c (dashed)", color=SERIES[3])
    limit = max(1e-6, max(abs(c) for _, c in share)) * 1.05
    other.set_ylim(-limit, limit)


# --- Trade-off: each recipe as a point, forget against retain, with the regions of the verdicts

Points = Sequence[tuple[float, float]]
ORIGINAL, RETRAINED = "original", "retrained"
NEAR = 0.05
"""Distance on both axes within which a model is close to the retrained one."""
KEPT, LOST = 0.5, 0.25
"""Fractions of the original's value: above the first the forget set is not forgotten, below the second retain is lost."""
MARGIN = 0.06
"""Margin of the axes beyond 0 and 1; larger than `NEAR`, so that its box is complete."""


@checked
def tradeoff(results: Mapping[str, Points], *, notes: Sequence[str] = ()) -> Figure:
    """Forget against retain with one point per seed; the best position is near the retrained model, at the upper left.

    The regions are those of the verdicts on metrics: "not forgotten" to the right of half of the original's forget
    value, "retain lost" below a quarter of its retain value, which is one of the two signs that a collapse needs. A box
    marks what is close to the retrained model.

    Args:
        results: name -> (forget, retain) of each seed, fractions in [0, 1]. "original" must be among the names;
            "retrained" is the model that never saw the forget set.
        notes: further facts for the title, such as the model and the facts.
    Raises:
        ArgumentError: if "original" is missing or the only name, or a name has no point.
        FractionError: if a value lies outside [0, 1].
    """
    _check_results(results)
    figure = canvas(7.0, 6.4)
    axes = figure.subplots()
    start = _mean(results[ORIGINAL])
    _regions(axes, start)
    if RETRAINED in results:
        forget, retain = _mean(results[RETRAINED])
        box = Rectangle(
            (forget - NEAR, retain - NEAR), 2 * NEAR, 2 * NEAR, label=f"within {NEAR:g} of retrained", zorder=1,
            edgecolor="black", facecolor="none", linestyle="--", linewidth=1.0,
        )  # fmt: skip
        axes.add_patch(box)
    styles = {ORIGINAL: ("black", "*", 130.0), RETRAINED: ("black", "D", 55.0)}
    for number, name in enumerate(name for name in results if name not in styles):
        styles[name] = (SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)], 50.0)
    for name, points in results.items():
        color, marker, size = styles[name]
        forgotten, retained = zip(*points, strict=True)
        axes.scatter(
            forgotten, retained, color=color, marker=marker, s=size, label=label_text(name), zorder=3, alpha=0.85,
            edgecolors="white", linewidths=0.6, clip_on=False,
        )  # fmt: skip
    _count_shared(axes, results)
    axes.set(
        xlabel="forget: share still right (less is better)", ylabel="retain: share still right (more is better)",
        xlim=(-MARGIN, 1 + MARGIN), ylim=(-MARGIN, 1 + MARGIN),
    )  # fmt: skip
    axes.grid(alpha=0.25)
    seeds = max(len(points) for points in results.values())
    others = len(set(results) - {ORIGINAL, RETRAINED})
    return figure.finish(
        "What unlearning buys and costs", [count_text(others, "recipe"), count_text(seeds, "seed"), *notes],
        legend=axes, columns=4,
    )  # fmt: skip


def _check_results(results: Mapping[str, Points]) -> None:
    if ORIGINAL not in results or len(results) < 2:
        raise ArgumentError(
            f"tradeoff() was given {sorted(results)}; give {ORIGINAL!r}, which defines the regions, and at least one other"
        )
    for name, points in results.items():
        if not len(points):
            raise ArgumentError(f"{name!r} has no point; give one (forget, retain) per seed")
        for point in points:
            if len(point) != 2 or not all(0 <= value <= 1 for value in point):
                raise FractionError(f"{name!r} holds {tuple(point)}; give (forget, retain), both in [0, 1]")


def _mean(points: Points) -> tuple[float, float]:
    forget, retain = zip(*points, strict=True)
    return sum(forget) / len(forget), sum(retain) / len(retain)


def _count_shared(axes: Axes, results: Mapping[str, Points]) -> None:
    """Annotate the number of names at positions that several share."""
    positions: dict[tuple[float, float], set[str]] = {}
    for name, points in results.items():
        for forget, retain in points:
            positions.setdefault((round(forget, 2), round(retain, 2)), set()).add(name)
    for point, names in positions.items():
        if len(names) > 1:
            axes.annotate(
                f"{len(names)} here", point, (0, -17), textcoords="offset points", ha="center", va="top", fontsize=SMALL,
                zorder=4, path_effects=[withStroke(linewidth=3, foreground="white")],
            )  # fmt: skip


def _regions(axes: Axes, start: tuple[float, float]) -> None:
    """Shade the regions in which the forget set is not forgotten, and in which retain is lost."""
    right, floor = KEPT * start[0], LOST * start[1]
    axes.axvspan(right, 1 + MARGIN, color=FORGET, alpha=0.10, linewidth=0, zorder=0)
    axes.axhspan(-MARGIN, floor, color=NEUTRAL, alpha=0.16, linewidth=0, zorder=0)
    axes.add_patch(
        Rectangle((-MARGIN, floor), right + MARGIN, 1 + MARGIN - floor, color=RETAIN, alpha=0.07, linewidth=0, zorder=0)
    )
    words = {
        "not forgotten": ((right + 1 + MARGIN) / 2, (floor + 1) / 2),
        "forgotten, retain kept in part or whole": ((right - MARGIN) / 2, (floor + 1) / 2),
        "retain lost, a sign of collapse": (0.5, (floor - MARGIN) / 2),
    }
    for text, (x, y) in words.items():
        axes.text(x, y, text.replace("n, ", "n,\n"), ha="center", va="center", fontsize=SMALL, color="0.25", zorder=2)


# --- The change of each weight, and whether it survives rounding to four bits


@checked
def delta(delta: Delta, subject: Subject, *, notes: Sequence[str] = ()) -> Figure:
    """The change of each weight relative to its spread, |dw| / std(w), by layer and module.

    |dw| is a root mean square. The dashed line is half a step of 4-bit rounding over std(w), the median over the
    changed matrices of a layer. Changes far below the line mostly vanish in 4-bit rounding, which restores the original
    model.

    Args:
        subject: the model from which the delta was trained.
        notes: further facts for the title.
    Raises:
        FingerprintError: if the delta was made for another model.
        ArgumentError: if it changes no tensor of a layer.
    """
    start = _started(delta, subject)
    moved = {name: _relative(value, start[name]) for name, value in delta.tensors.items()}
    moved = {name: size for name, size in moved.items() if layer_and_module(name)[0] is not None and size > 0}
    if not moved:
        raise ArgumentError(f"the delta changes nothing inside a layer, of {count_text(len(delta.tensors), 'tensor')}")
    layers = list(range(len(subject.layout.layers)))
    figure = canvas(8.5, 5.2)
    axes = figure.subplots()
    for number, module in enumerate(layer_modules(moved)):
        values = _mean_by_layer({name: size for name, size in moved.items() if layer_and_module(name)[1] == module})
        axes.plot(
            *zip(*sorted(values.items()), strict=True), color=SERIES[number % len(SERIES)], markersize=6, linewidth=1.0,
            marker=MARKERS[number % len(MARKERS)], linestyle="-", label=label_text(short_module(module)),
        )  # fmt: skip
    thresholds = _thresholds({name: start[name] for name in moved if start[name].ndim > 1})
    if thresholds:
        axes.plot(
            *zip(*thresholds, strict=True), color="black", linestyle="--", linewidth=1.2, label="half a step of 4 bits"
        )
    shown = [*moved.values(), *(value for _, value in thresholds if value == value)]
    # A factor of 4 on both sides: the ticks of a scale of less than a decade are unreadable.
    axes.set_ylim(min(shown) / 4, max(shown) * 4)
    axes.set(yscale="log", ylabel="|dw| / std(w)", xlim=(-0.5, len(layers) - 0.5))
    label_layers(axes, layers)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    return figure.finish("How far the training moved each weight", [*_facts(delta), *notes], legend=axes, columns=4)


def _started(delta: Delta, subject: Subject) -> dict[str, Tensor]:
    """The weights of the model by name, checked to be those from which the delta was trained."""
    start = {name: subject.value(name) for name in subject.specs}
    for name, value in delta.tensors.items():
        shape = tuple(start[name].shape) if name in start else "absent"
        if shape != tuple(value.shape):
            raise FingerprintError(
                f"the delta was made for another model: its {name} has shape {tuple(value.shape)}, here it is {shape}"
            )
    expected, actual = delta.provenance.get("model"), subject.fingerprint()
    if expected and expected != actual:
        raise FingerprintError(
            f"the delta was made for model {expected[:12]}, this one is {actual[:12]}; give the original"
        )
    return start


def _relative(value: Tensor, weight: Tensor) -> float:
    """Root mean square of a difference over the standard deviation of the weight, or its mean size if it is constant."""
    spread = float(weight.double().std()) if weight.numel() > 1 else 0.0
    return float(value.double().square().mean().sqrt()) / (spread or float(weight.double().abs().mean()) or 1.0)


def _mean_by_layer(sizes: dict[str, float]) -> dict[int, float]:
    """The root mean square over weight and bias, or over experts, of a module, by layer."""
    by_layer: dict[int, list[float]] = {}
    for name, size in sizes.items():
        layer, _ = layer_and_module(name)
        by_layer.setdefault(-1 if layer is None else layer, []).append(size)
    return {layer: (sum(s * s for s in part) / len(part)) ** 0.5 for layer, part in by_layer.items()}


def _thresholds(weights: dict[str, Tensor]) -> list[tuple[float, float]]:
    """Two points per layer: the median over its matrices of half a rounding step over the standard deviation."""
    by_layer: dict[int, list[float]] = {}
    for name, weight in weights.items():
        layer, _ = layer_and_module(name)
        half = float(step_size(weight, "int4").double().median()) / 2
        by_layer.setdefault(-1 if layer is None else layer, []).append(half / (float(weight.double().std()) or 1.0))
    # Each layer is a level segment, so that a single layer is visible; NaN leaves a gap where nothing changed.
    return [
        (layer + end, median(by_layer.get(layer, [math.nan])))
        for layer in range(max(by_layer, default=-1) + 1)
        for end in (-0.5, 0.5)
    ]


def _facts(delta: Delta) -> list[str]:
    outside = [name for name in delta.tensors if layer_and_module(name)[0] is None]
    facts = [str(delta.provenance["method"])] if delta.provenance.get("method") else []
    facts.append(count_text(len(delta.tensors), "tensor") + " changed")
    facts += [f"{count_text(len(outside), 'tensor')} outside the layers not shown"] if outside else []
    return [*facts, *model_facts(delta.provenance)]


# --- The units that a mask selects, by layer and module, next to those that pruning would select

_Panel = tuple[Table, list[str], str]


@checked
def saliency(mask: Mask, score: Scores | None = None, *, notes: Sequence[str] = ()) -> Figure:
    """The percentage of units of each layer and module that a mask selects, next to the neurons that pruning would select.

    With scores, the right half shows the same fraction of all neurons, those with the highest scores: where both halves
    are bright, gradients and activations agree on where the forget set is represented.

    Args:
        mask: from `repedit.unlearning.masks.saliency`, or another mask.
        score: from `repedit.score`.
        notes: further facts for the title, such as the forget set.
    Raises:
        ArgumentError: if the mask has no tensor in a layer, or selects nothing.
    """
    counts: dict[tuple[int, str], list[int]] = {}
    for name, chosen in mask.tensors.items():
        layer, module = layer_and_module(name)
        if layer is not None:
            sums = counts.setdefault((layer, module), [0, 0])
            sums[0] += int(chosen.sum())
            sums[1] += chosen.numel()
    if not any(selected for selected, _ in counts.values()):
        raise ArgumentError(
            f"the mask of {count_text(len(mask.tensors), 'tensor')} selects nothing inside a layer; draw one that does"
        )
    columns = layer_modules(mask.tensors)
    layers = sorted({layer for layer, _ in counts} | {site.layer for site in score or ()})
    grid = np.full((len(layers), len(columns)), np.nan)
    for (layer, module), (selected, total) in counts.items():
        grid[layers.index(layer), columns.index(module)] = 100 * selected / total
    panels: list[_Panel] = [(grid, [short_module(module) for module in columns], "may move")]
    share = sum(c for c, _ in counts.values()) / sum(n for _, n in counts.values())
    if score is not None:
        panels.append(_pruned(score, share, layers))
    figure = _mask_figure(panels, layers)
    return figure.finish("Units that a mask lets move", [f"{percent(share)} of the units", *_origin(mask), *notes])


def _pruned(score: Scores, share: float, layers: list[int]) -> _Panel:
    """The same fraction of all neurons, selected by score."""
    keep, sites = top(score, fraction=share), by_point(score)
    grid = np.full((len(layers), len(sites)), np.nan)
    for column, group in enumerate(sites.values()):
        for site in group:
            grid[layers.index(site.layer), column] = 100 * float((~keep[site]).double().mean())
    return grid, [point_title(point) for point in sites], "pruning would pick"


def _mask_figure(panels: list[_Panel], layers: list[int]) -> Canvas:
    widths = [max(len(columns), 1.5) for _, columns, _ in panels]
    # 3.2: labels of layers, a colour bar and slanted names; 2.4: title and slanted names.
    figure = canvas(max(6.0, 3.2 + CELL * sum(widths)), 2.4 + 0.25 * max(len(layers), 3))
    row = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths, sharey=True)[0]
    end = max(float(np.nanmax(grid)) for grid, _, _ in panels)
    for axes, (grid, columns, head) in zip(row, panels, strict=True):
        image = draw_table(axes, grid, [str(layer) for layer in layers], columns, ends=(0.0, end), form="{:.3g}")
        axes.set_title(head, fontsize=9)
    row[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(row), label="share of the units, %", pad=0.02)
    return figure


def _origin(mask: Mask) -> list[str]:
    record = mask.provenance
    facts = [f"unit: {record['unit']}"] if "unit" in record else []
    if {"percentile", "loss"} <= set(record):
        facts.append(f"percentile {record['percentile']:g} of {record['loss']}")
    outside = [name for name in mask.tensors if layer_and_module(name)[0] is None]
    facts += [f"{count_text(len(outside), 'tensor')} outside the layers not shown"] if outside else []
    return [*facts, *model_facts(record)]


# --- The parts of the SemEval score, which the aggregate hides

HATCHES = ("", "//", "..", "xx", "--", "\\\\")
MOST = len(HATCHES)
"""Maximum number of models in one figure."""


@checked
def semeval(scores: Mapping[str, SemEvalScore] | SemEvalScore, *, notes: Sequence[str] = ()) -> Figure:
    """The 12 parts of each model's score as bars, forget above and retain below, with the verdicts in the title.

    Bars are the measured values: on the forget side less is better. The legend has the aggregates of the parts.

    Args:
        scores: name -> score, or one score.
        notes: further facts for the title.
    Raises:
        ArgumentError: if there is no score, or there are more than 6.
    """
    by_name = {"model": scores} if isinstance(scores, SemEvalScore) else dict(scores)
    if not 1 <= len(by_name) <= MOST:
        raise ArgumentError(f"semeval() was given {len(by_name)} scores; it draws 1 to {MOST}")
    figure = canvas(9.0, 6.6 + 0.2 * len(by_name))
    for axes, side in zip(figure.subplots(2, 1), SIDES, strict=True):
        _bars(axes, side, by_name)
    verdicts = [
        score.verdict if len(by_name) == 1 else f"{label_text(name)}: {score.verdict}"
        for name, score in by_name.items()
    ]
    return figure.finish(
        "SemEval-2025 Task 4, part by part", [*verdicts, count_text(len(by_name), "model"), *notes],
        legend=figure.axes[0], columns=1,
    )  # fmt: skip


def _bars(axes: Axes, side: str, scores: Mapping[str, SemEvalScore]) -> None:
    """Six groups with one bar per model."""
    groups = [(task, measure) for measure in MEASURES for task in TASKS]
    width = 0.8 / len(scores)
    for number, (name, score) in enumerate(scores.items()):
        shift = (number - (len(scores) - 1) / 2) * width
        values = [score.parts[f"{side}/{task}/{measure}"] for task, measure in groups]
        label = (
            f"{name}: task aggregate {score.task_aggregate:.3f}, membership {score.membership:.3f}, MMLU {score.mmlu:.3f}, "
            f"final {score.final:.3f}; {score.verdict}"
        )
        bars = axes.bar(
            [i + shift for i in range(len(groups))], values, 0.92 * width, color=SERIES[number], hatch=HATCHES[number],
            edgecolor="white", label=label_text(label, 90),
        )  # fmt: skip
        # Room for two digits above a bar of .8 / 3 of a group; with more models they would touch.
        if len(scores) <= 3:
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
    axes.set_xticks(range(len(groups)), [f"{task}\n{measure}" for task, measure in groups])
    better = "less" if side == "forget" else "more"
    axes.set(ylim=(0, 1.12), yticks=(0, 0.25, 0.5, 0.75, 1), ylabel=f"{side}: {better} is better")
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
