"""What every map can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.errors import DeviceError, DtypeError, NotFinite, ShapeError


class AffineMap(ABC):
    """x -> Mx + c on the last axis, of one width."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Size d of the axis the map acts on."""

    @property
    @abstractmethod
    def rank_removed(self) -> int:
        """d - rank(M): the number of directions no input can reach afterwards."""

    @abstractmethod
    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Mx + c, in the dtype of x; half types are computed in float32 and rounded once.

        Where a GPU kernel runs, its products take half operands and are summed in float32 (repedit.kernels).
        """

    @abstractmethod
    def left(self, w: Float[Tensor, "d i"], *, out: Float[Tensor, "d i"] | None = None) -> Float[Tensor, "d i"]:
        """M W: the weight whose outputs are mapped; `out=w` rewrites in place."""

    @abstractmethod
    def right(self, w: Float[Tensor, "o d"], *, out: Float[Tensor, "o d"] | None = None) -> Float[Tensor, "o d"]:
        """W M: the weight whose inputs are mapped; `out=w` rewrites in place."""

    @property
    @abstractmethod
    def offset(self) -> Float[Tensor, " d"] | None:
        """The vector c, or None where it is zero; in float64 where it has to be computed."""

    def __matmul__(self, first: AffineMap) -> AffineMap:
        """The map that applies `first`, then this one; stays factored."""
        if self.width != first.width:
            raise ShapeError(
                f"cannot compose maps of widths {self.width} and {first.width}; are they for the same site?"
            )
        from repedit.maps.composition import composed

        return composed(self, first)

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the map is made of, by name."""

    def check_finite(self) -> None:
        """Refuse a map with a number that is not finite.

        Raises:
            NotFinite: naming the tensor and the place.
        """
        for name, value in self.tensors.items():
            place = not_finite_at(value)
            if place is not None:
                raise NotFinite(
                    f"{name} of the {type(self).__name__} is not finite at {place}; was the statistic or the fit behind it finite?"
                )

    def as_matrix(self) -> Float[Tensor, "d d"]:
        """M in float64; for tests and small widths."""
        return self.left(torch.eye(self.width, dtype=torch.float64))

    def _check(self, width: int) -> None:
        if width != self.width:
            raise ShapeError(
                f"the map has width {self.width}, the tensor has width {width}; was the edit fitted on another model?"
            )


def not_finite_at(x: Tensor) -> str | None:
    """The first place where a tensor is NaN or infinite, with the value; None where it is finite or has no values."""
    if x.device.type == "meta" or not (x.is_floating_point() or x.is_complex()):
        return None
    wide = x.detach().float() if x.dtype.itemsize == 1 else x.detach()
    if bool(torch.isfinite(wide).all()):
        return None
    place = tuple((~torch.isfinite(wide)).nonzero()[0].tolist())
    return f"{place} ({wide[place].item()}, {x.dtype})"


_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_together(**tensors: Tensor | None) -> None:
    """Refuse tensors that cannot make up one map.

    Raises:
        DtypeError: if one is no dense tensor with values, or not of a floating dtype that torch computes in.
        DeviceError: if they are on several devices.
        ShapeError: if the width is zero.
    """
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    places = {name: tensor.device for name, tensor in present.items() if isinstance(tensor, Tensor)}
    if len(set(places.values())) > 1:
        said = ", ".join(f"{name} on {device}" for name, device in places.items())
        raise DeviceError(f"the tensors of a map must be on one device, found {said}")
    for name, tensor in present.items():
        check_dense(name, tensor)
        if tensor.dtype not in _FLOATING:
            raise DtypeError(f"{name} has dtype {tensor.dtype}; give float32, float64, bfloat16 or float16")
    if any(tensor.ndim and not len(tensor) for tensor in present.values()):
        raise ShapeError("a map of width 0 maps nothing; is the tensor it was made from empty?")


def check_dense(name: str, value: Any) -> None:
    """Refuse what is no dense tensor with values.

    Raises:
        DtypeError: saying what it is.
    """
    if not isinstance(value, Tensor):
        raise DtypeError(f"{name} is a {type(value).__name__}; give a tensor")
    if value.layout != torch.strided or value.is_meta:
        what = "has no values (it is on the meta device)" if value.is_meta else f"is sparse ({value.layout})"
        raise DtypeError(f"{name} {what}; give a dense tensor with values")


def working(x: Tensor) -> Tensor:
    """x in the dtype the arithmetic runs in: float64 stays, everything else is float32.

    Raises:
        DtypeError: if x holds integers, booleans or complex numbers.
    """
    if not x.is_floating_point():
        raise DtypeError(f"a map acts on floating-point numbers, the tensor is {x.dtype}; convert it with .float()")
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
