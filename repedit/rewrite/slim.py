"""Slimming: a smaller model, without the neurons and groups of heads that an edit prunes.

An expert that loses every neuron is kept, as zeros: without it the router would send its tokens to other experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from repedit.arch import Architecture, Branch, ModelLayout, Shrink, Specs, TensorSpec, match_layout
from repedit.arch.storage import Piece
from repedit.arguments import checked
from repedit.edit import Edit, check_widths
from repedit.errors import ArgumentError, NotSlimmable, is_whole
from repedit.linear_maps import Diagonal
from repedit.lower import check_model, lower
from repedit.models.subject import Subject
from repedit.plan import LoweringOptions, Plan, Resize, TensorReader, plan_for_files
from repedit.rewrite.apply import check_editable, rebuilt
from repedit.sites import Point, Site

LAYOUTS = ("uniform", "ragged")


@checked
def slimmed(edit: Edit, subject: Subject, *, layout: str = "uniform", multiple: int = 8) -> Subject:
    """The subject without the neurons and groups of heads that an edit prunes: a smaller model with the same logits.

    Args:
        edit: masks at mlp.neurons and attn.neurons, with or without a constant fill.
        layout: "uniform" gives every layer the largest kept width, rounded up to `multiple`, and pads the others with
            pruned neurons, as zeros. "ragged" gives each MLP its own width, which only `repedit.load` can read back.
        multiple: a uniform width is rounded up to a multiple of this.
    Raises:
        NotSlimmable: if the edit is not such a mask, or what remains does not have such a shape.
        NoBiasSlot: if the family has no bias to hold a fill value.
    """
    check_editable(subject)
    check_model(edit, subject.value)
    return rebuilt(slim_plan(edit, subject.architecture, subject.specs, layout=layout, multiple=multiple), subject)


def slim_plan(
    edit: Edit,
    architecture: Architecture,
    specs: Specs,
    *,
    layout: str = "uniform",
    multiple: int = 8,
    **options: Unpack[LoweringOptions],
) -> Plan:
    """The plan of `slimmed`: the edit as zeros, then the cuts; made from names and shapes alone.

    Args:
        options: passed to lowering, such as sides="output".
    Raises:
        NotSlimmable, NoBiasSlot: as for `slimmed`.
    """
    if layout not in LAYOUTS or not is_whole(multiple):
        raise ArgumentError(
            f"layout={layout!r}, multiple={multiple!r}: layout is 'uniform' or 'ragged', multiple at least 1"
        )
    if architecture.shrink is None:
        raise NotSlimmable(
            f"the row of {architecture.model_type} does not say what changes with its widths (Architecture.shrink); use structure='keep'"
        )
    model_layout = match_layout(architecture, specs)
    check_widths(edit, model_layout)
    remaining = survivors(edit, model_layout, layout, multiple)
    zeroed = lower(edit, architecture, dict(specs), **options)
    resized = dict(_cuts(model_layout, remaining, specs, frozenset(zeroed.added)))
    if not resized:
        widths = [rows.shape[1] for rows in remaining.neurons]
        raise NotSlimmable(
            f"nothing would be cut: the layers would keep widths {widths} of {[b.parts[0].stop for _, b in model_layout.layers]}; "
            "prune every layer (scope='layer'), or use layout='ragged' or a smaller multiple"
        )
    config = {**zeroed.config, **_config(model_layout, remaining, architecture.shrink)}
    return plan_for_files(replace(zeroed, resized=resized, config=config, structure="slim"), specs)


# --- What remains of every branch: neurons of MLPs, and whole groups of heads that share a value head
#
# This section decides whether cutting can equal zeroing; each refusal says why not and what to prune instead.


@dataclass(frozen=True, eq=False)
class Survivors:
    """The MLP neurons and the groups of heads that remain in every layer."""

    neurons: tuple[Int[Tensor, "_ _"], ...]
    """By layer, one row per expert: indices within the expert, or within the MLP; pruned neurons among them are padding."""
    groups: tuple[Int[Tensor, " _"], ...]


def survivors(edit: Edit, model_layout: ModelLayout, layout: str, multiple: int) -> Survivors:
    """What remains of every branch of a model under a layout.

    "uniform": the largest kept count over the layers of a kind (dense, experts), rounded up to `multiple` but never
    above the width there is. "ragged": the largest kept count of each layer.

    Raises:
        NotSlimmable: if the edit is more than a mask of neurons, or what remains does not have such a shape.
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
    masks = {site: map_.kept.cpu() for site, map_ in edit.maps.items() if isinstance(map_, Diagonal)}
    neurons = _remaining_neurons(masks, model_layout, layout, multiple)
    groups = tuple(_remaining_groups(masks, model_layout, layer) for layer in range(len(model_layout.layers)))
    counts = [len(group) for group in groups]
    if len(set(counts)) > 1:
        raise NotSlimmable(
            f"the layers would keep different numbers of groups of heads ({counts}), which no config can hold; prune the same "
            "number in every layer (scope='layer', unit='kv_group'), or use structure='keep'"
        )
    return Survivors(neurons, groups)


