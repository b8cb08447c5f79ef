"""Attacks on image classifiers: membership, relearning, rounding and shadow models."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from repedit.auditing.attack import RAN, Finding
from repedit.errors import ArgumentError, NotEnoughRows
from repedit.metrics import membership as membership_metrics
from repedit.metrics.membership import (
    Values,
    auc,
    confidence,
    entropy,
    lira,
    loss_attack,
    modified_entropy,
    offline_lira,
    standard_error,
    tpr_at,
)
from repedit.quantization import fake_quantize
from repedit.vision.data import Images, ImageSplits, Task, random_generator
from repedit.vision.training import adam, descend, learning, train

# --- Attack on a classifier by membership: are the forget images told from holdout images, which no model saw?


MEMBERSHIP = "membership"
SCORES = ("loss", "confidence", "entropy", "m_entropy")
"""-loss, the largest probability, -entropy and -modified entropy: all higher for members."""


def membership(model: nn.Module, task: Task, splits: ImageSplits, *, seed: int = 0) -> Finding:
    """Scores of every forget image and every holdout image in eval mode, one setting a score.

    details: "auc" by score; "error", Hanley and McNeil's of the loss; "loss_lr", the accuracy of `loss_attack`, where
    there are ten images on each side; the numbers of members and others.

    Raises:
        MetricError: if an output of the model is not finite.
        ArgumentError: if the model has fewer outputs than the splits have labels.
    """
    start = time.perf_counter()
    sides = [outputs(model, task, images, splits.labels) for images in (splits.forget, splits.holdout)]
    labels = [images.y.cpu() for images in (splits.forget, splits.holdout)]
    scores = [np.stack([_scores(*side)[name] for name in SCORES]) for side in zip(sides, labels, strict=True)]
    correct = np.concatenate([(z.argmax(1) == y).numpy() for z, y in zip(sides, labels, strict=True)])
    values = {name: auc(*row) for name, *row in zip(SCORES, *scores, strict=True)}
    counts = len(splits.forget), len(splits.holdout)
    details = {
        "auc": values, "error": standard_error(values["loss"], *counts), "members": counts[0], "others": counts[1],
    }  # fmt: skip
    if min(counts) >= 10:
        details["loss_lr"] = loss_attack(scores[0][0], scores[1][0], seed=seed)
    return Finding(
        attack=MEMBERSHIP, seed=seed, status=RAN, reason="", items=(*named("forget", splits.forget), *named("holdout", splits.holdout)),
        settings=SCORES, correct=np.tile(correct.astype(np.int8), (len(SCORES), 1)), graded=np.concatenate(scores, 1),
        seconds=time.perf_counter() - start, details=details,
    )  # fmt: skip


def sides(finding: Finding, score: str = "loss") -> tuple[Values, Values]:
    """One score of the forget images, and of the holdout."""
    row = finding.graded[finding.settings.index(score)]
    members = np.array([item.startswith("forget") for item in finding.items])
    return row[members], row[~members]


def named(role: str, images: Images) -> tuple[str, ...]:
    """Ids of images: their set and their index in the source."""
    return tuple(f"{role} {index}" for index in images.index.tolist())


def outputs(model: nn.Module, task: Task, images: Images, labels: int) -> Tensor:
    """Logits in float64 on the CPU.

    Raises:
        ArgumentError: if there are fewer of them than labels.
    """
    logits = task.logits(model, images).double().cpu()
    if logits.shape[1] < labels:
        raise ArgumentError(
            f"the model has {logits.shape[1]} outputs, the splits have labels={labels}; give one output a label"
        )
    return logits


def log_probabilities(logits: Tensor, y: Tensor) -> Tensor:
    """That of every image's label, (n,), in nats: minus the loss."""
    return -torch.nn.functional.cross_entropy(logits, y, reduction="none")


def _scores(logits: Tensor, y: Tensor) -> dict[str, Values]:
    scores = {
        "confidence": confidence(logits), "entropy": -entropy(logits), "m_entropy": -modified_entropy(logits, y),
        "loss": log_probabilities(logits, y),
    }  # fmt: skip
    return {name: value.numpy() for name, value in scores.items()}


# --- Attack on a classifier by relearning: is half of the forget set enough to bring the other half back?


