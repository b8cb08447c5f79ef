"""From scores to edits: which neurons, heads or groups are pruned, and what replaces them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from repedit.activations.collection import Collection
from repedit.arguments import checked
from repedit.edit import Edit
from repedit.errors import (
    ArgumentError,
    FractionError,
    MissingStatistic,
    SelectionError,
    ShapeError,
    check_choice,
    check_seed,
    is_finite,
)
from repedit.linear_maps import Diagonal
from repedit.neurons.scores import Score, Scores
from repedit.sites import SiteKey

Keep = dict[SiteKey, Bool[Tensor, " d"]]
"""A mask for each site, False where a neuron is pruned."""


@checked
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

    N is the number of units of all scored sites. Ties go to the lower layer, then the lower index. The score of a head
    or group is the mean over its neurons.

    Args:
        scope: "global", one selection over all sites; "layer", the same fraction of each site.
        cap_per_layer: the largest fraction of a site that may be pruned.
        protect: masks by site, True for neurons that must be kept.
        unit: "neuron", "head" or "kv_group"; the last two for attention sites only.
    Raises:
        FractionError: if the fraction lies outside [0, 1].
        SelectionError: if nothing is selected, or the constraints cannot be met together.
    """
    check_fraction("fraction", fraction)
    check_choice(("global", "layer"), scope=scope)
    values = {site: _unit_scores(score, unit, (protect or {}).get(site)) for site, score in scores.items()}
    if cap_per_layer is not None:
        check_fraction("cap_per_layer", cap_per_layer)
        values = {site: _capped(value, cap_per_layer) for site, value in values.items()}
    groups = [list(values)] if scope == "global" else [[site] for site in values]
    keep: Keep = {}
    for group in groups:
        keep |= _without_highest({site: values[site] for site in group}, fraction, unit)
    return {site: mask.repeat_interleave(_unit_size(scores[site], unit)) for site, mask in keep.items()}


