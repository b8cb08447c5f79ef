"""Figures to explore in a notebook, without a server; a still picture where the front end cannot show them."""

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
from repedit.errors import ArgumentError, MissingDependency, SelectionError, TargetExists
from repedit.escaping import for_plotly
from repedit.io.files import write_text
from repedit.io.text import parse_json
from repedit.neurons.scores import Scores
from repedit.neurons.trajectory import Step, Trajectory
from repedit.plot import specialization
from repedit.plot import trajectory as drawn
from repedit.plot.canvas import FORGET, NEUTRAL, RETAIN, data_facts, describe_sites, model_facts, pruned_masks
from repedit.plot.neurons import SCALES, reach
from repedit.sites import Site

# --- A plotly figure with a still picture beside it, so that every front end shows one of them


@dataclass(frozen=True, eq=False)
class Explorer:
    """What a notebook shows interactively where it can, and as a picture elsewhere."""

    figure: Any
    """A plotly Figure."""
    still: Any
    """A matplotlib Figure of the same values."""

    def __repr__(self) -> str:
        return "Explorer: this front end shows neither plotly nor pictures; write_html(path) makes a page of it"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        buffer = io.BytesIO()
        self.still.savefig(buffer, format="png", dpi=110)
        return {
            "application/vnd.plotly.v1+json": parse_json(self.figure.to_json(), "the figure", finite=False),
            "image/png": base64.b64encode(buffer.getvalue()).decode(),
            "text/plain": repr(self),
        }

    def write_html(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """One page that holds everything it needs (5 MB, most of it plotly.js) and asks no network.

        Raises:
            TargetExists: if the file exists and overwrite is not set. CheckpointError: if it cannot be written.
        """
        target = Path(path)
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
            "rp.explore needs plotly, which is not installed: pip install plotly; rp.plot draws the same values as pictures"
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
"""One look: white paper, whatever the theme of the notebook."""


def axis(title: str, **options: Any) -> dict[str, Any]:
    """The layout of an axis with its title."""
    return {"title": {"text": title, "font": {"size": 13}}, **options}


def slider(label: str, steps: list[dict[str, Any]], active: int) -> dict[str, Any]:
    """The layout of a slider below the figure."""
    return {
        "active": active,
        "currentvalue": {"prefix": label},
        "pad": {"t": 50},
        "steps": steps,
    }


# --- Every neuron in the order of the model, as high as its score: hover one to read what drives it


FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""What the slider offers to prune."""
SVG = 6000
"""Up to so many points are drawn as SVG, which needs no WebGL."""
HOVER = (
    "<b>%{text}, neuron %{customdata[0]}</b><br>score %{y:.4g}, rank %{customdata[1]:,}<br>%{hovertext}<extra></extra>"
)
MARKER = {"size": 4.5, "colorscale": "PuOr", "reversescale": True, "line": {"width": 0.4, "color": "#777"}}


def neurons(
    scores: Scores,
    examples: Sequence[Examples] = (),
    *,
    at_most: int | None = None,
    snippets: int = 400,
    context: int = 6,
) -> Explorer:
    """The map of specialisation to explore: neurons from the first layer to the last, each as high as its score.

    Hovering shows site, index, score, rank over all sites, and the texts that drive the neuron hardest on each set. The slider
    moves the line above which `rp.prune(scores, fraction=...)` takes neurons.

    Args:
        examples: what `rp.max_activating` returned for each set, such as (of_forget, of_retain).
        at_most: show only the neurons of most extreme scores, half of either side; None shows all.
        snippets: for how many neurons of most extreme scores texts are in the figure.
        context: tokens on either side of the strongest one.
    Raises:
        ArgumentError: if there is no score to draw.
        MissingDependency: if plotly is not installed.
    """
    go = plotly()
    still, cloud = specialization(scores), _cloud(scores)
    order = np.argsort(-cloud.shown, kind="stable")
    shown = _extreme(order, at_most)
    told = {int(i) for i in _extreme(order, snippets)} if examples else set()
    texts_of = [_told(cloud, int(i), examples, context) if int(i) in told else "" for i in shown]
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
            hovertext=texts_of,
            mode="markers",
            hovertemplate=HOVER,
            marker=MARKER | {"color": colour, "cmin": middle - far, "cmax": middle + far},
        )
    )
    figure.update_layout(
        **LAYOUT,
        title={"text": _title(scores, len(shown), cloud), "font": {"size": 14}},
        xaxis=axis("layer, and within it the index of the neuron", tickvals=layers, zeroline=False),
        yaxis=axis(scale.name),
        height=560,
        **_line(cloud.shown[order]),
    )
    return Explorer(figure, still)


@dataclass(frozen=True, eq=False)
class _Cloud:
    """Every unprotected neuron: its site, index, place in depth, score as drawn, rank by score over all sites."""

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
    drawn = np.split(scale.shown(np.concatenate(values)), np.cumsum([len(v) for v in values])[:-1])
    for number, (site, shown) in enumerate(zip(sites, drawn, strict=True)):
        index = np.arange(len(shown))
        parts.append(
            np.stack([np.full(len(shown), number), index, site.layer + (index + 0.5) / len(shown) - 0.5, shown])
        )
    rows = np.concatenate(parts, 1)
    kept = np.isfinite(rows[3])
    number, index, depth, shown = rows[:, kept]
    rank = np.empty(len(shown), dtype=np.int64)
    rank[np.argsort(-shown, kind="stable")] = np.arange(1, len(shown) + 1)
    return _Cloud(sites, number.astype(int), index.astype(int), depth, shown, rank, int((~kept).sum()))


def _extreme(order: NDArray[np.int64], count: int | None) -> NDArray[np.int64]:
    """The first and last of an order, half of either."""
    if count is None or count >= len(order):
        return order
    if count < 2:
        raise ArgumentError(f"{count} neurons were asked for; give at least 2, one of either side")
    return np.concatenate([order[: count - count // 2], order[-(count // 2) :]])


def _told(cloud: _Cloud, i: int, examples: Sequence[Examples], context: int) -> str:
    """What drives a neuron on each set, as lines of HTML."""
    site, lines = cloud.sites[cloud.site[i]], []
    for found in examples:
        lines.append(f"<i>{for_plotly(found.corpus)}</i>")
        for row in found.of(site, int(cloud.index[i]), context=context):
            before, token, after = (for_plotly(part.replace("\n", "⏎")) for part in (row.before, row.token, row.after))
            lines.append(f"{row.activation:+.3g}  {before}<b>[{token}]</b>{after}")
    return "<br>".join(lines)


def _title(scores: Scores, shown: int, cloud: _Cloud) -> str:
    total = len(cloud.shown)
    part = f"all {total:,} neurons" if shown == total else f"the {shown:,} most extreme of {total:,} neurons"
    left = f"{cloud.protected:,} protected neurons left out" if cloud.protected else ""
    facts: Mapping[str, Any] = scores.provenance
    said = "; ".join(filter(None, [describe_sites(scores), part, left, *data_facts(facts), *model_facts(facts)]))
    return f"How specific each neuron is to the forget set<br><sup>{for_plotly(said)}</sup>"


def _line(ordered: NDArray[np.float64]) -> dict[str, Any]:
    """The line above which a fraction is pruned, and the slider that moves it."""
    offered = [(f, math.floor(f * len(ordered))) for f in FRACTIONS if math.floor(f * len(ordered)) >= 1]
    if not offered:
        return {}
    heights = [float(ordered[count - 1]) for _, count in offered]
    steps = [
        {"method": "relayout", "label": f"{100 * f:g} % ({count:,})", "args": [{"shapes[0].y0": y, "shapes[0].y1": y}]}
        for (f, count), y in zip(offered, heights, strict=True)
    ]
    start = next((i for i, (f, _) in enumerate(offered) if f == 0.01), 0)
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": heights[start], "y1": heights[start]}
    return {
        "shapes": [line | {"line": {"color": "black", "width": 1.5, "dash": "dash"}}],
        "sliders": [slider("prune above the line: ", steps, start)],
    }


# --- A pruning trajectory to slide along: what each fraction costs either set, and where its neurons lie


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
        title={"text": _sliding_title(found, start), "font": {"size": 14}},
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
    for site, mask in pruned_masks(step.edit).items():
        counts[site.layer] = counts.get(site.layer, 0) + int(mask.sum())
    return counts


def _shown(found: Trajectory, number: int, layers: list[int], heights: list[int]) -> dict[str, Any]:
    """What the slider changes to show a step: the marker, the bars, the title."""
    retain, forget = found.drops()[number]
    values = {"x": [[retain], layers], "y": [[forget], heights]}
    return {
        "method": "update",
        "label": f"{100 * found.steps[number].fraction:.3g} %",
        "args": [values, {"title.text": _sliding_title(found, number)}, [1, 2]],
    }


def _sliding_title(found: Trajectory, number: int) -> str:
    retain, forget = found.drops()[number]
    head = (
        f"{100 * found.steps[number].fraction:.3g} % pruned: forget drop {forget:.1f} %, retain drop {retain:.1f} %, "
        f"selectivity {forget - retain:.1f}"
    )
    said = "; ".join([*data_facts(found.provenance), *model_facts(found.provenance)])
    return f"{head}<br><sup>{for_plotly(said)}</sup>"


__all__ = ["Explorer", "neurons", "trajectory"]
