"""Editing a classifier without training: statistics and hooks at modules, maps folded into weights, and two recipes.

The input of a module is edited; its units are channels or features. An input (b, c, H, W) is read as rows (b H W, c),
an input (b, d) as it is, so the statistics and maps of language models apply.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from repedit.activations.collection import Collection
from repedit.arch import MatrixView, TensorSpec
from repedit.arguments import checked
from repedit.delta import Delta
from repedit.edit import describe_map
from repedit.errors import (
    ArgumentError,
    NoOpEdit,
    NoSignal,
    NotEnoughRows,
    NotFoldable,
    ShapeError,
    UnknownName,
    nearest,
)
from repedit.hashing import module_fingerprint, value_hash
from repedit.hooks import Hook, evaluating, installed
from repedit.linear_maps import AffineMap, Diagonal, LowRank
from repedit.lower import lower
from repedit.neurons.scores import score
from repedit.neurons.selection import top
from repedit.plan import Operation, Plan
from repedit.rewrite.apply import new_tensors, no_op_message
from repedit.stats import Activity, CrossMoments, Moments
from repedit.vision.data import Images, ImageSplits, Task, module_at

STATISTICS = {kind.__name__: kind for kind in (Activity, Moments, CrossMoments)}
Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

# --- Deltas of classifiers


@checked
def apply(delta: Delta | Sequence[Delta], model: nn.Module, *, any_model: bool = False) -> nn.Module:
    """A copy of the model with the differences added, each tensor rounded once; the model itself does not change.

    Args:
        delta: one delta, or several that are added from left to right.
        any_model: allow weights other than those that the delta was made from.
    Raises:
        FingerprintError: if it was made for another model. NoOpEdit: if nothing would change.
    """
    before = tensors_of(model)
    specs = {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in before.items()}
    plan = lower(delta, None, specs, any_model=any_model)
    plan.check(specs)
    new = new_tensors(plan, before)
    if all(name in before and torch.equal(value, before[name]) for name, value in new.items()):
        raise NoOpEdit(no_op_message(list(plan.operations)))
    changed = copy.deepcopy(model)
    tensors = tensors_of(changed)
    for name, value in new.items():
        if name in tensors:
            tensors[name].data.copy_(value)
        else:
            parent, _, attribute = name.rpartition(".")
            setattr(changed.get_submodule(parent), attribute, nn.Parameter(value))
    return changed


def tensors_of(model: nn.Module) -> dict[str, Any]:
    """Every parameter and buffer by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def difference(model: nn.Module, changed: nn.Module, provenance: Mapping[str, object]) -> Delta:
    """The parameters and buffers that changed, with the hashes of their original values."""
    old, new = tensors_of(model), tensors_of(changed)
    return between(model, {name: new[name] for name in new if not torch.equal(new[name], old[name])}, provenance)


def between(model: nn.Module, new: Mapping[str, Tensor], provenance: Mapping[str, object]) -> Delta:
    """New values of some tensors minus the values of the model; a tensor that the model does not have counts as 0."""
    old, differences, start = tensors_of(model), {}, {}
    for name, value in new.items():
        # A count (of batches seen) stays exact in float64.
        wide = torch.float32 if value.is_floating_point() and value.dtype != torch.float64 else torch.float64
        differences[name] = value.detach().to(wide)
        if name in old:
            differences[name] = differences[name] - old[name].detach().to(wide)
            start[name] = value_hash(old[name].detach().to(wide))
    added = {"added": sorted(set(new) - set(old))} if set(new) - set(old) else {}
    return Delta(differences, dict(provenance) | added | {"model": module_fingerprint(model), "start": start})


def recipe_record(
    method: str,
    begin: float,
    options: Mapping[str, object],
    *,
    offline: float = 0.0,
    plan: Sequence[str] = (),
    schedule: object = None,
    seed: int | None = None,
) -> dict[str, object]:
    """The provenance that every recipe records.

    Args:
        begin: `perf_counter()` when the recipe began to work on the request.
        offline: seconds of work before the request is known.
    """
    seconds = {"offline": round(offline, 4), "online": round(perf_counter() - begin, 4)}
    record = {"method": method, "options": dict(options), "plan": list(plan), "schedule": schedule, "seed": seed}
    return record | {"seconds": seconds}


# --- Statistics and hooks at the input of a module


