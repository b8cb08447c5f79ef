"""Really smaller models: pruned neurons and groups of heads are cut out of the tensors that held them.

An expert that loses every neuron stays, as zeros: without it the router would send its tokens elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from repedit.arch import Anatomy, Architecture, Branch, Shrink, Specs, anatomy
from repedit.edit import Edit, check_widths
from repedit.errors import ArgumentError, NotSlimmable
from repedit.lower import check_model, lower
from repedit.models import Subject
from repedit.plan import Plan, Read, Resize
from repedit.rewrite.live import check_editable
from repedit.rewrite.rebuilding import rebuilt
from repedit.rewrite.survivors import Survivors, group_count, survivors

LAYOUTS = ("uniform", "ragged")


def slimmed(edit: Edit, subject: Subject, *, layout: str = "uniform", multiple: int = 8) -> Subject:
    """The subject without the neurons and groups of heads that an edit prunes: a smaller model with the same logits.

    Args:
        edit: masks at mlp.neurons and attn.neurons, with or without a constant fill.
        layout: "uniform" gives every layer the largest kept width, rounded up to `multiple`; pruned neurons of the
            others pad it, as zeros. "ragged" gives each MLP its own width, which only `repedit.load` can read back.
        multiple: what a uniform width is rounded up to.
    Raises:
        NotSlimmable: if the edit is no such mask, or what it leaves has no such shape.
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
    **options: Any,
) -> Plan:
    """The plan of `slimmed`: the edit as zeros, then the cuts; headers suffice.

    Args:
        options: passed to lowering, such as sides="output".
    Raises:
        NotSlimmable, NoBiasSlot: as for `slimmed`.
    """
    if layout not in LAYOUTS or multiple < 1:
        raise ArgumentError(
            f"layout={layout!r}, multiple={multiple}: layout is 'uniform' or 'ragged', multiple at least 1"
        )
    if architecture.shrink is None:
        raise NotSlimmable(
            f"the row of {architecture.model_type} does not say what changes with its widths (Architecture.shrink); use structure='keep'"
        )
    plan = anatomy(architecture, specs)
    check_widths(edit, plan)
    left = survivors(edit, plan, layout, multiple)
    zeroed = lower(edit, architecture, specs, **options)
    resized = dict(_cuts(plan, left, specs, frozenset(zeroed.added)))
    if not resized:
        widths = [rows.shape[1] for rows in left.neurons]
        raise NotSlimmable(
            f"nothing would be cut: the layers would keep widths {widths} of {[b.parts[0].stop for _, b in plan.layers]}; "
            "prune every layer (scope='layer'), or use layout='ragged' or a smaller multiple"
        )
    config = {**zeroed.config, **_config(plan, left, architecture.shrink)}
    return replace(zeroed, resized=resized, config=config, structure="slim")


@dataclass(frozen=True, eq=False)
class Cut(Resize):
    """Keep some rows or columns of a tensor; of a stack of experts, other ones for each."""

    axis: int
    keep: Int[Tensor, " n"] | Int[Tensor, "e n"]

    def __call__(self, tensor: Tensor, read: Read) -> Tensor:
        keep = self.keep.to(tensor.device)
        if keep.ndim == 1:
            return tensor.index_select(self.axis, keep)
        return torch.stack([x.index_select(self.axis - 1, k) for x, k in zip(tensor, keep, strict=True)])

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        return (*before[: self.axis], self.keep.shape[-1], *before[self.axis + 1 :])

    def describe(self) -> str:
        return f"cut: {self.keep.shape[-1]} kept on axis {self.axis}"


def _cuts(plan: Anatomy, left: Survivors, specs: Specs, added: frozenset[str]) -> Iterator[tuple[str, Cut]]:
    shrink = plan.architecture.shrink
    assert shrink is not None
    layers = zip(plan.block_paths, plan.layers, left.neurons, left.groups, strict=True)
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
    for part, mine in zip(mlp.parts, keep, strict=True):
        fused = part.out.expert is not None
        yield part.out.tensor, Cut(2, keep) if fused else Cut(1, mine)
        for view in part.readers:
            rows = keep if fused else mine
            yield view.tensor, Cut(int(fused), _stacked(rows, part.stop - part.start, view.parts))


def _stacked(keep: Tensor, width: int, parts: int) -> Tensor:
    """The same rows of every part of a tensor that stacks several projections of one width."""
    return torch.cat([keep + number * width for number in range(parts)], dim=-1)


def _heads(attention: Branch, groups: Int[Tensor, " g"], names: Sequence[str]) -> Iterator[tuple[str, Cut]]:
    """Columns of the output projection, and rows of queries, keys and values, of the groups that stay."""
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


def _config(plan: Anatomy, left: Survivors, shrink: Shrink) -> dict[str, Any]:
    """The fields that say the new widths; nothing for MLPs whose layers differ, which no field can say."""
    found: dict[str, Any] = {}
    for routed in {branch.routed for _, branch in plan.layers}:
        layers = [
            (b, rows.shape[1]) for (_, b), rows in zip(plan.layers, left.neurons, strict=True) if b.routed is routed
        ]
        widths = {width for _, width in layers}
        if len(widths) == 1 and any(width < branch.parts[0].stop for branch, width in layers):
            found[shrink.expert if routed and shrink.expert else shrink.mlp] = widths.pop()
    attention = plan.layers[0][0]
    if len(left.groups[0]) < group_count(attention):
        heads = len(left.groups[0]) * attention.group
        if shrink.divides and plan.width % heads:
            raise NotSlimmable(
                f"the config of {plan.architecture.model_type} insists that the number of heads divides the width of the stream: "
                f"{heads} heads would stay, the width is {plan.width}; prune another number of groups"
            )
        found |= {
            "num_attention_heads": heads,
            "num_key_value_heads": len(left.groups[0]),
            "head_dim": attention.head_width,
        }
    return found
