"""Unlearning by condensation: the retain set reduced to one image a bucket, and trained on part by part."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from repedit.delta import Delta
from repedit.errors import ArgumentError, DataError, ShapeError, TrainingError, UnknownName, nearest
from repedit.vision.data import Images, ImageSplits, Task
from repedit.vision.grouping import buckets, dense, frozen, labels_of, made_index, matched, medoids
from repedit.vision.recipes import DataPlan, made, training_images
from repedit.vision.training import Schedule, overture, preparation, scheduled, train

# --- Images drawn for buckets by a small network that a frozen classifier teaches


GENERATOR_BATCH = 128


def inverted(
    model: nn.Module, images: Images, ids: Int[Tensor, " b"], *, epochs: int = 200, lr: float = 1e-3, seed: int = 0
) -> Images:
    """One image a bucket, drawn by a network g that learns CE(f(g(e_b)), y) + MSE(g(e_b), x) over the images x of b.

    f is the classifier, frozen and in eval mode; e_b is one-hot; g has layers 128-512-2048-4096-pixels with ReLU, and a
    sigmoid at its end.

    Raises:
        TrainingError: if the loss is not finite; no image is returned.
    Reference: Khan 2024, arXiv:2402.00195, the smaller of its two networks.
    """
    judge, draw = frozen(model), torch.Generator().manual_seed(seed)
    like = next(judge.parameters())
    x, y, ids = images.x.to(like), images.y.to(like.device), ids.to(like.device)
    count = int(ids.max()) + 1
    drawing = _network(count, images.x.shape[1:], seed).to(like)
    optimiser = torch.optim.Adam(drawing.parameters(), lr=lr)
    for epoch in range(epochs):
        for rows in torch.randperm(len(ids), generator=draw).split(GENERATOR_BATCH):
            made = drawing(functional.one_hot(ids[rows], count).to(like))
            loss = functional.cross_entropy(judge(made), y[rows]) + functional.mse_loss(made, x[rows])
            if not bool(torch.isfinite(loss)):
                raise TrainingError(
                    f"epoch {epoch}, seed {seed}: the loss of inversion is {float(loss.detach())} at lr {lr:g}; lower lr"
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        pixels = drawing(torch.eye(count).to(like)).cpu().to(images.x.dtype)
    return Images(pixels, labels_of(images, ids.cpu()), made_index(count))


def _network(count: int, shape: torch.Size, seed: int) -> nn.Module:
    widths = (count, 128, 512, 2048, 4096)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], shape.numel()), nn.Sigmoid(), nn.Unflatten(1, tuple(shape)))


# --- Condensation: the retain set reduced to one image a bucket, without a trace of the forget images in it
#
# What is to be forgotten is taken out before anything is condensed, so no pixel of a forget image reaches the result.
# Buckets and features still come from a model that saw those images: statistical evidence, not certified deletion.


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


# --- Unlearning by condensation: a reduced retain set, and a schedule that trains one part of the model at a time


log = logging.getLogger(__name__)


def condense(
    model: nn.Module,
    task: Task,
    splits: ImageSplits,
    *,
    plan: DataPlan | None = None,
    schedule: Schedule | None = None,
    offline: bool | Schedule = False,
    seed: int = 0,
) -> Delta:
    """Train on a condensed retain set, part by part, with a few remembered images a class for the classifier layer.

    Classes that retain does not have are dropped from the remembered images: with them in, the forgotten class stays
    (forget accuracy 87.7 to 99.1 % on four digits, 0 without).

    Args:
        plan: Condense() when None.
        schedule: overture() when None.
        offline: train the model before the request is known, by preparation() or by this schedule, on all images; its
            seconds are listed apart. The remembered images have all classes then, as nobody knows the request.
    Raises:
        DataError: if there is no remembrance set, or nothing is left of it.
        TrainingError: if a loss is not finite; no result is returned.
    Reference: Khan 2024, arXiv:2402.00195.
    """
    if splits.remember is None:
        raise DataError(
            "condense needs images to remember, and splits.remember is None; draw a few a class that are in no other set"
        )
    plan, schedule = plan or Condense(), schedule or overture()
    begin = perf_counter()
    start = _prepared(model, task, splits, offline, seed)
    offline_seconds = perf_counter() - begin if start is not model else 0.0
    begin = perf_counter()
    planned = plan(model, task, splits, seed)
    remember, dropped = remembered(splits)
    sets = {"reduced": planned.retain, "remember": remember}
    trained = scheduled(start, task, schedule, sets, seed=seed)
    findings = {"dropped_from_remember": dropped, "reduced": len(planned.retain), "retain": len(splits.retain)}
    return made(
        "condense",
        model,
        trained,
        begin,
        seed,
        offline=offline_seconds,
        plan=planned.plans,
        schedule=schedule.plain(),
        findings=findings,
    )


def remembered(splits: ImageSplits) -> tuple[Images, list[int]]:
    """The remembered images of classes that retain has, and the classes that were dropped, which is logged.

    Raises:
        DataError: if there is no remembrance set, or nothing is left of it.
    """
    if splits.remember is None:
        raise DataError("splits.remember is None; draw a few images a class that are in no other set")
    kept = torch.tensor([label in splits.retain.classes for label in splits.remember.y.tolist()], dtype=torch.bool)
    dropped = sorted(splits.remember.classes - splits.retain.classes)
    if dropped:
        log.warning(
            "the classes %s are not in retain; their %d images are dropped from remember", dropped, int((~kept).sum())
        )
    if not bool(kept.any()):
        raise DataError(f"remember has the classes {sorted(splits.remember.classes)}, none of which retain has")
    return splits.remember[kept], dropped


def condensed_model(
    model: nn.Module,
    task: Task,
    splits: ImageSplits,
    intermediate: nn.Module,
    *,
    plan: DataPlan | None = None,
    epochs: int = 20,
    lr: float = 1e-3,
    batch: int = 64,
    seed: int = 0,
) -> nn.Module:
    """A new intermediate part between the beginning and final part of an unlearned model, trained on the reduced set alone.

    The two outer parts stay bit by bit, so their knowledge is used again and this is no training from scratch. Pass an
    unlearned model: an original one carries the forget images in those parts.

    Args:
        intermediate: an untrained module of any kind that fits between the two; it is copied.
    Raises:
        ArgumentError: if the intermediate part of the task is not one module.
        TrainingError: if the loss is not finite.
    Reference: Khan 2024, arXiv:2402.00195, its condensed models.
    """
    places = task.parts["intermediate"]
    if len(places) != 1:
        raise ArgumentError(
            f"the intermediate part is made of {len(places)} modules, {', '.join(places)}; a new one replaces one module"
        )
    reduced = (plan or Condense())(model, task, splits, seed).retain
    grafted = copy.deepcopy(model)
    path, _, leaf = places[0].rpartition(".")
    setattr(grafted.get_submodule(path), leaf, copy.deepcopy(intermediate).to(next(model.parameters())))
    return train(grafted, task, reduced, epochs=epochs, lr=lr, batch=batch, seed=seed, parts=("intermediate",))


def _prepared(model: nn.Module, task: Task, splits: ImageSplits, offline: bool | Schedule, seed: int) -> nn.Module:
    if offline is False:
        return model
    assert splits.remember is not None
    schedule = preparation() if offline is True else offline
    return scheduled(model, task, schedule, {"remember": splits.remember, "all": training_images(splits)}, seed=seed)
