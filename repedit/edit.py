"""An edit: a frozen mapping from sites to affine maps, with its provenance.

Everything that finds a capability produces an edit, and everything that removes one consumes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Unpack

from torch import Tensor

from repedit import hooks
from repedit.arch import HookFn, ModelLayout, hooks_at
from repedit.arguments import check_type, checked
from repedit.errors import ArgumentError, FingerprintError, NotFoldable, ShapeError, during
from repedit.hashing import value_hash
from repedit.io import archive
from repedit.io.safetensors import raw_bytes
from repedit.io.text import json_copy
from repedit.linear_maps import AffineMap, Chain, Diagonal, LowRank
from repedit.models.subject import Subject
from repedit.plan import LoweringOptions
from repedit.sites import Point, Site, select


@dataclass(frozen=True, eq=False)
class Edit:
    """Affine maps by site. `a | b` applies a, then b.

    Two edits are equal only if they are the same object; compare `hash` to compare what they do. `len(edit)` is the number
    of sites. Copies and pickles hold the same maps.

    Raises:
        NotFinite: if a map holds a number that is not finite, with the site.
        ArgumentError: if a key is not a site, or a value not a map.
    """

    maps: Mapping[Site, AffineMap]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """method, options, seed, data, model fingerprint, versions, parents; plain JSON values, no clock, no path."""

    def __post_init__(self) -> None:
        check_type("maps", self.maps, Mapping)
        check_type("provenance", self.provenance, Mapping)
        by_site = {Site.parse(site) if isinstance(site, str) else site: map_ for site, map_ in self.maps.items()}
        for site, map_ in by_site.items():
            if not isinstance(site, Site) or not isinstance(map_, AffineMap):
                raise ArgumentError(
                    f"an edit holds a map for each site, and {site!r} has a {type(map_).__name__}; give a LowRank or a Diagonal"
                )
        ordered = {site: by_site[site] for site in sorted(by_site)}
        check_finite_maps(ordered)
        object.__setattr__(self, "maps", MappingProxyType(ordered))
        object.__setattr__(
            self, "provenance", MappingProxyType(json_copy(dict(self.provenance), "the provenance of an edit"))
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapping proxies cannot be pickled or copied; the dictionaries behind them can.
        return Edit, (dict(self.maps), dict(self.provenance))

    def __repr__(self) -> str:
        where = f"{len(self)} sites, {self.sites[0]} to {self.sites[-1]}" if self.maps else "no site"
        return f"Edit({self.provenance.get('method', 'by hand')}: {where}, removes rank {self.rank:,} in all)"

    def __len__(self) -> int:
        return len(self.maps)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The edited sites, in forward order."""
        return tuple(self.maps)

    @property
    def rank(self) -> int:
        """Number of directions removed, over all sites; a pruned neuron counts as one."""
        return sum(map_.rank_removed for map_ in self.maps.values())

    def __or__(self, then: Edit) -> Edit:
        """This edit, then another: maps of a shared site compose, and both provenances are kept as parents.

        Raises:
            FingerprintError: if the two were made for different models.
        """
        first, second = self.provenance.get("model"), then.provenance.get("model")
        if first and second and first != second:
            raise FingerprintError(f"the edits were made for different models: {first[:12]} and {second[:12]}")
        maps = dict(self.maps)
        for site, map_ in then.maps.items():
            maps[site] = map_ @ maps[site] if site in maps else map_
        parents = [dict(self.provenance), dict(then.provenance)]
        return Edit(maps, {"method": "composition", "model": first or second, "parents": parents})

    @property
    def weights(self) -> dict[str, str]:
        """Hash by name of the tensors that write at the sites, in the model the edit was made for; empty if not recorded."""
        return _weight_hashes(self.provenance)

    @checked
    def apply(
        self,
        subject: Subject,
        *,
        inplace: bool = False,
        allow_identity: bool = False,
        **options: Unpack[LoweringOptions],
    ) -> Subject:
        """The model with the edit in its weights: `repedit.apply(edit, subject)`, which documents the arguments."""
        import repedit

        return repedit.apply(self, subject, inplace=inplace, allow_identity=allow_identity, **options)

    @checked
    @contextmanager
    def hooked(self, subject: Subject) -> Iterator[None]:
        """Apply the edit while the context is open, without touching a weight.

        Raises:
            ShapeError: if a map's width is not the site's. FingerprintError: if the edit was made for another model.
            HookError, ModelBusy: as in `repedit.hooks.installed`, so that no forward pass silently runs unedited.
        """
        own = self.hooks(subject)
        with hooks.installed(subject.model, own):
            yield

    @checked
    def hooks(self, subject: Subject) -> list[hooks.Hook]:
        """The hooks that apply the edit, in forward order."""
        layout = subject.layout
        check_widths(self, layout)
        if not subject.quantizer:  # quantised weights hash differently from the weights they were made from
            check_made_for(self, subject.value)
        return [
            hook
            for site, map_ in self.maps.items()
            for hook in hooks_at(subject.model, layout, site, _hook_function(map_), replaces=True)
        ]

    @cached_property
    def hash(self) -> str:
        """sha256 over the sites and the tensors of the maps, without the provenance."""
        digest = hashlib.sha256()
        for site, map_ in self.maps.items():
            for link in _links(map_):
                for name, value in link.tensors.items():
                    digest.update(f"{site} {type(link).__name__} {name} {value.dtype} {tuple(value.shape)}".encode())
                    digest.update(raw_bytes(value))
        return digest.hexdigest()

    def describe(self) -> str:
        """One line per site with the map, the rank it removes and the TransformerLens name; then the provenance.

        The hashes of the tensors for which the edit was made are left out; `provenance` has them.
        """
        lines = [f"{site}  ({site.hook_name})  {describe_map(map_)}" for site, map_ in self.maps.items()]
        lines += [
            f"sink neurons pruned at {site}: {pruned}" for site, pruned in self.provenance.get("sinks", {}).items()
        ]
        provenance = {key: value for key, value in self.provenance.items() if key not in ("parents", "weights")}
        return "\n".join([*lines, f"made by: {json.dumps(provenance) if provenance else 'not recorded'}"])

    @checked
    def save(self, path: str | Path) -> None:
        """Write one safetensors file with tensors "<site>/<number>/u|v|center|scale|shift" and the provenance in its header."""
        check_finite_maps(self.maps)
        tensors: dict[str, Tensor] = {}
        kinds: dict[str, list[str]] = {}
        for site, map_ in self.maps.items():
            links = _links(map_)
            kinds[str(site)] = [type(link).__name__ for link in links]
            for number, link in enumerate(links):
                tensors |= {f"{site}/{number}/{name}": value for name, value in link.tensors.items()}
        archive.write(path, "edit", tensors, {"maps": kinds, "provenance": dict(self.provenance)})

    @staticmethod
    @checked
    def load(path: str | Path) -> Edit:
        """Read what `save` wrote, from a file or from the hub: "hf://owner/name/edit.safetensors".

        Raises:
            CheckpointError: if the file is not a saved edit. HubError: if it cannot be downloaded.
        """
        tensors, header = archive.read(path, "edit")
        with archive.rebuilding(path, "edit"):
            maps = {Site.parse(site): _pop_map(site, kinds, tensors) for site, kinds in header["maps"].items()}
            if tensors:
                raise ValueError(f"it holds tensors that belong to no map: {sorted(tensors)[:3]}")
            return Edit(maps, header["provenance"])


