"""Every neuron in the order of the model, as high as its score: hover one to read what drives it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repedit.activations.examples import Examples
from repedit.errors import ArgumentError
from repedit.explore.showing import LAYOUT, Explorer, axis, plotly, slider
from repedit.foreign_text import for_plotly
from repedit.importance.scores import Scores
from repedit.plot import specialization
from repedit.plot.canvas import model, spans, texts
from repedit.plot.heat import SCALES, reach
from repedit.sites import Site

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
    said = "; ".join(filter(None, [spans(scores), part, left, *texts(facts), *model(facts)]))
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
