"""How specific each neuron is to the forget set: importances on two sets, combined into one score.

Selective pruning, Pochinkov and Schoots 2024 (arXiv 2403.01267). A new score is a row of IMPORTANCES or COMBINATIONS.
"""

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
from repedit.arguments import checked
from repedit.errors import (
    ArgumentError,
    FingerprintError,
    MissingStatistic,
    OverlapError,
    ShapeError,
    UnknownName,
    UnsuitableImportance,
    check_choice,
    nearest,
)
from repedit.io import archive
from repedit.io.text import check_fields
from repedit.models.subject import Subject
from repedit.sites import Point, Site, SiteKey, site_key
from repedit.stats import Activity

# Median Spearman correlation of forget and retain importance over layers: code against WikiText 0.52, code against
# Python documentation 0.77, where pruning removed both.
COLLINEAR = 0.65
# A sink neuron's rms at the first position, over its layer's median: 73 of 46,080 neurons of SmolLM2-135M pass 100.
SINK_RATIO = 100.0
TINY = torch.finfo(torch.float64).tiny
SiteValues = dict[SiteKey, Tensor]
"""One float64 vector a site."""


class CollinearWarning(UserWarning):
    """Forget and retain importances are nearly the same, so a score would remove both capabilities."""


# --- The values: one Score a site, and all of them with their provenance


@dataclass(frozen=True, eq=False)
@checked
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
"""The fields of a score that a file holds as plain values."""


@dataclass(frozen=True, eq=False)
@checked
class Scores(Mapping[SiteKey, Score]):
    """The scores of several sites, with their provenance."""

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

    @checked
    def largest(self, count: int) -> tuple[tuple[Site, int, float], ...]:
        """(site, neuron, score) of the highest scores over all sites, the highest first; protected neurons are left out."""
        neurons = [(site, neuron) for site, score in self.items() for neuron in range(len(score.values))]
        values = torch.cat([score.values for score in self.values()])
        order = values.argsort(descending=True, stable=True)[:count].tolist()
        return tuple((*neurons[i], float(values[i])) for i in order if values[i] > -torch.inf)

    @property
    def agreement(self) -> float:
        """Median Spearman correlation over sites."""
        return float(torch.tensor([s.agreement for s in self.values()], dtype=torch.float64).quantile(0.5))

    @checked
    def save(self, path: str | Path) -> None:
        """Write one safetensors file: a vector for each site, with everything else in its header."""
        plain = {
            str(site): {k: v for k, v in vars(s).items() if k not in ("site", "values", "group_sizes")}
            | {"units": s.group_sizes}
            for site, s in self.items()
        }
        values = {str(site): s.values for site, s in self.items()}
        archive.write(path, "scores", values, {"sites": plain, "provenance": dict(self.provenance)})

    @staticmethod
    @checked
    def load(path: str | Path) -> Scores:
        """Read a file written by `save`.

        Raises:
            CheckpointError: if the file does not hold saved scores.
        """
        values, header = archive.read(path, "scores")
        with archive.rebuilding(path, "scores"):
            by_site = {}
            for name, row in header["sites"].items():
                site = site_key(name)
                check_fields(row, _PLAIN, name)
                plain = {key: value for key, value in row.items() if key != "units"}
                plain |= {"sinks": tuple(row["sinks"]), "group_sizes": row["units"]}
                by_site[site] = Score(site, values.pop(name), **plain)
            wrong = [*values, *(str(site) for site, score in by_site.items() if score.values.ndim != 1)]
            if wrong:
                raise ValueError(f"the tensor {wrong[0]!r} is not the vector of a site")
            return Scores({site: by_site[site] for site in sorted(by_site)}, dict(header["provenance"]))


# --- Scoring two collections


