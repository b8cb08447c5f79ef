"""Explorers: interactive figures for notebooks that need no server, with a static image for other front ends."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repedit.activations.examples import Examples
from repedit.arguments import checked
from repedit.errors import ArgumentError, MissingDependency, SelectionError, TargetExists, check_whole, is_whole
from repedit.escaping import for_plotly
from repedit.io.files import user_path, write_text
from repedit.io.text import parse_json
from repedit.neurons.scores import Scores
from repedit.neurons.trajectory import Step, Trajectory
from repedit.plot import specialization
from repedit.plot import trajectory as trajectory_figure
from repedit.plot.canvas import FORGET, NEUTRAL, RETAIN, data_facts, describe_sites, model_facts, pruned_masks
from repedit.plot.neurons import SCALES, reach
from repedit.sites import Site

# --- The explorer: a plotly figure and a static image of the same values


@dataclass(frozen=True, eq=False)
@checked
class Explorer:
    """A figure that a notebook shows interactively if it can, and as an image otherwise."""

    figure: Any
    """A plotly Figure."""
    still: Any
    """A matplotlib Figure of the same values."""

    def __repr__(self) -> str:
        return "Explorer: this front end shows neither plotly nor images; write_html(path) writes a page"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        buffer = io.BytesIO()
        self.still.savefig(buffer, format="png", dpi=110)
        return {
            "application/vnd.plotly.v1+json": parse_json(self.figure.to_json(), "the figure", finite=False),
            "image/png": base64.b64encode(buffer.getvalue()).decode(),
            "text/plain": repr(self),
        }

    @checked
    def write_html(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a self-contained HTML page (5 MB, mostly plotly.js) that needs no network.

        Raises:
            TargetExists: if the file exists and overwrite is not set. CheckpointError: if it cannot be written.
        """
        target = user_path(path)
        if target.exists() and not overwrite:
            raise TargetExists(f"{target.absolute()} exists; give another path, or overwrite=True")
        write_text(target, self.figure.to_html(include_plotlyjs=True, full_html=True))
        return target


def plotly() -> Any:
    """plotly.graph_objects.

    Raises:
        MissingDependency: if plotly is not installed.
    """
    try:
        import plotly.graph_objects
    except ImportError as error:
        raise MissingDependency(
            "rp.explore needs plotly, which is not installed: pip install plotly; rp.plot draws the same values as images"
        ) from error
    return plotly.graph_objects


LAYOUT: dict[str, Any] = {
    "template": "none",
    "font": {"family": "sans-serif", "size": 13, "color": "#222"},
    "margin": {"l": 80, "r": 50, "t": 60, "b": 60},
    "paper_bgcolor": "white",
    "plot_bgcolor": "white",
    "hoverlabel": {"align": "left", "bgcolor": "white", "font": {"family": "monospace", "size": 12, "color": "#222"}},
}
"""White background, independent of the theme of the notebook."""


def axis(title: str, **options: object) -> dict[str, Any]:
    """The layout of an axis with its title."""
    return {"title": {"text": title, "font": {"size": 13}}, **options}


def slider(label: str, steps: list[dict[str, Any]], active: int) -> dict[str, Any]:
    """The layout of a slider below the figure."""
    return {"active": active, "currentvalue": {"prefix": label}, "pad": {"t": 50}, "steps": steps}