@checked
def statistics(
    model: nn.Module, task: Task, images: Images, *modules: str, statistic: type[Any] = Activity
) -> Collection[Any]:
    """Statistics of the inputs of modules over images in eval mode, by module path: `rp.collect` for a classifier.

    The statistics are in float64. Pass the collections to `rp.score`, and the statistics in them to `rp.fit`.

    Args:
        modules: paths; the classifier layer of the task when none is given.
        statistic: Activity, Moments, or CrossMoments of the rows with the one-hot label of their image.
    Raises:
        UnknownName: if there is no such module or statistic. NotEnoughRows: if there are no images.
        HookError: if the forward pass does not reach a module. NotFinite: if an input is not finite.
    """
    if statistic not in STATISTICS.values():
        raise UnknownName(f"statistic={statistic.__name__}; {nearest(statistic.__name__, STATISTICS)}")
    if not len(images):
        raise NotEnoughRows("there are no images to measure; give at least one")
    by_path: dict[str, Any] = {}
    classes = task.logits(model, images[slice(0, 1)]).shape[1]
    labels = images.y[:0]
    like = next(model.parameters())

    def updating(path: str) -> Callable[[Tensor], None]:
        axis = axis_of(module_at(model, path))

        def update(x: Tensor) -> None:
            rows = x.movedim(axis, -1).double()
            if statistic is CrossMoments:
                cross = by_path.setdefault(path, CrossMoments(rows.shape[-1], classes, rows.device))
                one_hot = functional.one_hot(labels, classes).double().to(rows.device)
                one_hot = one_hot.reshape(-1, *(1,) * (rows.ndim - 2), classes).expand(*rows.shape[:-1], -1)
                cross.update(rows, one_hot)
            else:
                zeros = Activity.zeros if statistic is Activity else Moments
                by_path.setdefault(path, zeros(rows.shape[-1], device=rows.device)).update(rows)

        return update

    paths = modules or (task.module,)
    hooks = [Hook(module_at(model, path), "input", updating(path)) for path in paths]
    with torch.no_grad(), evaluating(model), installed(model, hooks):
        for batch in images.batches():
            labels = batch.y
            model(batch.x.to(like))
    return Collection(
        statistics={path: by_path[path].cpu() for path in paths}, model=module_fingerprint(model), corpus="images",
        data_hash=_hash(images), rule={"rows": "every position of every image"}, seen=len(images), counted=len(images),
        group_sizes={path: {} for path in paths}, gated=False,
    )  # fmt: skip


@checked
@contextmanager
def hooked(model: nn.Module, module: str, map: AffineMap) -> Iterator[nn.Module]:
    """Context in which the input of a module is mapped; the hook is removed on exit, also after an exception.

    Raises:
        UnknownName: if there is no such module. ShapeError: if the map is not as wide as its input.
        HookError: at the end of a forward pass that does not reach the module.
    """
    target = module_at(model, module)
    axis = axis_of(target)
    with installed(model, [Hook(target, "input", lambda x: map(x.movedim(axis, -1)).movedim(-1, axis))]):
        yield model


def axis_of(module: nn.Module) -> int:
    """The axis of a module's input that holds the units: the last for a linear layer, the second for any other module."""
    return -1 if isinstance(module, nn.Linear) else 1


def _hash(images: Images) -> str:
    digest = hashlib.sha256()
    for value in (images.x, images.y, images.index):
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- Maps folded into weights, exactly or not at all