@checked
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
        signed: allow choices that are refused because the sign of z or of an attribution carries little information.
        protect_sinks: keep attention-sink neurons from selection; they serve every text. Without the guard the default
            demo (SmolLM2-135M, seed 0, 3,000 tokens) selected one, and prose fell by 44 % instead of 7 %.
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
    _check_importance(importance, combine, signed, forget)
    if weighted and subject is None:
        raise ArgumentError("weighted=True needs the outgoing weights: pass subject=")
    i_forget, i_retain = (_importances(c, importance, subject if weighted else None) for c in (forget, retain))
    j_forget = _importances(forget, second, None) if combine == "rank" else {}
    options = CombineOptions(eps, lam, norm, q, p, IMPORTANCES[importance].signed)
    values = COMBINATIONS[combine].values(i_forget, i_retain, j_forget, options)
    correlations = {site: _spearman(i_forget[site], i_retain[site]) for site in i_forget}
    by_site = {}
    for site in forget:
        dead = (i_forget[site] == 0) & (i_retain[site] == 0)
        value = torch.where(dead, values[site].min(), values[site])
        sinks = _sinks(forget[site], retain[site])
        if protect_sinks:
            value[list(sinks)] = -torch.inf
        sizes = dict(forget.group_sizes[site])
        by_site[site] = Score(site, value, importance, combine, correlations[site], sinks, protect_sinks, sizes)
    recorded = {
        "importance": importance, "combine": combine, "eps": eps, "lam": lam, "norm": norm, "weighted": weighted,
        "protect_sinks": protect_sinks, "rule": dict(forget.rule),
    }  # fmt: skip
    recorded |= {"second": second} if combine == "rank" else {}
    scores = Scores(by_site, _provenance(forget, retain, recorded))
    if warn and scores.agreement > COLLINEAR:
        _warn_collinear(correlations, scores.agreement)
    return scores


@checked
def agreement(forget: Collection, retain: Collection, *, importance: str = "abs") -> dict[SiteKey, float]:
    """Spearman's rank correlation between forget and retain importances, by site.

    Raises:
        ShapeError, FingerprintError, OverlapError, MissingStatistic, UnknownName: as `score`.
    """
    _check_pair(forget, retain)
    _check_names(importance=importance)
    i_forget, i_retain = (_importances(c, importance, None) for c in (forget, retain))
    return {site: _spearman(i_forget[site], i_retain[site]) for site in i_forget}


def needs_gradients(importance: str, combine: str) -> bool:
    """Whether a score needs collections with gradient sums."""
    return combine == "rank" or (importance in IMPORTANCES and IMPORTANCES[importance].gradients)


def outgoing_norms(subject: Subject, site: Site) -> Float[Tensor, " d"]:
    """The Euclidean norm of each neuron's outgoing weights, float64."""
    parts = subject.layout.branch(site.layer, site.point).parts
    return torch.cat([part.out.read(subject.value(part.out.tensor)).double().norm(dim=0).cpu() for part in parts])


# --- Importances: how active each neuron is on one set. z is the activation, g = dL/dz


@dataclass(frozen=True)
class Importance:
    """A measure of how active each neuron is on one set, as a function of its statistics."""

    values: Callable[[Activity], Tensor]
    meaning: str
    """In words and units, for the axis of a figure."""
    gradients: bool = False
    """Whether it needs gradient sums."""
    signed: bool = False

    def __call__(self, statistics: Activity) -> Tensor:
        return self.values(statistics)


def _mean(statistics: Activity, name: str) -> Tensor:
    total = getattr(statistics, name)
    if total is None:
        raise MissingStatistic(f"this importance needs the sum {name!r}; collect with collect(..., gradients=True)")
    return total / statistics.count.clamp(min=1)


IMPORTANCES: Mapping[str, Importance] = {
    "abs": Importance(lambda s: _mean(s, "abs"), "mean |z|"),
    "rms": Importance(lambda s: s.rms, "root mean square of z"),
    "std": Importance(lambda s: s.variance.sqrt(), "standard deviation of z"),
    "frequency": Importance(lambda s: _mean(s, "positive"), "share of tokens with z > 0"),
    "gxa": Importance(lambda s: _mean(s, "gxa_abs"), "mean |z dL/dz|, nats", gradients=True),
    "taylor": Importance(lambda s: _mean(s, "gxa").abs(), "|mean z dL/dz|, nats", gradients=True),
    "fisher": Importance(lambda s: _mean(s, "gxa_square"), "mean (z dL/dz)^2, nats^2", gradients=True),
    "attribution": Importance(
        lambda s: -_mean(s, "gxa"), "predicted rise of the loss if z := 0, nats", gradients=True, signed=True
    ),
    "attribution_mean": Importance(
        lambda s: s.mean * _mean(s, "grad") - _mean(s, "gxa"),
        "predicted rise of the loss if z := its mean, nats",
        gradients=True,
        signed=True,
    ),
}


