"""Forgetting with drawn images: one generator for the retain set, one for the forget set, labels by the original model."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn

from repedit.delta import Delta
from repedit.errors import ArgumentError, UnknownName, nearest
from repedit.vision.differences import apply
from repedit.vision.gan import Gan, GanConfig, check_count, train_gan
from repedit.vision.reading import device_of
from repedit.vision.recipes import made
from repedit.vision.recipes import relabel as relabelled
from repedit.vision.relabelling import Relabel, training_images
from repedit.vision.task import Images, ImageSplits, Task
from repedit.vision.training import train

log = logging.getLogger(__name__)
SETS = ("retain", "forget")
Gans = Mapping[str, Gan]
"""Trained generators by set."""


@dataclass(frozen=True)
class Synthesize:
    """Drawn images added to a set, labelled by the model.

    Args:
        which: "retain" or "forget".
        count: images to draw; 0 changes nothing.
        gan: how the generator is trained.
        trained: a generator to use in place of training one.
    Raises:
        UnknownName, ArgumentError: for a set that does not exist, or a count below 0.
    """

    which: Literal["retain", "forget"] | str
    count: int
    gan: GanConfig = field(default_factory=GanConfig)
    trained: Gan | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.which not in SETS:
            raise UnknownName(f"which={self.which!r}; {nearest(self.which, SETS)}")
        if self.count < 0:
            raise ArgumentError(f"count={self.count}; give 0 or more images to draw")

    def __call__(self, model: nn.Module, task: Task, splits: ImageSplits, seed: int) -> ImageSplits:
        """The splits with the drawn images after the real ones of the set.

        Raises:
            NotEnoughRows, ArgumentError, TrainingError: as `train_gan`.
        """
        if not self.count:
            return splits
        images = splits.named[self.which]
        gan = self.trained or train_gan(images, self.gan, seed=seed, device=device_of(model))
        pixels = gan.draw(self.count, seed=seed + 1).to(images.x.dtype)
        blank = torch.zeros(self.count, dtype=torch.int64)
        drawn = Images(pixels, blank, -1 - torch.arange(self.count))
        drawn = drawn.labelled(task.logits(model, drawn).argmax(1).cpu())
        return replace(splits, **{self.which: images + drawn}, plans=(*splits.plans, repr(self)))  # type: ignore[arg-type]


def train_gans(
    splits: ImageSplits, gan: GanConfig | None = None, *, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[str, Gan]:
    """A generator for the retain and one for the forget set, as `multi_gan` trains them.

    Raises:
        NotEnoughRows, ArgumentError, TrainingError: as `train_gan`.
    """
    for which in SETS:
        check_count(splits.named[which])
    return {
        which: train_gan(splits.named[which], gan, seed=seed + number, device=device)
        for number, which in enumerate(SETS)
    }


def multi_gan(
    model: nn.Module,
    task: Task,
    splits: ImageSplits,
    *,
    mode: str = "random_other",
    synthetic: float = 1.0,
    gan: GanConfig | None = None,
    gans: Gans | None = None,
    epochs: int = 5,
    lr: float = 1e-3,
    seed: int = 0,
) -> Delta:
    """Relabel real and drawn forget images, add drawn retain images, and go on training on all of them.

    A quarter as many images as retain has, and as many as forget has, are drawn, times `synthetic`. The model labels them;
    then every forget label is replaced as in `Relabel`. The provenance holds the accuracies, and beside them those of the
    same recipe without drawn images, which is `relabel`: only the difference is due to the networks. It also holds how many
    images were drawn by the label that the model gave them: a poor generator draws for retain what the model takes for a
    forgotten class, and those images teach it again; that is logged.

    Args:
        synthetic: 0 draws nothing and gives the same bits as `relabel`.
        gan: GanConfig() when None.
        gans: generators from `train_gans`, which then cost this recipe nothing.
    Raises:
        ArgumentError: if synthetic is negative, or no network is made for images of this size.
        NotEnoughRows: if retain or forget has fewer than 16 images.
        TrainingError: if a loss is not finite; no result is returned.
    Reference: Hatua, Nguyen, Sung 2024, arXiv:2407.18467.
    """
    if not 0 <= synthetic < math.inf:
        raise ArgumentError(f"synthetic={synthetic}; give 0 or more drawn images for each of the usual number")
    if gans is not None and set(gans) != set(SETS):
        raise ArgumentError(f"gans has {', '.join(gans) or 'no keys'}; give a generator for retain and one for forget")
    begin = perf_counter()
    counts = {"retain": round(synthetic * len(splits.retain) / 4), "forget": round(synthetic * len(splits.forget))}
    planned = splits
    if any(counts.values()):
        pair = train_gans(splits, gan, seed=seed, device=device_of(model)) if gans is None else gans
        for which in SETS:
            planned = Synthesize(which, counts[which], gan or GanConfig(), pair[which])(model, task, planned, seed)
    labels = {which: _drawn_labels(planned.named[which]) for which in SETS}
    strange = {label: n for label, n in labels["retain"].items() if int(label) not in splits.retain.classes}
    if strange:
        log.warning("images drawn for retain have labels that retain lacks, by the model: %s (label: images)", strange)
    planned = Relabel(mode)(model, task, planned, seed)
    trained = train(model, task, training_images(planned), epochs=epochs, lr=lr, seed=seed)
    done = perf_counter()
    plain = relabelled(model, task, splits, mode=mode, epochs=epochs, lr=lr, seed=seed)
    findings: dict[str, Any] = {
        "drawn": labels,
        "accuracy": _accuracies(trained, task, splits),
        "ablation": {
            "synthetic": 0,
            "accuracy": _accuracies(apply(plain, model), task, splits),
            "seconds": plain.provenance["seconds"],
        },
    }
    options: dict[str, Any] = {
        "mode": mode,
        "synthetic": synthetic,
        "epochs": epochs,
        "lr": lr,
        "gans": "given" if gans else "trained",
    }
    # The ablation is a measurement and no part of what the recipe costs.
    begin += perf_counter() - done
    return made("multi_gan", model, trained, begin, seed, plan=planned.plans, findings=findings, **options)


def _drawn_labels(images: Images) -> dict[str, int]:
    found = images.y[images.index < 0].tolist()
    return {str(label): found.count(label) for label in sorted(set(found))}


def _accuracies(model: nn.Module, task: Task, splits: ImageSplits) -> dict[str, float]:
    return {name: task.accuracy(model, images) for name, images in splits.named.items() if len(images)}