# --- All neurons in model order, with their scores and activating texts

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Fractions on the slider."""
SVG = 6000
"""Maximum number of points drawn as SVG, which needs no WebGL."""
HOVER = (
    "<b>%{text}, neuron %{customdata[0]}</b><br>score %{y:.4g}, rank %{customdata[1]:,}<br>%{hovertext}<extra></extra>"
)
MARKER = {"size": 4.5, "colorscale": "PuOr", "reversescale": True, "line": {"width": 0.4, "color": "#777"}}


@checked
def neurons(
    scores: Scores,
    examples: Examples | Sequence[Examples] = (),
    *,
    at_most: int | None = None,
    snippets: int = 400,
    context: int = 6,
) -> Explorer:
    """The scores of all neurons, from the first layer to the last.

    Hovering shows site, index, score, rank over all sites, and the texts that activate the neuron most on each set. The
    slider moves the line above which `rp.prune(scores, fraction=...)` prunes neurons.

    Args:
        examples: the result of `rp.max_activating`, or one for each set, such as (of_forget, of_retain).
        at_most: show only the neurons with the most extreme scores, half from each end; None shows all.
        snippets: number of neurons with the most extreme scores that get texts.
        context: tokens on either side of the strongest one.
    Raises:
        ArgumentError: if there is no score to draw, or a number is out of range.
        MissingDependency: if plotly is not installed.
    """
    if at_most is not None and not is_whole(at_most, 2):
        raise ArgumentError(f"at_most={at_most!r} neurons were asked for; give at least 2, one from each end")
    check_whole(0, snippets=snippets, context=context)
    go = plotly()
    still, cloud = specialization(scores), _cloud(scores)
    order = np.argsort(-cloud.shown, kind="stable")
    shown = _extreme(order, at_most)
    sets = (examples,) if isinstance(examples, Examples) else examples
    with_texts = {int(i) for i in _extreme(order, snippets)} if sets else set()
    texts = [_snippets(cloud, int(i), sets, context) if int(i) in with_texts else "" for i in shown]
    layers = sorted({site.layer for site in cloud.sites})
    scale = SCALES[next(iter(scores.values())).combine]
    middle, far = scale.neutral(cloud.shown), reach(scale, cloud.shown)
    colour = cloud.shown[shown].astype(np.float32)
    figure = go.Figure(
        (go.Scattergl if len(shown) > SVG else go.Scatter)(
            x=cloud.depth[shown].astype(np.float32),
            y=colour,
            customdata=np.stack([cloud.index[shown], cloud.rank[shown]], 1).astype(np.int32),
            text=[str(cloud.sites[i]) for i in cloud.site[shown]],
            hovertext=texts,
            mode="markers",
            hovertemplate=HOVER,
            marker=MARKER | {"color": colour, "cmin": middle - far, "cmax": middle + far},
        )
    )
    figure.update_layout(
        **LAYOUT, title={"text": _title(scores, len(shown), cloud), "font": {"size": 14}},
        xaxis=axis("layer, and within it the index of the neuron", tickvals=layers, zeroline=False),
        yaxis=axis(scale.name), height=560, **_line(cloud.shown[order]),
    )  # fmt: skip
    return Explorer(figure, still)


@dataclass(frozen=True, eq=False)
class _Cloud:
    """All unprotected neurons: site, index, depth in the model, score as drawn, rank of the score over all sites."""

    sites: list[Site]
    site: NDArray[np.int64]
    index: NDArray[np.int64]
    depth: NDArray[np.float64]
    shown: NDArray[np.float64]
    rank: NDArray[np.int64]
    protected: int


def _cloud(scores: Scores) -> _Cloud:
    sites, parts = list(scores), []
    scale = SCALES[next(iter(scores.values())).combine]
    values = [scores[site].values.numpy() for site in sites]
    columns = np.split(scale.shown(np.concatenate(values)), np.cumsum([len(v) for v in values])[:-1])
    for number, (site, shown) in enumerate(zip(sites, columns, strict=True)):
        index = np.arange(len(shown))
        parts.append(
            np.stack([np.full(len(shown), number), index, site.layer + (index + 0.5) / len(shown) - 0.5, shown])
        )
    rows = np.concatenate(parts, 1)
    finite = np.isfinite(rows[3])
    number, index, depth, shown = rows[:, finite]
    rank = np.empty(len(shown), dtype=np.int64)
    rank[np.argsort(-shown, kind="stable")] = np.arange(1, len(shown) + 1)
    return _Cloud(sites, number.astype(int), index.astype(int), depth, shown, rank, int((~finite).sum()))


def _extreme(order: NDArray[np.int64], count: int | None) -> NDArray[np.int64]:
    """The first and last entries of an order, half from each end."""
    if count is None or count >= len(order):
        return order
    return np.concatenate([order[: count - count // 2], order[len(order) - count // 2 :]])


def _snippets(cloud: _Cloud, i: int, examples: Sequence[Examples], context: int) -> str:
    """The most activating texts of a neuron on each set, as lines of HTML."""
    site, lines = cloud.sites[cloud.site[i]], []
    for of_set in examples:
        lines.append(f"<i>{for_plotly(of_set.corpus)}</i>")
        for row in of_set.of(site, int(cloud.index[i]), context=context):
            before, token, after = (for_plotly(part.replace("\n", "⏎")) for part in (row.before, row.token, row.after))
            lines.append(f"{row.activation:+.3g}  {before}<b>[{token}]</b>{after}")
    return "<br>".join(lines)


def _title(scores: Scores, shown: int, cloud: _Cloud) -> str:
    total = len(cloud.shown)
    part = f"all {total:,} neurons" if shown == total else f"the {shown:,} most extreme of {total:,} neurons"
    left = f"{cloud.protected:,} protected neurons left out" if cloud.protected else ""
    facts: Mapping[str, Any] = scores.provenance
    facts_line = "; ".join(filter(None, [describe_sites(scores), part, left, *data_facts(facts), *model_facts(facts)]))
    return f"How specific each neuron is to the forget set<br><sup>{for_plotly(facts_line)}</sup>"


def _line(ordered: NDArray[np.float64]) -> dict[str, Any]:
    """The line above which a fraction is pruned, and the slider that moves it."""
    fractions = [(f, math.floor(f * len(ordered))) for f in FRACTIONS if math.floor(f * len(ordered)) >= 1]
    if not fractions:
        return {}
    heights = [float(ordered[count - 1]) for _, count in fractions]
    steps = [
        {"method": "relayout", "label": f"{100 * f:g} % ({count:,})", "args": [{"shapes[0].y0": y, "shapes[0].y1": y}]}
        for (f, count), y in zip(fractions, heights, strict=True)
    ]
    start = next((i for i, (f, _) in enumerate(fractions) if f == 0.01), 0)
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": heights[start], "y1": heights[start]}
    return {
        "shapes": [line | {"line": {"color": "black", "width": 1.5, "dash": "dash"}}],
        "sliders": [slider("prune above the line: ", steps, start)],
    }


# --- A pruning trajectory with a slider over the pruned fraction


@checked
def trajectory(trajectory: Trajectory) -> Explorer:
    """Forget drop against retain drop, and the neurons pruned in each layer, with a slider over the pruned fraction.

    Drops are in per cent of the original top-1 accuracy; selectivity = forget drop - retain drop.

    Raises:
        SelectionError: if no step prunes. ArgumentError: if a step holds anything but masks.
        MissingDependency: if plotly is not installed.
    """
    go = plotly()
    if len(trajectory.steps) < 2:
        raise SelectionError(f"the trajectory has {len(trajectory.steps)} step, none that prunes; run more steps")
    drops, bars = trajectory.drops(), [_per_layer(step) for step in trajectory.steps]
    layers = sorted({layer for counts in bars for layer in counts})
    heights = [[counts.get(layer, 0) for layer in layers] for counts in bars]
    start = trajectory.steps.index(trajectory.best(None))
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
        title={"text": _sliding_title(trajectory, start), "font": {"size": 14}},
        xaxis=axis("retain drop, %", domain=[0, 0.44]),
        yaxis=axis("forget drop, %"),
        xaxis2=axis("layer", domain=[0.56, 1], anchor="y2", nticks=12),
        yaxis2=axis("neurons pruned", anchor="x2", range=[0, max(map(max, heights)) * 1.05]),
        legend={"x": 0.02, "y": 0.98},
        height=480,
        sliders=[
            slider("pruned: ", [_slider_step(trajectory, i, layers, row) for i, row in enumerate(heights)], start)
        ],
    )
    return Explorer(figure, trajectory_figure(trajectory))


def _per_layer(step: Step) -> dict[int, int]:
    counts: dict[int, int] = {}
    for site, mask in pruned_masks(step.edit).items():
        counts[site.layer] = counts.get(site.layer, 0) + int(mask.sum())
    return counts


def _slider_step(trajectory: Trajectory, number: int, layers: list[int], heights: list[int]) -> dict[str, Any]:
    """The changes that show a step: the marker, the bars and the title."""
    retain, forget = trajectory.drops()[number]
    values = {"x": [[retain], layers], "y": [[forget], heights]}
    return {
        "method": "update",
        "label": f"{100 * trajectory.steps[number].fraction:.3g} %",
        "args": [values, {"title.text": _sliding_title(trajectory, number)}, [1, 2]],
    }


def _sliding_title(trajectory: Trajectory, number: int) -> str:
    retain, forget = trajectory.drops()[number]
    head = (
        f"{100 * trajectory.steps[number].fraction:.3g} % pruned: forget drop {forget:.1f} %, retain drop {retain:.1f} %, "
        f"selectivity {forget - retain:.1f}"
    )
    facts_line = "; ".join([*data_facts(trajectory.provenance), *model_facts(trajectory.provenance)])
    return f"{head}<br><sup>{for_plotly(facts_line)}</sup>"


__all__ = ["Explorer", "neurons", "trajectory"]
