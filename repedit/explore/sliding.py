"""A pruning trajectory to slide along: what each fraction costs either set, and where its neurons lie."""

from __future__ import annotations

from typing import Any

from repedit.errors import SelectionError
from repedit.explore.showing import LAYOUT, Explorer, axis, plotly, slider
from repedit.foreign_text import for_plotly
from repedit.importance.shelf import Step
from repedit.importance.trajectories import Trajectory
from repedit.plot import trajectory as drawn
from repedit.plot.canvas import FORGET, NEUTRAL, RETAIN, model, removed, texts


def trajectory(found: Trajectory) -> Explorer:
    """Forget drop against retain drop, and the neurons pruned in each layer, with a slider over the pruned fraction.

    Drops are in per cent of the original top-1 accuracy; selectivity = forget drop - retain drop.

    Raises:
        SelectionError: if no step prunes. ArgumentError: if a step holds something else than masks.
        MissingDependency: if plotly is not installed.
    """
    go = plotly()
    if len(found.steps) < 2:
        raise SelectionError(f"the trajectory has {len(found.steps)} step, none that prunes; run more steps")
    drops, bars = found.drops(), [_per_layer(step) for step in found.steps]
    layers = sorted({layer for counts in bars for layer in counts})
    heights = [[counts.get(layer, 0) for layer in layers] for counts in bars]
    start = found.steps.index(found.best(None))
    retain, forget = (list(side) for side in zip(*drops, strict=True))
    figure = go.Figure(
        [
            go.Scatter(x=retain, y=forget, mode="lines+markers", line={"color": NEUTRAL}, name="every step",
                       hovertemplate="retain drop %{x:.1f} %, forget drop %{y:.1f} %<extra></extra>"),
            go.Scatter(x=[retain[start]], y=[forget[start]], mode="markers", name="this step",
                       marker={"size": 15, "color": FORGET, "line": {"width": 2, "color": "black"}}, hoverinfo="skip"),
            go.Bar(x=layers, y=heights[start], xaxis="x2", yaxis="y2", marker={"color": RETAIN}, showlegend=False,
                   hovertemplate="layer %{x}: %{y:,} neurons<extra></extra>"),
        ]
    )  # fmt: skip
    figure.update_layout(
        **LAYOUT,
        title={"text": _title(found, start), "font": {"size": 14}},
        xaxis=axis("retain drop, %", domain=[0, 0.44]),
        yaxis=axis("forget drop, %"),
        xaxis2=axis("layer", domain=[0.56, 1], anchor="y2", nticks=12),
        yaxis2=axis("neurons pruned", anchor="x2", range=[0, max(map(max, heights)) * 1.05]),
        legend={"x": 0.02, "y": 0.98},
        height=480,
        sliders=[slider("pruned: ", [_shown(found, i, layers, row) for i, row in enumerate(heights)], start)],
    )
    return Explorer(figure, drawn(found))


def _per_layer(step: Step) -> dict[int, int]:
    counts: dict[int, int] = {}
    for site, mask in removed(step.edit).items():
        counts[site.layer] = counts.get(site.layer, 0) + int(mask.sum())
    return counts


def _shown(found: Trajectory, number: int, layers: list[int], heights: list[int]) -> dict[str, Any]:
    """What the slider changes to show a step: the marker, the bars, the title."""
    retain, forget = found.drops()[number]
    values = {"x": [[retain], layers], "y": [[forget], heights]}
    return {
        "method": "update",
        "label": f"{100 * found.steps[number].fraction:.3g} %",
        "args": [values, {"title.text": _title(found, number)}, [1, 2]],
    }


def _title(found: Trajectory, number: int) -> str:
    retain, forget = found.drops()[number]
    head = (
        f"{100 * found.steps[number].fraction:.3g} % pruned: forget drop {forget:.1f} %, retain drop {retain:.1f} %, "
        f"selectivity {forget - retain:.1f}"
    )
    said = "; ".join([*texts(found.provenance), *model(found.provenance)])
    return f"{head}<br><sup>{for_plotly(said)}</sup>"