def describe_map(map_: AffineMap) -> str:
    """A short description of a map: its kind and the rank it removes."""
    if isinstance(map_, Diagonal) and map_.is_mask:
        return f"{map_.rank_removed} of {map_.width} neurons {'filled' if map_.offset is not None else 'zeroed'}"
    return f"{type(map_).__name__} of width {map_.width}, removes rank {map_.rank_removed}"


def exactness(site: Site, layout: ModelLayout) -> str:
    """How exactly weights can reproduce an edit at a site: "exact", "subspace-exact" or "hook-only"."""
    if site.point in (Point.RESID_MID, Point.RESID_POST) or (site.point is Point.RESID_PRE and site.layer > 0):
        return "hook-only"
    if site.point is Point.RESID_PRE:
        return "exact" if layout.architecture.embedding_exact else "hook-only"
    branch = layout.branch(site.layer, site.point)
    return "subspace-exact" if site.point is branch.outer and branch.gains else "exact"


def check_finite_maps(maps: Mapping[Site, AffineMap]) -> None:
    """Refuse maps with numbers that are not finite.

    Raises:
        NotFinite: naming the site, the tensor and the index.
    """
    for site, map_ in maps.items():
        with during(str(site), f"while the map for {site} was checked"):
            map_.check_finite()


def check_widths(edit: Edit, layout: ModelLayout) -> None:
    """Refuse an edit whose maps do not fit the sites of this model, or are no longer finite.

    Raises:
        UnknownSite: if a layer or point is not in the model.
        ShapeError: if a width differs.
        NotFoldable: if a map mixes the neurons of different experts.
    """
    check_finite_maps(edit.maps)
    for site, map_ in edit.maps.items():
        select(site, len(layout.layers), layout.points)
        width = layout.width_of(site.layer, site.point)
        if map_.width != width:
            raise ShapeError(
                f"the map for {site} has width {map_.width}, the site has width {width}; was the edit fitted on another model?"
            )
        branch = layout.find(site.layer, site.point)
        if branch and site.point is branch.inner and len(branch.parts) > 1 and not isinstance(map_, Diagonal):
            raise NotFoldable(
                f"{site} holds the neurons of several projections or experts, which no single token passes together; only a Diagonal "
                f"fits, or edit {site.layer}.{branch.outer}"
            )