def group_count(branch: Branch) -> int:
    """Groups of query heads that share a value head."""
    return branch.width // (branch.head_width * branch.group)


def _remaining_neurons(
    edit_masks: Mapping[Site, Bool[Tensor, " f"]], model_layout: ModelLayout, layout: str, multiple: int
) -> tuple[Int[Tensor, "_ _"], ...]:
    masks, widths = [], []
    for layer, (_, branch) in enumerate(model_layout.layers):
        mask = edit_masks.get(Site(layer, Point.MLP_NEURONS), torch.ones(branch.width, dtype=torch.bool))
        if not bool(mask.any()):
            raise NotSlimmable(
                f"{layer}.mlp.neurons would keep none of its {branch.width} neurons, and a layer needs one; set cap_per_layer"
            )
        masks.append(torch.stack([mask[part.start : part.stop] for part in branch.parts]))
        widths.append(int(masks[-1].sum(1).max()))
    if layout == "uniform":
        widths = _uniform_widths(widths, model_layout, multiple)
    return tuple(_padded(mask, width) for mask, width in zip(masks, widths, strict=True))


def _uniform_widths(widths: list[int], model_layout: ModelLayout, multiple: int) -> list[int]:
    """One width for the dense layers and one for those with experts."""
    routed = [branch.routed for _, branch in model_layout.layers]
    uniform = {}
    for kind in set(routed):
        before = [branch.parts[0].stop for _, branch in model_layout.layers if branch.routed is kind]
        largest = max(width for width, k in zip(widths, routed, strict=True) if k is kind)
        uniform[kind] = min(-(-largest // multiple) * multiple, max(before))
        if uniform[kind] > min(before):
            raise NotSlimmable(
                f"the layers hold {min(before)} to {max(before)} neurons and a uniform width would be {uniform[kind]}; use layout='ragged'"
            )
    return [uniform[kind] for kind in routed]


def _padded(mask: Bool[Tensor, "e f"], width: int) -> Int[Tensor, "e n"]:
    """Indices of the kept neurons of each row, and of its first pruned ones up to the width, in order."""
    # A stable sort of "pruned" puts the kept neurons first and keeps the order within each kind.
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :width].sort(1).values


def _remaining_groups(
    edit_masks: Mapping[Site, Bool[Tensor, " f"]], model_layout: ModelLayout, layer: int
) -> Int[Tensor, " g"]:
    branch, site = model_layout.layers[layer][0], Site(layer, Point.ATTN_NEURONS)
    mask = edit_masks.get(site, torch.ones(branch.width, dtype=torch.bool))
    grouped = rearrange(mask, "(kv n) -> kv n", n=branch.group * branch.head_width)
    if not torch.equal(grouped.any(1), grouped.all(1)):
        raise NotSlimmable(
            f"{site} loses part of a group of heads; all heads share one width and all groups one number of heads: prune "
            "unit='kv_group', or use structure='keep'"
        )
    if not bool(mask.any()):
        raise NotSlimmable(f"{site} would keep none of its {group_count(branch)} groups of heads; set cap_per_layer")
    row = model_layout.architecture
    if row.shrink and row.shrink.whole_heads and not bool(mask.all()):
        raise NotSlimmable(
            f"{site}: heads of {row.model_type} cannot be cut out: {row.shrink.whole_heads}; use structure='keep'"
        )
    return grouped.any(1).nonzero()[:, 0]


# --- The cuts of every tensor


@dataclass(frozen=True, eq=False)
class Cut(Resize):
    """Keep some rows or columns of a tensor; of a stack of experts, different ones for each."""

    axis: int
    keep: Int[Tensor, " n"] | Int[Tensor, "e n"]

    def __call__(self, tensor: Tensor, read: TensorReader) -> Tensor:
        keep = self.keep.to(tensor.device)
        if keep.ndim == 1:
            return tensor.index_select(self.axis, keep)
        return torch.stack([x.index_select(self.axis - 1, k) for x, k in zip(tensor, keep, strict=True)])

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        return (*before[: self.axis], self.keep.shape[-1], *before[self.axis + 1 :])

    def of_piece(self, piece: Piece, stored: TensorSpec, name: Callable[[str], str]) -> Cut:
        one = piece.expert is not None
        axis, keep = self.axis - one, self.keep[piece.expert] if one and self.keep.ndim == 2 else self.keep
        if piece.parts > 1 and piece.axis == axis:
            keep = keep.chunk(piece.parts, -1)[piece.part] - piece.part * stored.shape[axis]
        return Cut(axis, keep)

    def describe(self) -> str:
        return f"cut: {self.keep.shape[-1]} kept on axis {self.axis}"


def _cuts(
    model_layout: ModelLayout, remaining: Survivors, specs: Specs, added: frozenset[str]
) -> Iterator[tuple[str, Cut]]:
    shrink = model_layout.architecture.shrink
    assert shrink is not None
    layers = zip(model_layout.block_paths, model_layout.layers, remaining.neurons, remaining.groups, strict=True)
    for block, (attention, mlp), neurons, groups in layers:
        if neurons.shape[1] < mlp.parts[0].stop:
            yield from _routed(mlp, neurons) if mlp.routed else _dense(mlp, neurons[0], added)
        if len(groups) < group_count(attention):
            names = [f"{block}.{module}.{leaf}" for module in shrink.heads for leaf in ("weight", "bias")]
            yield from _heads(attention, groups, [n if n in specs or n in added else "" for n in names])


def _dense(mlp: Branch, keep: Int[Tensor, " n"], added: frozenset[str]) -> Iterator[tuple[str, Cut]]:
    (part,) = mlp.parts
    yield part.out.tensor, Cut(0 if part.out.transposed else 1, keep)
    for view in part.readers:
        rows = _stacked(keep, part.stop, view.parts)
        bias = f"{view.tensor.removesuffix('.weight')}.bias"
        yield view.tensor, Cut(1 if view.transposed and view.tensor.endswith(".weight") else 0, rows)
        if bias in added:
            yield bias, Cut(0, rows)


def _routed(mlp: Branch, keep: Int[Tensor, "e n"]) -> Iterator[tuple[str, Cut]]:
    part = mlp.parts[0]
    yield part.out.tensor, Cut(2, keep)
    for view in part.readers:
        yield view.tensor, Cut(1, _stacked(keep, part.stop, view.parts))


def _stacked(keep: Tensor, width: int, parts: int) -> Tensor:
    """The same rows of every part of a tensor that stacks several projections of one width."""
    return torch.cat([keep + number * width for number in range(parts)], dim=-1)


def _heads(attention: Branch, groups: Int[Tensor, " g"], names: Sequence[str]) -> Iterator[tuple[str, Cut]]:
    """Columns of the output projection, and rows of queries, keys and values, of the groups that remain."""
    size = attention.head_width
    queries = _rows(groups, attention.group * size)
    shared = _rows(groups, size)
    (part,) = attention.parts
    yield part.out.tensor, Cut(1, queries)
    if len(names) == 2:
        count = group_count(attention) * size
        stacked = torch.cat([queries, shared + part.stop, shared + part.stop + count])
        rows = [stacked, stacked]
    else:
        rows = [queries, queries, *[shared] * 4]
    yield from ((name, Cut(0, keep)) for name, keep in zip(names, rows, strict=True) if name)


def _rows(groups: Int[Tensor, " g"], size: int) -> Int[Tensor, " n"]:
    return (groups[:, None] * size + torch.arange(size)).flatten()


def _config(model_layout: ModelLayout, remaining: Survivors, shrink: Shrink) -> dict[str, Any]:
    """The config fields of the new widths; none for MLPs of different widths, which config.json cannot express."""
    fields: dict[str, Any] = {}
    for routed in {branch.routed for _, branch in model_layout.layers}:
        layers = [
            (b, rows.shape[1])
            for (_, b), rows in zip(model_layout.layers, remaining.neurons, strict=True)
            if b.routed is routed
        ]
        widths = {width for _, width in layers}
        if len(widths) == 1 and any(width < branch.parts[0].stop for branch, width in layers):
            fields[shrink.expert if routed and shrink.expert else shrink.mlp] = widths.pop()
    attention = model_layout.layers[0][0]
    if len(remaining.groups[0]) < group_count(attention):
        heads = len(remaining.groups[0]) * attention.group
        if shrink.heads_must_divide_width and model_layout.width % heads:
            raise NotSlimmable(
                f"the config of {model_layout.architecture.model_type} requires that the number of heads divides the width of the stream: "
                f"{heads} heads would remain, the width is {model_layout.width}; prune another number of groups"
            )
        fields |= {
            "num_attention_heads": heads,
            "num_key_value_heads": len(remaining.groups[0]),
            "head_dim": attention.head_width,
        }
    return fields