@checked
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
        scope, cap_per_layer, protect, unit: as in `top`.
        fill: "zero"; "mean", with `values` the retain Collection; "peak", with `values` from `peaks`.
    Raises:
        FractionError, SelectionError: as `top`. MissingStatistic: if a fill needs values that are not given.
    """
    keep = top(scores, fraction=fraction, scope=scope, cap_per_layer=cap_per_layer, protect=protect, unit=unit)
    masks = {site: mask for site, mask in keep.items() if not bool(mask.all())}
    constants = _fill_values(masks, fill, values)
    maps = {
        site: Diagonal.mask(mask) if fill == "zero" else Diagonal.fill(mask, constants[site])
        for site, mask in masks.items()
    }
    options = dict(scores.provenance.get("options", {})) | {
        "fraction": fraction, "scope": scope, "cap_per_layer": cap_per_layer, "unit": unit, "fill": fill,
    }  # fmt: skip
    sinks = {str(site): [i for i in scores[site].sinks if not mask[i]] for site, mask in masks.items()}
    pruned_sinks = {site: neurons for site, neurons in sinks.items() if neurons}
    derived = {"options": options, "sinks": pruned_sinks, "agreement": scores.agreement}
    return Edit(maps, dict(scores.provenance) | derived)


@checked
def random_like(edit: Edit, *, seed: int, match: str = "layer", widths: Mapping[SiteKey, int] | None = None) -> Edit:
    """A control: as many neurons as `edit` prunes, chosen at random.

    Args:
        match: "layer", the same number at each site; "uniform", the same total spread evenly over the sites.
        widths: for "uniform", the sites to spread over with their widths; those of the edit when None.
    Raises:
        ArgumentError: if the edit is not made of masks.
    """
    check_choice(("layer", "uniform"), match=match)
    check_seed(seed=seed)
    masks = {site: map_ for site, map_ in edit.maps.items() if isinstance(map_, Diagonal) and map_.is_mask}
    if len(masks) != len(edit.maps):
        raise ArgumentError(
            f"random_like needs an edit made of neuron masks; {next(s for s in edit.maps if s not in masks)} is not one"
        )
    filled = [site for site, map_ in masks.items() if map_.offset is not None]
    if filled:
        raise ArgumentError(
            f"{filled[0]} is filled with constants, which are unknown for other neurons; make the control of the "
            "zero-filled edit"
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
    source = {"model": edit.provenance.get("model")} | ({"weights": edit.weights} if edit.weights else {})
    return Edit(maps, {"method": "random control", "options": {"match": match}, "seed": seed, **source})


def check_fraction(name: str, value: float) -> None:
    """Refuse a value outside [0, 1].

    Raises:
        FractionError: with the value, and the fraction that was probably meant.
    """
    if not is_finite(value) or not 0 <= value <= 1:
        hint = f"; did you mean {value / 100:g}?" if is_finite(value) and 1 < value <= 100 else ""
        raise FractionError(f"{name}={value!r}: a fraction lies in [0, 1]{hint}")


def _unit_size(score: Score, unit: str) -> int:
    if unit == "neuron":
        return 1
    check_choice(("neuron", "head", "kv_group"), unit=unit)
    size = dict(score.group_sizes).get(unit)
    if size is None:
        raise ArgumentError(f"unit={unit!r} is for attn.neurons; {score.site} has no heads")
    return size


def _unit_scores(score: Score, unit: str, protect: Tensor | None) -> Tensor:
    """The mean score of each unit; -inf where one of its neurons is protected."""
    values = score.values.clone()
    if protect is not None:
        if protect.shape != values.shape:
            raise ShapeError(
                f"protect[{score.site}] has shape {tuple(protect.shape)}, the site has width {len(values)}"
            )
        values[protect.bool()] = -torch.inf
    return values.unflatten(0, (-1, _unit_size(score, unit))).mean(1)


def _capped(values: Tensor, cap: float) -> Tensor:
    """The scores with -inf below the share of a site that may be pruned."""
    allowed = math.floor(cap * len(values) + 1e-9)
    order = values.sort(descending=True, stable=True).indices
    capped = values.clone()
    capped[order[allowed:]] = -torch.inf
    return capped


def _without_highest(values: Mapping[SiteKey, Tensor], fraction: float, unit: str) -> Keep:
    all_values = torch.cat(list(values.values()))
    # 1e-9: floor(0.29 * 100) must be 29.
    k = math.floor(fraction * len(all_values) + 1e-9)
    if k == 0:
        raise SelectionError(
            f"fraction={fraction} of {len(all_values)} {unit}s selects none; the smallest fraction that selects one is {1 / len(all_values):.3g}"
        )
    available = int((all_values > -torch.inf).sum())
    if k > available:
        raise SelectionError(
            f"fraction={fraction} asks for {k} of {len(all_values)} {unit}s, {available} may be selected; lower the fraction, "
            "raise cap_per_layer or protect fewer"
        )
    keep = torch.ones(len(all_values), dtype=torch.bool)
    keep[all_values.sort(descending=True, stable=True).indices[:k]] = False
    return dict(zip(values, keep.split([len(v) for v in values.values()]), strict=True))


def _fill_values(masks: Keep, fill: str, values: Collection | Mapping[SiteKey, Tensor] | None) -> dict[SiteKey, Tensor]:
    check_choice(("zero", "mean", "peak"), fill=fill)
    if fill == "zero":
        return {}
    if values is None:
        source = "the retain collection" if fill == "mean" else "rp.peaks(subject, retain, edit)"
        raise MissingStatistic(f"fill={fill!r} needs values={source}")
    absent = [site for site in masks if site not in values]
    if absent:
        raise MissingStatistic(f"fill={fill!r} needs values for {absent[0]}; collect that site on the retain set")
    constants = {site: values[site].mean if isinstance(values, Collection) else values[site] for site in masks}
    return {site: value.float() for site, value in constants.items()}


def _spread(total: int, widths: Mapping[SiteKey, int]) -> dict[SiteKey, int]:
    neurons = sum(widths.values())
    counts = {site: total * width // neurons for site, width in widths.items()}
    for site in list(widths)[: total - sum(counts.values())]:
        counts[site] += 1
    return counts
