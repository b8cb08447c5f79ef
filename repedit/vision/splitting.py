"""From one data set to the sets of an unlearning request: a class, wrong labels, or images at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repedit.errors import DataError, FractionError
from repedit.vision.task import Images, ImageSplits


def class_splits(data: Images, label: int, *, train: int = 1200, remember: int = 100, seed: int = 0) -> ImageSplits:
    """The request to forget one class.

    Of the shuffled data the first `train` images make retain and forget, the next `remember` the remembrance set (all
    classes). Of the rest, images of the class are the holdout and the others the test set.

    Raises:
        DataError: if the data has no such class, or too few images.
    """
    if label not in data.classes:
        raise DataError(f"no image has the label {label}; the data has the labels {sorted(data.classes)}")
    drawn = _drawn(data, train, remember, seed)
    return ImageSplits(
        retain=drawn.train[drawn.train.y != label],
        forget=drawn.train[drawn.train.y == label],
        test=drawn.unseen[drawn.unseen.y != label],
        holdout=drawn.unseen[drawn.unseen.y == label],
        remember=drawn.remember,
        labels=drawn.labels,
    )


def mislabelled_splits(
    data: Images, fraction: float = 0.1, *, train: int = 1200, remember: int = 100, seed: int = 0
) -> ImageSplits:
    """The request to forget images that were given wrong labels, so that only memorising them can explain a low loss.

    A fraction of the training images gets labels drawn from the other classes and is the forget set. The holdout is as
    many unseen images with labels made wrong in the same way; the test set is the rest of the unseen, with its own labels.

    Raises:
        FractionError: if the fraction is not in (0, 1). DataError: if there are too few images or classes.
    """
    splits = random_splits(data, fraction, train=train, remember=remember, seed=seed)
    draw = torch.Generator().manual_seed(seed + 1)
    wrong = {
        n: s.labelled(other_labels(s.y, splits.labels, draw))
        for n, s in splits.named.items()
        if n in ("forget", "holdout")
    }
    return ImageSplits(splits.retain, wrong["forget"], splits.test, wrong["holdout"], splits.remember, splits.labels)


def random_splits(
    data: Images, fraction: float = 0.1, *, train: int = 1200, remember: int = 100, seed: int = 0
) -> ImageSplits:
    """The request to forget a random fraction of the training images; the holdout is as many unseen images.

    Raises:
        FractionError: if the fraction is not in (0, 1). DataError: if there are too few images.
    """
    drawn = _drawn(data, train, remember, seed)
    if not 0 < fraction < 1:
        raise FractionError(f"fraction={fraction}: a part of the training images lies in (0, 1)")
    count = max(1, round(fraction * train))
    if len(drawn.unseen) <= count:
        raise DataError(
            f"{len(drawn.unseen)} unseen images are left for a holdout of {count} and a test set; lower train or fraction"
        )
    return ImageSplits(
        retain=drawn.train[count:],
        forget=drawn.train[:count],
        test=drawn.unseen[count:],
        holdout=drawn.unseen[:count],
        remember=drawn.remember,
        labels=drawn.labels,
    )


def other_labels(y: Tensor, labels: int, draw: torch.Generator) -> Tensor:
    """A label for each that is uniform over the other labels - 1 classes.

    Raises:
        DataError: if there is one class only.
    """
    if labels < 2:
        raise DataError(f"labels={labels}: with one class there is no other label")
    return (y + torch.randint(1, labels, y.shape, generator=draw).to(y)) % labels


@dataclass(frozen=True, eq=False)
class _Drawn:
    train: Images
    remember: Images | None
    unseen: Images
    labels: int


def _drawn(data: Images, train: int, remember: int, seed: int) -> _Drawn:
    if train < 2 or remember < 0 or train + remember >= len(data):
        raise DataError(
            f"{len(data)} images: train={train} and remember={remember} must be at least 2 and 0, and leave some unseen"
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    first, middle, last = (data[rows] for rows in order.split([train, remember, len(data) - train - remember]))
    return _Drawn(first, middle if remember else None, last, int(data.y.max()) + 1)
