"""Affine maps x -> Mx + c on the last axis: the value every edit is made of.

`LowRank` (projections, steering), `Diagonal` (pruning) and `Chain` (the rest) stay factored: none of them forms a
d x d matrix unless `as_matrix` is called. `a @ b` applies b first, as matrices do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.errors import RankError, ShapeError


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
        """Mx + c, in the dtype of x; half types are computed in float32 and rounded once."""

    @abstractmethod
    def left(self, w: Float[Tensor, "d i"]) -> Float[Tensor, "d i"]:
        """M W: the weight whose outputs are mapped."""

    @abstractmethod
    def right(self, w: Float[Tensor, "o d"]) -> Float[Tensor, "o d"]:
        """W M: the weight whose inputs are mapped."""

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
        return _composed(self, first)

    def as_matrix(self) -> Float[Tensor, "d d"]:
        """M in float64; for tests and small widths."""
        return self.left(torch.eye(self.width, dtype=torch.float64))

    def _check(self, width: int) -> None:
        if width != self.width:
            raise ShapeError(
                f"the map has width {self.width}, the tensor has width {width}; was the edit fitted on another model?"
            )


@dataclass(frozen=True, eq=False)
class LowRank(AffineMap):
    """x -> x - U V^T (x - center); U, V are (d, k), an empty basis is (d, 0)."""

    u: Float[Tensor, "d k"]
    v: Float[Tensor, "d k"]
    center: Float[Tensor, " d"] | None = None

    def __post_init__(self) -> None:
        if self.u.shape != self.v.shape or (self.center is not None and self.center.shape[0] != self.u.shape[0]):
            center = None if self.center is None else tuple(self.center.shape)
            raise ShapeError(
                f"u {tuple(self.u.shape)}, v {tuple(self.v.shape)}, center {center} do not fit: give (d, k), (d, k), (d,)"
            )

    @staticmethod
    def projection(basis: Float[Tensor, "d k"], center: Float[Tensor, " d"] | None = None) -> LowRank:
        """The orthogonal projection that removes span(basis): x - Q Q^T (x - center), Q an orthonormal basis in float64.

        Raises:
            RankError: if the columns are linearly dependent or more than the width.
        """
        q, r = torch.linalg.qr(basis.double())
        # What is left of a column after the ones before it; a dependent column leaves its own rounding.
        left = r.diagonal().abs() / r.norm(dim=0)[: len(r)]
        if basis.shape[1] > basis.shape[0] or not bool((left > max(1e-10, 8 * torch.finfo(basis.dtype).eps)).all()):
            raise RankError(
                f"a basis of shape {tuple(basis.shape)} is not of full column rank; remove dependent columns"
            )
        q = q.to(torch.promote_types(basis.dtype, torch.float32)).contiguous()
        return LowRank(q, q, center)

    @staticmethod
    def oblique(u: Float[Tensor, "d k"], v: Float[Tensor, "d k"], center: Float[Tensor, " d"] | None = None) -> LowRank:
        """The oblique projection along span(u) onto the complement of span(v): x - U (V^T U)^-1 V^T (x - center).

        Raises:
            RankError: if V^T U is singular.
        """
        inner = v.double().T @ u.double()
        if u.shape[1] and not torch.linalg.cond(inner) <= 1e12:
            raise RankError("V^T U is singular: u and v of an oblique projection must not be orthogonal to each other")
        return LowRank((u.double() @ torch.linalg.inv(inner)).to(u.dtype), v, center)

    @property
    def width(self) -> int:
        return self.u.shape[0]

    @property
    def rank_removed(self) -> int:
        inner = torch.eye(self.u.shape[1], dtype=torch.float64) - self.v.double().T.cpu() @ self.u.double().cpu()
        # d - rank(I - U V^T) = k - rank(I - V^T U); 1e-4: a float32 basis is orthonormal to about 1e-7.
        return self.u.shape[1] - int(torch.linalg.matrix_rank(inner, atol=1e-4)) if inner.numel() else 0

    @property
    def offset(self) -> Float[Tensor, " d"] | None:
        if self.center is None or not self.u.shape[1]:
            return None
        return self.u.double() @ (self.v.double().T @ self.center.double())

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        self._check(x.shape[-1])
        work = _work(x)
        u, v = self.u.to(work), self.v.to(work)
        centered = work if self.center is None else work - self.center.to(work)
        return (work - (centered @ v) @ u.T).to(x.dtype)

    def left(self, w: Float[Tensor, "d i"]) -> Float[Tensor, "d i"]:
        self._check(w.shape[0])
        work = _work(w)
        return (work - self.u.to(work) @ (self.v.to(work).T @ work)).to(w.dtype)

    def right(self, w: Float[Tensor, "o d"]) -> Float[Tensor, "o d"]:
        self._check(w.shape[1])
        work = _work(w)
        return (work - (work @ self.u.to(work)) @ self.v.to(work).T).to(w.dtype)


@dataclass(frozen=True, eq=False)
class Diagonal(AffineMap):
    """x -> scale * x + shift, elementwise; a 0/1 scale is a mask of neurons."""

    scale: Float[Tensor, " d"]
    shift: Float[Tensor, " d"] | None = None

    def __post_init__(self) -> None:
        if self.shift is not None and self.shift.shape != self.scale.shape:
            raise ShapeError(f"scale has width {self.width}, shift has width {self.shift.shape[0]}; they must agree")

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
        work = _work(x)
        scaled = work * self.scale.to(work)
        return (scaled if self.offset is None else scaled + self.offset.to(work)).to(x.dtype)

    def left(self, w: Float[Tensor, "d i"]) -> Float[Tensor, "d i"]:
        self._check(w.shape[0])
        work = _work(w)
        return (work * self.scale.to(work)[:, None]).to(w.dtype)

    def right(self, w: Float[Tensor, "o d"]) -> Float[Tensor, "o d"]:
        self._check(w.shape[1])
        work = _work(w)
        return (work * self.scale.to(work)).to(w.dtype)


@dataclass(frozen=True, eq=False)
class Chain(AffineMap):
    """Several maps, the first one applied first; for compositions with no simpler form."""

    maps: tuple[LowRank | Diagonal, ...]

    def __post_init__(self) -> None:
        if not self.maps or len({m.width for m in self.maps}) != 1:
            raise ShapeError(
                f"a chain needs at least one map and one width; found widths {[m.width for m in self.maps]}"
            )

    @property
    def width(self) -> int:
        return self.maps[0].width

    @property
    def rank_removed(self) -> int:
        return self.width - int(torch.linalg.matrix_rank(self.as_matrix(), rtol=1e-6))

    @property
    def offset(self) -> Float[Tensor, " d"] | None:
        if all(m.offset is None for m in self.maps):
            return None
        return self(torch.zeros(self.width, dtype=torch.float64))

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        work = _work(x)
        for map_ in self.maps:
            work = map_(work)
        return work.to(x.dtype)

    def left(self, w: Float[Tensor, "d i"]) -> Float[Tensor, "d i"]:
        work = _work(w)
        for map_ in self.maps:
            work = map_.left(work)
        return work.to(w.dtype)

    def right(self, w: Float[Tensor, "o d"]) -> Float[Tensor, "o d"]:
        work = _work(w)
        for map_ in reversed(self.maps):
            work = map_.right(work)
        return work.to(w.dtype)


def _work(x: Tensor) -> Tensor:
    """x in the dtype the arithmetic runs in: float64 stays, everything else is float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _composed(last: AffineMap, first: AffineMap) -> AffineMap:
    if isinstance(last, Diagonal) and isinstance(first, Diagonal):
        return _multiplied(last, first)
    merged = _merged(last, first) if isinstance(last, LowRank) and isinstance(first, LowRank) else None
    links = (*_links(first), *_links(last))
    return Chain(cast("tuple[LowRank | Diagonal, ...]", links)) if merged is None else merged