def _importances(collection: Collection, name: str, subject: Subject | None) -> SiteValues:
    """The importance at every site, times the norms of the outgoing weights where a subject is given."""
    values = {site: IMPORTANCES[name](statistics) for site, statistics in collection.items()}
    if subject is None:
        return values
    return {site: value * outgoing_norms(subject, site) for site, value in values.items()}


# --- Combinations: two importances become one score; higher is more specific to the forget set
#
# Every combination is finite where both importances are, whatever the scale of a layer.


@dataclass(frozen=True)
class CombineOptions:
    """The options of `score` that a combination reads."""

    eps: str | float
    lam: float | None
    norm: str
    q: float | None
    p: float | None
    signed: bool
    """Importances are signed: take the difference as it is."""


@dataclass(frozen=True)
class Combination:
    """How I_f and I_r (and J_f, for "rank") become a score."""

    values: Callable[[SiteValues, SiteValues, SiteValues, CombineOptions], SiteValues]
    meaning: str
    """For the colour bar of a figure."""
    logarithmic: bool = False
    """Whether a figure shows the logarithm."""
    centered: bool = False
    """Whether no preference is the median of all scores; it is 0 otherwise."""


def _difference(forget: SiteValues, retain: SiteValues, _second: SiteValues, options: CombineOptions) -> SiteValues:
    lam = 1.0 if options.lam is None else options.lam
    if options.signed:
        return {site: forget[site] - lam * retain[site] for site in forget}
    check_choice(("layer", "all"), norm=options.norm)
    totals = [torch.stack([v.sum() for v in side.values()]).sum() for side in (forget, retain)]

    def share(value: Tensor, total: Tensor) -> Tensor:
        return value / (value.sum() if options.norm == "layer" else total).clamp(min=TINY)

    return {site: share(forget[site], totals[0]) - lam * share(retain[site], totals[1]) for site in forget}


def _ratio(forget: SiteValues, retain: SiteValues, _second: SiteValues, options: CombineOptions) -> SiteValues:
    return {site: forget[site] / (retain[site] + _eps(options.eps, forget[site], retain[site])) for site in forget}


def _logratio(forget: SiteValues, retain: SiteValues, _second: SiteValues, options: CombineOptions) -> SiteValues:
    eps = {site: _eps(options.eps, forget[site], retain[site]) for site in forget}
    return {site: (forget[site] + eps[site]).log() - (retain[site] + eps[site]).log() for site in forget}


def _rank(forget: SiteValues, retain: SiteValues, second: SiteValues, options: CombineOptions) -> SiteValues:
    lam = 0.3 if options.lam is None else options.lam
    ratio, other = _ranks(_ratio(forget, retain, second, options)), _ranks(second)
    return {site: ratio[site] + lam * other[site] for site in forget}


def _setdiff(forget: SiteValues, retain: SiteValues, _second: SiteValues, options: CombineOptions) -> SiteValues:
    q, p = options.q, options.p
    if q is None or p is None or not (0 < q <= 1 and 0 <= p <= 1):
        raise ArgumentError(f"combine='setdiff' needs the fractions q and p in [0, 1]; found q={q}, p={p}")
    ranks, retain_ranks = _ranks(forget), _ranks(retain)
    # The fraction of a tie-break never reaches 1, so order inside each class follows I_f. 1e-9: 1 - 0.9 < 0.1.
    return {
        site: ((ranks[site] > 1 - q + 1e-9) & (retain_ranks[site] <= 1 - p + 1e-9)).double() + 0.5 * ranks[site]
        for site in forget
    }


COMBINATIONS: Mapping[str, Combination] = {
    "difference": Combination(_difference, "score: share of forget - share of retain importance"),
    "ratio": Combination(_ratio, "log of the score, forget / retain importance", logarithmic=True),
    "logratio": Combination(_logratio, "score: log of forget / retain importance"),
    "rank": Combination(_rank, "score: sum of ranks, centred at its median", centered=True),
    "setdiff": Combination(_setdiff, "score: set difference, centred at its median", centered=True),
}


