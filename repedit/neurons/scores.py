"""How specific each neuron is to the forget set: importances on two sets, combined into one score."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from scipy import stats as scipy_stats
from torch import Tensor

from repedit.activations.collection import Collection
from repedit.errors import (
    ArgumentError,
    FingerprintError,
    MissingStatistic,
    OverlapError,
    ShapeError,
    UnknownName,
    UnsuitableImportance,
    nearest,
)
from repedit.io import archive
from repedit.io.text import check_fields
from repedit.models.subject import Subject
from repedit.sites import Point, Site, SiteKey, site_key
from repedit.stats import Activity

# --- Scores: how specific each neuron is to the forget set, by site, with where that comes from


@dataclass(frozen=True, eq=False)
class Score:
    """How specific each neuron of a site is to the forget set; higher is more specific."""

    site: SiteKey
    values: Float[Tensor, " d"]
    """float64; -inf where a neuron must not be selected."""
    importance: str
    combine: str
    agreement: float
    """Spearman's rank correlation of the two importances."""
    sinks: tuple[int, ...] = ()
    """Neurons whose first-position rms exceeds 100 times the layer's median."""
    protected: bool = False
    """Whether sinks are kept from selection."""
    group_sizes: Mapping[str, int] = field(default_factory=dict)
    """Neurons in a head and in a key-value group, for attention sites."""


_PLAIN = {
    "importance": str, "combine": str, "agreement": int | float, "sinks": list[int], "protected": bool, "units": dict[str, int],
}  # fmt: skip
"""Of the fields of a score, those that a file holds as plain values."""


@dataclass(frozen=True, eq=False)
class Scores(Mapping[SiteKey, Score]):
    """One Score a site, with where they come from."""

    by_site: Mapping[SiteKey, Score]
    provenance: Mapping[str, Any]

    def __getitem__(self, site: SiteKey) -> Score:
        return self.by_site[site if site in self.by_site else Site.parse(site)]

    def __iter__(self) -> Iterator[SiteKey]:
        return iter(self.by_site)

    def __len__(self) -> int:
        return len(self.by_site)

    def __repr__(self) -> str:
        total = sum(len(score.values) for score in self.values())
        kinds = sorted({f"{score.combine} of {score.importance}" for score in self.values()})
        return f"Scores({total:,} neurons at {len(self)} sites, {', '.join(kinds)})"

    def largest(self, count: int) -> tuple[tuple[Site, int, float], ...]:
        """The neurons of highest score over all sites, the highest first: (site, neuron, score); protected ones are left out."""
        sites = [(site, neuron) for site, score in self.items() for neuron in range(len(score.values))]
        values = torch.cat([score.values for score in self.values()])
        order = values.argsort(descending=True, stable=True)[:count].tolist()
        return tuple((*sites[i], float(values[i])) for i in order if values[i] > -torch.inf)

    @property
    def agreement(self) -> float:
        """Median Spearman correlation over sites."""
        return float(torch.tensor([s.agreement for s in self.values()], dtype=torch.float64).quantile(0.5))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, a vector a site, with everything else in its header."""
        plain = {
            str(site): {k: v for k, v in vars(s).items() if k not in ("site", "values", "group_sizes")}
            | {"units": s.group_sizes}
            for site, s in self.items()
        }
        values = {str(site): s.values for site, s in self.items()}
        archive.write(path, "scores", values, {"sites": plain, "provenance": dict(self.provenance)})

    @staticmethod
    def load(path: str | Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is not saved scores.
        """
        values, header = archive.read(path, "scores")
        with archive.rebuilding(path, "scores"):
            found = {}
            for name, row in header["sites"].items():
                site = site_key(name)
                check_fields(row, _PLAIN, name)
                plain = {key: value for key, value in row.items() if key != "units"}
                plain |= {"sinks": tuple(row["sinks"]), "group_sizes": row["units"]}
                found[site] = Score(site, values.pop(name), **plain)
            wrong = [*values, *(str(site) for site, score in found.items() if score.values.ndim != 1)]
            if wrong:
                raise ValueError(f"the tensor {wrong[0]!r} is not the vector of a site")
            return Scores({site: found[site] for site in sorted(found)}, dict(header["provenance"]))


# --- How two importances become one score; higher is more specific to the forget set
#
# I_f and I_r are vectors by site, float64. Every combination is finite where both are, whatever the scale of a layer.


TINY = torch.finfo(torch.float64).tiny
Values = dict[SiteKey, Tensor]


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


# --- How specific each neuron is to the forget set: importances on two sets, combined into one score
#
# Selective pruning, Pochinkov and Schoots 2024 (arXiv 2403.01267), with per-layer scale-free combinations.


# Median Spearman correlation of forget and retain importance over layers: code against WikiText 0.52, code against
# Python documentation 0.77, where pruning removed both.
COLLINEAR = 0.65
# A sink neuron's rms at the first position, over its layer's median: 73 of 46,080 neurons of SmolLM2-135M pass 100.
SINK_RATIO = 100.0
GRADIENT_IMPORTANCES = ("gxa", "taylor", "fisher", "attribution", "attribution_mean")
_SIGNED = ("attribution", "attribution_mean")


