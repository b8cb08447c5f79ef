"""Condensation: the retain set reduced to one image a bucket, without a trace of the forget images in it.

What is to be forgotten is taken out before anything is condensed, so no pixel of a forget image reaches the result.
Buckets and features still come from a model that saw those images: statistical evidence, not certified deletion.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from repedit.errors import ArgumentError, ShapeError, UnknownName, nearest
from repedit.vision.grouping import buckets, dense, matched, medoids
from repedit.vision.inversion import inverted
from repedit.vision.relabelling import training_images
from repedit.vision.task import Images, ImageSplits, Task

CHOICES = {
    "method": ("fdm", "medoid", "inversion"),
    "contaminated": ("residual", "recondense"),
    "weights": ("free", "simplex"),
}


@dataclass(frozen=True)
class Condense:
    """A smaller retain set: one image for each bucket, k buckets a class.

    Args:
        k: k-means centres a class.
        method: "fdm", a weighted sum of the bucket's images whose feature matches the bucket's mean; "medoid", the real
            image nearest to that mean; "inversion", an image that a network learns to draw for the bucket.
        contaminated: what becomes of a bucket with a forget image: "residual", its retain images stay as they are;
            "recondense", one image is made from them.
        weights: "free" or "simplex", for "fdm".
        steps: of Adam, for "fdm".
        epochs: of training the network, for "inversion".
        lr: of Adam.
    Raises:
        UnknownName, ArgumentError: for choices that do not exist, or numbers out of range.
    Reference: Khan 2024, arXiv:2402.00195.
    """

    k: int = 10
    method: str = "fdm"
    contaminated: str = "residual"
    weights: str = "free"
    steps: int = 100
    lr: float = 1e-3
    epochs: int = 200

    def __post_init__(self) -> None:
        for name, valid in CHOICES.items():
            value = getattr(self, name)
            if value not in valid:
                raise UnknownName(f"{name}={value!r}; {nearest(value, valid)}; valid are {', '.join(valid)}")
        if self.k < 1 or self.steps < 1 or self.epochs < 1 or not self.lr > 0:
            raise ArgumentError(
                f"k={self.k}, steps={self.steps}, epochs={self.epochs}, lr={self.lr}: give k, steps and epochs of at least 1, "
                "and a rate above 0"
            )

    def __call__(self, model: nn.Module, task: Task, splits: ImageSplits, seed: int) -> ImageSplits:
        """The splits with the reduced retain set."""
        ids = buckets(model, task, training_images(splits), self.k, seed=seed)
        retain = reduced(model, task, splits, ids, self, seed=seed)
        return replace(splits, retain=retain, plans=(*splits.plans, repr(self)))


def reduced(
    model: nn.Module, task: Task, splits: ImageSplits, ids: Int[Tensor, " b"], plan: Condense, *, seed: int = 0
) -> Images:
    """The reduced retain set for given buckets of retain and forget images, in this order.

    A bucket is safe if no forget image lies in it. Its size over that of retain is, for buckets of m images of which a
    random fraction p is forgotten, 1 - (1 - p)^(m - 1) + (1 - p)^(m - 1) / m on average with "residual".

    Raises:
        ShapeError: if there is not one bucket an image.
    """
    count = len(splits.retain)
    if len(ids) != count + len(splits.forget):
        raise ShapeError(
            f"{len(ids)} buckets for {count} retain and {len(splits.forget)} forget images; give one an image"
        )
    mine = ids[:count]
    if plan.contaminated == "residual":
        safe = ~torch.isin(mine, ids[count:])
        rest = splits.retain[~safe]
    else:
        safe, rest = torch.ones(count, dtype=torch.bool), splits.retain[slice(0, 0)]
    if not bool(safe.any()):
        return rest
    return _condensed(model, task, splits.retain[safe], dense(mine[safe]), plan, seed) + rest


def _condensed(
    model: nn.Module, task: Task, images: Images, ids: Int[Tensor, " b"], plan: Condense, seed: int
) -> Images:
    if plan.method == "medoid":
        return medoids(model, task, images, ids)
    if plan.method == "inversion":
        return inverted(model, images, ids, epochs=plan.epochs, lr=plan.lr, seed=seed)
    return matched(model, task, images, ids, steps=plan.steps, lr=plan.lr, weights=plan.weights)[0]
