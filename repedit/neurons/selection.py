"""From scores to edits: which neurons, heads or groups go, and what is left in their place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from repedit.activations.collection import Collection
from repedit.edit import Edit
from repedit.errors import (
    ArgumentError,
    FractionError,
    MissingStatistic,
    SelectionError,
    ShapeError,
    UnknownName,
    nearest,
)
from repedit.linear_maps import Diagonal
from repedit.neurons.scores import Score, Scores
from repedit.sites import SiteKey

Keep = dict[SiteKey, Bool[Tensor, " d"]]
Unit = Literal["neuron", "head", "kv_group"]


def top(
    scores: Mapping[SiteKey, Score],
    *,
    fraction: float,
    scope: str = "global",
    cap_per_layer: float | None = None,
    protect: Mapping[SiteKey, Tensor] | None = None,
    unit: str = "neuron",
) -> Keep:
    """Keep-masks that are False for the k = floor(fraction N) units with the highest scores.

    N counts the units of all scored sites. Ties go to the lower layer, then the lower index. A unit of heads is scored
    by the mean of its neurons.

    Args:
        scope: "global", one selection over all sites; "layer", the same fraction of each site.
        cap_per_layer: the largest share of a site that may go.
        protect: masks by site, True for neurons that must stay.
        unit: "neuron", "head" or "kv_group"; the last two for attention sites only.
    Raises:
        FractionError: if the fraction lies outside [0, 1].
        SelectionError: if nothing is selected, or the constraints cannot be met together.
    """
    check_fraction("fraction", fraction)
    if scope not in ("global", "layer"):
        raise UnknownName(f"scope={scope!r}; {nearest(scope, ('global', 'layer'))}")
    pooled = {site: _pooled(s, unit, (protect or {}).get(site)) for site, s in scores.items()}
    if cap_per_layer is not None:
        check_fraction("cap_per_layer", cap_per_layer)
        pooled = {site: _capped(values, cap_per_layer) for site, values in pooled.items()}
    groups = [list(pooled)] if scope == "global" else [[site] for site in pooled]
    keep: Keep = {}
    for group in groups:
        keep |= _selected({site: pooled[site] for site in group}, fraction, unit)
    return {site: mask.repeat_interleave(_size(scores[site], unit)) for site, mask in keep.items()}


def prune(
    scores: Scores,
    *,
    fraction: float,
    scope: str = "global",
    cap_per_layer: float | None = None,
    protect: Mapping[SiteKey, Tensor] | None = None,
    unit: str = "neuron",
    fill: str = "zero",
    values: Collection | Mapping[SiteKey, Tensor] | None = None,
) -> Edit:
    """The edit that removes the neurons most specific to the forget set: z -> 0, or z -> a constant.

    Args:
        fill: "zero"; "mean", with `values` the retain Collection; "peak", with `values` from `peaks`.
        others: as `top`.
    Raises:
        FractionError, SelectionError: as `top`. MissingStatistic: if a fill needs values that are not given.
    """
    keep = top(scores, fraction=fraction, scope=scope, cap_per_layer=cap_per_layer, protect=protect, unit=unit)
    touched = {site: mask for site, mask in keep.items() if not bool(mask.all())}
    constants = _constants(touched, fill, values)
    maps = {
        site: Diagonal.mask(mask) if fill == "zero" else Diagonal.fill(mask, constants[site])
        for site, mask in touched.items()
    }
    options = dict(scores.provenance.get("options", {})) | {
        "fraction": fraction,
        "scope": scope,
        "cap_per_layer": cap_per_layer,
        "unit": unit,
        "fill": fill,
    }
    sinks = {str(site): [i for i in scores[site].sinks if not mask[i]] for site, mask in touched.items()}
    provenance = dict(scores.provenance) | {
        "options": options,
        "sinks": {site: found for site, found in sinks.items() if found},
        "agreement": scores.agreement,
    }
    return Edit(maps, provenance)


def random_like(edit: Edit, *, seed: int, match: str = "layer", widths: Mapping[SiteKey, int] | None = None) -> Edit:
    """A control: as many neurons as `edit` prunes, chosen at random.

    Args:
        match: "layer", the same number at each site; "uniform", the same total spread evenly over the sites.
        widths: for "uniform", the sites to spread over with their widths; those of the edit when None.
    Raises:
        ArgumentError: if the edit is not made of masks.
    """
    if match not in ("layer", "uniform"):
        raise UnknownName(f"match={match!r}; {nearest(match, ('layer', 'uniform'))}")
    masks = {site: map_ for site, map_ in edit.maps.items() if isinstance(map_, Diagonal) and map_.is_mask}
    if len(masks) != len(edit.maps):
        raise ArgumentError(
            f"random_like needs an edit made of neuron masks; {next(s for s in edit.maps if s not in masks)} is not one"
        )
    filled = [site for site, map_ in masks.items() if map_.offset is not None]
    if filled:
        raise ArgumentError(
            f"{filled[0]} is filled with constants, and other neurons' are not known; make the control of the zero-filled edit"
        )
    sizes = dict(widths) if widths and match == "uniform" else {site: map_.width for site, map_ in masks.items()}
    counts = {site: map_.rank_removed for site, map_ in masks.items()}
    if match == "uniform":
        counts = _spread(sum(counts.values()), sizes)
    generator = torch.Generator().manual_seed(seed)
    maps = {}
    for site, width in sizes.items():
        keep = torch.ones(width, dtype=torch.bool)
        keep[torch.randperm(width, generator=generator)[: counts[site]]] = False
        maps[site] = Diagonal.mask(keep)
    return Edit(
        maps,
        {
            "method": "random control",
            "options": {"match": match},
            "seed": seed,
            "model": edit.provenance.get("model"),
            **({"weights": edit.weights} if edit.weights else {}),
        },
    )


def check_fraction(name: str, value: float) -> None:
    """Refuse what is not a fraction.

    Raises:
        FractionError: with the value, and what was probably meant.
    """
    if not 0 <= value <= 1 or math.isnan(value):
        hint = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise FractionError(f"{name}={value}: a fraction lies in [0, 1]{hint}")


def _size(score: Score, unit: str) -> int:
    if unit == "neuron":
        return 1
    if unit not in ("head", "kv_group"):
        raise UnknownName(f"unit={unit!r}; {nearest(unit, ('neuron', 'head', 'kv_group'))}")
    size = dict(score.group_sizes).get(unit)
    if size is None:
        raise ArgumentError(f"unit={unit!r} is for attn.neurons; {score.site} has no heads")
    return size


def _pooled(score: Score, unit: str, protect: Tensor | None) -> Tensor:
    values = score.values.clone()
    if protect is not None:
        if protect.shape != values.shape:
            raise ShapeError(
                f"protect[{score.site}] has shape {tuple(protect.shape)}, the site has width {len(values)}"
            )
        values[protect.bool()] = -torch.inf
    return values.unflatten(0, (-1, _size(score, unit))).mean(1)


def _capped(values: Tensor, cap: float) -> Tensor:
    allowed = math.floor(cap * len(values) + 1e-9)
    order = values.sort(descending=True, stable=True).indices
    capped = values.clone()
    capped[order[allowed:]] = -torch.inf
    return capped


def _selected(values: Mapping[SiteKey, Tensor], fraction: float, unit: str) -> Keep:
    joined = torch.cat(list(values.values()))
    # 1e-9: floor(0.29 * 100) must be 29.
    k = math.floor(fraction * len(joined) + 1e-9)
    if k == 0:
        raise SelectionError(
            f"fraction={fraction} of {len(joined)} {unit}s selects none; the smallest fraction that selects one is {1 / len(joined):.3g}"
        )
    available = int((joined > -torch.inf).sum())
    if k > available:
        raise SelectionError(
            f"fraction={fraction} asks for {k} of {len(joined)} {unit}s, {available} may be selected; lower the fraction, "
            "raise cap_per_layer or protect fewer"
        )
    keep = torch.ones(len(joined), dtype=torch.bool)
    keep[joined.sort(descending=True, stable=True).indices[:k]] = False
    return dict(zip(values, keep.split([len(v) for v in values.values()]), strict=True))


def _constants(touched: Keep, fill: str, values: Any) -> dict[SiteKey, Tensor]:
    if fill not in ("zero", "mean", "peak"):
        raise UnknownName(f"fill={fill!r}; {nearest(fill, ('zero', 'mean', 'peak'))}")
    if fill == "zero":
        return {}
    if values is None:
        source = "the retain collection" if fill == "mean" else "rp.peaks(subject, retain, edit)"
        raise MissingStatistic(f"fill={fill!r} needs values={source}")
    found = {
        site: values[site].mean if isinstance(values, Collection) else values[site]
        for site in touched
        if site in values
    }
    absent = [site for site in touched if site not in found]
    if absent:
        raise MissingStatistic(f"fill={fill!r} needs values for {absent[0]}; collect that site on the retain set")
    return {site: value.float() for site, value in found.items()}


def _spread(total: int, widths: Mapping[SiteKey, int]) -> dict[SiteKey, int]:
    whole = sum(widths.values())
    counts = {site: total * width // whole for site, width in widths.items()}
    for site in list(widths)[: total - sum(counts.values())]:
        counts[site] += 1
    return counts