class CollinearWarning(UserWarning):
    """Forget and retain importances are nearly the same, so a score would remove both capabilities."""


def score(
    forget: Collection,
    retain: Collection,
    *,
    importance: str = "abs",
    combine: str = "difference",
    eps: str | float = "rel:1e-3",
    lam: float | None = None,
    norm: str = "layer",
    second: str = "gxa",
    q: float | None = None,
    p: float | None = None,
    weighted: bool = False,
    signed: bool = False,
    subject: Subject | None = None,
    protect_sinks: bool = True,
    warn: bool = True,
) -> Scores:
    """A score for every neuron, from its importance I_f on the forget and I_r on the retain set.

    difference: I_f / sum I_f - lam I_r / sum I_r, sums over the layer (norm="layer") or all sites ("all"); lam = 1
    ratio: I_f / (I_r + eps);  logratio: log(I_f + eps) - log(I_r + eps)
    rank: rank(I_f / (I_r + eps)) + lam rank(J_f), J the importance `second`, ranks in [0, 1] over all sites; lam = 0.3
    setdiff: 1 in the top q of I_f and not in the top p of I_r (fractions), else 0, ties by I_f

    Args:
        importance: "abs" mean |z|, "rms", "std", "frequency" P(z > 0), "gxa" mean |z g|, "taylor" |mean z g|,
            "fisher" mean (z g)^2, "attribution" (predicted loss rise if z := 0), "attribution_mean" (z := its mean).
            Signed first-order attribution is a poor score: selectivity -13.7 at 1 % on SmolLM2-135M.
        eps: "rel:1e-3" is 1e-3 times the layer's median of I_r; a number is absolute.
        weighted: multiply importances by the norm of the neuron's outgoing weights (needs `subject`).
        signed: allow what is refused because the sign of z or of an attribution says little.
        protect_sinks: keep attention-sink neurons from selection; they serve every text. Without the guard the default
            demo (SmolLM2-135M, seed 0, 3,000 tokens) let one in, and prose fell by 44 % in place of 7 %.
    Raises:
        ShapeError, FingerprintError: if the two sets were not collected on the same sites of one model.
        OverlapError: if they are the same data. MissingStatistic: if gradient sums are needed and absent.
        UnsuitableImportance, UnknownName, ArgumentError: for choices that cannot work.
    Warns:
        CollinearWarning: if the two importances rank neurons nearly alike (median Spearman above 0.65).
    Reference: Pochinkov and Schoots 2024, arXiv 2403.01267, section 3; Wei et al. 2024, arXiv 2402.05162 (setdiff).
    """
    _check_pair(forget, retain)
    _check_names(importance=importance, second=second, combine=combine)
    _check_choice(forget, importance, combine, signed, weighted, subject, q, p)
    first, last = (_importances(c, importance, subject if weighted else None) for c in (forget, retain))
    extra = _importances(forget, second, None) if combine == "rank" else {}
    values = COMBINATIONS[combine](first, last, extra, Options(eps, lam, norm, q, p, importance in _SIGNED))
    agreements = {site: _spearman(first[site], last[site]) for site in first}
    found = {}
    for site in forget:
        dead = (first[site] == 0) & (last[site] == 0)
        value = torch.where(dead, values[site].min(), values[site])
        sinks = _sinks(forget[site], retain[site])
        if protect_sinks:
            value[list(sinks)] = -torch.inf
        found[site] = Score(
            site, value, importance, combine, agreements[site], sinks, protect_sinks, dict(forget.group_sizes[site])
        )
    options: dict[str, Any] = {
        "importance": importance, "combine": combine, "eps": eps, "lam": lam, "norm": norm, "weighted": weighted,
    }  # fmt: skip
    options |= {"protect_sinks": protect_sinks, "rule": dict(forget.rule)} | (
        {"second": second} if combine == "rank" else {}
    )
    data = {
        role: {"name": c.corpus, "hash": c.data_hash, "tokens": c.counted}
        for role, c in (("forget", forget), ("retain", retain))
    }
    scores = Scores(
        found,
        {
            "method": "selective pruning",
            "options": options,
            "data": data,
            "model": forget.model,
            "weights": dict(forget.weights),
        },
    )
    if warn and scores.agreement > COLLINEAR:
        _warn_collinear(agreements, scores.agreement)
    return scores


def agreement(forget: Collection, retain: Collection, *, importance: str = "abs") -> dict[SiteKey, float]:
    """Spearman's rank correlation between forget and retain importances, by site.

    Raises:
        as `score`, for collections that do not belong together.
    """
    _check_pair(forget, retain)
    _check_names(importance=importance)
    first, last = (_importances(c, importance, None) for c in (forget, retain))
    return {site: _spearman(first[site], last[site]) for site in first}


def _sum(stat: Activity, name: str) -> Tensor:
    value = getattr(stat, name)
    if value is None:
        raise MissingStatistic(f"this importance needs the sum {name!r}; collect with collect(..., gradients=True)")
    return value / stat.count.clamp(min=1)


