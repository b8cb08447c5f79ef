"""One forward loop over a corpus: statistics at chosen sites.

Statistics are reduced inside the hook, so memory does not grow with tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from repedit.activations.counting import Count, CountingRule
from repedit.activations.passes import batches, named_batch
from repedit.activations.watching import Labels, Watch
from repedit.data import Batch, Batches
from repedit.edit import Edit
from repedit.errors import FingerprintError, NotEnoughRows, check_whole
from repedit.hooks import evaluating, installed
from repedit.io import archive
from repedit.io.text import check_fields
from repedit.models import Subject
from repedit.ranks import Ranks, joined_ranks
from repedit.sites import Place, Point, Site, place
from repedit.stats import Activity, CrossMoments, Moments

_PLAIN = {
    "model": str, "corpus": str, "data_hash": str, "rule": dict[str, bool | str], "seen": int, "counted": int, "gated": bool,
    "seconds_in_hooks": int | float, "edit": str, "weights": dict[str, str], "units": dict[str, dict[str, int]],
}  # fmt: skip
"""Of the fields of a collection, those that its file holds as plain values."""
Statistic = TypeVar("Statistic", Activity, Moments, CrossMoments)


@dataclass(frozen=True, eq=False)
class Collection(Mapping[Place, Statistic], Generic[Statistic]):
    """Statistics by site, with the model and the text they come from; by module path for an image classifier."""

    statistics: Mapping[Place, Statistic]
    model: str
    """Fingerprint of the model's weights."""
    corpus: str
    data_hash: str
    rule: Mapping[str, bool | str]
    """Which tokens counted."""
    seen: int
    counted: int
    units: Mapping[Place, Mapping[str, int]]
    """Neurons a unit: {"head": e, "kv_group": G e} for attention sites."""
    gated: bool
    seconds_in_hooks: float = field(default=0.0, compare=False)
    edit: str = ""
    """Hash of the edit that was active, empty where none was."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the tensors that write at the sites; empty for an image classifier."""

    def __repr__(self) -> str:
        return f"Collection({self.kind} at {len(self)} sites, {self.counted:,} tokens of {self.corpus})"

    def __getitem__(self, site: Place) -> Statistic:
        return self.statistics[site if site in self.statistics else Site.parse(site)]

    def __iter__(self) -> Iterator[Place]:
        return iter(self.statistics)

    def __len__(self) -> int:
        return len(self.statistics)

    @property
    def kind(self) -> str:
        """Name of the statistic: "Activity", "Moments" or "CrossMoments"."""
        return type(next(iter(self.values()))).__name__

    def only(self, point: str | Point) -> Collection[Statistic]:
        """The part of the collection at one point, such as "attn.neurons"."""
        kept = {site: value for site, value in self.items() if site.point == point}
        return replace(self, statistics=kept, units={site: self.units[site] for site in kept})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the sums of every site, with everything else in its header."""
        tensors = {f"{site}/{name}": v for site, value in self.items() for name, v in value.state().items()}
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("statistics", "units")}
        units = {str(site): dict(unit) for site, unit in self.units.items()}
        archive.write(path, "collection", tensors, {"statistic": self.kind, "units": units, "collection": plain})

    @staticmethod
    def load(path: str | Path) -> Collection[Any]:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is not a saved collection.
        """
        tensors, header = archive.read(path, "collection")
        with archive.rebuilding(path, "collection"):
            plain = {"weights": {}} | header["collection"]  # files of older versions name the model alone
            check_fields(plain | {"units": header["units"]}, _PLAIN, "the collection")
            states: dict[str, dict[str, Any]] = {}
            for key, value in tensors.items():
                site, _, name = key.rpartition("/")
                states.setdefault(site, {})[name] = value
            make = {kind.__name__: kind for kind in (Activity, Moments, CrossMoments)}[header["statistic"]]
            found = {place(site): make.of_state(state) for site, state in states.items()}
            units = {place(site): unit for site, unit in header["units"].items()}
            if not found or set(found) != set(units):
                raise ValueError("its tensors and its units are of different sites")
            return Collection({site: found[site] for site in sorted(found)}, units=units, **plain)

    def __add__(self, other: Collection[Statistic]) -> Collection[Statistic]:
        """Both collections as one: the sums of every site are added.

        Raises:
            FingerprintError: if they were not collected at the same sites of one model, by one rule.
        """
        for what in ("kind", "model", "edit", "rule", "units"):
            mine, theirs = (getattr(side, what) for side in (self, other))
            if mine != theirs:
                raise FingerprintError(f"cannot merge collections: {what} is {mine} and {theirs}; collect both alike")
        return replace(
            self,
            statistics={site: self[site] + other[site] for site in self},
            corpus=self.corpus if self.corpus == other.corpus else f"{self.corpus}+{other.corpus}",
            data_hash=hashlib.sha256("+".join(sorted((self.data_hash, other.data_hash))).encode()).hexdigest(),
            seen=self.seen + other.seen,
            counted=self.counted + other.counted,
            seconds_in_hooks=self.seconds_in_hooks + other.seconds_in_hooks,
        )


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

    Padding never counts; the first position of a chunk and special tokens do not count unless asked for. Without
    gradients the language-model head is not run. The tensor that is summed is the one an edit at that site would be
    given, after `edit`.

    Args:
        statistic: Activity, of neurons; Moments (mean and covariance) or CrossMoments, at any site.
        gradients: with L the summed loss of the predictions of counted tokens (of the answers, where batches mark
            them), Activity also sums z * dL/dz, and CrossMoments gives E[x g^T], g = dL/dx.
        labels: batch -> (b, t, z) for CrossMoments, which gives cov(x, z) then.
        count: a rule of your own: batch -> mask (b, t), replacing the default one (padding still never counts), or
            `positions("answer")` and its siblings.
        edit: an edit that is active during the pass.
        limit_tokens: stop after the batch that reaches this many counted tokens.
    Raises:
        ArgumentError: if the length, the batch size or the limit is below 1.
        UnknownSite: if the selector names a site this model has not, or one that does not have this statistic.
        NotEnoughRows: if no token counts.
        TooLarge: if the covariances would not fit into memory.
        NotFinite: if an activation or the loss is not finite.
        NoGradient: if gradients are asked for where none can be had.
        HookError, ModelBusy: if a hook does not run in a pass, or another thread uses the model.
        FingerprintError, ProcessFailed: if processes were given different things, or one of them failed.
    """
    check_whole(limit_tokens=limit_tokens, length=length, batch_size=batch_size)
    watch = Watch(subject, subject.select(sites), statistic, gradients, labels)
    rule = CountingRule(subject.tokenizer, first_position, special_tokens, count)
    ranks = joined_ranks(subject.device)
    origin: dict[str, Any] = {
        **subject.made_for(watch.sites),
        "data_hash": corpus.hash,
        "edit": edit.hash if edit else "",
    }
    origin |= {"rule": rule.plain()}
    reading: dict[str, Any] = {
        "length": length,
        "batch_size": batch_size,
        "limit_tokens": limit_tokens,
        "gradients": gradients,
    }
    summed: dict[str, Any] = {"sites": [str(site) for site in watch.sites], "statistic": statistic.__name__}
    ranks.check_same(**origin, **summed, **reading)
    source = batches(subject, corpus, length, batch_size, progress if ranks.first else False, "collect")
    try:
        hooks = [*(edit.hooks(subject) if edit else ()), *watch.hooks()]
        with evaluating(subject.model), installed(subject.model, hooks):
            seen, counted = _read(source, watch, rule, ranks, limit_tokens)
    except Exception as error:  # of whatever kind: the other ranks must not wait for this one
        ranks.check_alive(error)
        raise
    ranks.check_alive(None)
    if not counted:
        raise NotEnoughRows(
            f"corpus {corpus.name!r}: {seen} tokens seen, 0 counted ({rule.describe()}); give longer text"
        )
    return Collection(
        statistics={site: value.over(ranks).cpu() for site, value in watch.found.items()},
        corpus=corpus.name,
        seen=seen,
        counted=counted,
        units={site: _units(subject, site) for site in watch.sites},
        gated=subject.architecture.gated,
        seconds_in_hooks=ranks.slowest(watch.seconds, subject.device),
        **origin,
    )


def _read(
    source: Iterable[Batch], watch: Watch, rule: CountingRule, ranks: Ranks, limit: int | None
) -> tuple[int, int]:
    """Run this rank's batches; (tokens seen, tokens that count) of all ranks."""
    seen = counted = 0
    for number, batch in enumerate(source):
        with named_batch(number):
            mask, first = rule(batch)
            # Every rank counts every batch, so that all stop where one process would; and all shift as it would, by
            # the first batch that counts.
            own = number % ranks.size == ranks.rank
            if own or (not counted and watch.statistic is not Activity):
                watch.run(batch, mask, first)
            if not own and not counted:
                watch.empty()
        seen, counted = seen + int(batch.attention_mask.sum()), counted + int(mask.sum())
        if limit is not None and counted >= limit:
            break
    return seen, counted


def _units(subject: Subject, site: Site) -> dict[str, int]:
    if site.point is not Point.ATTN_NEURONS:
        return {}
    branch = subject.anatomy.branch(site.layer, site.point)
    return {"head": branch.head_width, "kv_group": branch.head_width * branch.group}
