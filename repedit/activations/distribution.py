"""The most common activation of each neuron: what "peak" filling holds a pruned neuron at.

Peak ablation, Pochinkov et al. 2024 (arXiv 2408.17322).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.activations.counting import CountingRule
from repedit.activations.passes import batches, inputs_of
from repedit.arch import hooks_at
from repedit.data import Batches
from repedit.edit import Edit
from repedit.errors import ArgumentError
from repedit.hooks import evaluating, installed
from repedit.models import Subject
from repedit.sites import Site

BINS = 100


def peaks(
    subject: Subject,
    corpus: Batches,
    edit: Edit,
    *,
    bins: int = BINS,
    length: int = 128,
    batch_size: int = 8,
    progress: bool | None = None,
) -> dict[Site, Float[Tensor, " d"]]:
    """The centre of the fullest of `bins` equal bins between each neuron's extremes, at the sites of an edit.

    Two passes over the corpus: one for the extremes, one to count. Counted tokens are those of `collect`.

    Raises:
        ArgumentError: if a site holds expert neurons, which see different tokens each.
    """
    routed = [s for s in edit.maps if subject.anatomy.branch(s.layer, s.point).routed]
    if routed:
        raise ArgumentError(f"{routed[0]} holds expert neurons; fill them with zero")
    rule = CountingRule(subject.tokenizer, False, False, None)
    extremes: dict[Site, Tensor] = {}
    counts: dict[Site, Tensor] = {}

    def widen(site: Site, rows: Tensor) -> None:
        new = torch.stack([rows.amin(0), rows.amax(0)])
        old = extremes.get(site, new)
        extremes[site] = torch.stack([torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])])

    def fill(site: Site, rows: Tensor) -> None:
        low, high = extremes[site]
        place = ((rows - low) / (high - low).clamp(min=1e-30) * bins).long().clamp(0, bins - 1)
        flat = place + torch.arange(rows.shape[1], device=rows.device) * bins
        counts[site] = counts.get(site, 0) + torch.bincount(flat.reshape(-1), minlength=rows.shape[1] * bins)

    for visit in (widen, fill):
        _visited(subject, corpus, list(edit.maps), rule, visit, (length, batch_size, progress))
    found = {}
    for site, (low, high) in extremes.items():
        best = counts[site].unflatten(0, (-1, bins)).argmax(1)
        found[site] = (low + (best + 0.5) * (high - low) / bins).cpu()
    return found


def _visited(
    subject: Subject,
    corpus: Batches,
    sites: list[Site],
    rule: CountingRule,
    visit: Callable[[Site, Tensor], None],
    how: tuple[int, int, bool | None],
) -> None:
    mask = torch.empty(0)

    def at(site: Site) -> Callable[..., None]:
        return lambda x, _at, _tokens: visit(site, x[mask.reshape(x.shape[:-1]).to(x.device)].float())

    hooks = [h for s in sites for h in hooks_at(subject.model, subject.anatomy, s, at(s), replaces=False)]
    with evaluating(subject.model), installed(subject.model, hooks), torch.no_grad():
        for batch in batches(subject, corpus, how[0], how[1], how[2], "peaks"):
            mask, _ = rule(batch)
            if bool(mask.any()):
                subject.model.base_model(**inputs_of(batch))
