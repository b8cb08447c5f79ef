"""What every map can do."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.errors import DtypeError, ShapeError


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

    def as_matrix(self) -> Float[Tensor, "d d"]:
        """M in float64; for tests and small widths."""
        return self.left(torch.eye(self.width, dtype=torch.float64))

    def _check(self, width: int) -> None:
        if width != self.width:
            raise ShapeError(
                f"the map has width {self.width}, the tensor has width {width}; was the edit fitted on another model?"
            )


def working(x: Tensor) -> Tensor:
    """x in the dtype the arithmetic runs in: float64 stays, everything else is float32.

    Raises:
        DtypeError: if x holds integers, booleans or complex numbers.
    """
    if not x.is_floating_point():
        raise DtypeError(f"a map acts on floating-point numbers, the tensor is {x.dtype}; convert it with .float()")
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
