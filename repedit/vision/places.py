"""A place in a classifier: the input of a module, whose units are its channels or features.

An input (b, c, H, W) is read as rows (b H W, c), an input (b, d) stays, so the statistics and maps of language models fit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repedit.activations.collection import Collection
from repedit.errors import NotEnoughRows, UnknownName, nearest
from repedit.fingerprints import module_fingerprint
from repedit.hooks import Hook, evaluating, installed
from repedit.maps import AffineMap
from repedit.stats import Activity, CrossMoments, Moments
from repedit.vision.reading import module_at
from repedit.vision.task import Images, Task

STATISTICS = {kind.__name__: kind for kind in (Activity, Moments, CrossMoments)}


def statistics(
    model: nn.Module, task: Task, images: Images, *modules: str, statistic: type[Any] = Activity
) -> Collection[Any]:
    """Statistics of the inputs of modules over images in eval mode, by module path: `rp.collect` for a classifier.

    The rows are in float64. `rp.score` and `rp.top` take the collections, and `rp.fit` the statistics in them.

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
    found: dict[str, Any] = {}
    labels = task.logits(model, images[slice(0, 1)]).shape[1]
    now: list[Tensor] = []
    like = next(model.parameters())

    def watch(path: str) -> Callable[[Tensor], None]:
        axis = axis_of(module_at(model, path))

        def add(x: Tensor) -> None:
            rows = x.movedim(axis, -1).double()
            if statistic is CrossMoments:
                kept = found.setdefault(path, CrossMoments(rows.shape[-1], labels, rows.device))
                one_hot = functional.one_hot(now[-1], labels).double().to(rows.device)
                kept.update(rows, one_hot.reshape(-1, *(1,) * (rows.ndim - 2), labels).expand(*rows.shape[:-1], -1))
            else:
                make = Activity.zeros if statistic is Activity else Moments
                found.setdefault(path, make(rows.shape[-1], device=rows.device)).update(rows)

        return add

    paths = modules or (task.module,)
    hooks = [Hook(module_at(model, path), "input", watch(path)) for path in paths]
    with torch.no_grad(), evaluating(model), installed(model, hooks):
        for part in images.batches():
            now.append(part.y)
            model(part.x.to(like))
    return Collection(
        statistics={path: found[path].cpu() for path in paths},
        model=module_fingerprint(model),
        corpus="images",
        data_hash=_hash(images),
        rule={"rows": "every position of every image"},
        seen=len(images),
        counted=len(images),
        units={path: {} for path in paths},
        gated=False,
    )


@contextmanager
def hooked(model: nn.Module, module: str, map: AffineMap) -> Iterator[nn.Module]:
    """The model with the input of a module mapped; the hook is removed on leaving, also after an exception.

    Raises:
        UnknownName: if there is no such module. ShapeError: if the map is not as wide as its input.
        HookError: at the end of a forward pass that does not reach the module.
    """
    place = module_at(model, module)
    axis = axis_of(place)
    with installed(model, [Hook(place, "input", lambda x: map(x.movedim(axis, -1)).movedim(-1, axis))]):
        yield model


def axis_of(module: nn.Module) -> int:
    """The axis of a module's input that holds its units: the last of a linear layer, the second of any other."""
    return -1 if isinstance(module, nn.Linear) else 1


def _hash(images: Images) -> str:
    digest = hashlib.sha256()
    for value in (images.x, images.y, images.index):
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
