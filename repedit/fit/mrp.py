"""MRP: irreversible projections of hidden states, from a closed form or trained, for one set to forget after another."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.activations.collection import Collection, MarkedPositions, collect
from repedit.activations.forward import batches_of
from repedit.arguments import checked, with_changes
from repedit.data import Batch, Batches, Facts, Rows, TextSource, prose
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
    check_whole,
    is_whole,
    nearest,
)
from repedit.fit.closed_form import FITS
from repedit.fit.linalg import extend, is_orthogonal, orthonormal, projector, union
from repedit.fit.mrp_training import Bases, ForgetLoss, History, MRPConfig, TrainingSets, forget_loss, train
from repedit.hashing import package_versions
from repedit.linear_maps import LowRank
from repedit.models.subject import Subject
from repedit.sites import Point, Site
from repedit.stats import CrossMoments, Moments, pooled
from repedit.training import resume as resume_state
from repedit.training.sampler import BatchSampler, answer_ids, check_disjoint, split_by_entity, training_rows


class RankWarning(UserWarning):
    """A site loses so many directions that retained behaviour must suffer."""


class HookOnlyWarning(UserWarning):
    """No weight equals the edit at some of the sites."""


REFERENCE = MRPConfig(
    steps=None, epochs=2, lr=2e-4, batch_size=5, optimizer="sgd", cap=float("inf"), among="vocabulary",
    retain_weight=1.2, kl_weight=0.0, text_rows=0, shown=0, forget_at="everywhere", anneal=0.0, clip=1.0, start="residual_pca",
)  # fmt: skip
"""The published settings (used with rank=2), with the defects of the published code corrected."""


@checked
def mrp(
    subject: Subject,
    *,
    forget: TextSource,
    retain: TextSource,
    sites: str | Site | list[str | Site] | None = None,
    rank: int = 8,
    method: str = "mrp",
    config: MRPConfig | Mapping[str, object] | None = None,
    text: TextSource | None = "prose",
    previous: Edit | None = None,
    forgotten: Sequence[TextSource] = (),
    stop: Callable[[Subject], bool] | None = None,
    resume: str | Path | None = None,
    progress: bool | None = None,
) -> Edit:
    """Find the directions of hidden states whose removal loses the forget set and keeps the retain set.

    At each site x -> x - U U^T x, U (d, rank) orthonormal. A closed form gives the start; training then moves U to
    minimise -min(CE_f, cap) + retain_weight CE_r + kl_weight KL(original || edited), with the weights frozen. The edit is
    the union of what `previous` removes and the new directions, jointly orthonormal, so that earlier tasks stay removed.

    Args:
        forget, retain: facts (with every phrasing they carry), rows, a corpus, or texts.
        sites: where to project; None for mlp.out of the first 40 % of the layers, where facts enter the stream, at the
            last token of what they are about; "stream" for one basis removed by every writer of the residual stream.
        method: "mrp" trains; the name of a closed form (`rp.fit.FITS`) uses its result.
        config: settings of the training, or a mapping of those to change.
        text: running text whose predictions are kept as well; the built-in prose by default, None for none.
        previous: the edit of earlier tasks. It is active while statistics are collected and bases are trained; its sites
            that are not among `sites` are kept unchanged.
        forgotten: the forget sets of earlier tasks. Their directions stay removed, but training could find other ways to
            the same answers; it is prevented from doing so for these sets.
        stop: called with the edited subject every `evaluate_every` steps; True stops the training.
        resume: a folder in which the training is saved, and from which a later call continues. Closed forms take one
            pass: for them `forgotten`, `stop` and `resume` have no effect.
    Raises:
        OverlapError, DataError: if the sets share rows, or one is empty.
        RankError: if the rank is not possible at a site beside what was removed before.
        UnknownName: if the method or a key of the config does not exist.
        FingerprintError: if `previous` was made for another model, or `resume` holds another training.
        ArgumentError: if `previous` holds anything other than projections.
        QuantizedModel: if the weights are quantised. TrainingError: if a loss is not finite.
    Reference: Wu et al. 2025, arXiv 2508.15449; cap, retain KL, exact union of tasks and folding are ours.
    """
    settings = _settings(config)
    check_method(method)
    subject.check_unquantized("edited exactly")

    def rows(source: TextSource, role: str) -> Batches:
        return training_rows(source, role, demonstrations=settings.shown, seed=settings.seed)

    forget_rows, retain_rows = rows(forget, "forget"), rows(retain, "retain")
    check_disjoint(subject, forget_rows, retain_rows, length=settings.length)
    text_rows = prose() if text == "prose" else None if text is None else training_rows(text, "text")
    sites = early_sites(subject) if sites is None else sites
    shared = sites == "stream"
    chosen = stream_sites(subject) if shared else subject.select(sites)
    _warn_hook_only(subject, chosen)
    earlier = _earlier_maps(previous, subject, chosen, rank, shared)
    starts = closed_form_maps(
        subject, forget_rows, retain_rows, chosen, method=settings.start if method == "mrp" else method, rank=rank,
        seed=settings.seed, previous=previous, shared=shared, progress=progress,
    )  # fmt: skip
    rehearsed = [rows(source, "forgotten") for source in forgotten]
    data = {"forget": forget_rows, "retain": retain_rows, "text": text_rows}
    data |= {f"forgotten {i}": batches for i, batches in enumerate(rehearsed)}
    record = _record(subject, method, settings, sites, rank, data) | subject.made_for(chosen)
    if method != "mrp":
        return _edit(previous, {site: _composed(earlier.get(site), map_) for site, map_ in starts.items()}, record)
    bases = Bases(subject, starts, earlier, shared=shared)
    fingerprint = subject.fingerprint()
    key = {k: record[k] for k in ("model", "data", "sites", "rank")} | {"previous": previous.hash if previous else ""}
    state = None if resume is None else resume_state.state_path(resume)
    others = {site: map_ for site, map_ in previous.maps.items() if site not in earlier} if previous else {}
    with Edit(others).hooked(subject):
        sets = _training_sets(subject, forget_rows, retain_rows, text_rows, settings, rehearsed)
        history = train(bases, sets, settings, stop=stop, state=state, key=key, progress=progress)
    if subject.fingerprint() != fingerprint:
        raise TrainingError("the weights changed while the bases were trained; does one of your hooks write to them?")
    return _edit(previous, bases.maps(), record | _summary(history, bases))


def early_sites(subject: Subject) -> str:
    """The selector of mlp.out in the first 40 % of the layers.

    In SmolLM2-135M projections there carried over to phrasings unseen in training (seat of government: accuracy .51,
    from .84); the same number of projections at layers 8 to 20 did not (.92 in one of them).
    """
    return f"0-{max(1, round(0.4 * len(subject.layout.layers))) - 1}.mlp.out"


def check_method(method: str) -> None:
    """Refuse a method that does not exist.

    Raises:
        UnknownName: with the nearest names.
    """
    if method != "mrp" and method not in FITS:
        raise UnknownName(f"method={method!r} does not exist; {nearest(method, ('mrp', *FITS))}")


class MRPOptions(TypedDict, total=False):
    """Options of `mrp` that a series of tasks shares."""

    config: MRPConfig | Mapping[str, object] | None
    method: str
    text: TextSource | None
    stop: Callable[[Subject], bool] | None
    resume: str | Path | None
    progress: bool | None


class SeriesOptions(MRPOptions, total=False):
    """Options of `ContinualMRP`."""

    sites: str | Site | list[str | Site] | None
    rank: int


class ContinualMRP:
    """Deletion requests one after another: task t is trained in the complement of what tasks < t removed.

    The removed span only grows, U_t being orthogonal to U_1 .. U_{t-1}: P_{t+1} P_t = P_t P_{t+1} = P_{t+1}. The model is
    never changed; `edit` can be hooked, applied or exported. The forget sets of earlier tasks are rehearsed while a new one
    is trained, as long as they are in memory: a series that was loaded has none.
    """

    @checked
    def __init__(
        self,
        subject: Subject,
        *,
        sites: str | Site | list[str | Site] | None = None,
        rank: int = 8,
        **options: Unpack[MRPOptions],
    ) -> None:
        """Rank is that of each task; `options` are those of `rp.mrp`.

        Raises:
            ArgumentError: if the rank is not a whole number of at least 1.
        """
        check_whole(rank=rank)
        self.subject, self.sites, self.rank, self.options = subject, sites, rank, options
        self.edit = Edit({})
        self.tasks: tuple[str, ...] = ()
        self.forgotten: tuple[TextSource, ...] = ()

    def __repr__(self) -> str:
        return f"ContinualMRP(tasks={list(self.tasks)}, sites={self.sites!r}, rank={self.rank} a task)"

    @checked
    def add_task(
        self,
        name: str,
        *,
        forget: TextSource,
        retain: TextSource,
        rank: int | None = None,
        **options: Unpack[MRPOptions],
    ) -> Edit:
        """Unlearn one more set; returns the edit of all tasks so far. If it fails, nothing has changed.

        Raises:
            ArgumentError: if a task of that name exists. Also everything that `rp.mrp` raises.
        """
        if name in self.tasks:
            raise ArgumentError(f"task {name!r} was added before; tasks are {list(self.tasks)}")
        edit = mrp(
            self.subject, forget=forget, retain=retain, sites=self.sites, rank=rank or self.rank,
            previous=self.edit if self.tasks else None, forgotten=self.forgotten, **(self.options | options),
        )  # fmt: skip
        tasks = (*self.tasks, name)
        self.forgotten = (*self.forgotten, forget)
        self.edit, self.tasks = Edit(edit.maps, {**edit.provenance, "tasks": list(tasks)}), tasks
        return self.edit

    @checked
    def save(self, path: str | Path) -> None:
        """Write the edit, with the names of its tasks in the header."""
        self.edit.save(path)

    @staticmethod
    @checked
    def load(path: str | Path, subject: Subject, **options: Unpack[SeriesOptions]) -> ContinualMRP:
        """Continue from a saved edit.

        Raises:
            ArgumentError: if the file is not the edit of a series of tasks.
        """
        edit = Edit.load(path)
        record: Mapping[str, Any] = edit.provenance
        if not record.get("tasks"):
            raise ArgumentError(f"{path} is not a series of tasks; pass it to rp.mrp(previous=Edit.load(path)) instead")
        saved: SeriesOptions = {"sites": record["sites"], "rank": record["rank"]}
        series = ContinualMRP(subject, **(saved | options))
        series.edit, series.tasks = edit, tuple(record["tasks"])
        return series


# --- Checks before anything is computed


def _settings(config: MRPConfig | Mapping[str, object] | None) -> MRPConfig:
    if isinstance(config, Mapping) and config.get("epochs") is not None:
        config = {"steps": None, **config}
    return with_changes(MRPConfig(), config)


def _warn_hook_only(subject: Subject, sites: Iterable[Site]) -> None:
    hook_only = [site for site in sites if exactness(site, subject.layout) == "hook-only"]
    if hook_only:
        first = hook_only[0]
        warnings.warn(
            f"{first} and {len(hook_only) - 1} other sites are residual streams, which no weight equals: the edit works as a "
            f"hook only. Foldable alternatives: {first.layer}.mlp.out, {first.layer}.attn.out, sites='stream'",
            HookOnlyWarning,
            stacklevel=3,
        )


def _earlier_maps(
    previous: Edit | None, subject: Subject, sites: Sequence[Site], rank: int, shared: bool
) -> dict[Site, LowRank]:
    """The maps of earlier tasks at the sites of this one, after checking them and the rank."""
    if previous is not None:
        made_for = previous.provenance.get("model")
        if made_for and made_for != subject.fingerprint():
            raise FingerprintError(
                f"previous was made for model {made_for[:12]}, this one is {subject.fingerprint()[:12]}; give the unedited "
                "model, previous is hooked into it"
            )
    maps: dict[Site, LowRank] = {}
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
                    f"{site}: previous holds a {type(map_).__name__} that is not an orthogonal projection; training continues "
                    "from orthogonal ones only. Compose other maps afterwards, with previous | edit"
                )
            maps[site] = map_
        removed = maps[site].u.shape[1] if site in maps else 0
        if not is_whole(rank) or not rank < width - removed:
            raise RankError(
                f"{site}: rank {rank} was asked for, 1 to {width - removed - 1} is possible beside the {removed} removed before"
            )
    bases = [map_.u for map_ in maps.values()]
    if shared and bases and (len(bases) < len(sites) or any(not torch.equal(u, bases[0]) for u in bases)):
        raise ArgumentError(
            "sites='stream' continues from a stream erasure only; previous removes other bases at other writers"
        )
    return maps


# --- What the loop draws from, and the edit with its record


def _training_sets(
    subject: Subject, forget: Batches, retain: Batches, text: Batches | None, config: MRPConfig, rehearsed: Sequence[Batches]
) -> TrainingSets:  # fmt: skip
    def sampler(batches: Batches, batch_size: int = config.batch_size, length: int = config.length) -> BatchSampler:
        return BatchSampler(subject, batches, batch_size, length=length, seed=config.seed)

    def with_loss(batches: Batches) -> tuple[BatchSampler, ForgetLoss]:
        rows = sampler(batches)
        return rows, forget_loss(rows, subject, among=config.among, cap=config.cap)

    parts = [part for part in split_by_entity(forget, retain) if part is not None]
    retained = [sampler(part, -(-config.batch_size // len(parts))) for part in parts]
    if text is not None and config.text_rows:
        retained.append(sampler(text, config.text_rows, config.text_length))
    return TrainingSets(*with_loss(forget), tuple(retained), tuple(with_loss(batches) for batches in rehearsed))


def _record(
    subject: Subject,
    method: str,
    config: MRPConfig,
    sites: str | Site | list[str | Site],
    rank: int,
    data: Mapping[str, Batches | None],
) -> dict[str, Any]:
    options = {k: str(v) if v == float("inf") else v for k, v in asdict(config).items()} if method == "mrp" else {}
    return {
        "method": method, "sites": ",".join(map(str, sites)) if isinstance(sites, list | tuple) else str(sites),
        "rank": rank, "options": options, "seed": config.seed, "model": subject.fingerprint(),
        "data": {role: {"name": c.name, "hash": c.hash} for role, c in data.items() if c is not None},
        "versions": package_versions("transformers"),
    }  # fmt: skip


def _summary(history: History, bases: Bases) -> dict[str, Any]:
    rounded = {name: [round(v, 4) for v in getattr(history, name)] for name in ("forget", "right", "divergence")}
    return {
        "steps_run": len(history.forget), "stopped": history.reason, "history": rounded,
        "overlap": round(bases.overlap(), 4),
    }  # fmt: skip


def _composed(earlier: LowRank | None, new: LowRank) -> LowRank:
    """Both tasks at one site: the union of orthogonal projections, otherwise the factored product."""
    if earlier is None:
        return new
    if new.center is None and is_orthogonal(new):
        return union(earlier, new)
    composed = new @ earlier
    if not isinstance(composed, LowRank):
        raise ArgumentError("the map found does not compose with previous into one projection; use previous | edit")
    return composed


def _edit(previous: Edit | None, maps: Mapping[Site, LowRank], record: Mapping[str, Any]) -> Edit:
    """The maps with those of the previous edit at other sites."""
    carried = {} if previous is None else {site: map_ for site, map_ in previous.maps.items() if site not in maps}
    history = {}
    if previous is not None:
        history = {"parents": [dict(previous.provenance)], "carried": [str(site) for site in carried]}
    wide = {str(site): m.rank_removed for site, m in maps.items() if m.rank_removed > m.width / 4}
    if wide:
        site, rank = max(wide.items(), key=lambda item: item[1])
        warnings.warn(
            f"{len(wide)} sites remove more than a quarter of their directions ({site}: {rank}); retained behaviour suffers there",
            RankWarning,
            stacklevel=3,
        )
    return Edit({**carried, **maps}, {**record, **history})


# --- A closed form at each site of a model: the statistics it needs, and the map it finds. MRP training may start from it


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


# --- One basis removed by every writer of the residual stream, so that the stream never contains it


@checked
def erase_stream(
    subject: Subject, basis: LowRank | Float[Tensor, "d k"], *, multiple: int = 1, retain: Moments | None = None
) -> Edit:
    """The edit {0.resid.pre: P, *.attn.out: P, *.mlp.out: P, ...}: the stream has no component along the basis at any point.

    P = I - U U^T, or the oblique map given. If the norms of the family subtract the mean (LayerNorm), centring would
    re-create part of the direction in what readers see; U' = orth((I - 1 1^T / d) U) is used instead.

    Args:
        basis: (d, k), d the width of the stream, or a map without a center.
        multiple: remove more directions, those that `retain` uses least, until d - k is a multiple of this, so that a
            sliced stream has a width that suits the hardware.
        retain: second moments of the stream on the retain set; needed if directions have to be added.
    Raises:
        ShapeError: if the width is not that of the stream.
        ArgumentError: if the map has a center, or is oblique in a family with LayerNorm or if directions have to be
            added; if retain is needed and missing.
        RankError: if nothing is removed, or nothing would remain.
    """
    width = subject.layout.width
    map_ = basis if isinstance(basis, LowRank) else None
    basis_width = basis.width if isinstance(basis, LowRank) else basis.shape[0]
    if basis_width != width:
        raise ShapeError(
            f"the basis has width {basis_width}, the stream has width {width}; was it fitted on another model?"
        )
    if map_ is not None and map_.center is not None:
        raise ArgumentError("a stream erasure is linear: every writer would add the offset again; fit without a center")
    if map_ is None or is_orthogonal(map_):
        columns = basis.u if isinstance(basis, LowRank) else basis
        u = orthonormal(columns)
        u = centred_basis(u) if subject.architecture.centered else u
        u = _extended_to_multiple(u, multiple, retain, subject.architecture.centered)
        map_ = projector(u, torch.promote_types(columns.dtype, torch.float32))
    elif subject.architecture.centered:
        raise ArgumentError(
            f"{subject.architecture.model_type} has LayerNorm, which re-creates part of an oblique map's kernel; "
            "give an orthogonal projection"
        )
    elif (width - map_.rank_removed) % multiple:
        raise ArgumentError(f"multiple={multiple} adds directions to an orthogonal basis; the map given is oblique")
    if not 0 < map_.rank_removed < width:
        raise RankError(
            f"the basis removes rank {map_.rank_removed} of a stream of width {width}; give 1 to {width - 1} directions"
            + (" that are not the mean" if subject.architecture.centered else "")
        )
    sites = stream_sites(subject)
    return Edit(
        dict.fromkeys(sites, map_),
        {"method": "stream erasure", "options": {"rank": map_.rank_removed}, **subject.made_for(sites)},
    )


def _extended_to_multiple(
    u: Float[Tensor, "d k"], multiple: int, retain: Moments | None, centered: bool
) -> Float[Tensor, "d r"]:
    """The basis with the directions added that make d - k a multiple; not the mean, if the norms subtract it."""
    if multiple < 1:
        raise ArgumentError(f"multiple={multiple}; give at least 1")
    d, k = u.shape
    rank = d - (d - k) // multiple * multiple
    if rank == k:
        return u
    if retain is None:
        raise ArgumentError(
            f"{d - k} is not a multiple of {multiple}, so {rank - k} more directions must be removed; pass retain=Moments of the "
            "stream to determine which are used least"
        )
    if not centered:
        return extend(u, retain, rank)
    return centred_basis(extend(torch.cat([u, torch.ones(d, 1).to(u)], 1), retain, rank + 1))


def stream_sites(subject: Subject) -> tuple[Site, ...]:
    """Every site that writes to the residual stream: the embedding sum and every branch of every block."""
    writers = (Site(i, branch.outer) for i, layer in enumerate(subject.layout.layers) for branch in layer)
    return (Site(0, Point.RESID_PRE), *sorted(writers))


def centred_basis(basis: Float[Tensor, "d k"]) -> Float[Tensor, "d r"]:
    """orth((I - 1 1^T / d) U), U orthonormal: the basis without the mean, which LayerNorm removes itself."""
    left, size, _ = torch.linalg.svd(basis - basis.mean(0, keepdim=True), full_matrices=False)
    return left[:, size > 1e-6]
