"""Attack on a classifier by shadow models: what would this image's margin be, had the model seen it, and had it not?

It trains several models, so it is made by itself and is no part of `audit_classifier`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from repedit.attacks.attack import RAN, Finding
from repedit.attacks.families.image_members import named, outputs
from repedit.errors import ArgumentError
from repedit.metrics import margins
from repedit.metrics.separation import Values, auc, tpr_at
from repedit.metrics.shadows import lira, offline_lira
from repedit.vision.task import Images, ImageSplits, Task
from repedit.vision.training import generator, train

NAME = "shadow"


def shadows(
    model: nn.Module,
    task: Task,
    splits: ImageSplits,
    build: Callable[[], nn.Module],
    *,
    models: int = 8,
    epochs: int = 20,
    lr: float = 1e-3,
    fprs: Sequence[float] = (0.01, 0.05),
    seed: int = 0,
) -> Finding:
    """LiRA with models trained on random halves of retain, forget and holdout; each image is in half of them.

    The score is the margin log(p / (1 - p)) of the label; see `lira`. With two or three models a side has too few of
    them: they are trained on halves of retain alone, and the score is `offline_lira`. details: "auc", "tpr" by rate of
    false alarms, "kind", "models".

    Args:
        build: makes an untrained model.
        fprs: rates of false alarms; n holdout images resolve 1 / n.
    Raises:
        ArgumentError: if there are fewer than two models, or an odd number of four or more.
        MetricError: if the holdout is too small for a rate. TrainingError: if a loss is not finite.
    """
    begin = time.perf_counter()
    if models < 2 or (models > 3 and models % 2):
        raise ArgumentError(f"models={models}; give an even number of at least 4, or 2 or 3 for the offline form")
    asked = splits.forget + splits.holdout
    offline = models < 4
    pool = splits.retain if offline else splits.retain + asked
    halves = _halves(len(pool), models, seed)
    trained = [train(build(), task, pool[half], epochs=epochs, lr=lr, seed=seed + i) for i, half in enumerate(halves)]
    shadow = np.stack([margin(one, task, asked, splits.labels) for one in trained])
    target = margin(model, task, asked, splits.labels)
    seen = np.stack([np.isin(np.arange(len(pool)), half.numpy()) for half in halves])[:, len(splits.retain) :]
    values = offline_lira(target, shadow) if offline else lira(target, shadow, seen)
    members, others = values[: len(splits.forget)], values[len(splits.forget) :]
    right = outputs(model, task, asked, splits.labels).argmax(1) == asked.y.cpu()
    kind = "offline" if offline else "online"
    return Finding(
        attack=NAME, seed=seed, status=RAN, reason="", items=(*named("forget", splits.forget), *named("holdout", splits.holdout)),
        settings=("lira",), correct=right.numpy().astype(np.int8)[None], graded=values[None], seconds=time.perf_counter() - begin,
        details={
            "auc": auc(members, others), "tpr": {f"{fpr:g}": tpr_at(members, others, fpr) for fpr in fprs}, "kind": kind,
            "models": models, "members": len(members), "others": len(others),
        },
    )  # fmt: skip


def klom(edited: Sequence[nn.Module], references: Sequence[nn.Module], task: Task, images: Images) -> Values:
    """KL divergence of the margins of edited models from those of retrained ones, by image, nats; see `margins.klom`.

    Edited models should differ in their seeds, and in what they began from, as the retrained ones do.

    Raises:
        NotEnoughRows: if there are fewer than five models of either kind.
    """
    sides = [
        np.stack([margin(model, task, images, int(images.y.max()) + 1) for model in models])
        if models
        else np.zeros((0, len(images)))
        for models in (edited, references)
    ]
    return margins.klom(*sides)


def margin(model: nn.Module, task: Task, images: Images, labels: int) -> Values:
    """The margin of every image's label, (n,)."""
    return margins.margin(outputs(model, task, images, labels), images.y.cpu()).numpy()


def _halves(count: int, models: int, seed: int) -> list[torch.Tensor]:
    """Rows of each model: random halves, each followed by its other half."""
    draw = generator(seed)
    found: list[torch.Tensor] = []
    while len(found) < models:
        order = torch.randperm(count, generator=draw)
        found += [order[: count // 2], order[count // 2 :]]
    return found[:models]