def check_made_for(edit: Edit, read: Callable[[str], Tensor | None], ignore: Container[str] = ()) -> None:
    """Refuse an edit that was made for other values of the tensors that write at its sites.

    Args:
        read: name -> the tensor in this model; None if it has no tensor of that name.
        ignore: tensors not to compare, because something else changes them first.
    Raises:
        FingerprintError: naming the tensor. An edit that records no model is never refused.
    """
    for name, made_for in edit.weights.items():
        tensor = None if name in ignore else read(name)
        if tensor is not None and value_hash(tensor) != made_for:
            raise FingerprintError(
                f"the edit was made for another model, or for this one before it was edited: {name} holds other values (hash "
                f"{value_hash(tensor)}) than when the edit was made ({made_for}). Make the edit from this model; to use it "
                "anyway, pass repedit.Edit(edit.maps), which records no model, or any_model=True where weights are edited"
            )


def _weight_hashes(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The hashes a provenance records; of parents applied in sequence, the first that names a tensor saw it unedited.

    A parent without hashes may have changed any tensor, so the parents after it are not used.
    """
    hashes = dict(provenance.get("weights") or {})
    for parent in provenance.get("parents") or ():
        parent_hashes = _weight_hashes(parent)
        if not parent_hashes:
            break
        hashes = parent_hashes | hashes
    return hashes


def _links(map_: AffineMap) -> tuple[AffineMap, ...]:
    return map_.maps if isinstance(map_, Chain) else (map_,)


def _hook_function(map_: AffineMap) -> HookFn:
    def apply_map(x: Tensor, neurons: slice, _tokens: Tensor | None) -> Tensor:
        if neurons == slice(None):
            return map_(x)
        assert isinstance(map_, Diagonal)
        return Diagonal(map_.scale[neurons], None if map_.shift is None else map_.shift[neurons])(x)

    return apply_map


def _pop_map(site: str, kinds: list[str], tensors: dict[str, Tensor]) -> AffineMap:
    """The map of a site; its tensors are removed from the mapping."""
    types = {"LowRank": LowRank, "Diagonal": Diagonal}
    if not isinstance(kinds, list) or not kinds or not set(kinds) <= set(types):
        raise ValueError(f"{site} has the maps {kinds!r:.100}; a list of {' and '.join(types)} was expected")
    links = []
    for number, kind in enumerate(kinds):
        prefix = f"{site}/{number}/"
        names = [name for name in tensors if name.startswith(prefix)]
        links.append(types[kind](**{name.removeprefix(prefix): tensors.pop(name) for name in names}))
    return links[0] if len(links) == 1 else Chain(tuple(links))