IMPORTANCES: Mapping[str, Callable[[Activity], Tensor]] = {
    "abs": lambda s: _sum(s, "abs"),
    "rms": lambda s: s.rms,
    "std": lambda s: s.variance.sqrt(),
    "frequency": lambda s: _sum(s, "positive"),
    "gxa": lambda s: _sum(s, "gxa_abs"),
    "taylor": lambda s: _sum(s, "gxa").abs(),
    "fisher": lambda s: _sum(s, "gxa_square"),
    "attribution": lambda s: -_sum(s, "gxa"),
    "attribution_mean": lambda s: s.mean * _sum(s, "grad") - _sum(s, "gxa"),
}


def _importances(collection: Collection, name: str, subject: Subject | None) -> Values:
    values = {site: IMPORTANCES[name](stat) for site, stat in collection.items()}
    return (
        values if subject is None else {site: value * outgoing_norms(subject, site) for site, value in values.items()}
    )


def outgoing_norms(subject: Subject, site: Site) -> Float[Tensor, " d"]:
    """The Euclidean norm of what each neuron writes with, float64."""
    parts = subject.layout.branch(site.layer, site.point).parts
    return torch.cat([part.out.read(subject.value(part.out.tensor)).double().norm(dim=0).cpu() for part in parts])


def _spearman(first: Tensor, last: Tensor) -> float:
    if len(first) < 2 or bool((first == first[0]).all()) or bool((last == last[0]).all()):
        return 0.0
    return float(scipy_stats.spearmanr(first.numpy(), last.numpy()).statistic)


def _sinks(forget: Activity, retain: Activity) -> tuple[int, ...]:
    found = torch.zeros(forget.width, dtype=torch.bool)
    for stat in (forget, retain):
        rms = (stat.first_square / stat.first_count.clamp(min=1)).sqrt()
        # Of a ReLU layer most neurons are 0 there: their median says nothing about those that fire.
        live = rms[rms > 0]
        if len(live):
            found |= rms > SINK_RATIO * live.median()
    return tuple(int(i) for i in found.nonzero()[:, 0])


def _warn_collinear(agreements: Mapping[SiteKey, float], median: float) -> None:
    worst = max(agreements, key=lambda site: agreements[site])
    warnings.warn(
        f"forget and retain importances rank neurons nearly alike: median Spearman {median:.2f}, worst {worst} with "
        f"{agreements[worst]:.2f}. A score would remove both; choose a retain set that differs more from the forget set",
        CollinearWarning,
        stacklevel=3,
    )


def _check_pair(forget: Collection, retain: Collection) -> None:
    if forget is retain or forget.data_hash == retain.data_hash:
        raise OverlapError(f"forget and retain are the same data ({forget.corpus!r}); a score would be noise")
    if forget.model != retain.model:
        raise FingerprintError(
            f"forget was collected on model {forget.model[:12]}, retain on {retain.model[:12]}; collect both on one model"
        )
    for what in ("edit", "rule"):
        mine, theirs = (getattr(side, what) for side in (forget, retain))
        if mine != theirs:
            raise FingerprintError(
                f"forget was collected with {what} {mine or 'none'}, retain with {theirs or 'none'}; collect both alike"
            )
    if set(forget) != set(retain):
        odd = sorted(set(forget) ^ set(retain))
        raise ShapeError(
            f"forget has {len(forget)} sites, retain {len(retain)}; they differ at {', '.join(map(str, odd[:3]))}"
        )
    for site in forget:
        if forget[site].width != retain[site].width:
            raise ShapeError(
                f"{site}: widths {forget[site].width} and {retain[site].width}; were they collected on the same model?"
            )


def _check_names(**names: str) -> None:
    for name, value in names.items():
        table: Mapping[str, object] = COMBINATIONS if name == "combine" else IMPORTANCES
        if value not in table:
            raise UnknownName(f"{name}={value!r} does not exist; {nearest(value, table)} All: {', '.join(table)}")


def _check_choice(
    forget: Collection,
    importance: str,
    combine: str,
    signed: bool,
    weighted: bool,
    subject: Subject | None,
    q: float | None,
    p: float | None,
) -> None:
    if importance == "frequency" and forget.gated and not signed and any(s.point is Point.MLP_NEURONS for s in forget):
        raise UnsuitableImportance(
            "importance='frequency' counts z > 0, but on a gated MLP z = act(gate) * up has an arbitrary sign: measured "
            "selectivity -5.5 on SmolLM2-135M; use importance='abs', or signed=True to insist"
        )
    if importance in _SIGNED and not (signed and combine == "difference"):
        raise UnsuitableImportance(
            f"importance={importance!r} is signed and a poor score: measured selectivity -13.7 at 1 % and -7.8 at 3 %; use "
            "importance='gxa', or combine='difference' with signed=True to insist"
        )
    if weighted and subject is None:
        raise ArgumentError("weighted=True needs the outgoing weights: pass subject=")
    if combine == "setdiff" and (q is None or p is None or not (0 < q <= 1 and 0 <= p <= 1)):
        raise ArgumentError(f"combine='setdiff' needs the fractions q and p in [0, 1]; found q={q}, p={p}")
