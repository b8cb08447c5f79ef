"""Labelled images, the sets of an unlearning request, and how a classifier is read.

Pixels are floats in [0, 1] laid out (b, c, H, W), labels are int64. Every image carries its index in the data set it came
from, so that two sets can be shown to be disjoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from repedit.errors import ArgumentError, DataError, DtypeError, OverlapError, ShapeError, UnknownName, nearest
from repedit.hooks import evaluating
from repedit.vision.reading import input_of

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
