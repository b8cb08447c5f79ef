"""What is left of removed directions in the weights, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from repedit.errors import ArgumentError
from repedit.plot.canvas import NEUTRAL, RETAIN, SMALL, canvas, entitle, legend_below, named, plain_texts
from repedit.plot.cells import counted, wrapped
from repedit.rewrite.certificates import LIMITS, Certificate, TensorCertificate

MOST = 32
"""Tensors a figure has room for."""
STYLES: tuple[dict[str, Any], ...] = ({"color": "white", "edgecolor": NEUTRAL, "hatch": "////"}, {"color": RETAIN})
"""How the bars before the cast, and as stored, are drawn."""


@plain_texts
def leakage(certificate: Certificate, *, notes: Sequence[str] = ()) -> Figure:
    """Bars of ||V^T W'|| / ||V^T W|| by tensor, before and after the cast to the stored dtype, on a logarithmic axis.

    The line is what rounding alone can leave in a dtype. Beyond 32 tensors the worst of each layer is drawn, beyond 32
    layers the worst of those; the title says how many are not. Worst is nearest to, or furthest beyond, its limit.

    Args:
        certificate: what `repedit.rewrite.certificates.certificate` returns.
        notes: what else the title should tell, such as the model.
    Raises:
        ArgumentError: if the certificate lists no tensor.
    """
    if not certificate.tensors:
        raise ArgumentError(f"the certificate ({certificate.form}) lists no tensor, so there is no bar to draw")
    shown = _chosen(certificate.tensors)
    figure = canvas(9.5, 2.2 + 0.27 * len(shown))
    axes = figure.subplots()
    _bars(axes, shown)
    legend_below(figure, axes, columns=4)
    n, beyond = len(certificate.tensors), sum(_beyond(row) > 1 for row in certificate.tensors.values())
    facts = [f"{certificate.form}, {certificate.exactness}"]
    facts += [f"{counted(certificate.rank, 'direction')} over {counted(n, 'tensor')}"]
    facts += [f"largest leak {_short(certificate.worst_leak)}"]
    facts += [f"{beyond} of {n} beyond the limit"] if beyond else []
    if len(shown) < n:
        all_layers = len(shown) == len({_layer(name) for name in certificate.tensors})
        which = "the worst of each layer" if all_layers else f"the worst of the {len(shown)} worst layers"
        facts.append(f"{which}, {n - len(shown)} tensors not shown")
    entitle(figure, "What is left of the removed directions in the weights", [*facts, *notes])
    return figure


def _chosen(tensors: Mapping[str, TensorCertificate]) -> dict[str, TensorCertificate]:
    """All tensors, or the worst of each layer, or the worst of those; in the order they came."""
    if len(tensors) <= MOST:
        return dict(tensors)
    worst: dict[str, str] = {}
    for name in sorted(tensors, key=lambda name: -_beyond(tensors[name])):
        worst.setdefault(_layer(name), name)
    kept = set(list(worst.values())[:MOST])
    return {name: row for name, row in tensors.items() if name in kept}


def _layer(name: str) -> str:
    """The part of a name up to its first number, such as "model.layers.7"; the name itself where there is none."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name


def _limit(dtype: str) -> float | None:
    return LIMITS.get(getattr(torch, dtype, None))  # type: ignore[arg-type]


def _beyond(row: TensorCertificate) -> float:
    return row.leak / (_limit(row.dtype) or max(LIMITS.values()))


def _bars(axes: Axes, rows: Mapping[str, TensorCertificate]) -> None:
    limits = {dtype: _limit(dtype) for dtype in dict.fromkeys(row.dtype for row in rows.values())}
    sides = {
        "before the cast": np.array([row.leak_computed for row in rows.values()]),
        "as stored": np.array([row.leak for row in rows.values()]),
    }
    known = [limit for limit in limits.values() if limit]
    positive = [float(v) for side in sides.values() for v in side if v > 0] + known
    left, right = min(positive, default=1e-9) / 10, max(positive, default=1.0) * 10
    at = np.arange(len(rows))
    axes.set_xscale("log")
    for (name, values), shift, style in zip(sides.items(), (-0.2, 0.2), STYLES, strict=True):
        axes.barh(at + shift, np.maximum(values - left, 0), 0.4, left=left, label=name, **style)
    for (dtype, limit), line in zip(limits.items(), ("--", "-.", ":", "-") * len(limits), strict=False):
        if limit:
            axes.axvline(limit, color="black", linestyle=line, linewidth=1.2, label=f"limit of {dtype}, {limit:.0e}")
    for y, row in enumerate(rows.values()):
        text = f"{_short(row.leak_computed)} → {_short(row.leak)}"
        axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=SMALL)
    axes.annotate(
        "before → stored", (1.01, 1), (0, 3), xycoords="axes fraction", textcoords="offset points", fontsize=SMALL
    )
    # Lines end after a dot.
    names = [
        wrapped(f"{named(name)}, {row.dtype}".replace(".", ". "), 60).replace(". ", ".") for name, row in rows.items()
    ]
    axes.set_yticks(at, names, fontsize=8)
    axes.set(xlim=(left, right), ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlabel("leak: norm along the removed directions, edited over original")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", alpha=0.25)


def _short(leak: float) -> str:
    return f"{leak:.1e}" if leak else "0"
