"""Value overwrite: what early MLPs write at the last token of an entity's name becomes a common or another entity's value.

Most of what a model knows of an entity enters the stream there. What is overwritten fact by fact, rather than suppressed in
a direction that all facts share, is not undone for the other facts when some of them are taught again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.activations.collection import CountingRule, collect, positions
from repedit.arch import hooks_at
from repedit.arguments import checked
from repedit.data import Batch, Batches, Fact, Facts, TextSource, prose
from repedit.delta import Delta
from repedit.edit import Edit
from repedit.errors import (
    ArgumentError,
    FractionError,
    NotEnoughRows,
    NotFoldable,
    RankError,
    SelectionError,
    UnknownName,
    UnknownSite,
    check_positive,
    check_seed,
    given,
    is_whole,
    nearest,
)
from repedit.fit import local_regression
from repedit.fit.contexts import (
    EntityTokens,
    Observe,
    by_entity,
    check_other_entities,
    contexts_of,
    entity_rows,
    entity_tokens,
    held_out,
    name_ends,
    not_sinks,
    recorded,
)
from repedit.fit.local_regression import Inputs, Regression
from repedit.hashing import value_hash
from repedit.hooks import Hook
from repedit.linear_maps import LowRank
from repedit.models.subject import Subject
from repedit.sites import Point, Site
from repedit.stats import CrossMoments
from repedit.training.sampler import training_rows

TARGETS = ("mean", "exchange", "selective")
METHODS = ("linear", "regression")
FORMS = ("auto", "edit", "delta")
LAM = 0.3
"""Weight of what is retained, where neither `lam` nor a budget is given."""
_LAM_RANGE = (1e-6, 1e8)
# Relative to the mean of the diagonal: keeps the system solvable where keys span fewer directions than there are neurons.
_RIDGE = 1e-8
_FEWEST = 3

# --- What a certificate says of each layer


@dataclass(frozen=True)
@checked
class LayerCertificate:
    """How well the values of one layer are overwritten, and what else moved."""

    layer: int
    lam: float | None
    """Weight of what is retained in the closed form; None for the regression."""
    rho: float
    """||R - (v' - v)|| / ||R|| on contexts not used, R = v* - v; 0 where every value is the target, 1 where none moved."""
    rho_fitted: float
    """The same on the contexts of the fit."""
    distortion: float
    """Root mean square change of the output over its size, on what is retained; ||D C^1/2|| / ||W C^1/2|| in closed form."""
    stable_rank: float
    """||D||_F^2 / ||D||_2^2 of the change D of a matrix; the smallest of the layer's matrices."""
    relative_norm: float
    """||D||_2 / ||W||_2; the largest of the layer's matrices."""
    contexts: int
    sinks: int
    """Contexts left out because the norm of their state is that of an attention sink."""


@dataclass(frozen=True)
@checked
class OverwriteCertificate:
    """The certificates of all layers, as `overwrite` records them in the provenance of its result."""

    layers: tuple[LayerCertificate, ...]

    @staticmethod
    @checked
    def of(change: Edit | Delta) -> OverwriteCertificate:
        """The certificate of an edit or delta that `overwrite` made.

        Raises:
            ArgumentError: if something else made it.
        """
        if change.provenance.get("method") != "overwrite":
            raise ArgumentError(f"{change!r} was not made by fit.overwrite, so it records no certificate")
        return OverwriteCertificate(tuple(LayerCertificate(**row) for row in change.provenance["layers"]))

    @property
    def distortion(self) -> float:
        """The largest distortion of a layer."""
        return max(row.distortion for row in self.layers)

    def describe(self) -> str:
        """A line for each layer, and what the numbers do not say."""
        lines = [
            f"layer {row.layer}: {row.rho:.3f} of the values' distance to their targets is left on unused contexts "
            f"({row.rho_fitted:.3f} on those of the fit), retained outputs move by {row.distortion:.3g}, stable rank "
            f"{row.stable_rank:.1f}, norm {row.relative_norm:.3g} of the weight's"
            for row in self.layers
        ]
        return "\n".join([*lines, "This says nothing of copies of the knowledge elsewhere: attack it."])

    def plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


# --- The fit


@checked
def overwrite(
    subject: Subject,
    facts: Facts | Iterable[Fact],
    *,
    layers: str = "0-1",
    target: str = "mean",
    method: str = "linear",
    lam: float | None = None,
    retain_budget: float | None = None,
    retain: TextSource | None = None,
    others: Iterable[Fact] = (),
    others_weight: float = 5.0,
    keep: Iterable[Fact] = (),
    keep_rank: int = 32,
    contexts: Sequence[str] = ("templates", "wordings"),
    holdout: float = 0.25,
    form: Literal["auto", "edit", "delta"] = "auto",
    config: Regression | Mapping[str, object] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Edit | Delta:
    """Overwrite what MLPs write at the last token of each entity's name.

    With k (f,) the key, the input of the MLP's output matrix W (d, f) at that token, v = W k its value and v* the target:
    W' = W + R K^T (K K^T + lam C + eps I)^-1, R = V* - W K, where K (f, n) holds the keys of the contexts, K K^T is a mean
    over them and C = E[k k^T] over what is retained. Layers are changed upwards, keys collected again under what is already
    changed. As v* = W k* for a mean of keys k*, this is the map k -> k + (K* - K) K^T (..)^-1 k at `l.mlp.neurons`: an Edit.
    The regression trains the matrices of one MLP after another on its cached inputs x:
    E_names ||mlp(x) - v*||^2 / spread + beta E_retain ||mlp(x) - mlp_0(x)||^2 / spread. That is a Delta.

    The first position of a text, and states with outlying norms, are never among the contexts: such sinks are hundreds of
    times larger and would decide the fit alone. What is written at the sinks of retained text is protected like C, at the
    weight of C, and not counted as distortion.

    Args:
        facts: what to forget; only their entities and wordings are used.
        layers: such as "0-1", "2-11" or "0,3".
        target: "mean", the mean value over the entities of a domain, in the unedited model; "exchange", the mean value of
            another entity of the domain, in a seeded cycle; "selective", v* + Q Q^T (v - v*) with v* the mean and Q the
            `keep_rank` leading gradients of the answers of `keep`.
        method: "linear" (closed form) or "regression".
        lam: weight of C in the closed form; 0.3 if neither it nor a budget is given.
        retain_budget: the largest distortion of a layer (see `LayerCertificate`); the closed form takes the smallest `lam`
            that meets it, the regression is refused if it exceeds it.
        retain: running text, rows or facts whose keys give C; the built-in prose by default. Names of the entities to
            forget are left out.
        others: facts about other entities, whose names are retained `others_weight` times as strongly as the text.
        keep: facts about the same entities that should stay, for target="selective".
        contexts: kinds of texts that name an entity: "templates", "wordings", "prose", "written".
        holdout: share of the contexts of each entity on which rho is measured.
        form: "edit" or "delta" instead of an Edit wherever there is one.
        config: settings of the regression.
    Returns:
        An Edit or a Delta with its certificate in the provenance; see `OverwriteCertificate.of`.
    Raises:
        DataError: if a fact has no entity, a name is not in its wordings or ends every context at the first position.
        NotEnoughRows: if a domain has fewer than 3 entities, or an entity fewer than 2 contexts.
        OverlapError: if `others` are about an entity to forget.
        UnknownName: if there is no such target, method, form or kind of contexts. UnknownSite: if a layer does not exist.
        NotFoldable: if an MLP is not one dense matrix (experts), or has no form that was asked for.
        SelectionError: if the retain budget cannot be met. RankError: if `keep_rank` is not below the width.
        QuantizedModel: if the weights are quantised.
    Reference: Meng et al. 2022, arXiv 2210.07229, equation 14, for the closed form; exchange and selective targets,
        protected sinks and the regression are ours.
    """
    settings = _Settings(target, method, form, lam, retain_budget, others_weight, keep_rank, holdout, seed)
    settings.check()
    subject.check_unquantized("edited exactly")
    sites = _sites(subject, layers, target, method)
    goals = goals_of(facts, target, seed)
    rest = tuple(others)
    check_other_entities(rest, goals, "overwritten", ", or give them as keep= with target='selective'")
    fitted, unused = (
        entity_tokens(subject, part)
        for part in held_out(contexts_of(subject, facts, contexts, seed=seed), holdout, seed)
    )
    names = fitted.names | unused.names
    retained = prose() if retain is None else training_rows(retain, "retain")
    other_tokens = entity_tokens(subject, contexts_of(subject, rest, ("templates", "wordings"))) if rest else None
    bases = _kept_directions(subject, tuple(keep), sites, keep_rank, progress) if target == "selective" else {}
    task = _Task(subject, goals, fitted, unused, names, retained, other_tokens, bases, settings, progress)
    record = _record(subject, sites, settings, task) | {"contexts": list(contexts), "layers_selected": layers}
    if method == "regression":
        regression = Regression.of(config)
        return _regressed(task, sites, regression, record | {"config": asdict(regression)})
    return _solved(task, sites, record)


@dataclass(frozen=True)
class _Settings:
    """The options of an overwrite that are plain values."""

    target: str
    method: str
    form: str
    lam: float | None
    retain_budget: float | None
    others_weight: float
    keep_rank: int
    holdout: float
    seed: int

    def check(self) -> None:
        """Refuse values that are out of range, or do not fit together."""
        check_seed(seed=self.seed)
        check_positive(others_weight=self.others_weight, **given(lam=self.lam, retain_budget=self.retain_budget))
        for name, valid in (("target", TARGETS), ("method", METHODS), ("form", FORMS)):
            if getattr(self, name) not in valid:
                raise UnknownName(
                    f"{name}={getattr(self, name)!r} does not exist; {nearest(getattr(self, name), valid)}"
                )
        if not 0 < self.holdout < 1:
            raise FractionError(f"holdout={self.holdout}; give a fraction strictly between 0 and 1")
        if not is_whole(self.keep_rank):
            raise RankError(f"keep_rank={self.keep_rank!r}; give at least 1")
        if self.lam is not None and (self.retain_budget is not None or self.method == "regression"):
            raise ArgumentError(
                f"lam={self.lam} with retain_budget={self.retain_budget} and method={self.method!r}: a budget chooses lam, and the "
                "regression has none (its config has beta); give one of them"
            )
        if self.form == "edit" and (self.target == "selective" or self.method == "regression"):
            raise NotFoldable(
                f"form='edit': target={self.target!r} by method={self.method!r} is no map of the keys; use form='delta'"
            )


@dataclass(frozen=True)
class _Task:
    """What the fit of every layer shares."""

    subject: Subject
    goals: Mapping[str, tuple[str, ...]]
    fitted: EntityTokens
    unused: EntityTokens
    names: frozenset[tuple[int, ...]]
    retain: Batches
    others: EntityTokens | None
    bases: Mapping[int, Tensor]
    """Directions of the values that stay, by layer, (d, keep_rank)."""
    settings: _Settings
    progress: bool | None

    def targets(self, tokens: EntityTokens, means: Mapping[str, Tensor]) -> Tensor:
        """The target of each context: the mean over the entities of its goal."""
        goal = {e: torch.stack([means[other] for other in others]).mean(0) for e, others in self.goals.items()}
        return torch.stack([goal[context.entity] for context in tokens.contexts])


def goals_of(facts: Facts | Iterable[Fact], target: str, seed: int = 0) -> dict[str, tuple[str, ...]]:
    """The entities whose mean value each entity gets: all of its domain, or for "exchange" one other.

    An exchange is one cycle through the entities of a domain in a seeded order, so that no entity keeps its own value.

    Raises:
        NotEnoughRows: if a domain has fewer than 3 entities.
        DataError: if a fact names no entity.
    """
    groups: dict[str, list[str]] = {}
    for entity, items in by_entity(facts).items():
        groups.setdefault(items[0].domain, []).append(entity)
    goals: dict[str, tuple[str, ...]] = {}
    for domain, entities in groups.items():
        if len(entities) < _FEWEST:
            raise NotEnoughRows(
                f"domain {domain!r} has {len(entities)} entities, target={target!r} needs at least {_FEWEST}: a mean of fewer, or a "
                "swap, says which entity is meant"
            )
        order = sorted(entities)
        random.Random(f"{seed}:{domain}").shuffle(order)
        for entity, successor in zip(order, [*order[1:], order[0]], strict=True):
            goals[entity] = (successor,) if target == "exchange" else tuple(sorted(entities))
    return goals


def _sites(subject: Subject, layers: str, target: str, method: str) -> tuple[Site, ...]:
    """The neurons of the selected MLPs, all of them one dense matrix."""
    if not isinstance(layers, str) or "." in layers:
        raise UnknownSite(f"layers={layers!r}; give layers alone, such as '0-1', '2-11' or '0,3'")
    sites = subject.select([f"{part.strip()}.{Point.MLP_NEURONS}" for part in layers.split(",")])
    for site in sites:
        branch = subject.layout.branch(site.layer, site.point)
        if len(branch.parts) != 1 or branch.routed:
            raise NotFoldable(
                f"{site}: the values of this MLP are written by {len(branch.parts)} projections or experts, and an overwrite needs "
                "one dense matrix; choose other layers, or project with rp.mrp"
            )
        if target == "selective" and branch.gains:
            raise NotFoldable(
                f"{site}: a norm lies between this MLP and the stream, so the directions that stay are no directions of its "
                "values; use target='mean' or 'exchange'"
            )
        if method == "regression":
            local_regression.check_module(subject, site.layer)
    return sites


def _kept_directions(
    subject: Subject, keep: Sequence[Fact], sites: Sequence[Site], rank: int, progress: bool | None
) -> dict[int, Tensor]:
    """The leading gradients, with respect to the values at the names, of the log-probabilities of the answers to keep."""
    if not keep:
        raise ArgumentError(
            "target='selective' keeps what the gradients of some facts use: give keep=, facts of the same entities"
        )
    if not rank < subject.layout.width:
        raise RankError(
            f"keep_rank={rank}; the width is {subject.layout.width}, so at most {subject.layout.width - 1} stay"
        )
    outs: list[str | Site] = [Site(site.layer, Point.MLP_OUT) for site in sites]
    moments = collect(
        subject, training_rows(keep, "keep"), outs, statistic=CrossMoments, gradients=True, count=positions("entity"),
        progress=progress,
    )  # fmt: skip
    # The rows of E[x g^T] span the gradients.
    return {
        site.layer: torch.linalg.svd(moments[out].second.cpu()).Vh[:rank].T
        for site, out in zip(sites, outs, strict=True)
    }


def _record(subject: Subject, sites: Sequence[Site], settings: _Settings, task: _Task) -> dict[str, Any]:
    data = {"forget": task.fitted.batches, "held out": task.unused.batches, "retain": task.retain}
    if task.others is not None:
        data["others"] = task.others.batches
    options = {name: value for name, value in asdict(settings).items() if name not in ("target", "seed")}
    return {
        "method": "overwrite",
        "target": settings.target,
        "options": options,
        "seed": settings.seed,
        "entities": len(task.goals),
        "data": {role: {"name": c.name, "hash": c.hash} for role, c in data.items()},
        "versions": {name: version(name) for name in ("repedit", "torch", "transformers")},
    } | subject.made_for(sites)


# --- The closed form


@dataclass(frozen=True)
class _Retained:
    """Second moments of keys that must keep their values, (f, f)."""

    text: Tensor
    """E[k k^T] of running text without sinks and names."""
    protected: Tensor
    """That, with the sinks and the names of other entities at their weights."""


def _solved(task: _Task, sites: Sequence[Site], record: dict[str, Any]) -> Edit | Delta:
    subject = task.subject
    points = {site.layer: _neurons(subject, site) for site in sites}
    original = entity_rows(subject, task.fitted, points)
    means = {layer: _means(task.fitted, rows) for layer, rows in original.items()}
    maps: dict[Site, LowRank] = {}
    changes: dict[str, Tensor] = {}
    active: list[Hook] = []
    certificates: list[LayerCertificate] = []
    for site in sites:
        point, weight = {site.layer: points[site.layer]}, _weight(subject, site)
        keys = entity_rows(subject, task.fitted, point, active=active)[site.layer].double()
        unused = entity_rows(subject, task.unused, point, active=active)[site.layer].double()
        away = [task.targets(t, means[site.layer]) - k for t, k in ((task.fitted, keys), (task.unused, unused))]
        fine, fine_unused = not_sinks(keys), not_sinks(unused)
        system = _System(keys[fine], away[0][fine], weight, _retained(task, point, active), task.bases.get(site.layer))
        lam = _chosen_lam(system, task.settings, site)
        u, v = system.solution(lam)
        change = -system.moved(u) @ v.T
        sinks = int((~fine).sum() + (~fine_unused).sum())
        certificates.append(
            LayerCertificate(
                site.layer, lam, system.left_over(change, unused[fine_unused], away[1][fine_unused]),
                system.left_over(change, keys[fine], away[0][fine]), system.distortion(u, v), *_sizes(change, weight),
                contexts=int(fine.sum()), sinks=sinks,
            )
        )  # fmt: skip
        if task.bases:
            changes[subject.layout.branch(site.layer, site.point).parts[0].out.tensor] = change
            active += _added(subject, site, change)
        else:
            dtype = torch.float64 if subject.model.dtype == torch.float64 else torch.float32
            maps[site] = LowRank(u.to(dtype), v.to(dtype))
            active += Edit({site: maps[site]}).hooks(subject)
            if task.settings.form == "delta":
                changes[subject.layout.branch(site.layer, site.point).parts[0].out.tensor] = change
    record |= {"layers": [asdict(row) for row in certificates]}
    return Delta(*_stored(subject, sites, changes, record)) if changes else Edit(maps, record)


class _System:
    """The equations of one layer, in float64.

    Args:
        keys, away: of the contexts, rows (n, f): k, and k* - k.
        weight: W (d, f). basis: directions of values that stay, (d, r).
    """

    def __init__(self, keys: Tensor, away: Tensor, weight: Tensor, retained: _Retained, basis: Tensor | None) -> None:
        self.weight, self.retained, self.basis = weight, retained, basis
        self.gram = keys.T @ keys / len(keys)
        wide = len(keys) <= keys.shape[1]
        # U V^T = (K - K*) K^T A^-1 / n, with the factors of the smaller side.
        self.u = -away.T / len(keys) if wide else -(away.T @ keys) / len(keys)
        self.right = keys.T if wide else torch.eye(keys.shape[1], dtype=torch.float64)

    def solution(self, lam: float) -> tuple[Tensor, Tensor]:
        """(u, v): W' = W - (W u) v^T, or W - (I - Q Q^T) (W u) v^T."""
        system = self.gram + lam * self.retained.protected
        ridge = _RIDGE * float(system.diagonal().mean())
        factor = torch.linalg.cholesky(system + ridge * torch.eye(len(system), dtype=torch.float64))
        return self.u, torch.cholesky_solve(self.right, factor)

    def moved(self, u: Tensor) -> Tensor:
        """W u without what stays."""
        values = self.weight @ u
        return values if self.basis is None else values - self.basis @ (self.basis.T @ values)

    def distortion(self, u: Tensor, v: Tensor) -> float:
        """||D C^1/2|| / ||W C^1/2|| on running text."""
        moved, c = self.moved(u), self.retained.text
        change = ((moved @ (v.T @ c @ v)) * moved).sum().clamp(min=0)
        return float((change / ((self.weight @ c) * self.weight).sum()).sqrt())

    def left_over(self, change: Tensor, keys: Tensor, away: Tensor) -> float:
        """||R - D K|| / ||R||."""
        goal = self.moved(away.T)
        return float((goal - change @ keys.T).norm() / goal.norm().clamp(min=1e-300))


def _chosen_lam(system: _System, settings: _Settings, site: Site) -> float:
    """The weight that was given, or the smallest one that meets the budget, to 2 %."""
    budget = settings.retain_budget
    if budget is None:
        return LAM if settings.lam is None else settings.lam
    low, high = _LAM_RANGE
    if system.distortion(*system.solution(low)) <= budget:
        return low
    least = system.distortion(*system.solution(high))
    if least > budget:
        raise SelectionError(
            f"{site}: retain_budget={budget:g} cannot be met: the distortion is {least:.2g} even at lam={high:g}, where nearly "
            "nothing is overwritten; raise the budget"
        )
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        if system.distortion(*system.solution(middle)) <= budget:
            high = middle
        else:
            low = middle
    return high


def _retained(task: _Task, point: Mapping[int, Observe], active: Sequence[Hook]) -> _Retained:
    """The second moments of the keys of retained text and of other entities."""
    (layer,) = point
    text, sinks = _Sum(), _Sum()
    rule = CountingRule(task.subject)

    def named(batch: Batch) -> Tensor:
        return batch.attention_mask & ~name_ends(batch, task.names)

    for rows, mask, batch in recorded(task.subject, task.retain, named, point, active=active, progress=task.progress):
        keys = rows[layer].double()
        ordinary = rule(batch)[0][mask].cpu()
        if bool(ordinary.any()):
            ordinary &= not_sinks(keys, float(keys[ordinary].norm(dim=1).median()))
        text.add(keys[ordinary])
        sinks.add(keys[~ordinary])
    width = task.subject.layout.width_of(layer, Point.MLP_NEURONS)
    if text.count < width:
        raise NotEnoughRows(
            f"retain {task.retain.name!r} has {text.count} tokens beside names and first positions; its covariance at layer {layer} "
            f"needs at least {width}, or some directions are not protected: give longer text"
        )
    protected = text.mean
    if sinks.count:
        protected = protected + sinks.mean * (text.mean.trace() / sinks.mean.trace())
    if task.others is not None:
        others = entity_rows(task.subject, task.others, point, active=active)[layer].double()
        others = others[not_sinks(others)]
        protected = protected + task.settings.others_weight * (others.T @ others) / len(others)
    return _Retained(text.mean, protected)


class _Sum:
    """A sum of outer products of rows."""

    def __init__(self) -> None:
        self.total: Tensor = torch.zeros(())
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Add rows (n, f)."""
        if len(rows):
            self.total = self.total + rows.T @ rows
            self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        """E[k k^T]."""
        return self.total / self.count


def _means(tokens: EntityTokens, rows: Float[Tensor, "n f"]) -> dict[str, Tensor]:
    """The mean state of each entity without sinks.

    Raises:
        NotEnoughRows: if every context of an entity is a sink.
    """
    fine = not_sinks(rows)
    means = {}
    for entity in dict.fromkeys(context.entity for context in tokens.contexts):
        own = fine & torch.tensor([context.entity == entity for context in tokens.contexts])
        if not bool(own.any()):
            raise NotEnoughRows(f"every context of entity {entity!r} is an attention sink; give other contexts")
        means[entity] = rows[own].double().mean(0)
    return means


def _neurons(subject: Subject, site: Site) -> Observe:
    def observe(visit: Callable[..., None]) -> list[Hook]:
        return hooks_at(subject.model, subject.layout, site, visit, replaces=False)

    return observe


def _weight(subject: Subject, site: Site) -> Float[Tensor, "d f"]:
    view = subject.layout.branch(site.layer, site.point).parts[0].out
    return view.read(subject.value(view.tensor)).double().cpu()


def _added(subject: Subject, site: Site, change: Float[Tensor, "d f"]) -> list[Hook]:
    """A hook that adds the change of a weight times the keys to the output of its module."""
    module = subject.model.get_submodule(subject.layout.branch(site.layer, site.point).writer)

    def add(_module: object, args: tuple[Tensor, ...], _kwargs: object, output: Tensor) -> Tensor:
        keys = args[0]
        extra = keys.to(torch.promote_types(keys.dtype, torch.float32)) @ change.T.to(
            keys.device, torch.promote_types(keys.dtype, torch.float32)
        )
        return output + extra.to(output.dtype)

    return [Hook(module, "call", add)]


def _sizes(change: Float[Tensor, "d f"], weight: Float[Tensor, "d f"]) -> tuple[float, float]:
    """(stable rank, relative norm) of a change."""
    largest = torch.linalg.matrix_norm(change, 2)
    stable = change.square().sum() / largest.square().clamp(min=1e-300)
    return float(stable), float(largest / torch.linalg.matrix_norm(weight, 2))


def _stored(
    subject: Subject, sites: Sequence[Site], changes: Mapping[str, Tensor], record: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The changes of matrices in the form of their tensors, and the record with the hashes of the start."""
    views = {v.tensor: v for s in sites for v in (subject.layout.branch(s.layer, s.point).parts[0].out,)}
    stored = {}
    for name, change in changes.items():
        start = subject.value(name)
        dtype = torch.promote_types(start.dtype, torch.float32)
        stored[name] = torch.zeros(start.shape, dtype=dtype)
        views[name].change(stored[name], partial(_filled, change.to(dtype)))
    plain = {key: value for key, value in record.items() if key != "weights"}
    return stored, plain | {"start": {name: value_hash(subject.value(name)) for name in stored}}


def _filled(change: Tensor, _: Tensor) -> Tensor:
    return change


# --- The local regression


def _regressed(task: _Task, sites: Sequence[Site], config: Regression, record: dict[str, Any]) -> Delta:
    subject = task.subject
    layers = [site.layer for site in sites]
    outputs = {layer: local_regression.outputs_of(subject, layer) for layer in layers}
    means = {layer: _means(task.fitted, rows) for layer, rows in entity_rows(subject, task.fitted, outputs).items()}
    changes: dict[str, Tensor] = {}
    active: list[Hook] = []
    certificates: list[LayerCertificate] = []
    for layer in layers:
        fitted, unused, sinks = _inputs(task, layer, means[layer], active)
        retained = local_regression.retained_inputs(
            subject, layer, task.retain, task.names, task.others, config, active, task.settings.seed, task.progress
        )
        trained = local_regression.train(
            subject, layer, fitted, retained, config, seed=task.settings.seed, progress=task.progress
        )
        changes |= trained.differences
        active += trained.hooks
        sizes = [_sizes(c, w) for c, w in trained.matrices]
        row = LayerCertificate(
            layer, None, trained.left_over(unused), trained.left_over(fitted), trained.distortion(retained.text),
            min(s for s, _ in sizes), max(n for _, n in sizes), contexts=len(fitted.x), sinks=sinks,
        )  # fmt: skip
        certificates.append(row)
        budget = task.settings.retain_budget
        if budget is not None and row.distortion > budget:
            raise SelectionError(
                f"layer {layer}: retain_budget={budget:g} is not met: the regression distorts retained outputs by "
                f"{row.distortion:.2g}; raise the budget, or beta or steps of its config"
            )
    start = {name: value_hash(subject.value(name)) for name in changes}
    plain = {key: value for key, value in record.items() if key != "weights"}
    return Delta(changes, plain | {"start": start, "layers": [asdict(row) for row in certificates]})


def _inputs(task: _Task, layer: int, means: Mapping[str, Tensor], active: Sequence[Hook]) -> tuple[Inputs, Inputs, int]:
    """Inputs of an MLP at the names, with the values they should get: of the fit, and unused; and the number of sinks."""
    point = {layer: local_regression.inputs_of_mlp(task.subject, layer)}
    parts, sinks = [], 0
    for tokens in (task.fitted, task.unused):
        x = entity_rows(task.subject, tokens, point, active=active)[layer]
        goal = task.targets(tokens, means).to(x)
        now = local_regression.original(task.subject, layer)(x)
        if layer in task.bases:
            basis = task.bases[layer].to(x)
            goal = goal + (now - goal) @ basis @ basis.T
        fine = not_sinks(x) & not_sinks(now)
        sinks += int((~fine).sum())
        parts.append(Inputs(x[fine], goal[fine]))
    return parts[0], parts[1], sinks
