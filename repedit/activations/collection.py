"""One forward loop over a corpus: statistics at chosen sites.

Statistics are reduced inside the hooks, so memory does not grow with the number of tokens.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.activations.forward import batches, inputs_of, loss_of, note_batch_on_error
from repedit.arch import hooks_at
from repedit.arguments import checked
from repedit.data import Batch, Batches
from repedit.distributed import ProcessGroup, process_group
from repedit.edit import Edit
from repedit.errors import (
    ArgumentError,
    DataError,
    FingerprintError,
    NoGradient,
    NotEnoughRows,
    NotFinite,
    ShapeError,
    TooLarge,
    UnknownName,
    UnknownSite,
    check_whole,
    given,
    nearest,
)
from repedit.hooks import Hook, check_differentiable, evaluating, installed
from repedit.io import archive
from repedit.io.text import check_fields
from repedit.models.subject import Subject
from repedit.sites import NEURONS, Point, Site, SiteKey, site_key
from repedit.stats import Activity, CrossMoments, Moments

Count = Callable[[Batch], Bool[Tensor, "b t"]]
"""Which tokens of a batch a statistic counts."""
Labels = Callable[[Batch], Float[Tensor, "b t z"]]
"""The labels of the tokens of a batch."""
Statistic = TypeVar("Statistic", Activity, Moments, CrossMoments)

# --- The value: statistics by site, with their provenance


_PLAIN = {
    "model": str, "corpus": str, "data_hash": str, "rule": dict[str, bool | str], "seen": int, "counted": int, "gated": bool,
    "seconds_in_hooks": int | float, "edit": str, "weights": dict[str, str], "units": dict[str, dict[str, int]],
}  # fmt: skip
"""The fields of a collection that a file holds as plain values."""


@dataclass(frozen=True, eq=False)
class Collection(Mapping[SiteKey, Statistic], Generic[Statistic]):
    """Statistics by site (by module path for an image classifier), with the model and the text they come from."""

    statistics: Mapping[SiteKey, Statistic]
    model: str
    """Fingerprint of the model's weights."""
    corpus: str
    data_hash: str
    rule: Mapping[str, bool | str]
    """Which tokens counted."""
    seen: int
    counted: int
    group_sizes: Mapping[SiteKey, Mapping[str, int]]
    """Neurons in each kind of group: {"head": e, "kv_group": G e} for attention sites, empty for others."""
    gated: bool
    seconds_in_hooks: float = field(default=0.0, compare=False)
    edit: str = ""
    """Hash of the edit that was active, empty where none was."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the tensors that write at the sites; empty for an image classifier."""

    def __repr__(self) -> str:
        return f"Collection({self.kind} at {len(self)} sites, {self.counted:,} tokens of {self.corpus})"

    def __getitem__(self, site: SiteKey) -> Statistic:
        return self.statistics[site if site in self.statistics else Site.parse(site)]

    def __iter__(self) -> Iterator[SiteKey]:
        return iter(self.statistics)

    def __len__(self) -> int:
        return len(self.statistics)

    @property
    def kind(self) -> str:
        """Name of the statistic: "Activity", "Moments" or "CrossMoments"."""
        return type(next(iter(self.values()))).__name__

    def only(self, point: str | Point) -> Collection[Statistic]:
        """The part of the collection at one point, such as "attn.neurons"."""
        statistics = {site: value for site, value in self.items() if site.point == point}
        return replace(self, statistics=statistics, group_sizes={site: self.group_sizes[site] for site in statistics})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the sums of every site, with everything else in its header."""
        tensors = {f"{site}/{name}": v for site, value in self.items() for name, v in value.state().items()}
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("statistics", "group_sizes")}
        sizes = {str(site): dict(groups) for site, groups in self.group_sizes.items()}
        archive.write(path, "collection", tensors, {"statistic": self.kind, "units": sizes, "collection": plain})

    @staticmethod
    def load(path: str | Path) -> Collection[Any]:
        """Read a file written by `save`.

        Raises:
            CheckpointError: if the file does not hold a saved collection.
        """
        tensors, header = archive.read(path, "collection")
        with archive.rebuilding(path, "collection"):
            plain = {"weights": {}} | header["collection"]  # files of older versions name the model alone
            check_fields(plain | {"units": header["units"]}, _PLAIN, "the collection")
            states: dict[str, dict[str, Any]] = {}
            for key, value in tensors.items():
                site, _, name = key.rpartition("/")
                states.setdefault(site, {})[name] = value
            kind = {kind.__name__: kind for kind in (Activity, Moments, CrossMoments)}[header["statistic"]]
            statistics = {site_key(site): kind.of_state(state) for site, state in states.items()}
            sizes = {site_key(site): groups for site, groups in header["units"].items()}
            if not statistics or set(statistics) != set(sizes):
                raise ValueError("its tensors and its group sizes are of different sites")
            return Collection({site: statistics[site] for site in sorted(statistics)}, group_sizes=sizes, **plain)

    def __add__(self, other: Collection[Statistic]) -> Collection[Statistic]:
        """Both collections as one: the sums of every site are added.

        Raises:
            FingerprintError: if they were not collected at the same sites of one model, by one rule.
        """
        for name in ("kind", "model", "edit", "rule", "group_sizes"):
            values = [getattr(side, name) for side in (self, other)]
            if values[0] != values[1]:
                raise FingerprintError(
                    f"cannot merge collections: {name} is {values[0]} and {values[1]}; collect both alike"
                )
        return replace(
            self, statistics={site: self[site] + other[site] for site in self},
            corpus=self.corpus if self.corpus == other.corpus else f"{self.corpus}+{other.corpus}",
            data_hash=hashlib.sha256("+".join(sorted((self.data_hash, other.data_hash))).encode()).hexdigest(),
            seen=self.seen + other.seen, counted=self.counted + other.counted,
            seconds_in_hooks=self.seconds_in_hooks + other.seconds_in_hooks,
        )  # fmt: skip


# --- Collecting


@checked
def collect(
    subject: Subject,
    corpus: Batches,
    sites: str | Site | list[str | Site] = "*.mlp.neurons",
    *,
    statistic: type[Any] = Activity,
    gradients: bool = False,
    labels: Labels | None = None,
    count: Count | None = None,
    first_position: bool = False,
    special_tokens: bool = False,
    edit: Edit | None = None,
    length: int = 128,
    batch_size: int = 8,
    limit_tokens: int | None = None,
    progress: bool | None = None,
) -> Collection[Any]:
    """Statistics of a corpus at the selected sites, in one pass.

    Under `torchrun` every process reads its share of the batches, and all return the statistics of the whole corpus.

    Padding never counts; the first position of a chunk and special tokens do not count unless requested. Without
    gradients the language-model head is not run. The summed tensor is the one that an edit at that site would be given,
    after `edit`.

    Args:
        statistic: Activity, of neurons; Moments (mean and covariance) or CrossMoments, at any site.
        gradients: with L the summed loss of the predictions of counted tokens (of the answers, where batches mark
            them), Activity also sums z * dL/dz, and CrossMoments gives E[x g^T], g = dL/dx.
        labels: batch -> (b, t, z) for CrossMoments, which then gives cov(x, z).
        count: a custom rule, batch -> mask (b, t), which replaces the default one (padding still never counts), or
            `positions("answer")` and the like.
        edit: an edit that is active during the pass.
        limit_tokens: stop after the batch that reaches this many counted tokens.
    Raises:
        ArgumentError: if the length, the batch size or the limit is below 1.
        UnknownSite: if the selector names a site that this model does not have, or one without this statistic.
        NotEnoughRows: if no token counts.
        TooLarge: if the covariances would not fit into memory.
        NotFinite: if an activation or the loss is not finite.
        NoGradient: if gradients are requested where none can be computed.
        HookError, ModelBusy: if a hook does not run in a pass, or another thread uses the model.
        FingerprintError, ProcessFailed: if processes were given different arguments, or one of them failed.
    """
    check_whole(length=length, batch_size=batch_size, **given(limit_tokens=limit_tokens))
    sums = StatisticsHooks(subject, subject.select(sites), statistic, gradients, labels)
    rule = CountingRule(subject, first_position=first_position, special_tokens=special_tokens, custom=count)
    ranks = process_group(subject.device)
    origin = subject.made_for(sums.sites) | {
        "data_hash": corpus.hash, "edit": edit.hash if edit else "", "rule": rule.plain(),
    }  # fmt: skip
    ranks.check_same(
        **origin, sites=[str(site) for site in sums.sites], statistic=statistic.__name__, gradients=gradients,
        length=length, batch_size=batch_size, limit_tokens=limit_tokens,
    )  # fmt: skip
    source = batches(subject, corpus, length, batch_size, progress if ranks.is_first else False, "collect")
    try:
        hooks = [*(edit.hooks(subject) if edit else ()), *sums.hooks()]
        with evaluating(subject.model), installed(subject.model, hooks):
            seen, counted = _read(source, sums, rule, ranks, limit_tokens)
    except Exception as error:  # of whatever kind: the other ranks must not wait for this one
        ranks.check_alive(error)
        raise
    ranks.check_alive(None)
    if not counted:
        raise NotEnoughRows(
            f"corpus {corpus.name!r}: {seen} tokens seen, 0 counted ({rule.describe()}); give longer text"
        )
    return Collection(
        statistics={site: value.all_reduced(ranks).cpu() for site, value in sums.statistics.items()},
        corpus=corpus.name, seen=seen, counted=counted,
        group_sizes={site: _group_sizes(subject, site) for site in sums.sites}, gated=subject.architecture.gated,
        seconds_in_hooks=ranks.max(sums.seconds, subject.device), **origin,
    )  # fmt: skip


def _read(
    source: Iterable[Batch], sums: StatisticsHooks, rule: CountingRule, ranks: ProcessGroup, limit: int | None
) -> tuple[int, int]:
    """Run this rank's batches; (tokens seen, tokens counted) of all ranks."""
    seen = counted = 0
    for number, batch in enumerate(source):
        with note_batch_on_error(number):
            mask, first = rule(batch)
            # Every rank counts every batch, so that all stop where one process would; and all use the shift that it
            # would use, that of the first batch with counted tokens.
            own = number % ranks.size == ranks.rank
            if own or (not counted and sums.statistic is not Activity):
                sums.run(batch, mask, first)
            if not own and not counted:
                sums.reset()
        seen, counted = seen + int(batch.attention_mask.sum()), counted + int(mask.sum())
        if limit is not None and counted >= limit:
            break
    return seen, counted


