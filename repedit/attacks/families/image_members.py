"""Attack on a classifier by membership: are the forget images told from holdout images, which no model saw?"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor, nn

from repedit.attacks.attack import RAN, Finding
from repedit.errors import ArgumentError
from repedit.metrics.margins import confidence, entropy, modified_entropy
from repedit.metrics.separation import Values, auc, loss_attack, standard_error
from repedit.vision.task import Images, ImageSplits, Task

NAME = "membership"
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
    begin = time.perf_counter()
    sides = [outputs(model, task, images, splits.labels) for images in (splits.forget, splits.holdout)]
    labels = [images.y.cpu() for images in (splits.forget, splits.holdout)]
    found = [np.stack([_scores(*side)[name] for name in SCORES]) for side in zip(sides, labels, strict=True)]
    right = np.concatenate([(z.argmax(1) == y).numpy() for z, y in zip(sides, labels, strict=True)])
    values = {name: auc(*row) for name, *row in zip(SCORES, *found, strict=True)}
    counts = len(splits.forget), len(splits.holdout)
    details = {
        "auc": values,
        "error": standard_error(values["loss"], *counts),
        "members": counts[0],
        "others": counts[1],
    }
    if min(counts) >= 10:
        details["loss_lr"] = loss_attack(found[0][0], found[1][0], seed=seed)
    return Finding(
        attack=NAME, seed=seed, status=RAN, reason="", items=(*named("forget", splits.forget), *named("holdout", splits.holdout)),
        settings=SCORES, correct=np.tile(right.astype(np.int8), (len(SCORES), 1)), graded=np.concatenate(found, 1),
        seconds=time.perf_counter() - begin, details=details,
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
    found = task.logits(model, images).double().cpu()
    if found.shape[1] < labels:
        raise ArgumentError(
            f"the model has {found.shape[1]} outputs, the splits have labels={labels}; give one output a label"
        )
    return found


def log_probabilities(logits: Tensor, y: Tensor) -> Tensor:
    """That of every image's label, (n,), in nats: minus the loss."""
    return -torch.nn.functional.cross_entropy(logits, y, reduction="none")


def _scores(logits: Tensor, y: Tensor) -> dict[str, Values]:
    found = {
        "confidence": confidence(logits), "entropy": -entropy(logits), "m_entropy": -modified_entropy(logits, y),
        "loss": log_probabilities(logits, y),
    }  # fmt: skip
    return {name: value.numpy() for name, value in found.items()}
