"""An edit: a frozen mapping from sites to affine maps, with where it came from.

Everything that finds a capability produces one of these, and everything that removes it consumes one.
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
from typing import Any

import torch
from torch import Tensor

from repedit import hooks
from repedit.arch import ModelLayout, hooks_at
from repedit.errors import ArgumentError, FingerprintError, NotFoldable, ShapeError, during
from repedit.hashing import value_hash
from repedit.io import archive
from repedit.io.text import plain
from repedit.linear_maps import AffineMap, Chain, Diagonal, LowRank
from repedit.models.subject import Subject
from repedit.sites import Point, Site


@dataclass(frozen=True, eq=False)
class Edit:
    """Affine maps by site. `a | b` applies a, then b.

    Two edits are equal only if they are one object; `hash` compares what they do. Copies and pickles hold the same maps.

    Raises:
        NotFinite: if a map holds a number that is not finite, with the site.
        ArgumentError: if a key is no site, or a value no map.
    """

    maps: Mapping[Site, AffineMap]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """method, options, seed, data, model fingerprint, versions, parents; plain JSON values, no clock, no path."""

    def __post_init__(self) -> None:
        by_site = {Site.parse(site) if isinstance(site, str) else site: map_ for site, map_ in self.maps.items()}
        for site, map_ in by_site.items():
            if not isinstance(site, Site) or not isinstance(map_, AffineMap):
                raise ArgumentError(
                    f"an edit holds a map for each site; found {type(map_).__name__} for {site!r}: give a LowRank or a Diagonal"
                )
        ordered = {site: by_site[site] for site in sorted(by_site)}
        check_finite_maps(ordered)
        object.__setattr__(self, "maps", MappingProxyType(ordered))
        object.__setattr__(
            self, "provenance", MappingProxyType(plain(dict(self.provenance), "the provenance of an edit"))
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # The read-only views cannot be pickled or copied, what they show can.
        return Edit, (dict(self.maps), dict(self.provenance))

    def __repr__(self) -> str:
        rank = sum(map_.rank_removed for map_ in self.maps.values())
        what = f"{len(self.maps)} sites, {next(iter(self.maps))} to {list(self.maps)[-1]}" if self.maps else "no site"
        return f"Edit({self.provenance.get('method', 'by hand')}: {what}, removes rank {rank:,} in all)"

    def __or__(self, then: Edit) -> Edit:
        """This edit, then another: maps of a shared site compose, and both provenances are kept as parents.

        Raises:
            FingerprintError: if the two were made for different models.
        """
        mine, theirs = self.provenance.get("model"), then.provenance.get("model")
        if mine and theirs and mine != theirs:
            raise FingerprintError(f"the edits were made for different models: {mine[:12]} and {theirs[:12]}")
        maps = dict(self.maps)
        for site, map_ in then.maps.items():
            maps[site] = map_ @ maps[site] if site in maps else map_
        parents = [dict(self.provenance), dict(then.provenance)]
        return Edit(maps, {"method": "composition", "model": mine or theirs, "parents": parents})

    @property
    def weights(self) -> dict[str, str]:
        """Hashes of the tensors that write at the sites of the model the edit was made for; empty where it does not say."""
        return _weights(self.provenance)

    @contextmanager
    def hooked(self, subject: Subject) -> Iterator[None]:
        """Apply the edit while the context is open, without touching a weight.

        Raises:
            ShapeError: if a map's width is not the site's. FingerprintError: if the edit was made for another model.
            HookError, ModelBusy: as `repedit.hooks.installed` says: no forward pass goes unedited in silence.
        """
        with hooks.installed(subject.model, self.hooks(subject)):
            yield

    def hooks(self, subject: Subject) -> list[hooks.Hook]:
        """The hooks that carry the edit, in forward order."""
        layout = subject.layout
        check_widths(self, layout)
        if not subject.quantizer:  # the same model in other numbers
            check_made_for(self, subject.value)
        return [
            hook
            for site, map_ in self.maps.items()
            for hook in hooks_at(subject.model, layout, site, _visit(map_), replaces=True)
        ]

    @cached_property
    def hash(self) -> str:
        """sha256 over the sites and the tensors of the maps; the provenance plays no part."""
        digest = hashlib.sha256()
        for site, map_ in self.maps.items():
            for link in map_.maps if isinstance(map_, Chain) else (map_,):
                for name, value in link.tensors.items():
                    digest.update(f"{site} {type(link).__name__} {name} {value.dtype} {tuple(value.shape)}".encode())
                    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line a site: the map, the rank it removes, the TransformerLens name; then what made the edit."""
        lines = [f"{site}  ({site.hook_name})  {describe_map(map_)}" for site, map_ in self.maps.items()]
        lines += [f"sink neurons pruned at {site}: {found}" for site, found in self.provenance.get("sinks", {}).items()]
        return "\n".join(
            [*lines, f"made by: {json.dumps({k: v for k, v in self.provenance.items() if k != 'parents'})}"]
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: "<site>/u|v|center|scale|shift", and a JSON header with the provenance."""
        check_finite_maps(self.maps)
        tensors: dict[str, Tensor] = {}
        kinds: dict[str, list[str]] = {}
        for site, map_ in self.maps.items():
            links = map_.maps if isinstance(map_, Chain) else (map_,)
            kinds[str(site)] = [type(link).__name__ for link in links]
            for number, link in enumerate(links):
                tensors |= {f"{site}/{number}/{name}": value for name, value in link.tensors.items()}
        archive.write(path, "edit", tensors, {"maps": kinds, "provenance": dict(self.provenance)})

    @staticmethod
    def load(path: str | Path) -> Edit:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is not a saved edit.
        """
        tensors, header = archive.read(path, "edit")
        with archive.rebuilding(path, "edit"):
            maps = {Site.parse(site): _rebuilt(site, kinds, tensors) for site, kinds in header["maps"].items()}
            if tensors:
                raise ValueError(f"it holds tensors that belong to no map: {sorted(tensors)[:3]}")
            return Edit(maps, header["provenance"])


def describe_map(map_: AffineMap) -> str:
    """A few words on a map: what it does and the rank it removes."""
    if isinstance(map_, Diagonal) and map_.is_mask:
        return f"{map_.rank_removed} of {map_.width} neurons {'filled' if map_.offset is not None else 'zeroed'}"
    return f"{type(map_).__name__} of width {map_.width}, removes rank {map_.rank_removed}"


def exactness(site: Site, layout: ModelLayout) -> str:
    """How exactly weights can equal the edit at a site: "exact", "subspace-exact" or "hook-only"."""
    if site.point in (Point.RESID_MID, Point.RESID_POST) or (site.point is Point.RESID_PRE and site.layer > 0):
        return "hook-only"
    if site.point in (Point.ATTN_OUT, Point.MLP_OUT) and layout.branch(site.layer, site.point).gain is not None:
        return "subspace-exact"
    return "exact"


def check_finite_maps(maps: Mapping[Site, AffineMap]) -> None:
    """Refuse a map with a number that is not finite.

    Raises:
        NotFinite: naming the site, the tensor and the place.
    """
    for site, map_ in maps.items():
        with during(str(site), f"while the map for {site} was checked"):
            map_.check_finite()


def check_widths(edit: Edit, layout: ModelLayout) -> None:
    """Refuse an edit whose maps do not fit the sites of this model, or are no longer finite.

    Raises:
        UnknownSite: if a layer or point is not in the model.
        ShapeError: if a width differs, or an expert layer gets a map that mixes neurons of different experts.
    """
    from repedit.sites import select

    check_finite_maps(edit.maps)
    for site, map_ in edit.maps.items():
        select(site, len(layout.layers), layout.architecture.points)
        width = layout.width_of(site.layer, site.point)
        if map_.width != width:
            raise ShapeError(
                f"the map for {site} has width {map_.width}, the site has width {width}; was the edit fitted on another model?"
            )
        if (
            site.point is Point.MLP_NEURONS
            and layout.branch(site.layer, site.point).routed
            and not isinstance(map_, Diagonal)
        ):
            raise NotFoldable(
                f"{site} holds the neurons of several experts, which no single token passes together; only a Diagonal fits, or edit {site.layer}.mlp.out"
            )


def check_made_for(edit: Edit, read: Callable[[str], Tensor | None], apart: Container[str] = ()) -> None:
    """Refuse an edit that was made for other values of the tensors that write at its sites.

    Args:
        read: name -> the tensor in this model; None where it has no tensor of that name.
        apart: tensors that something else changes first.
    Raises:
        FingerprintError: with the tensor. An edit that names no model is never refused.
    """
    for name, made_for in edit.weights.items():
        tensor = None if name in apart else read(name)
        if tensor is not None and value_hash(tensor) != made_for:
            raise FingerprintError(
                f"the edit was made for another model, or for this one before it was edited: {name} holds other values "
                f"({value_hash(tensor)}) than then ({made_for}). Make the edit from this model; to use it all the same, give "
                "repedit.Edit(edit.maps), which names no model, or any_model=True where weights are edited"
            )


def _weights(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Of parents that follow each other, the first that names a tensor saw it unedited, unless one before it names none."""
    hashes = dict(provenance.get("weights") or {})
    for parent in provenance.get("parents") or ():
        named = _weights(parent)
        if not named:
            break
        hashes = named | hashes
    return hashes


def _visit(map_: AffineMap) -> Any:
    def visit(x: Tensor, at: slice, _tokens: Tensor | None) -> Tensor:
        if at == slice(None):
            return map_(x)
        assert isinstance(map_, Diagonal)
        return Diagonal(map_.scale[at], None if map_.shift is None else map_.shift[at])(x)

    return visit


def _rebuilt(site: str, kinds: list[str], tensors: dict[str, Tensor]) -> AffineMap:
    """The map of a site, of tensors that are taken out of the mapping."""
    types = {"LowRank": LowRank, "Diagonal": Diagonal}
    if not isinstance(kinds, list) or not kinds or not set(kinds) <= set(types):
        raise ValueError(f"{site} has the maps {kinds!r:.100}; a list of {' and '.join(types)} was expected")
    links = []
    for number, kind in enumerate(kinds):
        prefix = f"{site}/{number}/"
        parts = {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        links.append(types[kind](**{name.removeprefix(prefix): value for name, value in parts.items()}))
    return links[0] if len(links) == 1 else Chain(tuple(links))
