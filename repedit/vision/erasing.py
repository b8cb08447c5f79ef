"""Editing a classifier without training it: one direction erased, or a few units zeroed."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from torch import nn

from repedit.delta import Delta
from repedit.errors import ArgumentError, NoSignal, NotEnoughRows, ShapeError
from repedit.importance.scoring import score
from repedit.importance.selection import top
from repedit.maps import Diagonal, LowRank
from repedit.stats import Moments
from repedit.vision.folding import fold
from repedit.vision.places import statistics
from repedit.vision.task import Images, ImageSplits, Task


def erase_class(
    model: nn.Module,
    task: Task,
    splits: ImageSplits,
    *,
    module: str | None = None,
    ridge: float = 1e-2,
    affine: bool = True,
) -> Delta:
    """Fold the eraser of the forget images into the classifier layer, which then sees one mean for both sets.

    Args:
        module: the layer whose input is edited; the classifier layer when None.
        ridge, affine: as `class_eraser`.
    Raises:
        NotEnoughRows: if there are fewer than d + 1 retain rows or 2 forget rows. NotFoldable: as `fold`.
        NoSignal: if the means agree.
    """
    begin, path = perf_counter(), module or task.module
    forget, retain = (statistics(model, task, images, path, statistic=Moments)[path] for images in _sides(splits))
    eraser = class_eraser(forget, retain, ridge=ridge, affine=affine)
    return _recorded(fold(model, path, eraser), "erase_class", begin, ridge=ridge, affine=affine)


def class_eraser(forget: Moments, retain: Moments, *, ridge: float = 1e-2, affine: bool = True) -> LowRank:
    """The rank-1 map that gives forget and retain rows one mean, and moves retain rows least.

    x - u v^T (x - m_r) with v = (S_r + ridge I)^-1 (m_f - m_r) and u = (m_f - m_r) / (v . (m_f - m_r)), S_r the centred
    covariance of retain; the retain mean stays. All in float64.

    Args:
        affine: keep the retain mean; without, the map is linear and both means move.
    Raises:
        NotEnoughRows: if retain has fewer than d + 1 rows or forget fewer than 2. NoSignal: if the means agree.
        ShapeError: if the widths differ. ArgumentError: if the ridge is not above 0.
    """
    if forget.width != retain.width:
        raise ShapeError(f"forget has width {forget.width}, retain {retain.width}; collect both at one module")
    for name, rows, needed in (("retain", retain.count, retain.width + 1), ("forget", forget.count, 2)):
        if rows < needed:
            raise NotEnoughRows(
                f"{name} has {rows} rows of width {retain.width}, {needed} are needed; give more images"
            )
    if not ridge > 0:
        raise ArgumentError(f"ridge={ridge}; give a number above 0, 1e-2 say")
    gap = forget.mean - retain.mean
    if not float(gap.norm()) > 1e-12 * float(forget.mean.norm() + retain.mean.norm()):
        raise NoSignal(
            "the means of forget and retain agree, so there is no direction between them; are the two sets different?"
        )
    v = torch.linalg.solve(retain.covariance + ridge * torch.eye(retain.width, dtype=torch.float64), gap)
    return LowRank((gap / (v @ gap))[:, None], v[:, None], retain.mean if affine else None)


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
    """Zero the units that are most specific to the forget images, scored as neurons of a language model are.

    Args:
        module: the layer whose input units are zeroed; the classifier layer when None.
        fraction: of the units.
        importance, combine: as `rp.score`.
    Raises:
        FractionError, SelectionError: as `rp.top`. UnknownName: as `rp.score`. NotFoldable: as `fold`.
    """
    begin, path = perf_counter(), module or task.module
    forget, retain = (statistics(model, task, images, path) for images in _sides(splits))
    # How alike the two rankings are goes into the provenance; the limit that warns was measured on language models.
    scores = score(forget, retain, importance=importance, combine=combine, warn=False)
    keep = top(scores, fraction=fraction)[path]
    made = fold(model, path, Diagonal.mask(keep))
    found = {"fraction": fraction, "importance": importance, "combine": combine, "agreement": scores.agreement}
    return _recorded(made, "zero_units", begin, **found, units=[int(i) for i in (~keep).nonzero()[:, 0]])


def _sides(splits: ImageSplits) -> tuple[Images, Images]:
    return splits.forget, splits.retain


def _recorded(delta: Delta, method: str, begin: float, **options: object) -> Delta:
    seconds = {"offline": 0.0, "online": round(perf_counter() - begin, 4)}
    record: dict[str, Any] = {
        "method": method,
        "options": options,
        "plan": [],
        "schedule": None,
        "seed": None,
        "seconds": seconds,
    }
    return Delta(delta.tensors, dict(delta.provenance) | record)
