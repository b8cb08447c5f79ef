"""MRP: irreversible projections of hidden states, from a closed form or trained, one task after another."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repedit.activations.collection import Collection, MarkedPositions, collect
from repedit.activations.forward import batches_of
from repedit.data import Batch, Batches, Facts, Rows, prose
from repedit.edit import Edit, exactness
from repedit.errors import (
    ArgumentError,
    DataError,
    FingerprintError,
    RankError,
    RepeditError,
    ShapeError,
    TrainingError,
    UnknownName,
    is_whole,
    nearest,
)
from repedit.fit.closed_form import FITS
from repedit.fit.linalg import is_orthogonal, union
from repedit.fit.mrp_training import Bases, History, MRPConfig, Sources, answers_of, forgetting, train
from repedit.fit.stream import stream_sites
from repedit.linear_maps import LowRank
from repedit.models.subject import Subject
from repedit.quantization import check_unquantized
from repedit.sites import Site
from repedit.stats import CrossMoments, Moments, pooled
from repedit.training.sampler import Sampler, check_disjoint, neighbours, training_rows

# --- A closed form at many sites: the statistics it needs, collected with earlier edits active, and one map a site


RANKLESS = ("mean_difference", "lda", "leace")
_BEFORE, _ENTITY = MarkedPositions("before_answer"), MarkedPositions("entity")


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

    Rows with MarkedPositions answers are read at the positions that predict the answers and at the last token of the entity;
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
        width = {site: subject.layout.width_of(site.layer, site.point) for site in sites}
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
                raise DataError(f"method='leace' needs rows with MarkedPositions answers; {corpus.name!r} marks none")
            found |= set(answers_of(batch))
        self.classes = {answer: number for number, answer in enumerate(sorted(found))}

    def __call__(self, batch: Batch) -> Tensor:
        number = torch.tensor([self.classes[answer] for answer in answers_of(batch)])
        one_hot = torch.nn.functional.one_hot(number, len(self.classes)).to(batch.input_ids.device, torch.float32)
        return one_hot[:, None].expand(-1, batch.input_ids.shape[1], -1)


def _seed(seed: int, site: Site | None) -> int:
    return zlib.crc32(f"{seed}:{site}".encode())


# --- MRP: irreversible projections of hidden states, from a closed form or trained, one task after another


class RankWarning(UserWarning):
    """A site loses so many directions that what is retained must suffer."""


class HookOnlyWarning(UserWarning):
    """No weight equals the edit at some of the sites."""


REFERENCE = MRPConfig(
    steps=None, epochs=2, lr=2e-4, batch_size=5, optimizer="sgd", cap=float("inf"), among="vocabulary",
    retain_weight=1.2, kl_weight=0.0, text_rows=0, shown=0, forget_at="everywhere", anneal=0.0, clip=1.0, start="residual_pca",
)  # fmt: skip
"""The published settings (used with rank=2), with the defects of the published code corrected."""


def mrp(
    subject: Subject,
    *,
    forget: Any,
    retain: Any,
    sites: str | Site | list[str | Site] | None = None,
    rank: int = 8,
    method: str = "mrp",
    config: MRPConfig | Mapping[str, Any] | None = None,
    text: Batches | str | None = "prose",
    previous: Edit | None = None,
    forgotten: Sequence[Any] = (),
    stop: Callable[[Subject], bool] | None = None,
    resume: str | Path | None = None,
    progress: bool | None = None,
) -> Edit:
    """Find the directions of hidden states whose removal loses the forget set and keeps the retain set.

    At each site x -> x - U U^T x, U (d, rank) orthonormal. A closed form gives the start; training then moves U to
    minimise -min(CE_f, cap) + retain_weight CE_r + kl_weight KL(original || edited), with the weights frozen. The edit is
    the union of what `previous` removes and the new directions, jointly orthonormal: earlier tasks never come back.

    Args:
        forget, retain: facts (every phrasing they carry is used), rows, a corpus, or texts.
        sites: where to project; None for mlp.out of the first 40 % of the layers, where facts enter the stream, at the
            last token of what they are about; "stream" for one basis removed by every writer of the residual stream.
        method: "mrp" trains; the name of a closed form (`rp.fit.FITS`) takes what it finds.
        config: settings of the training, or a mapping of the ones to change.
        text: running text whose predictions are kept as well; the built-in prose by default, None for none.
        previous: the edit of earlier tasks. It is active while statistics are taken and bases are trained; its sites that
            are not among `sites` are carried along unchanged.
        forgotten: the forget sets of earlier tasks. Their directions stay removed anyway, but training may open other ways to
            the same answers; with the sets at hand it is made not to.
        stop: called with the edited subject every `evaluate_every` steps; True ends the training.
        resume: a file the run is saved to on its way, and goes on from where it exists. Closed forms take one pass: for
            them `forgotten`, `stop` and `resume` say nothing.
    Raises:
        OverlapError, DataError: if the sets share rows, or one is empty.
        RankError: if the rank is not possible at a site beside what was removed before.
        UnknownName: if the method or a key of the config does not exist.
        FingerprintError: if `previous` was made for another model. ArgumentError: if it holds other than projections.
        QuantizedModel: if the weights are quantised. TrainingError: if a loss is not finite.
    Reference: Wu et al. 2025, arXiv 2508.15449; cap, retain KL, exact union of tasks and folding are ours.
    """
    settings = _settings(config)
    check_method(method)
    check_unquantized(subject.quantizer, subject.specs, "edited exactly")
    bad, good = (
        training_rows(source, role, shown=settings.shown, seed=settings.seed)
        for role, source in (("forget", forget), ("retain", retain))
    )
    check_disjoint(subject, bad, good, length=settings.length)
    kept = prose() if text == "prose" else None if text is None else training_rows(text, "text")
    sites = early_sites(subject) if sites is None else sites
    shared = sites == "stream"
    chosen = stream_sites(subject) if shared else subject.select(sites)
    _warn_hook_only(subject, chosen)
    earlier = _checked(previous, subject, chosen, rank, shared)
    starts = fitted(
        subject, bad, good, chosen, method=settings.start if method == "mrp" else method, rank=rank,
        seed=settings.seed, earlier=previous, shared=shared, progress=progress,
    )  # fmt: skip
    rehearsed = [training_rows(s, "forgotten", shown=settings.shown, seed=settings.seed) for s in forgotten]
    data = {"forget": bad, "retain": good, "text": kept} | {f"forgotten {i}": rows for i, rows in enumerate(rehearsed)}
    record = _record(subject, method, settings, sites, rank, data) | subject.made_for(chosen)
    if method != "mrp":
        return _with(previous, {site: _joined(earlier.get(site), map_) for site, map_ in starts.items()}, record, {})
    bases = Bases(subject, starts, earlier, shared=shared)
    weights = subject.fingerprint()
    others = Edit({s: m for s, m in previous.maps.items() if s not in earlier}) if previous else Edit({})
    with others.hooked(subject):
        history = train(
            bases, _sources(subject, bad, good, kept, settings, rehearsed), settings, stop=stop, progress=progress,
            state=None if resume is None else Path(resume), key={k: record[k] for k in ("model", "data", "sites", "rank")} | {"previous": previous.hash if previous else ""},
        )  # fmt: skip
    if subject.fingerprint() != weights:
        raise TrainingError("the weights changed while the bases were trained; does a hook of yours write to them?")
    return _with(previous, bases.maps(), record, _summary(history, bases))


def early_sites(subject: Subject) -> str:
    """The selector of mlp.out in the first 40 % of the layers.

    In SmolLM2-135M projections there carried over to phrasings that training never saw (seat of government: .51 right,
    from .84); the same number of projections at layers 8 to 20 did not (.92 right in one of them).
    """
    return f"0-{max(1, round(0.4 * len(subject.layout.layers))) - 1}.mlp.out"


def check_method(method: str) -> None:
    """Refuse a method that does not exist.

    Raises:
        UnknownName: with the nearest names.
    """
    if method != "mrp" and method not in FITS:
        raise UnknownName(f"method={method!r} does not exist; {nearest(method, ('mrp', *FITS))}")


def _settings(config: MRPConfig | Mapping[str, Any] | None) -> MRPConfig:
    if config is None or isinstance(config, MRPConfig):
        return config or MRPConfig()
    known = asdict(MRPConfig())
    for name in config:
        if name not in known:
            raise UnknownName(f"config has no key {name!r}; {nearest(name, known)}")
    fixed = {"steps": None, **config} if config.get("epochs") is not None else dict(config)
    return replace(MRPConfig(), **fixed)


def _checked(
    previous: Edit | None, subject: Subject, sites: Sequence[Site], rank: int, shared: bool
) -> dict[Site, LowRank]:
    """The maps of earlier tasks at the sites of this one; refusals before anything is computed."""
    if previous is not None:
        made_for = previous.provenance.get("model")
        if made_for and made_for != subject.fingerprint():
            raise FingerprintError(
                f"previous was made for model {made_for[:12]}, this one is {subject.fingerprint()[:12]}; give the unedited "
                "model, previous is hooked into it"
            )
    found: dict[Site, LowRank] = {}
    for site in sites:
        width = subject.layout.width_of(site.layer, site.point)
        map_ = None if previous is None else previous.maps.get(site)
        if map_ is not None:
            if map_.width != width:
                raise ShapeError(
                    f"{site}: previous has width {map_.width}, the site has width {width}; is it of another model?"
                )
            if not isinstance(map_, LowRank) or map_.center is not None or not is_orthogonal(map_):
                raise ArgumentError(
                    f"{site}: previous holds a {type(map_).__name__} that is no orthogonal projection; training goes on from "
                    "orthogonal ones only. Compose other maps afterwards, with previous | edit"
                )
            found[site] = map_
        taken = found[site].u.shape[1] if site in found else 0
        if not is_whole(rank) or not rank < width - taken:
            raise RankError(
                f"{site}: rank {rank} was asked for, 1 to {width - taken - 1} is possible beside the {taken} removed before"
            )
    first = next(iter(found.values()), None)
    if (
        shared
        and first is not None
        and (len(found) < len(sites) or any(not torch.equal(m.u, first.u) for m in found.values()))
    ):
        raise ArgumentError(
            "sites='stream' goes on from a stream erasure only; previous removes other bases at other writers"
        )
    return found


def _warn_hook_only(subject: Subject, sites: Iterable[Site]) -> None:
    found = [site for site in sites if exactness(site, subject.layout) == "hook-only"]
    if found:
        warnings.warn(
            f"{found[0]} and {len(found) - 1} other sites are residual streams, which no weight equals: the edit works as a "
            f"hook only. Foldable alternatives: {found[0].layer}.mlp.out, {found[0].layer}.attn.out, sites='stream'",
            HookOnlyWarning,
            stacklevel=3,
        )


def _sources(
    subject: Subject, forget: Batches, retain: Batches, text: Batches | None, config: MRPConfig, rehearsed: Sequence[Batches]
) -> Sources:  # fmt: skip
    bad = Sampler(subject, forget, config.batch_size, length=config.length, seed=config.seed)
    near, rest = neighbours(forget, retain)
    parts = [part for part in (near, rest) if part is not None]
    size = -(-config.batch_size // len(parts))
    kept = [Sampler(subject, part, size, length=config.length, seed=config.seed) for part in parts]
    if text is not None and config.text_rows:
        kept.append(Sampler(subject, text, config.text_rows, length=config.text_length, seed=config.seed))
    before = [Sampler(subject, rows, config.batch_size, length=config.length, seed=config.seed) for rows in rehearsed]
    losses = [forgetting(sampler, subject, among=config.among, cap=config.cap) for sampler in (bad, *before)]
    return Sources(bad, tuple(kept), losses[0], tuple(zip(before, losses[1:], strict=True)))


def _record(
    subject: Subject, method: str, config: MRPConfig, sites: Any, rank: int, data: Mapping[str, Batches | None]
) -> dict[str, Any]:
    return {
        "method": method,
        "sites": ",".join(map(str, sites)) if isinstance(sites, list | tuple) else str(sites),
        "rank": rank,
        "options": {k: str(v) if v == float("inf") else v for k, v in asdict(config).items()}
        if method == "mrp"
        else {},
        "seed": config.seed,
        "model": subject.fingerprint(),
        "data": {role: {"name": c.name, "hash": c.hash} for role, c in data.items() if c is not None},
        "versions": {name: version(name) for name in ("repedit", "torch", "transformers")},
    }


def _summary(history: History, bases: Bases) -> dict[str, Any]:
    rounded = {name: [round(v, 4) for v in getattr(history, name)] for name in ("forget", "right", "divergence")}
    return {
        "steps_run": len(history.forget),
        "stopped": history.reason,
        "history": rounded,
        "overlap": round(bases.overlap(), 4),
    }


def _joined(earlier: LowRank | None, new: LowRank) -> LowRank:
    """Both tasks at one site: the union of orthogonal projections, else the factored product."""
    if earlier is None:
        return new
    if new.center is None and is_orthogonal(new):
        return union(earlier, new)
    composed = new @ earlier
    if not isinstance(composed, LowRank):
        raise ArgumentError("the map found does not compose with previous into one projection; use previous | edit")
    return composed


def _with(
    previous: Edit | None, maps: Mapping[Site, LowRank], record: Mapping[str, Any], summary: Mapping[str, Any]
) -> Edit:
    carried = {} if previous is None else {site: map_ for site, map_ in previous.maps.items() if site not in maps}
    parents = [] if previous is None else [dict(previous.provenance)]
    extra = {"parents": parents, "carried": [str(site) for site in carried]} if parents else {}
    found = Edit({**carried, **maps}, {**record, **summary, **extra})
    wide = {str(site): m.rank_removed for site, m in maps.items() if m.rank_removed > m.width / 4}
    if wide:
        site, rank = max(wide.items(), key=lambda item: item[1])
        warnings.warn(
            f"{len(wide)} sites remove more than a quarter of their directions ({site}: {rank}); retained behaviour suffers there",
            RankWarning,
            stacklevel=3,
        )
    return found


# --- Deletion requests one after another: each is trained with the earlier ones in place, and none of them comes back


class ContinualMRP:
    """A growing edit: task t is fitted and trained in the complement of what tasks < t removed.

    The removed span only grows, U_t being orthogonal to U_1 .. U_{t-1}: P_{t+1} P_t = P_t P_{t+1} = P_{t+1}. The model is
    never changed; `edit` is what there is to hook, apply or export. The forget sets of earlier tasks are rehearsed while a
    new one is trained, as long as they are in memory: a series that was loaded has none.
    """

    def __init__(
        self, subject: Subject, *, sites: str | Site | list[str | Site] | None = None, rank: int = 8, **options: Any
    ) -> None:
        """Rank is that of each task; `options` are those of `rp.mrp` (config, method, text, progress)."""
        self.subject, self.sites, self.rank, self.options = subject, sites, rank, options
        self.edit = Edit({})
        self.tasks: tuple[str, ...] = ()
        self.forgotten: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"ContinualMRP(tasks={list(self.tasks)}, sites={self.sites!r}, rank={self.rank} a task)"

    def add_task(self, name: str, *, forget: Any, retain: Any, rank: int | None = None, **options: Any) -> Edit:
        """Unlearn one more set; returns the edit of all tasks so far. If it fails, nothing has changed.

        Raises:
            ArgumentError: if a task of that name exists. What `rp.mrp` raises.
        """
        if name in self.tasks:
            raise ArgumentError(f"task {name!r} was added before; tasks are {list(self.tasks)}")
        found = mrp(
            self.subject, forget=forget, retain=retain, sites=self.sites, rank=rank or self.rank,
            previous=self.edit if self.tasks else None, forgotten=self.forgotten, **{**self.options, **options},
        )  # fmt: skip
        names = (*self.tasks, name)
        self.forgotten = (*self.forgotten, forget)
        self.edit, self.tasks = Edit(found.maps, {**found.provenance, "tasks": list(names)}), names
        return self.edit

    def save(self, path: str | Path) -> None:
        """Write the edit, with the names of its tasks in the header."""
        self.edit.save(path)

    @staticmethod
    def load(path: str | Path, subject: Subject, **options: Any) -> ContinualMRP:
        """Go on from a saved edit.

        Raises:
            ArgumentError: if the file is not the edit of a series of tasks.
        """
        edit = Edit.load(path)
        names: Mapping[str, Any] = edit.provenance
        if not names.get("tasks"):
            raise ArgumentError(f"{path} is no series of tasks; pass it to rp.mrp(previous=Edit.load(path)) instead")
        known = {"sites": names["sites"], "rank": names["rank"]}
        found = ContinualMRP(subject, **{**known, **options})
        found.edit, found.tasks = edit, tuple(names["tasks"])
        return found