@checked
def fold(model: nn.Module, module: str, map: AffineMap) -> Delta:
    """The difference of weights that has the same effect as mapping the input of a linear layer or convolution.

    W -> W M; for a convolution W[o, :, p, q] -> W[o, :, p, q] M at each position of the kernel; and bias -> bias + W c,
    summed over the kernel. A missing bias is added and listed in the provenance under "added". Computed in float32
    (float64 for float64).

    Raises:
        UnknownName: if there is no such module. ShapeError: if the map is not as wide as its input.
        NotFoldable: if the module is of another kind or shares its weight; if the map has an offset and the convolution
            pads with zeros, to which the offset would not apply; or if the map mixes the groups of a grouped
            convolution.
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
            f"{module!r} pads its input with zeros, to which the map's offset would not apply: use a linear map (without a "
            "center), or padding 0, or hooked(model, module, map)"
        )
    operations: dict[str, tuple[Operation, ...]] = {}
    for number, block in enumerate(_blocks(map, groups, module)):
        view = MatrixView(weight, parts=groups, part=number, kernel=isinstance(layer, Convolution))
        operations[weight] = (*operations.get(weight, ()), Operation("inputs", view, block))
        if offset is not None:
            constant = offset.chunk(groups)[number]
            carry = Operation("carry", MatrixView(bias, parts=groups, part=number), constant=constant, weight=view)
            operations[bias] = (*operations.get(bias, ()), carry)
    added = {}
    if bias in operations and bias not in before:
        added[bias] = TensorSpec((before[weight].shape[0],), before[weight].dtype)
    plan = Plan(operations, {}, "live", added=added)
    new = {}
    for name in plan.rewritten:
        old = before[name] if name in before else before[weight].new_zeros(plan.added[name].shape)
        new[name] = plan.computed(name, old, lambda other: before[other].detach())
    return between(model, new, {"method": "fold", "module": module, "map": describe_map(map), "rank": map.rank_removed})


def _check_layer(model: nn.Module, module: str, layer: nn.Module, has_weight: bool) -> None:
    if not isinstance(layer, nn.Linear | Convolution):
        raise NotFoldable(
            f"{module!r} is a {type(layer).__name__}, which is not a linear function of its input's units: name the Linear or "
            "Conv layer that reads them, or use hooked(model, module, map)"
        )
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is layer.weight]
    if not has_weight or len(names) != 1:
        raise NotFoldable(
            f"the weight of {module!r} is {'shared by ' + ' and '.join(names) if names else 'computed from others'}, so a "
            "fold would change more than this module; use hooked(model, module, map)"
        )


def _pads(layer: Convolution) -> bool:
    """Whether the input is padded with zeros; "same" does not pad for a kernel of size 1."""
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    if layer.padding == "same":
        return any(d * (k - 1) > 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return any(int(p) > 0 for p in layer.padding)


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
            f"{module!r} is a convolution with {groups} groups of {size} channels, and the map mixes groups; use a map that "
            "is block-diagonal over them, or hooked(model, module, map)"
        )
    for start in range(0, map.width, size):
        block = matrix[start : start + size, start : start + size]
        eye = torch.eye(size, dtype=block.dtype)
        yield LowRank(eye - block, eye)


# --- Recipes: erase one direction, or zero a few units


@checked
def erase_class(
    model: nn.Module,
    task: Task,
    splits: ImageSplits,
    *,
    module: str | None = None,
    ridge: float = 1e-2,
    affine: bool = True,
) -> Delta:
    """Fold the `class_eraser` of forget against retain into the classifier layer, whose inputs then have one mean.

    Args:
        module: the layer whose input is edited; the classifier layer when None.
        ridge, affine: as in `class_eraser`.
    Raises:
        NotEnoughRows: if there are fewer than d + 1 retain rows or 2 forget rows. NotFoldable: as `fold`.
        NoSignal: if the means agree.
    """
    begin, path = perf_counter(), module or task.module
    forget = statistics(model, task, splits.forget, path, statistic=Moments)[path]
    retain = statistics(model, task, splits.retain, path, statistic=Moments)[path]
    folded = fold(model, path, class_eraser(forget, retain, ridge=ridge, affine=affine))
    record = recipe_record("erase_class", begin, {"ridge": ridge, "affine": affine})
    return Delta(folded.tensors, dict(folded.provenance) | record)


@checked
def class_eraser(forget: Moments, retain: Moments, *, ridge: float = 1e-2, affine: bool = True) -> LowRank:
    """The rank-1 map that gives forget and retain rows the same mean and moves retain rows least.

    x - u v^T (x - m_r) with v = (S_r + ridge I)^-1 (m_f - m_r) and u = (m_f - m_r) / (v . (m_f - m_r)), S_r the centred
    covariance of retain; the retain mean does not change. All in float64.

    Args:
        affine: keep the retain mean; otherwise the map is linear and both means change.
    Raises:
        NotEnoughRows: if retain has fewer than d + 1 rows or forget fewer than 2. NoSignal: if the means agree.
        ShapeError: if the widths differ. ArgumentError: if ridge is not positive.
    """
    if forget.width != retain.width:
        raise ShapeError(f"forget has width {forget.width}, retain {retain.width}; collect both at one module")
    for name, rows, needed in (("retain", retain.count, retain.width + 1), ("forget", forget.count, 2)):
        if rows < needed:
            raise NotEnoughRows(
                f"{name} has {rows} rows of width {retain.width}, {needed} are needed; give more images"
            )
    if not ridge > 0:
        raise ArgumentError(f"ridge={ridge}; give a positive number, such as 1e-2")
    gap = forget.mean - retain.mean
    if not float(gap.norm()) > 1e-12 * float(forget.mean.norm() + retain.mean.norm()):
        raise NoSignal(
            "the means of forget and retain agree, so there is no direction between them; are the two sets different?"
        )
    v = torch.linalg.solve(retain.covariance + ridge * torch.eye(retain.width, dtype=torch.float64), gap)
    return LowRank((gap / (v @ gap))[:, None], v[:, None], retain.mean if affine else None)


@checked
def zero_units(
    model: nn.Module,
    task: Task,
    splits: ImageSplits,
    *,
    module: str | None = None,
    fraction: float = 0.1,
    importance: str = "abs",
    combine: str = "ratio",
) -> Delta:
    """Zero the units that are most specific to the forget images, scored like neurons of a language model.

    Args:
        module: the layer whose input units are zeroed; the classifier layer when None.
        fraction: of the units of the layer.
        importance, combine: as in `rp.score`.
    Raises:
        FractionError, SelectionError: as `rp.top`. UnknownName: as `rp.score`. NotFoldable: as `fold`.
    """
    begin, path = perf_counter(), module or task.module
    forget, retain = (statistics(model, task, images, path) for images in (splits.forget, splits.retain))
    # The agreement of the rankings goes into the provenance; the threshold of the warning is one of language models.
    scores = score(forget, retain, importance=importance, combine=combine, warn=False)
    keep = top(scores, fraction=fraction)[path]
    folded = fold(model, path, Diagonal.mask(keep))
    options = {"fraction": fraction, "importance": importance, "combine": combine, "agreement": scores.agreement}
    zeroed = [int(i) for i in (~keep).nonzero()[:, 0]]
    record = recipe_record("zero_units", begin, options | {"units": zeroed})
    return Delta(folded.tensors, dict(folded.provenance) | record)