def _multiplied(last: Diagonal, first: Diagonal) -> Diagonal:
    scale = last.scale.double() * first.scale.to(last.scale.device).double()
    start = torch.zeros_like(scale) if first.offset is None else first.offset.to(scale)
    shift = None if first.offset is None and last.offset is None else last(start)
    return Diagonal(scale.to(torch.promote_types(last.scale.dtype, first.scale.dtype)), shift)


def _links(map_: AffineMap) -> tuple[AffineMap, ...]:
    return map_.maps if isinstance(map_, Chain) else (map_,)


def _merged(last: LowRank, first: LowRank) -> LowRank | None:
    """One LowRank equal to last after first, or None where no center gives its offset.

    M2 M1 = I - [U1 - U2 V2^T U1, U2] [V1, V2]^T, compressed in float64 by QR of both factors and an SVD of the core.
    """
    u1, v1, u2, v2 = (t.double().cpu() for t in (first.u, first.v, last.u, last.v))
    u, v = torch.cat([u1 - u2 @ (v2.T @ u1), u2], 1), torch.cat([v1, v2], 1)
    qu, ru = torch.linalg.qr(u)
    qv, rv = torch.linalg.qr(v)
    left, size, right = torch.linalg.svd(ru @ rv.T)
    # float32 factors are exact to 6e-8: below 1e-6 of their size a direction is the rounding of one already removed.
    scale = max(float(a.norm() * b.norm()) for a, b in ((u1, v1), (u2, v2)))
    keep = size > 1e-6 * scale
    u, v = (qu @ left)[:, keep] * size[keep], (qv @ right.T)[:, keep]
    dtype, device = torch.promote_types(first.u.dtype, last.u.dtype), last.u.device
    center = None
    if first.center is not None or last.center is not None:
        offset = last(first(torch.zeros(last.width, dtype=torch.float64)))
        center = v @ torch.linalg.lstsq(u, offset[:, None]).solution[:, 0] if u.shape[1] else torch.zeros_like(offset)
        if not torch.allclose(u @ (v.T @ center), offset, atol=1e-6 * float(offset.abs().max())):
            return None
    return LowRank(u.to(device, dtype), v.to(device, dtype), None if center is None else center.to(device, dtype))
