"""A closed form at each site of a model: the statistics it needs, and the map it finds. MRP training may start from it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.activations.collection import Collection, MarkedPositions, collect
from repedit.activations.forward import batches_of
from repedit.data import Batch, Batches, Facts, Rows
from repedit.edit import Edit
from repedit.errors import DataError, RepeditError, UnknownName, nearest
from repedit.fit.closed_form import FITS
from repedit.linear_maps import LowRank
from repedit.models.subject import Subject
from repedit.sites import Site
from repedit.stats import CrossMoments, Moments, pooled
from repedit.training.batching import answer_ids

_FIXED_RANK = ("mean_difference", "lda", "leace")
"""Methods whose rank is a result."""
_UNPOOLED = ("leace", "grad_pca")
"""Methods that pair rows with labels or gradients of one site."""
_BEFORE_ANSWER, _ENTITY = MarkedPositions("before_answer"), MarkedPositions("entity")


def closed_form_maps(
    subject: Subject,
    forget: Batches,
    retain: Batches,
    sites: Sequence[Site],
    *,
    method: str,
    rank: int,
    seed: int = 0,
    previous: Edit | None = None,
    shared: bool = False,
    progress: bool | None = None,
) -> dict[Site, LowRank]:
    """The map that a closed form finds at each site, or at all of them together, outside what earlier edits removed.

    Rows with marked answers are read at the positions that predict the answers and at the last token of the entity;
    other text at every counted token.

    Args:
        method: a name of `FITS`.
        previous: an earlier edit, active while statistics are collected.
        shared: one map for all sites, from their pooled statistics.
    Raises:
        UnknownName: if there is no such method. Errors of the fit carry the name of the site.
    """
    if method not in FITS:
        raise UnknownName(f"method={method!r} does not exist; {nearest(method, (*FITS, 'mrp'))}")
    fit = FITS[method]
    earlier = {} if previous is None else {site: previous.maps[site] for site in sites if site in previous.maps}
    if method == "random":
        maps = {}
        for site in sites:
            width = subject.layout.width_of(site.layer, site.point)
            site_seed = zlib.crc32(f"{seed}:{None if shared else site}".encode())
            maps[site] = fit(width, rank=rank, seed=site_seed, previous=earlier.get(site))
        return maps
    statistics = _statistics(subject, forget, retain, sites, method, previous, progress)
    options = {} if method in _FIXED_RANK else {"rank": rank}
    if shared:
        if method in _UNPOOLED:
            raise DataError(
                f"method={method!r} pairs rows with labels or gradients of one site and cannot be pooled; use 'cpca'"
            )
        scales = [statistics[1][site] for site in sites]
        sides = [pooled([side[site] for site in sites], scales) for side in statistics]
        return dict.fromkeys(sites, fit(*sides, previous=earlier.get(sites[0]), **options))
    maps = {}
    for site in sites:
        try:
            maps[site] = fit(*(side[site] for side in statistics), previous=earlier.get(site), **options)
        except RepeditError as error:
            raise type(error)(f"{site}: {error}") from error
    return maps


def _statistics(
    subject: Subject, forget: Batches, retain: Batches, sites: Sequence[Site], method: str, previous: Edit | None,
    progress: bool | None,
) -> tuple[Collection[Any], Collection[Any]]:  # fmt: skip
    """The two statistics that a method takes: of forget and retain; for LEACE of x, and of x with its labels."""
    names: list[str | Site] = list(sites)
    if method == "leace":
        labels = _AnswerLabels(subject, forget)
        return (
            collect(subject, forget, names, statistic=Moments, count=_BEFORE_ANSWER, edit=previous, progress=progress),
            collect(
                subject, forget, names, statistic=CrossMoments, labels=labels, count=_BEFORE_ANSWER, edit=previous,
                progress=progress,
            ),
        )  # fmt: skip
    gradients = method == "grad_pca"

    def collection(side: Batches) -> Collection[Any]:
        return collect(
            subject, side, names, statistic=CrossMoments if gradients else Moments, gradients=gradients,
            count=_fact_positions if isinstance(side, Rows | Facts) else None, edit=previous, progress=progress,
        )  # fmt: skip

    return collection(forget), collection(retain)


def _fact_positions(batch: Batch) -> Bool[Tensor, "b t"]:
    """The positions that predict the answer, and the last token of the entity."""
    return _BEFORE_ANSWER(batch) | _ENTITY(batch)


class _AnswerLabels:
    """One-hot labels of the answers, at every position of their row."""

    def __init__(self, subject: Subject, corpus: Batches) -> None:
        answers: set[tuple[int, ...]] = set()
        for batch in batches_of(subject, corpus, batch_size=64):
            if batch.answer is None:
                raise DataError(f"method='leace' needs rows with marked answers; {corpus.name!r} marks none")
            answers |= set(answer_ids(batch))
        self.classes: Mapping[tuple[int, ...], int] = {answer: i for i, answer in enumerate(sorted(answers))}

    def __call__(self, batch: Batch) -> Float[Tensor, "b t c"]:
        classes = torch.tensor([self.classes[answer] for answer in answer_ids(batch)])
        one_hot = torch.nn.functional.one_hot(classes, len(self.classes)).to(batch.input_ids.device, torch.float32)
        return one_hot[:, None].expand(-1, batch.input_ids.shape[1], -1)
