"""How two importances become one score; higher is more specific to the forget set.

I_f and I_r are vectors by site, float64. Every combination is finite where both are, whatever the scale of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from scipy import stats as scipy_stats
from torch import Tensor

from repedit.errors import UnknownName, nearest
from repedit.sites import Place

TINY = torch.finfo(torch.float64).tiny
Values = dict[Place, Tensor]


@dataclass(frozen=True)
class Options:
    """The options of `score` that a combination reads."""

    eps: str | float
    lam: float | None
    norm: str
    q: float | None
    p: float | None
    raw: bool
    """Importances are signed: take the difference as it is."""


def _difference(first: Values, last: Values, _extra: Values, options: Options) -> Values:
    lam = 1.0 if options.lam is None else options.lam
    if options.raw:
        return {site: first[site] - lam * last[site] for site in first}
    if options.norm not in ("layer", "all"):
        raise UnknownName(f"norm={options.norm!r}; {nearest(options.norm, ('layer', 'all'))}")
    whole = [torch.stack([v.sum() for v in side.values()]).sum() for side in (first, last)]

    def share(value: Tensor, total: Tensor) -> Tensor:
        return value / (value.sum() if options.norm == "layer" else total).clamp(min=TINY)

    return {site: share(first[site], whole[0]) - lam * share(last[site], whole[1]) for site in first}


def _ratio(first: Values, last: Values, _extra: Values, options: Options) -> Values:
    return {site: first[site] / (last[site] + _eps(options.eps, first[site], last[site])) for site in first}


def _logratio(first: Values, last: Values, _extra: Values, options: Options) -> Values:
    eps = {site: _eps(options.eps, first[site], last[site]) for site in first}
    return {site: (first[site] + eps[site]).log() - (last[site] + eps[site]).log() for site in first}


def _rank(first: Values, last: Values, extra: Values, options: Options) -> Values:
    lam = 0.3 if options.lam is None else options.lam
    ratio, second = _ranks(_ratio(first, last, extra, options)), _ranks(extra)
    return {site: ratio[site] + lam * second[site] for site in first}


def _setdiff(first: Values, last: Values, _extra: Values, options: Options) -> Values:
    assert options.q is not None and options.p is not None
    most, held = _ranks(first), _ranks(last)
    # The fraction of a tie-break never reaches 1, so order inside each class follows I_f. 1e-9: 1 - 0.9 < 0.1.
    return {
        site: ((most[site] > 1 - options.q + 1e-9) & (held[site] <= 1 - options.p + 1e-9)).double() + 0.5 * most[site]
        for site in first
    }


COMBINATIONS: Mapping[str, Callable[[Values, Values, Values, Options], Values]] = {
    "difference": _difference,
    "ratio": _ratio,
    "logratio": _logratio,
    "rank": _rank,
    "setdiff": _setdiff,
}


def _eps(eps: str | float, first: Tensor, last: Tensor) -> Tensor:
    relative = isinstance(eps, str)
    kind, _, number = eps.partition(":") if isinstance(eps, str) else ("rel", "", eps)
    try:
        scale = float(number)
    except ValueError:
        scale = -1.0
    if kind != "rel" or not 0 <= scale < math.inf:
        raise UnknownName(f"eps={eps!r}; write 'rel:1e-3' (times the layer's median of I_r) or a number >= 0")
    # The least eps keeps I_f / eps finite where I_r is 0.
    least = TINY * max(1.0, float(first.max()))
    return (scale * last.median() if relative else torch.tensor(scale, dtype=torch.float64)).clamp(min=least)


def _ranks(values: Values) -> Values:
    """Average ranks over all sites together, in (0, 1]."""
    joined = torch.cat(list(values.values()))
    ranks = torch.from_numpy(scipy_stats.rankdata(joined.numpy())) / len(joined)
    return dict(zip(values, ranks.split([len(v) for v in values.values()]), strict=True))