def _group_sizes(subject: Subject, site: Site) -> dict[str, int]:
    if site.point is not Point.ATTN_NEURONS:
        return {}
    branch = subject.layout.branch(site.layer, site.point)
    return {"head": branch.head_width, "kv_group": branch.head_width * branch.group}


# --- Which tokens count


def positions(kind: str) -> Count | None:
    """A counting rule by name, for batches that mark their answers and entities (facts).

    "answer": the tokens of the answer; "before_answer": the positions that predict them; "entity": the last token of
    the entity the question is about; "content": the default rule (None).

    Raises:
        UnknownName: if there is no such rule.
    """
    if kind == "content":
        return None
    if kind not in _MARKS:
        raise UnknownName(f"positions({kind!r}) does not exist; {nearest(kind, (*_MARKS, 'content'))}")
    return MarkedPositions(kind)


@dataclass(frozen=True)
class MarkedPositions:
    """Counts the positions marked by a field of the batch."""

    kind: str
    """"answer", "before_answer" or "entity"."""

    def __call__(self, batch: Batch) -> Bool[Tensor, "b t"]:
        name, select = _MARKS[self.kind]
        mark = getattr(batch, name)
        if mark is None:
            raise DataError(f"positions({self.kind!r}) needs batches that mark their {name}; this corpus marks none")
        return select(mark.to(batch.attention_mask) & batch.attention_mask)


