"""Attack on a classifier by relearning: is half of the forget set enough to bring the other half back?"""

from __future__ import annotations

import copy
import time

import numpy as np
import torch
from torch import nn

from repedit.attacks.attack import RAN, Finding
from repedit.attacks.families.image_members import log_probabilities, named, outputs
from repedit.errors import ArgumentError, NotEnoughRows
from repedit.metrics.separation import Values
from repedit.vision.task import Images, ImageSplits, Task
from repedit.vision.training import adam, descend, generator, learning

NAME = "relearn"
MOST = 64
"""Images of T. With 175 of them (MNIST, a class of 3500 images) a retrained model learns the class as fast as the original
remembers it, .93 against 1.00, and nothing could be found; with 60 (digits) it is .5 against 1.00."""


def relearn(
    model: nn.Module,
    task: Task,
    splits: ImageSplits,
    *,
    epochs: int = 10,
    lr: float = 1e-3,
    batch: int = 64,
    seed: int = 0,
) -> Finding:
    """Fine-tune on T and ask V after every epoch; T is half of the forget set, at most 64 images, and V the rest.

    T comes with twice as many retain images, which keeps the model from collapsing onto the forget labels. Setting
    "epoch=0" is the model as it is. The same seed draws the same halves and the same order for every model; the model
    given is untouched.

    Raises:
        NotEnoughRows: if there are fewer than four forget images. ArgumentError: if epochs < 1 or lr <= 0.
        TrainingError: if the loss is not finite.
    """
    begin = time.perf_counter()
    if epochs < 1:
        raise ArgumentError(f"epochs={epochs}; give at least 1")
    train, test = halves(splits.forget, seed)
    rows = torch.randperm(len(splits.retain), generator=generator(seed + 1))[: 2 * len(train)]
    mixed = train + splits.retain[rows]
    student = copy.deepcopy(model)
    optimiser, order = adam(student, task, None, lr), generator(seed)
    found = [outputs(student, task, test, splits.labels)]
    with learning(student, task, None, seed):
        for _ in range(epochs):
            descend(student, optimiser, mixed, epochs=1, batch=batch, order=order)
            found.append(outputs(student, task, test, splits.labels))
    y = test.y.cpu()
    own = [log_probabilities(z, y).numpy() for z in found]
    return Finding(
        attack=NAME, seed=seed, status=RAN, reason="", items=named("forget", test),
        settings=tuple(f"epoch={epoch}" for epoch in range(epochs + 1)),
        correct=np.stack([(z.argmax(1) == y).numpy().astype(np.int8) for z in found]), graded=np.stack(own),
        train_accuracy=task.accuracy(student, train), seconds=time.perf_counter() - begin,
        details={"T": len(train), "V": len(test), "retain": len(rows), "lr": lr, "batch": batch},
    )  # fmt: skip


def relearned(finding: Finding) -> Values:
    """Accuracy on V after each epoch; the one before the first is left out."""
    return finding.correct[1:].mean(1)


def halves(forget: Images, seed: int) -> tuple[Images, Images]:
    """T and V: the forget images halved by a seeded draw, with at most `MOST` in T.

    Raises:
        NotEnoughRows: if there are fewer than four.
    """
    if len(forget) < 4:
        raise NotEnoughRows(
            f"{len(forget)} forget images; relearning needs two to train on and two to ask, or relearn=False"
        )
    order, count = torch.randperm(len(forget), generator=generator(seed)), min(len(forget) // 2, MOST)
    return forget[order[:count]], forget[order[count:]]
