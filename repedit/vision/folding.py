"""Maps folded into the weights of a classifier, exactly or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from repedit.arch import TensorSpec, View
from repedit.delta import Delta
from repedit.edit import describe_map
from repedit.errors import NotFoldable, ShapeError
from repedit.maps import AffineMap, Diagonal, LowRank
from repedit.plan import Operation, Plan
from repedit.vision.differences import between, tensors_of
from repedit.vision.reading import module_at

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


def fold(model: nn.Module, module: str, map: AffineMap) -> Delta:
    """The difference of weights that equals mapping the input of a linear layer or convolution.

    W -> W M, of a convolution W[o, :, p, q] -> W[o, :, p, q] M at each place of its kernel, and bias -> bias + W c, summed
    over the kernel; a bias that is absent is added, and named in the provenance under "added". Computed in float32
    (float64 for float64).

    Raises:
        UnknownName: if there is no such module. ShapeError: if the map is not as wide as its input.
        NotFoldable: if the module is of another kind or its weight is not its own; if the map has an offset and the
            convolution pads with zeros, which the offset would not reach; or if a grouped convolution would mix groups.
    """
    layer, before = module_at(model, module), tensors_of(model)
    weight, bias = f"{module}.weight", f"{module}.bias"
    _check_layer(model, module, layer, weight in before)
    groups = getattr(layer, "groups", 1)
    width = before[weight].shape[1] * groups
    if map.width != width:
        raise ShapeError(
            f"the map has width {map.width}, the input of {module!r} has width {width}; was it fitted at another module?"
        )
    offset = map.offset
    if offset is not None and isinstance(layer, Convolution) and _pads(layer):
        raise NotFoldable(
            f"{module!r} pads its input with zeros, which the map's offset would not reach: use a linear map (without a "
            "center), or padding 0, or hooked(model, module, map)"
        )
    operations: dict[str, tuple[Operation, ...]] = {}
    for number, piece in enumerate(_blocks(map, groups, module)):
        view = View(weight, parts=groups, part=number, kernel=isinstance(layer, Convolution))
        operations[weight] = (*operations.get(weight, ()), Operation("inputs", view, piece))
        if offset is not None:
            constant = offset.chunk(groups)[number]
            carry = Operation("carry", View(bias, parts=groups, part=number), constant=constant, weight=view)
            operations[bias] = (*operations.get(bias, ()), carry)
    plan = Plan(operations, {}, "live", added=_added(bias, weight, operations, before))
    new = {}
    for name in plan.rewritten:
        old = before[name] if name in before else before[weight].new_zeros(plan.added[name].shape)
        new[name] = plan.computed(name, old, lambda other: before[other].detach())
    return between(model, new, {"method": "fold", "module": module, "map": describe_map(map), "rank": map.rank_removed})


def _check_layer(model: nn.Module, module: str, layer: nn.Module, own: bool) -> None:
    if not isinstance(layer, nn.Linear | Convolution):
        raise NotFoldable(
            f"{module!r} is a {type(layer).__name__}, which is not a linear function of its input's units: name the Linear or "
            "Conv layer that reads them, or use hooked(model, module, map)"
        )
    held = [name for name, p in model.named_parameters(remove_duplicate=False) if p is layer.weight]
    if not own or len(held) != 1:
        raise NotFoldable(
            f"the weight of {module!r} is {'shared by ' + ' and '.join(held) if held else 'computed from others'}, so a fold "
            "would change more than this place; use hooked(model, module, map)"
        )


def _pads(layer: Convolution) -> bool:
    """Whether zeros are put around the input; "same" does not pad a kernel of size 1."""
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    if layer.padding == "same":
        return any(d * (k - 1) > 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return any(int(p) > 0 for p in layer.padding)


def _added(
    bias: str, weight: str, operations: dict[str, tuple[Operation, ...]], before: dict[str, Tensor]
) -> dict[str, TensorSpec]:
    if bias in before or bias not in operations:
        return {}
    return {bias: TensorSpec((before[weight].shape[0],), before[weight].dtype)}


def _blocks(map: AffineMap, groups: int, module: str) -> Iterator[AffineMap]:
    """The part of a map inside each group of channels.

    Raises:
        NotFoldable: if it mixes groups.
    """
    if groups == 1:
        yield map
        return
    size = map.width // groups
    if isinstance(map, Diagonal):
        yield from (Diagonal(scale) for scale in map.scale.split(size))
        return
    matrix = map.as_matrix()
    inside = torch.block_diag(*(torch.ones(size, size) for _ in range(groups))).bool()
    if bool(matrix[~inside].any()):
        raise NotFoldable(
            f"{module!r} is convolved in {groups} groups of {size} channels, and the map mixes groups; use a map that is "
            "block-diagonal over them, or hooked(model, module, map)"
        )
    for start in range(0, map.width, size):
        block = matrix[start : start + size, start : start + size]
        eye = torch.eye(size, dtype=block.dtype)
        yield LowRank(eye - block, eye)
