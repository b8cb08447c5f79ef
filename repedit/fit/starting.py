"""A closed form at many sites: the statistics it needs, collected with earlier edits active, and one map a site."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from repedit.activations.collection import Collection, collect
from repedit.activations.counting import marked
from repedit.activations.passes import batches_of
from repedit.data import Batch, Batches, Facts, Rows
from repedit.edit import Edit
from repedit.errors import DataError, RepeditError, UnknownName, nearest
from repedit.fit.methods import FITS
from repedit.fit.objective import answers_of
from repedit.maps import LowRank
from repedit.models import Subject
from repedit.sites import Site
from repedit.stats import CrossMoments, Moments, pooled

RANKLESS = ("mean_difference", "lda", "leace")
_BEFORE, _ENTITY = marked("before_answer"), marked("entity")


def fitted(
    subject: Subject,
    forget: Batches,
    retain: Batches,
    sites: Sequence[Site],
    *,
    method: str,
    rank: int,
    seed: int = 0,
    earlier: Edit | None = None,
    shared: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> dict[Site, LowRank]:
    """The map a closed form finds at each site, or at all of them together, outside what earlier edits removed.

    Rows with marked answers are read at the positions that predict the answers and at the last token of the entity;
    other text at every counted token.

    Args:
        method: a name of `FITS`.
        shared: one map for all sites, from their pooled statistics.
    Raises:
        UnknownName: if there is no such method. The errors of the fit carry the site's name.
    """
    if method not in FITS:
        raise UnknownName(f"method={method!r} does not exist; {nearest(method, (*FITS, 'mrp'))}")
    previous = _previous(earlier, sites)
    if method == "random":
        width = {site: subject.anatomy.width_of(site.layer, site.point) for site in sites}
        return {
            site: FITS[method](width[site], rank=rank, seed=_seed(seed, None if shared else site), previous=previous.get(site), **options)
            for site in sites
        }  # fmt: skip
    sides = _statistics(subject, forget, retain, sites, method, earlier, progress)
    if method not in RANKLESS:
        options["rank"] = rank
    if shared:
        if method in ("leace", "grad_pca"):
            raise DataError(
                f"method={method!r} pairs rows with labels or gradients of one site and cannot be pooled; use 'cpca'"
            )
        both = [pooled([side[s] for s in sites], [sides[1][s] for s in sites]) for side in sides]
        one = FITS[method](*both, previous=previous.get(sites[0]), **options)
        return dict.fromkeys(sites, one)
    found = {}
    for site in sites:
        try:
            found[site] = FITS[method](sides[0][site], sides[1][site], previous=previous.get(site), **options)
        except RepeditError as error:
            raise type(error)(f"{site}: {error}") from error
    return found


def _previous(earlier: Edit | None, sites: Sequence[Site]) -> dict[Site, LowRank]:
    maps: Mapping[Site, Any] = {} if earlier is None else earlier.maps
    return {site: maps[site] for site in sites if site in maps}


def _statistics(
    subject: Subject, forget: Batches, retain: Batches, sites: Sequence[Site], method: str, earlier: Edit | None,
    progress: bool | None,
) -> tuple[Collection[Any], Collection[Any]]:  # fmt: skip
    options: dict[str, Any] = {"edit": earlier, "progress": progress}
    names: list[str | Site] = list(sites)
    if method == "leace":
        labels = _Answers(subject, forget)
        both: dict[str, Any] = {**options, "count": _BEFORE}
        return (
            collect(subject, forget, names, statistic=Moments, **both),
            collect(subject, forget, names, statistic=CrossMoments, labels=labels, **both),
        )
    kind: dict[str, Any] = (
        {"statistic": CrossMoments, "gradients": True} if method == "grad_pca" else {"statistic": Moments}
    )
    sides = [
        collect(subject, side, names, count=telling if isinstance(side, Rows | Facts) else None, **kind, **options)
        for side in (forget, retain)
    ]
    return sides[0], sides[1]


def telling(batch: Batch) -> Tensor:
    """The positions of a row that tell: those that predict the answer, and the entity's last token."""
    return _BEFORE(batch) | _ENTITY(batch)


class _Answers:
    """One-hot labels of the answers, at every position of their row."""

    def __init__(self, subject: Subject, corpus: Batches) -> None:
        found: set[tuple[int, ...]] = set()
        for batch in batches_of(subject, corpus, batch_size=64):
            if batch.answer is None:
                raise DataError(f"method='leace' needs rows with marked answers; {corpus.name!r} marks none")
            found |= set(answers_of(batch))
        self.classes = {answer: number for number, answer in enumerate(sorted(found))}

    def __call__(self, batch: Batch) -> Tensor:
        number = torch.tensor([self.classes[answer] for answer in answers_of(batch)])
        one_hot = torch.nn.functional.one_hot(number, len(self.classes)).to(batch.input_ids.device, torch.float32)
        return one_hot[:, None].expand(-1, batch.input_ids.shape[1], -1)


def _seed(seed: int, site: Site | None) -> int:
    return zlib.crc32(f"{seed}:{site}".encode())
