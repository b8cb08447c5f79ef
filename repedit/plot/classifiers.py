"""Figures of classifier audits: gaps to the retrained model, losses of forget and holdout, and synthetic images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from repedit.arguments import checked
from repedit.auditing.attack import Finding
from repedit.auditing.image_attacks import MEMBERSHIP, sides
from repedit.auditing.report import AUC, FORGET, RELEARNING, RETAIN, TEST, Gap, Report
from repedit.auditing.verdict import ALIKE, CLOSE, DAMAGE, RELEARNED
from repedit.errors import ArgumentError
from repedit.metrics.membership import auc_draws, percentiles
from repedit.plot.canvas import FORGET as ORANGE
from repedit.plot.canvas import NEUTRAL, SMALL, canvas, label_text
from repedit.plot.canvas import RETAIN as BLUE
from repedit.plot.reports import is_measured
from repedit.vision.data import Images, ImageSplits

PANELS: Mapping[str, tuple[float, float, str]] = {
    FORGET: (-ALIKE, ALIKE, "forget accuracy"), RETAIN: (-DAMAGE, np.inf, "retain accuracy"),
    TEST: (-DAMAGE, np.inf, "test accuracy"), AUC: (-CLOSE, CLOSE, "AUC of the loss"), RELEARNING: (-np.inf, RELEARNED, "relearn value"),
}  # fmt: skip
"""By measure: lowest and highest gap that passes, and the title of the panel."""
ROLES = {"original": "original", "edited": "edited", "reference": "retrained"}
BINS = 24
LEAST_LOSS = 1e-5
"""Smaller losses are drawn at this value: a report rounds scores to five digits."""


@checked
def gap(reports: Mapping[str, Report]) -> Figure:
    """Gaps of recipes to the retrained model: one panel per measure, one row per recipe; gaps in the green band pass.

    Bars are 95 % intervals of the gap in AUC, grey ticks are several retrained models. A measure that no report holds
    has no panel.

    Raises:
        ArgumentError: if there is no report, or one is not of a classifier with a retrained model.
    """
    rows = {name: _by_measure(name, report) for name, report in reports.items()}
    if not rows:
        raise ArgumentError("gap() was given no report to draw; pass {recipe: report}")
    measures = [measure for measure in PANELS if any(measure in gaps for gaps in rows.values())]
    figure = canvas(3.0 + 2.0 * len(measures), 1.9 + 0.34 * len(rows))
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        low, high, title = PANELS[measure]
        values = [gaps.get(measure) for gaps in rows.values()]
        _panel(axes, values, (low, high))
        axes.set_title(title, fontsize=9.5)
        axes.set_xlabel("edited - retrained")
    names = [f"{label_text(name, 30)}: {label_text(report.verdict.word, 30)}" for name, report in reports.items()]
    panels[0].set_yticks(range(len(names)), names, fontsize=9)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    panels[0].plot([], [], "o", color=ORANGE, label="gap")
    if any(is_measured(*gap.spread) for gaps in rows.values() for gap in gaps.values()):
        panels[0].plot([], [], "|", color=NEUTRAL, markersize=9, label="lowest and highest retrained model")
    panels[0].axvspan(0, 0, color="#009E73", alpha=0.18, linewidth=0, label="what a pass allows")
    return figure.finish(
        "Gap to a model that never saw the forget images", _facts(next(iter(reports.values()))), legend=panels[0],
        columns=3,
    )  # fmt: skip


@checked
def membership(report: Report) -> Figure:
    """Loss histograms of forget and holdout images for original, edited and retrained model, with the AUC and its interval.

    Raises:
        ArgumentError: if the report holds no membership attack on images.
    """
    by_role = {name: _membership_finding(report, role) for role, name in ROLES.items()}
    findings = {name: finding for name, finding in by_role.items() if finding is not None}
    if not findings:
        raise ArgumentError("the report holds no membership attack on images; draw what rp.audit_classifier returned")
    losses = {
        name: [np.maximum(-side.round(5), LEAST_LOSS) for side in sides(finding)] for name, finding in findings.items()
    }
    all_losses = np.concatenate([side for pair in losses.values() for side in pair])
    edges = np.geomspace(all_losses.min(), max(all_losses.max(), 2 * all_losses.min()), BINS + 1)
    figure = canvas(max(6.0, 3.4 * len(findings)), 3.6)
    panels = figure.subplots(1, len(findings), sharey=True, squeeze=False)[0]
    for axes, (name, (forget, holdout)) in zip(panels, losses.items(), strict=True):
        for values, colour, filled, label in ((forget, ORANGE, True, "forget"), (holdout, BLUE, False, "holdout")):
            share = np.histogram(values, edges)[0] / len(values)
            axes.stairs(share, edges, color=colour, fill=filled, alpha=0.5 if filled else 1.0, linewidth=1.4, label=f"{label}, {len(values)} images")  # fmt: skip
        low, high = percentiles(auc_draws(-forget[None], -holdout[None])[0])
        axes.set_title(
            f"{label_text(name, 30)}: AUC {findings[name].details['auc']['loss']:.2f} [{low:.2f}, {high:.2f}]",
            fontsize=9.5,
        )
        axes.set(xscale="log", xlabel="loss of the image's label, nats")
    panels[0].set_ylabel("share of the images")
    return figure.finish(
        "Are forget images told from images that no model saw?",
        [report.verdict.word, *_facts(report)],
        legend=panels[0],
    )


@checked
def condensed(splits: ImageSplits, real: Images | None = None, *, most: int = 20) -> Figure:
    """Synthetic images of a data plan, each above its nearest real image of any label by pixel distance.

    Args:
        splits: the result of a data plan such as `rp.vision.Condense`; synthetic images have a negative index.
        real: the candidates for nearest images; None for all real images of these splits.
        most: maximum number of images, spread over the labels.
    Raises:
        ArgumentError: if no image of the splits is synthetic, or most < 1.
    """
    all_sets = [images for images in splits.sets.values() if len(images)]
    synthetic = [images[images.index < 0] for images in (splits.retain, splits.forget) if len(images)]
    sets = [images for images in synthetic if len(images)]
    if not sets or most < 1:
        raise ArgumentError(
            f"most={most}, {sum(map(len, synthetic))} synthetic images; give the result of a data plan, and most >= 1"
        )
    first = _spread(sets, most)
    others = [real] if real is not None else [images[images.index >= 0] for images in all_sets]
    pool = torch.cat([images.x for images in others]).flatten(1)
    labels = torch.cat([images.y for images in others])
    near = torch.cdist(first.x.flatten(1).double(), pool.double()).argmin(1)
    columns = min(len(first), 10)
    rows = -(-len(first) // columns)
    figure = canvas(1.0 * columns + 0.4, 2.3 * rows + 0.8)
    grid = figure.subplots(2 * rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
        axes.set(xticks=[], yticks=[])
    for number, x in enumerate(first.x):
        row, column = divmod(number, columns)
        other = pool[near[number]].reshape(x.shape)
        for place, image, word in (
            (2 * row, x, f"made {int(first.y[number])}"),
            (2 * row + 1, other, f"real {int(labels[near[number]])}"),
        ):
            _picture(grid[place, column], image)
            grid[place, column].set_title(word, fontsize=SMALL)
    return figure.finish(
        "Made images, each above its nearest real one", [*splits.plans, f"{sum(map(len, sets))} made images"]
    )


def _by_measure(name: str, report: Report) -> dict[str, Gap]:
    gaps = {gap.measure: gap for gap in report.gaps if is_measured(gap.value)}
    if not gaps:
        raise ArgumentError(
            f"{name!r} has no gap to a retrained model; draw audits of classifiers that have a reference"
        )
    return gaps


def _panel(axes: Axes, values: Sequence[Gap | None], band: tuple[float, float]) -> None:
    """Points at the gaps with their intervals; ticks at the lowest and highest of several retrained models."""
    reach = max([0.12, *(abs(end) for gap in values if gap for end in (gap.value, *gap.interval) if is_measured(end))])
    axes.set_xlim(-1.1 * reach, 1.1 * reach)
    axes.axvspan(max(band[0], -1.1 * reach), min(band[1], 1.1 * reach), color="#009E73", alpha=0.18, linewidth=0)
    axes.axvline(0, color="black", linewidth=0.9)
    for y, gap in enumerate(values):
        if gap is None:
            axes.text(0, y, "not measured", fontsize=SMALL, ha="center", va="center", color=NEUTRAL)
            continue
        if is_measured(*gap.interval):
            axes.plot(gap.interval, [y, y], color=ORANGE, linewidth=2)
        axes.plot([end - gap.reference for end in gap.spread], [y, y], "|", color=NEUTRAL, markersize=9)
        axes.plot(gap.value, y, "o", color=ORANGE, markersize=6)
    axes.grid(axis="x", alpha=0.25)


def _membership_finding(report: Report, role: str) -> Finding | None:
    finding = report.finding(role, MEMBERSHIP)
    return finding if finding is not None and "loss" in finding.settings else None


def _facts(report: Report) -> list[str]:
    first = report.gaps[0] if report.gaps else None
    membership_gap = next((gap for gap in report.gaps if gap.measure == AUC), None)
    sets = [membership_gap.members, membership_gap.others] if membership_gap else []
    count = len(report.context.get("hashes", {}).get("reference", ()))
    return [*sets, f"{count} retrained model{'s' if count > 1 else ''}"] if first and count else sets


def _spread(sets: Sequence[Images], most: int) -> Images:
    """At most `most` images, taken from the labels in turn."""
    whole = sets[0]
    for images in sets[1:]:
        whole = whole + images
    turn: NDArray[np.int64] = np.zeros(len(whole), dtype=np.int64)
    for label in whole.y.unique():
        rows = (whole.y == label).nonzero().flatten().numpy()
        turn[rows] = np.arange(len(rows))
    order = np.lexsort((whole.y.numpy(), turn))[:most]
    chosen = torch.as_tensor(order)
    return whole[chosen[whole.y[chosen].argsort(stable=True)]]


def _picture(axes: Axes, image: torch.Tensor) -> None:
    shown = image.detach().clamp(0, 1).permute(1, 2, 0).numpy()
    axes.imshow(shown[..., 0] if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=1)
