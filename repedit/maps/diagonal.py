"""Maps that scale and shift each neuron by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.errors import ShapeError
from repedit.maps.affine import AffineMap, check_together, working


@dataclass(frozen=True, eq=False)
class Diagonal(AffineMap):
    """x -> scale * x + shift, elementwise; a 0/1 scale is a mask of neurons."""

    scale: Float[Tensor, " d"]
    shift: Float[Tensor, " d"] | None = None

    def __post_init__(self) -> None:
        check_together(scale=self.scale, shift=self.shift)
        if self.scale.ndim != 1 or (self.shift is not None and self.shift.shape != self.scale.shape):
            shift = None if self.shift is None else tuple(self.shift.shape)
            raise ShapeError(f"scale {tuple(self.scale.shape)} and shift {shift} do not fit: give (d,) and (d,)")

    @staticmethod
    def mask(keep: Bool[Tensor, " d"]) -> Diagonal:
        """Zero the neurons where `keep` is False."""
        return Diagonal(keep.float())

    @staticmethod
    def fill(keep: Bool[Tensor, " d"], value: Float[Tensor, " d"]) -> Diagonal:
        """Hold the neurons where `keep` is False at `value` (their mean, say)."""
        return Diagonal(keep.float(), torch.where(keep, torch.zeros_like(value), value).float())

    @property
    def width(self) -> int:
        return self.scale.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale} | ({} if self.shift is None else {"shift": self.shift})

    @property
    def kept(self) -> Bool[Tensor, " d"]:
        """True where the neuron survives."""
        return self.scale != 0

    @property
    def is_mask(self) -> bool:
        """Whether every scale is 0 or 1."""
        return bool(((self.scale == 0) | (self.scale == 1)).all())

    @property
    def rank_removed(self) -> int:
        return int((self.scale == 0).sum())

    @property
    def offset(self) -> Float[Tensor, " d"] | None:
        return self.shift if self.shift is not None and bool(self.shift.any()) else None

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        self._check(x.shape[-1])
        work = working(x)
        scaled = work * self.scale.to(work)
        return (scaled if self.offset is None else scaled + self.offset.to(work)).to(x.dtype)

    def left(self, w: Float[Tensor, "d i"], *, out: Float[Tensor, "d i"] | None = None) -> Float[Tensor, "d i"]:
        self._check(w.shape[0])
        return _scaled(w, self.scale[:, None], out)

    def right(self, w: Float[Tensor, "o d"], *, out: Float[Tensor, "o d"] | None = None) -> Float[Tensor, "o d"]:
        self._check(w.shape[1])
        return _scaled(w, self.scale, out)


def _scaled(w: Tensor, scale: Tensor, out: Tensor | None) -> Tensor:
    work = working(w)
    if out is not None and work is w:
        return torch.mul(w, scale.to(w), out=out)
    new = (work * scale.to(work)).to(w.dtype)
    return new if out is None else out.copy_(new)
