"""Data plans, and the plan that gives the forget images other labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from repedit.errors import ArgumentError, UnknownName, nearest
from repedit.vision.splitting import other_labels
from repedit.vision.task import Images, ImageSplits, Task

DataPlan = Callable[[nn.Module, Task, ImageSplits, int], ImageSplits]
"""What a request does to the data before an ordinary fine-tune: (model, task, splits, seed) -> new splits; pure."""


@dataclass(frozen=True)
class Relabel:
    """Another label for every forget image.

    Args:
        mode: "random_other", uniform over the C - 1 other classes; "runner_up" and "least_likely", the most and the least
            likely other class by the model; "mirror", C - 1 - y, for even C.
    """

    mode: str = "random_other"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UnknownName(f"mode={self.mode!r}; {nearest(self.mode, MODES)}")

    def __call__(self, model: nn.Module, task: Task, splits: ImageSplits, seed: int) -> ImageSplits:
        """The splits with new labels on forget.

        Raises:
            ArgumentError: if the model has one class, a label is none of its classes, or C is odd for "mirror".
        """
        logits = task.logits(model, splits.forget).cpu()
        classes, top = logits.shape[1], int(splits.forget.y.max())
        if classes < 2 or top >= classes:
            raise ArgumentError(
                f"the model has C = {classes} classes and forget the label {top}; relabelling needs two classes and labels below C"
            )
        y = MODES[self.mode](splits.forget.y, logits, torch.Generator().manual_seed(seed))
        return replace(splits, forget=splits.forget.labelled(y), plans=(*splits.plans, repr(self)))


def _random_other(y: Tensor, logits: Tensor, draw: torch.Generator) -> Tensor:
    return other_labels(y, logits.shape[1], draw)


def _runner_up(y: Tensor, logits: Tensor, _draw: torch.Generator) -> Tensor:
    return logits.masked_fill(_own(y, logits), -torch.inf).argmax(1)


def _least_likely(y: Tensor, logits: Tensor, _draw: torch.Generator) -> Tensor:
    return logits.masked_fill(_own(y, logits), torch.inf).argmin(1)


def _mirror(y: Tensor, logits: Tensor, _draw: torch.Generator) -> Tensor:
    classes = logits.shape[1]
    if classes % 2:
        raise ArgumentError(
            f"mode='mirror' with C = {classes} classes: the middle class maps to itself; use random_other"
        )
    return classes - 1 - y


def _own(y: Tensor, logits: Tensor) -> Tensor:
    return functional.one_hot(y, logits.shape[1]).bool()


MODES: Mapping[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "random_other": _random_other,
    "runner_up": _runner_up,
    "least_likely": _least_likely,
    "mirror": _mirror,
}


def training_images(splits: ImageSplits) -> Images:
    """Retain and forget, in this order."""
    return splits.retain + splits.forget
