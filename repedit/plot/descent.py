"""A gradient unlearning step by step: its losses, and how its two gradients lie to each other."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repedit.delta import Delta
from repedit.errors import ArgumentError
from repedit.plot.canvas import (
    FORGET,
    NEUTRAL,
    RETAIN,
    SERIES,
    SMALL,
    canvas,
    entitle,
    legend_below,
    model,
    named,
    plain_texts,
)

_STYLES = ("-", "--", "-.", ":")


@plain_texts
def training(delta: Delta, *, notes: Sequence[str] = ()) -> Figure:
    """The losses of a gradient unlearning by term, and below them the cosine of the two gradients and c, over the steps.

    c = <g_r, g_f> / |g_f|^2 is the share of the forget gradient that BLUR takes out of the retain gradient. The title says
    why the training ended.

    Args:
        notes: what else the title should tell, such as the data.
    Raises:
        ArgumentError: if the delta has no log, as sums and scaled deltas have none.
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
    legend_below(figure, axes[0], columns=3)
    stopped = delta.provenance.get("stopped", {})
    facts = [f"ended: {stopped['reason']}"] if stopped.get("reason") else []
    entitle(
        figure, f"Training of {delta.provenance.get('method', 'a delta')}", [*facts, *model(delta.provenance), *notes]
    )
    return figure


def _losses(axes: Axes, delta: Delta) -> None:
    steps = [record["step"] for record in delta.log]
    names = list(dict.fromkeys(name for record in delta.log for name in record["losses"]))
    others = iter(SERIES[2:] * len(names))
    taken: set[str] = set()
    for number, name in enumerate(names):
        role = name.rpartition(" ")[2]
        main = {"forget": FORGET, "retain": RETAIN}.get(role)
        color = main if main is not None and role not in taken else next(others)
        taken.add(role)
        held = [
            (step, record["losses"][name])
            for step, record in zip(steps, delta.log, strict=True)
            if name in record["losses"]
        ]
        style = _STYLES[number % len(_STYLES)]
        axes.plot(
            *zip(*held, strict=True),
            style,
            color=color,
            label=named(name),
            linewidth=1.4,
            marker="." if len(held) < 40 else None,
        )
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
    held = [(r["step"], r["cosine"]) for r in delta.log if r.get("cosine") is not None]
    axes.plot(*zip(*held, strict=True), "-", color=NEUTRAL, linewidth=1.4, label="cosine of the gradients")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(ylabel="cos(g_f, g_r)", ylim=(-1.05, 1.05))
    axes.grid(alpha=0.25)
    share = [(r["step"], r["c"]) for r in delta.log if r.get("c") is not None]
    other = axes.twinx()
    other.plot(*zip(*share, strict=True), "--", color=SERIES[3], linewidth=1.2, label="c")
    other.set_ylabel("c (dashed)", color=SERIES[3])
    limit = max(1e-6, max(abs(c) for _, c in share)) * 1.05
    other.set_ylim(-limit, limit)