def _before(mark: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    return torch.cat([mark[:, 1:], torch.zeros_like(mark[:, :1])], 1)


def _last(mark: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    return mark & (mark.flip(1).cumsum(1).flip(1) == 1)


# Rule -> (field of the batch, function of its mark).
_MARKS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "answer": ("answer", lambda mark: mark),
    "before_answer": ("answer", _before),
    "entity": ("entity", _last),
}


class CountingRule:
    """The default rule, or a custom one. Padding never counts.

    By default neither the first position of a chunk (an attention sink) nor a special token counts.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        first_position: bool = False,
        special_tokens: bool = False,
        custom: Count | None = None,
    ) -> None:
        self.first_position, self.special_tokens, self.custom = first_position, special_tokens, custom
        tokenizer = None if special_tokens else subject.tokenizer
        ids = [] if tokenizer is None else sorted(set(tokenizer.all_special_ids))
        self.special = torch.tensor(ids, dtype=torch.long)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(counted, first): masks (b, t) of the counted tokens and of the first positions."""
        first = batch.attention_mask & (batch.attention_mask.cumsum(1) == 1)
        if self.custom is not None:
            return batch.attention_mask & self.custom(batch).to(batch.attention_mask), first
        mask = batch.attention_mask if self.first_position else batch.attention_mask & ~first
        return mask & ~torch.isin(batch.input_ids, self.special.to(batch.input_ids.device)), first

    def plain(self) -> dict[str, bool | str]:
        """The rule as plain values, for the provenance."""
        return {
            "first_position": self.first_position,
            "special_tokens": self.special_tokens,
            "custom": self.custom.kind if isinstance(self.custom, MarkedPositions) else self.custom is not None,
        }

    def describe(self) -> str:
        """What the rule excludes, for an error message."""
        if self.custom:
            return "your count rule removed the rest"
        excluded = {
            "padding": True, "first positions": not self.first_position, "special tokens": not self.special_tokens,
        }  # fmt: skip
        return f"{', '.join(name for name, out in excluded.items() if out)} do not count"


# --- The hooks that sum: they see exactly the tensor that an edit at the same site would be given


class StatisticsHooks:
    """The statistics of every site, the hooks that add to them, and the forward pass that runs the hooks."""

    def __init__(
        self, subject: Subject, sites: tuple[Site, ...], statistic: type[Any], gradients: bool, labels: Labels | None
    ) -> None:
        _check_statistic(statistic, gradients, labels)
        _check_sites(subject, sites, statistic)
        _check_gradients(subject, sites, gradients)
        self.subject, self.sites, self.statistic = subject, sites, statistic
        self.gradients, self.labels = gradients, labels
        self.statistics: dict[Site, Any] = {}
        self.mask = self.first = torch.empty(0)
        self.batch_labels: Tensor | None = None
        self.graph: dict[Site, Tensor] = {}
        self.seconds = 0.0
        if labels is None:
            self._allocate(None)

    def hooks(self) -> list[Hook]:
        """Observers at every site; resid.mid, a sum that no module returns, is put back so that it is part of the graph."""
        layout, model = self.subject.layout, self.subject.model
        hooks: list[Hook] = []
        for site in self.sites:
            replaces = self.gradients and site.point is Point.RESID_MID
            hooks += hooks_at(model, layout, site, self._hook_function(site, replaces), replaces=replaces)
        return hooks

    def run(self, batch: Batch, mask: Tensor, first: Tensor) -> None:
        """One forward pass, and a backward pass for gradients."""
        self.mask, self.first = mask, first
        if self.labels is not None:
            self._set_labels(batch, self.labels(batch))
        inputs = inputs_of(batch)
        if not self.gradients:
            with torch.no_grad():
                self.subject.model.base_model(**inputs)
            return
        # The embeddings carry the graph even where every weight is frozen.
        embedded = self.subject.model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
        with torch.enable_grad():
            logits = self.subject.model(inputs_embeds=embedded, **inputs).logits
            loss = loss_of(logits, batch, mask)
        if not bool(torch.isfinite(loss)):
            raise NotFinite(f"the loss is {loss.item()}; load the model in float32?")
        tensors = list(self.graph.values())
        for (site, z), grad in zip(self.graph.items(), torch.autograd.grad(loss, tensors), strict=True):
            self._update(site, z.detach(), slice(None), None, grad)
        self.graph.clear()

    def reset(self) -> None:
        """Discard the sums and keep the shifts of second moments."""
        for statistic in self.statistics.values():
            if not isinstance(statistic, Activity):
                statistic.reset()

    def _allocate(self, label_width: int | None) -> None:
        """Make empty statistics at every site, once the width of the labels is known."""
        layout = self.subject.layout
        widths = {site: layout.width_of(site.layer, site.point) for site in self.sites}
        devices = {site: self.subject.device_at(site.layer) for site in self.sites}
        if self.statistic is Activity:
            gradients = self.gradients
            self.statistics = {s: Activity.zeros(d, gradients=gradients, device=devices[s]) for s, d in widths.items()}
            return
        other = {site: width if label_width is None else label_width for site, width in widths.items()}
        for device in dict.fromkeys(devices.values()):
            here = [site for site in widths if devices[site] == device]
            _check_memory(sum(8 * widths[site] * other[site] for site in here), len(here), device)
        if self.statistic is Moments:
            self.statistics = {site: Moments(d, devices[site]) for site, d in widths.items()}
        else:
            self.statistics = {site: CrossMoments(d, other[site], devices[site]) for site, d in widths.items()}

    def _set_labels(self, batch: Batch, values: Tensor) -> None:
        if values.ndim != 3 or values.shape[:2] != batch.input_ids.shape:
            raise ShapeError(
                f"the labels of a batch have shape {tuple(values.shape)}, its tokens {tuple(batch.input_ids.shape)}; "
                "give one row of labels for each token, (b, t, z)"
            )
        if not self.statistics:
            self._allocate(values.shape[2])
        self.batch_labels = values

    def _hook_function(self, site: Site, replaces: bool) -> Callable[[Tensor, slice, Tensor | None], Tensor | None]:
        def visit(x: Tensor, at: slice, tokens: Tensor | None) -> Tensor | None:
            if self.gradients:
                self.graph[site] = x
                return x if replaces else None
            start = time.thread_time()
            self._update(site, x, at, tokens, self.batch_labels)
            self.seconds += time.thread_time() - start
            return None

        return visit

    def _update(self, site: Site, x: Tensor, at: slice, tokens: Tensor | None, other: Tensor | None) -> None:
        # OPT flattens its tokens before the MLP, so the rows of x may be (b t) as well as (b, t).
        mask, first = (
            (m if tokens is None else m.reshape(-1)[tokens.to(m.device)]).reshape(x.shape[:-1]).to(x.device)
            for m in (self.mask, self.first)
        )
        try:
            match self.statistics[site]:
                case Activity() as activity:
                    activity.update(x, mask, grad=other, first=first, at=at)
                case Moments() as moments:
                    moments.update(x, mask)
                case CrossMoments() as cross:
                    assert other is not None
                    cross.update(x, other.reshape(*x.shape[:-1], cross.other), mask)
        except NotFinite as error:
            raise NotFinite(f"{site}: {error}") from error


def _check_statistic(statistic: type[Any], gradients: bool, labels: Labels | None) -> None:
    if statistic not in (Activity, Moments, CrossMoments):
        raise ArgumentError(f"statistic={statistic.__name__}: it must be Activity, Moments or CrossMoments")
    if statistic is CrossMoments and gradients == (labels is not None):
        raise ArgumentError(
            "statistic=CrossMoments pairs the tensor of a site with its gradients or with labels: "
            "give gradients=True or labels=, one of them"
        )
    if statistic is not CrossMoments and labels is not None:
        raise ArgumentError(f"labels= play no part in {statistic.__name__}; use statistic=CrossMoments")
    if statistic is Moments and gradients:
        raise ArgumentError("gradients=True plays no part in Moments; use statistic=CrossMoments for E[x g^T]")


def _check_sites(subject: Subject, sites: tuple[Site, ...], statistic: type[Any]) -> None:
    for site in sites:
        if statistic is Activity and site.point not in NEURONS:
            raise UnknownSite(
                f"{site} is not made of neurons: activity is collected at {', '.join(NEURONS)}; try '*.mlp.neurons'"
            )
        if statistic is not Activity and subject.layout.routed(site):
            raise UnknownSite(
                f"{site} holds the neurons of several experts, which no single token passes together: they have no "
                f"covariance. Collect {statistic.__name__} at {site.layer}.mlp.out, or Activity here"
            )


def _check_gradients(subject: Subject, sites: tuple[Site, ...], gradients: bool) -> None:
    if not gradients:
        return
    check_differentiable(subject.model)
    subject.check_unquantized("differentiated")
    routed = [site for site in sites if subject.layout.routed(site)]
    if routed:
        raise NoGradient(
            f"{routed[0]} holds expert neurons, which are recomputed outside the graph; collect without gradients"
        )


def _check_memory(needed: int, sites: int, device: torch.device) -> None:
    free = _free(device)
    if needed > free:
        raise TooLarge(
            f"float64 moments of {sites} sites take {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; "
            "choose fewer sites, or collect layer groups one after another"
        )


def _free(device: torch.device) -> int:
    """Bytes of memory that are available on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        # MemFree excludes the file cache, which the kernel releases on demand.
        return next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- The most common activation of each neuron, for filling with "peak"


@checked
def peaks(
    subject: Subject,
    corpus: Batches,
    edit: Edit,
    *,
    bins: int = 100,
    length: int = 128,
    batch_size: int = 8,
    progress: bool | None = None,
) -> dict[Site, Float[Tensor, " d"]]:
    """The centre of the fullest of `bins` equal bins between each neuron's extremes, at the sites of an edit.

    Two passes over the corpus: one for the extremes, one for the histogram. Tokens are counted as in `collect`.

    Raises:
        ArgumentError: if a site holds expert neurons, which see different tokens each, or a number is out of range.
    Reference: peak ablation, Pochinkov et al. 2024, arXiv 2408.17322.
    """
    check_whole(bins=bins)
    routed = [site for site in edit.maps if subject.layout.routed(site)]
    if routed:
        raise ArgumentError(f"{routed[0]} holds expert neurons; fill them with zero")
    extremes: dict[Site, Tensor] = {}
    counts: dict[Site, Tensor] = {}

    def widen(site: Site, rows: Tensor) -> None:
        new = torch.stack([rows.amin(0), rows.amax(0)])
        old = extremes.get(site, new)
        extremes[site] = torch.stack([torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])])

    def count(site: Site, rows: Tensor) -> None:
        low, high = extremes[site]
        bin_ = ((rows - low) / (high - low).clamp(min=1e-30) * bins).long().clamp(0, bins - 1)
        flat = bin_ + torch.arange(rows.shape[1], device=rows.device) * bins
        counts[site] = counts.get(site, 0) + torch.bincount(flat.reshape(-1), minlength=rows.shape[1] * bins)

    for visit in (widen, count):
        read = batches(subject, corpus, length, batch_size, progress, "peaks")
        _visit_counted_rows(subject, read, list(edit.maps), visit)
    centers = {}
    for site, (low, high) in extremes.items():
        fullest = counts[site].unflatten(0, (-1, bins)).argmax(1)
        centers[site] = (low + (fullest + 0.5) * (high - low) / bins).cpu()
    return centers


def _visit_counted_rows(
    subject: Subject, read: Iterable[Batch], sites: list[Site], visit: Callable[[Site, Tensor], None]
) -> None:
    """Run the model on batches and call `visit` with the counted rows (n, d) of every site, in float32."""
    rule, mask = CountingRule(subject), torch.empty(0)

    def hook_function(site: Site) -> Callable[..., None]:
        return lambda x, _at, _tokens: visit(site, x[mask.reshape(x.shape[:-1]).to(x.device)].float())

    hooks = [h for s in sites for h in hooks_at(subject.model, subject.layout, s, hook_function(s), replaces=False)]
    with evaluating(subject.model), installed(subject.model, hooks), torch.no_grad():
        for batch in read:
            mask, _ = rule(batch)
            if bool(mask.any()):
                subject.model.base_model(**inputs_of(batch))