def _eps(eps: str | float, forget: Tensor, retain: Tensor) -> Tensor:
    kind, _, number = eps.partition(":") if isinstance(eps, str) else ("rel", "", eps)
    try:
        scale = float(number)
    except ValueError:
        scale = -1.0
    if kind != "rel" or not 0 <= scale < math.inf:
        raise UnknownName(f"eps={eps!r}; write 'rel:1e-3' (times the layer's median of I_r) or a number >= 0")
    value = scale * retain.median() if isinstance(eps, str) else torch.tensor(scale, dtype=torch.float64)
    # The least eps keeps I_f / eps finite where I_r is 0.
    return value.clamp(min=TINY * max(1.0, float(forget.max())))


def _ranks(values: SiteValues) -> SiteValues:
    """Average ranks over all sites together, in (0, 1]."""
    all_values = torch.cat(list(values.values()))
    ranks = torch.from_numpy(scipy_stats.rankdata(all_values.numpy())) / len(all_values)
    return dict(zip(values, ranks.split([len(v) for v in values.values()]), strict=True))


# --- Sinks, correlation and provenance


def _sinks(forget: Activity, retain: Activity) -> tuple[int, ...]:
    """Attention-sink neurons: those whose first-position rms is far above the layer's median, on either set."""
    is_sink = torch.zeros(forget.width, dtype=torch.bool)
    for statistics in (forget, retain):
        rms = (statistics.first_square / statistics.first_count.clamp(min=1)).sqrt()
        # Most neurons of a ReLU layer are 0 there: their median says nothing about those that fire.
        active = rms[rms > 0]
        if len(active):
            is_sink |= rms > SINK_RATIO * active.median()
    return tuple(int(i) for i in is_sink.nonzero()[:, 0])


def _spearman(forget: Tensor, retain: Tensor) -> float:
    if len(forget) < 2 or bool((forget == forget[0]).all()) or bool((retain == retain[0]).all()):
        return 0.0
    return float(scipy_stats.spearmanr(forget.numpy(), retain.numpy()).statistic)


def _provenance(forget: Collection, retain: Collection, options: Mapping[str, object]) -> dict[str, Any]:
    data = {
        role: {"name": c.corpus, "hash": c.data_hash, "tokens": c.counted}
        for role, c in (("forget", forget), ("retain", retain))
    }
    source = {"model": forget.model, "weights": dict(forget.weights)}
    return {"method": "selective pruning", "options": dict(options), "data": data, **source}


def _warn_collinear(correlations: Mapping[SiteKey, float], median: float) -> None:
    worst = max(correlations, key=lambda site: correlations[site])
    warnings.warn(
        f"forget and retain importances rank neurons nearly alike: median Spearman {median:.2f}, worst {worst} with "
        f"{correlations[worst]:.2f}. A score would remove both; choose a retain set that differs more from the forget set",
        CollinearWarning,
        stacklevel=3,
    )


# --- Refusals


def _check_pair(forget: Collection, retain: Collection) -> None:
    if forget is retain or forget.data_hash == retain.data_hash:
        raise OverlapError(f"forget and retain are the same data ({forget.corpus!r}); a score would be noise")
    if forget.model != retain.model:
        raise FingerprintError(
            f"forget was collected on model {forget.model[:12]}, retain on {retain.model[:12]}; collect both on one model"
        )
    for name in ("edit", "rule"):
        values = [getattr(side, name) for side in (forget, retain)]
        if values[0] != values[1]:
            raise FingerprintError(
                f"forget was collected with {name} {values[0] or 'none'}, retain with {values[1] or 'none'}; "
                "collect both alike"
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
            raise UnknownName(f"{name}={value!r} does not exist; {nearest(value, table, every=True)}")


def _check_importance(importance: str, combine: str, signed: bool, forget: Collection) -> None:
    if importance == "frequency" and forget.gated and not signed and any(s.point is Point.MLP_NEURONS for s in forget):
        raise UnsuitableImportance(
            "importance='frequency' counts z > 0, but on a gated MLP z = act(gate) * up has an arbitrary sign: measured "
            "selectivity -5.5 on SmolLM2-135M; use importance='abs', or signed=True to insist"
        )
    if IMPORTANCES[importance].signed and not (signed and combine == "difference"):
        raise UnsuitableImportance(
            f"importance={importance!r} is signed and a poor score: measured selectivity -13.7 at 1 % and -7.8 at 3 %; use "
            "importance='gxa', or combine='difference' with signed=True to insist"
        )
