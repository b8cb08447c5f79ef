"""Where the energy of two sets lies, direction by direction, and where a projection may take from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from repedit.errors import ArgumentError
from repedit.fit import Spectra
from repedit.plot.canvas import FORGET, RETAIN, SMALL, canvas, entitle, legend_below, percent, plain_texts

NEGLIGIBLE = 1e-12
"""Energies below this share of the largest are rounding of float64 eigenvalues, and are not drawn."""


@plain_texts
def spectra(spectra: Spectra, *, notes: Sequence[str] = ()) -> Figure:
    """Energy along the principal directions of forget, of retain, and of forget outside the cut; log-log.

    Each set has its own directions, numbered from 1 in descending order. The cut is drawn after the last retain
    direction that `residual_pca` keeps out of; what it removes is at the left end of "forget outside the cut".

    Args:
        notes: what else the title should tell, such as the site and the texts.
    Raises:
        ArgumentError: if no direction has energy.
    """
    series = {
        "forget": spectra.forget.cpu().numpy(),
        "retain": spectra.retain.cpu().numpy(),
        "forget outside the cut": spectra.residual.cpu().numpy(),
    }
    largest = max((float(values.max()) for values in series.values() if len(values)), default=0.0)
    if not largest > 0:
        raise ArgumentError("no direction has energy, so there is no line to draw; were the statistics collected?")
    figure = canvas(7.5, 4.8)
    axes = figure.subplots()
    styles = zip((FORGET, RETAIN, FORGET), ("-", "-", "--"), ("o", "s", "^"), strict=True)
    hidden = 0
    for (name, values), (colour, line, marker) in zip(series.items(), styles, strict=True):
        shown = values > NEGLIGIBLE * largest
        hidden += int((~shown).sum())
        axes.plot(
            1 + np.flatnonzero(shown), values[shown], color=colour, linestyle=line, marker=marker, markersize=3.5,
            linewidth=1.4, label=name, fillstyle="none" if line == "--" else "full",
            markevery=_sparse(int(shown.sum())),
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", ylabel="energy E (uᵀx)²", xlabel="direction, by descending energy")
    axes.set_xlim(0.8, 1.2 * len(spectra.forget))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    if spectra.cut:
        _mark(axes, spectra)
    legend_below(figure, axes, columns=4)
    outside = f"{percent(spectra.share)} of forget energy outside the cut" if spectra.cut else "no cut"
    facts = [f"{len(spectra.forget)} directions", outside]
    facts += [f"{hidden} energies below {NEGLIGIBLE:.0e} of the largest not drawn"] if hidden else []
    entitle(figure, "Where the energy of both sets lies", [*facts, *notes])
    return figure


def _sparse(n: int) -> list[int]:
    """About 40 of n places, evenly spaced on a logarithmic axis, the first and the last among them."""
    return sorted({int(i) - 1 for i in np.geomspace(1, n, 40).round()}) if n else []


def _mark(axes: Axes, spectra: Spectra) -> None:
    """The cut as a line after its last direction, with its number and the share of retain energy before it."""
    at = spectra.cut + 0.5
    axes.axvline(at, color="black", linestyle=":", linewidth=1.4, label="cut")
    held = float(spectra.retain[: spectra.cut].sum() / spectra.retain.sum())
    # All lines descend, so the corner below them and left of the cut is free; with a small cut it is too narrow.
    right = at < len(spectra.forget) ** 0.5
    axes.annotate(
        f"cut: first {spectra.cut}\nhold {percent(held)}\nof retain", (at, 0.03), (5 if right else -5, 0),
        xycoords=axes.get_xaxis_transform(), textcoords="offset points", va="bottom", ha="left" if right else "right",
        fontsize=SMALL, path_effects=[withStroke(linewidth=3, foreground="white")],
    )  # fmt: skip
