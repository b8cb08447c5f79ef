"""Attack on a classifier by rounding: an edit smaller than a step of the stored weights is swallowed."""

from __future__ import annotations

import copy
import time

import numpy as np
import torch
from torch import nn

from repedit.attacks.attack import RAN, Finding
from repedit.attacks.families.image_members import log_probabilities, named, outputs
from repedit.attacks.families.rounding import rounded
from repedit.metrics.separation import auc
from repedit.vision.task import ImageSplits, Task

SCHEMES = ("int8", "int4")


def rounding(model: nn.Module, task: Task, splits: ImageSplits, scheme: str, *, seed: int = 0) -> Finding:
    """Store every weight in few bits, one step an output channel, and ask the forget images again.

    round(w / D) D with D = max|w| / 127 of a row (int8) or max|w| / 7 (int4). Weights are the parameters of two or more
    axes, rows their first; biases and norms stay. details: "test" and "retain" accuracy, "auc" of the loss.

    Raises:
        UnknownName: if there is no such scheme.
    """
    begin = time.perf_counter()
    copied = coarse(model, scheme)
    logits, y = outputs(copied, task, splits.forget, splits.labels), splits.forget.y.cpu()
    own = log_probabilities(logits, y).numpy()
    others = -task.losses(copied, splits.holdout).cpu().numpy()
    return Finding(
        attack=scheme, seed=seed, status=RAN, reason="", items=named("forget", splits.forget), settings=(scheme,),
        correct=(logits.argmax(1) == y).numpy().astype(np.int8)[None], graded=own[None], seconds=time.perf_counter() - begin,
        details={"test": task.accuracy(copied, splits.test), "retain": task.accuracy(copied, splits.retain), "auc": auc(own, others)},
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
            weight.copy_(rounded(rows, scheme, rows.shape[1]).reshape(weight.shape))
    return copied
