"""What an edit leaves of every branch: neurons of MLPs, and whole groups of heads that share a value head.

Here is decided whether cutting can equal zeroing; each refusal says why and what to prune instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from repedit.arch import Anatomy, Branch
from repedit.edit import Edit
from repedit.errors import NotSlimmable
from repedit.maps import Diagonal
from repedit.sites import Point, Site


@dataclass(frozen=True, eq=False)
class Survivors:
    """Of every layer: the MLP neurons that stay, one row an expert, and the groups of heads that stay."""

    neurons: tuple[Int[Tensor, "_ _"], ...]
    """Indices within a part; pruned neurons among them pad a part to the width of the others."""
    groups: tuple[Int[Tensor, " _"], ...]


def survivors(edit: Edit, plan: Anatomy, layout: str, multiple: int) -> Survivors:
    """What stays of every branch of a model under a layout.

    "uniform": the largest kept count over the layers of a kind (dense, experts), rounded up to `multiple` but never
    above the width there is. "ragged": the largest kept count of each layer.

    Raises:
        NotSlimmable: if the edit is more than a mask of neurons, or what it leaves has no such shape.
    """
    for site, map_ in edit.maps.items():
        if site.point not in (Point.MLP_NEURONS, Point.ATTN_NEURONS):
            raise NotSlimmable(
                f"{site}: only pruned neurons (mlp.neurons, attn.neurons) can be cut out; use structure='keep'"
            )
        if not isinstance(map_, Diagonal) or not map_.is_mask:
            raise NotSlimmable(
                f"{site} holds a {type(map_).__name__} that is not a mask of zeros and ones; use structure='keep'"
            )
    kept = {site: map_.kept.cpu() for site, map_ in edit.maps.items() if isinstance(map_, Diagonal)}
    neurons = _neurons(kept, plan, layout, multiple)
    groups = tuple(_groups(kept, plan, layer) for layer in range(len(plan.layers)))
    counts = [len(g) for g in groups]
    if len(set(counts)) > 1:
        raise NotSlimmable(
            f"the layers would keep different numbers of groups of heads ({counts}), which no config can hold; prune the same "
            "number in every layer (scope='layer', unit='kv_group'), or use structure='keep'"
        )
    return Survivors(neurons, groups)


def group_count(branch: Branch) -> int:
    """Groups of query heads that share a value head."""
    return branch.width // (branch.head_width * branch.group)


def _neurons(
    kept: Mapping[Site, Bool[Tensor, " f"]], plan: Anatomy, layout: str, multiple: int
) -> tuple[Int[Tensor, "_ _"], ...]:
    masks, widths = [], []
    for layer, (_, branch) in enumerate(plan.layers):
        mask = kept.get(Site(layer, Point.MLP_NEURONS), torch.ones(branch.width, dtype=torch.bool))
        if not bool(mask.any()):
            raise NotSlimmable(
                f"{layer}.mlp.neurons would keep none of its {branch.width} neurons, and a layer needs one; set cap_per_layer"
            )
        masks.append(torch.stack([mask[part.start : part.stop] for part in branch.parts]))
        widths.append(int(masks[-1].sum(1).max()))
    if layout == "uniform":
        widths = _evened(widths, plan, multiple)
    return tuple(_padded(mask, width) for mask, width in zip(masks, widths, strict=True))


def _evened(widths: list[int], plan: Anatomy, multiple: int) -> list[int]:
    """One width for the dense layers and one for those with experts."""
    routed = [branch.routed for _, branch in plan.layers]
    found = {}
    for kind in set(routed):
        there = [branch.parts[0].stop for _, branch in plan.layers if branch.routed is kind]
        largest = max(w for w, k in zip(widths, routed, strict=True) if k is kind)
        found[kind] = min(-(-largest // multiple) * multiple, max(there))
        if found[kind] > min(there):
            raise NotSlimmable(
                f"the layers hold {min(there)} to {max(there)} neurons and a uniform width would be {found[kind]}; use layout='ragged'"
            )
    return [found[kind] for kind in routed]


def _padded(mask: Bool[Tensor, "e f"], width: int) -> Int[Tensor, "e n"]:
    """Indices of the kept neurons of each row, and of its first pruned ones up to the width, in order."""
    # A stable sort of "pruned" puts the kept first and leaves each kind in order.
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :width].sort(1).values


def _groups(kept: Mapping[Site, Bool[Tensor, " f"]], plan: Anatomy, layer: int) -> Int[Tensor, " g"]:
    branch, site = plan.layers[layer][0], Site(layer, Point.ATTN_NEURONS)
    mask = kept.get(site, torch.ones(branch.width, dtype=torch.bool))
    grouped = rearrange(mask, "(kv n) -> kv n", n=branch.group * branch.head_width)
    if not torch.equal(grouped.any(1), grouped.all(1)):
        raise NotSlimmable(
            f"{site} loses part of a group of heads; all heads share one width and all groups one number of heads: prune "
            "unit='kv_group', or use structure='keep'"
        )
    if not bool(mask.any()):
        raise NotSlimmable(f"{site} would keep none of its {group_count(branch)} groups of heads; set cap_per_layer")
    whole = plan.architecture.shrink.whole_heads if plan.architecture.shrink else ""
    if whole and not bool(mask.all()):
        raise NotSlimmable(
            f"{site}: heads of {plan.architecture.model_type} cannot be cut out: {whole}; use structure='keep'"
        )
    return grouped.any(1).nonzero()[:, 0]
