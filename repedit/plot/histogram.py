"""One neuron seen closely: its activations on both sets."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from repedit.activations.collection import batches, named_batch
from repedit.arch import hooks_at
from repedit.data import Batch, Batches
from repedit.edit import Edit
from repedit.errors import ArgumentError, NotEnoughRows, NotFinite
from repedit.hooks import evaluating, installed
from repedit.models import Subject
from repedit.plot.canvas import FORGET, RETAIN, canvas, entitle, legend_below, plain_texts
from repedit.sites import Site

Values = NDArray[np.float64]


@plain_texts
def activations(
    subject: Subject,
    site: Site | str,
    neuron: int,
    forget: Batches,
    retain: Batches,
    *,
    edit: Edit | None = None,
    bins: int = 100,
    log: bool = True,
    length: int = 128,
    batch_size: int = 8,
    limit_tokens: int | None = None,
    progress: bool | None = None,
) -> Figure:
    """Histograms of one neuron's activation on both sets, in shared bins, with zero, mean and peak marked.

    The peak is the centre of the fullest bin. Padding and first positions do not count.

    Args:
        edit: an edit that is active during the passes.
        log: a logarithmic density axis, on which rare large activations can be seen.
        limit_tokens: end each pass after the batch that reaches this many counted tokens.
    Raises:
        UnknownSite: if the model has no such site. ArgumentError: if it has no such neuron.
        NotEnoughRows: if no token of a set counts. NotFinite: if an activation is not finite.
    """
    place = subject.select(Site.parse(site))[0]
    width = subject.anatomy.width_of(place.layer, place.point)
    if not 0 <= neuron < width:
        raise ArgumentError(f"{place} has no neuron {neuron}; its neurons are 0..{width - 1}")
    if bins < 1:
        raise ArgumentError(f"bins={bins}; a histogram needs at least 1")
    sides = []
    for corpus in (forget, retain):
        items = batches(subject, corpus, length, batch_size, progress, "activations")
        with edit.hooked(subject) if edit else nullcontext():
            sides.append(_values(subject, place, neuron, items, limit_tokens))
        _check(sides[-1], corpus, place, neuron)
    edges = np.histogram_bin_edges(np.concatenate(sides), bins)
    figure = canvas(7.0, 4.8)
    axes = figure.subplots()
    facts: list[str] = []
    axes.axvline(0, color="black", linewidth=1, label="zero")
    for role, corpus, values in zip(("forget", "retain"), (forget, retain), sides, strict=True):
        _histogram(axes, f"{role} ({corpus.name})", role, values, edges)
        facts.append(f"{role} {corpus.name}, {len(values):,} tokens")
    axes.set(
        xlabel=f"activation z of neuron {neuron}", ylabel="density, per unit of z", yscale="log" if log else "linear"
    )
    legend_below(figure, axes)
    seen = [f"{bins} bins", f"model {subject.fingerprint()[:8]}"] + (["edited"] if edit else [])
    entitle(figure, f"Activation of neuron {neuron} of {place} on both sets", [*facts, *seen])
    return figure


def _values(subject: Subject, site: Site, neuron: int, items: Iterable[Batch], limit: int | None) -> Values:
    """The activations of one neuron at counted tokens."""
    found: list[Tensor] = []
    mask = torch.empty(0)

    def visit(x: Tensor, at: slice, tokens: Tensor | None) -> None:
        column = neuron - (at.start or 0)
        # An expert holds some of the neurons and sees some of the tokens.
        if 0 <= column < x.shape[-1]:
            use = mask.reshape(-1).to(x.device)
            found.append(x[..., column].reshape(-1)[use if tokens is None else use[tokens]].double().cpu())

    hooks = hooks_at(subject.model, subject.anatomy, site, visit, replaces=False)
    with evaluating(subject.model), installed(subject.model, hooks), torch.no_grad():
        counted = 0
        for number, batch in enumerate(items):
            given = batch.attention_mask
            mask = given & (given.cumsum(1) > 1)
            with named_batch(number):
                subject.model.base_model(input_ids=batch.input_ids, attention_mask=given.long(), use_cache=False)
            counted += int(mask.sum())
            if limit is not None and counted >= limit:
                break
    return torch.cat(found).numpy() if found else np.empty(0)


def _check(values: Values, corpus: Batches, site: Site, neuron: int) -> None:
    if not len(values):
        raise NotEnoughRows(
            f"corpus {corpus.name!r}: no counted token reaches neuron {neuron} of {site} (padding and first positions do "
            "not count); give longer text"
        )
    if not np.isfinite(values).all():
        raise NotFinite(f"neuron {neuron} of {site} is not finite on {corpus.name!r}; load the model in float32?")


def _histogram(axes: Axes, name: str, role: str, values: Values, edges: Values) -> None:
    """Forget is filled, with a dashed mean; retain is an outline, with a dotted one."""
    density, _ = np.histogram(values, edges, density=True)
    fullest = int(density.argmax())
    mean, peak = float(values.mean()), float(edges[fullest : fullest + 2].mean())
    forget = role == "forget"
    colour = FORGET if forget else RETAIN
    axes.stairs(density, edges, color=colour, fill=forget, alpha=0.5 if forget else 1.0, linewidth=1.4, label=name)
    axes.axvline(mean, color=colour, linestyle="--" if forget else ":", linewidth=1.6, label=f"{role} mean {mean:.3g}")
    axes.plot(
        peak,
        density[fullest],
        "v" if forget else "^",
        color=colour,
        markeredgecolor="black",
        markersize=8,
        label=f"{role} peak {peak:.3g}",
    )