RELEARN = "relearn"
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
    batch_size: int = 64,
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
    start = time.perf_counter()
    if epochs < 1:
        raise ArgumentError(f"epochs={epochs}; give at least 1")
    train, test = halves(splits.forget, seed)
    rows = torch.randperm(len(splits.retain), generator=random_generator(seed + 1))[: 2 * len(train)]
    mixed = train + splits.retain[rows]
    student = copy.deepcopy(model)
    optimizer, order = adam(student, task, None, lr), random_generator(seed)
    logits = [outputs(student, task, test, splits.labels)]
    with learning(student, task, None, seed):
        for _ in range(epochs):
            descend(student, optimizer, mixed, epochs=1, batch_size=batch_size, order=order)
            logits.append(outputs(student, task, test, splits.labels))
    y = test.y.cpu()
    log_probability = [log_probabilities(z, y).numpy() for z in logits]
    return Finding(
        attack=RELEARN, seed=seed, status=RAN, reason="", items=named("forget", test),
        settings=tuple(f"epoch={epoch}" for epoch in range(epochs + 1)),
        correct=np.stack([(z.argmax(1) == y).numpy().astype(np.int8) for z in logits]), graded=np.stack(log_probability),
        train_accuracy=task.accuracy(student, train), seconds=time.perf_counter() - start,
        details={"T": len(train), "V": len(test), "retain": len(rows), "lr": lr, "batch": batch_size},
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
    order, count = torch.randperm(len(forget), generator=random_generator(seed)), min(len(forget) // 2, MOST)
    return forget[order[:count]], forget[order[count:]]


# --- Attack on a classifier by rounding: an edit smaller than a step of the stored weights is swallowed


SCHEMES = ("int8", "int4")


def rounding(model: nn.Module, task: Task, splits: ImageSplits, scheme: str, *, seed: int = 0) -> Finding:
    """Store every weight in few bits, one step an output channel, and ask the forget images again.

    round(w / D) D with D = max|w| / 127 of a row (int8) or max|w| / 7 (int4). Weights are the parameters of two or more
    axes, rows their first; biases and norms stay. details: "test" and "retain" accuracy, "auc" of the loss.

    Raises:
        UnknownName: if there is no such scheme.
    """
    start = time.perf_counter()
    rounded_model = coarse(model, scheme)
    logits, y = outputs(rounded_model, task, splits.forget, splits.labels), splits.forget.y.cpu()
    log_probability = log_probabilities(logits, y).numpy()
    others = -task.losses(rounded_model, splits.holdout).cpu().numpy()
    return Finding(
        attack=scheme, seed=seed, status=RAN, reason="", items=named("forget", splits.forget), settings=(scheme,),
        correct=(logits.argmax(1) == y).numpy().astype(np.int8)[None], graded=log_probability[None], seconds=time.perf_counter() - start,
        details={"test": task.accuracy(rounded_model, splits.test), "retain": task.accuracy(rounded_model, splits.retain), "auc": auc(log_probability, others)},
    )  # fmt: skip


@torch.no_grad()
def coarse(model: nn.Module, scheme: str) -> nn.Module:
    """A copy of a model with every weight rounded, one step an output channel.

    Raises:
        UnknownName: if there is no such scheme.
    """
    copied = copy.deepcopy(model)
    for weight in copied.parameters():
        if weight.ndim > 1:
            rows = weight.flatten(1)
            weight.copy_(fake_quantize(rows, scheme, rows.shape[1]).reshape(weight.shape))
    return copied


# --- Attack on a classifier by shadow models: what would this image's margin be, had the model seen it, and had it not?
#
# It trains several models, so it is made by itself and is no part of `audit_classifier`.


SHADOWS = "shadow"


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
    start = time.perf_counter()
    if models < 2 or (models > 3 and models % 2):
        raise ArgumentError(f"models={models}; give an even number of at least 4, or 2 or 3 for the offline form")
    asked = splits.forget + splits.holdout
    offline = models < 4
    pool = splits.retain if offline else splits.retain + asked
    halves = _halves(len(pool), models, seed)
    trained = [train(build(), task, pool[half], epochs=epochs, lr=lr, seed=seed + i) for i, half in enumerate(halves)]
    shadow = np.stack([margin(one, task, asked, splits.labels) for one in trained])
    target = margin(model, task, asked, splits.labels)
    trained_on = np.stack([np.isin(np.arange(len(pool)), half.numpy()) for half in halves])[:, len(splits.retain) :]
    values = offline_lira(target, shadow) if offline else lira(target, shadow, trained_on)
    members, others = values[: len(splits.forget)], values[len(splits.forget) :]
    correct = outputs(model, task, asked, splits.labels).argmax(1) == asked.y.cpu()
    kind = "offline" if offline else "online"
    return Finding(
        attack=SHADOWS, seed=seed, status=RAN, reason="", items=(*named("forget", splits.forget), *named("holdout", splits.holdout)),
        settings=("lira",), correct=correct.numpy().astype(np.int8)[None], graded=values[None], seconds=time.perf_counter() - start,
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
    return membership_metrics.klom(*sides)


def margin(model: nn.Module, task: Task, images: Images, labels: int) -> Values:
    """The margin of every image's label, (n,)."""
    return membership_metrics.margin(outputs(model, task, images, labels), images.y.cpu()).numpy()


def _halves(count: int, models: int, seed: int) -> list[torch.Tensor]:
    """Rows of each model: random halves, each followed by its other half."""
    draws = random_generator(seed)
    rows: list[torch.Tensor] = []
    while len(rows) < models:
        order = torch.randperm(count, generator=draws)
        rows += [order[: count // 2], order[count // 2 :]]
    return rows[:models]
