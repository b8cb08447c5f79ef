"""Affine maps x -> Mx + c on the last axis: the values that edits consist of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import isfinite
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.arguments import checked
from repedit.errors import DeviceError, DtypeError, NotFinite, RankError, ShapeError
from repedit.kernels import dispatch

# --- What every map can do


class AffineMap(ABC):
    """x -> Mx + c on the last axis, of one width."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Size d of the axis the map acts on."""

    @property
    @abstractmethod
    def rank_removed(self) -> int:
        """d - rank(M): the number of directions that no output has."""

    @abstractmethod
    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Mx + c, in the dtype of x; half types are computed in float32 and rounded once.

        A GPU kernel multiplies half operands and sums in float32 (repedit.kernels).
        """

    @abstractmethod
    @checked
    def left(self, w: Float[Tensor, "d i"], *, out: Float[Tensor, "d i"] | None = None) -> Float[Tensor, "d i"]:
        """M W: the weight whose outputs are mapped; `out=w` rewrites in place."""

    @abstractmethod
    @checked
    def right(self, w: Float[Tensor, "o d"], *, out: Float[Tensor, "o d"] | None = None) -> Float[Tensor, "o d"]:
        """W M: the weight whose inputs are mapped; `out=w` rewrites in place."""

    @property
    @abstractmethod
    def offset(self) -> Float[Tensor, " d"] | None:
        """The vector c, or None if it is zero; in float64 if it has to be computed."""

    def __matmul__(self, first: AffineMap) -> AffineMap:
        """The map that applies `first`, then this one; stays factored."""
        if self.width != first.width:
            raise ShapeError(
                f"cannot compose maps of widths {self.width} and {first.width}; are they for the same site?"
            )
        return composed(self, first)

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the map by name."""

    def check_finite(self) -> None:
        """Refuse a map with a number that is not finite.

        Raises:
            NotFinite: naming the tensor and the index.
        """
        for name, value in self.tensors.items():
            index = not_finite_at(value)
            if index is not None:
                raise NotFinite(
                    f"{name} of the {type(self).__name__} is not finite at {index}; was the statistic or the fit behind it finite?"
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
    """The first index at which a tensor is NaN or infinite, with the value; None if it is finite or has no values.

    The extremes of a tensor with a NaN are NaN; finding them takes 1/27 of the time of a mask of finite bfloat16 values.
    """
    if x.device.type == "meta" or not (x.is_floating_point() or x.is_complex()):
        return None
    wide = x.detach().float() if x.dtype.itemsize == 1 else x.detach()
    if not wide.numel() or _all_finite(wide):
        return None
    index = tuple((~torch.isfinite(wide)).nonzero()[0].tolist())
    return f"{index} ({wide[index].item()}, {x.dtype})"


def _all_finite(x: Tensor) -> bool:
    if x.is_complex() or x.device.type != "cpu":
        return bool(torch.isfinite(x if x.is_complex() else torch.stack(x.aminmax())).all())
    return all(isfinite(float(extreme)) for extreme in x.aminmax())


def check_together(**tensors: Tensor | None) -> None:
    """Refuse tensors that cannot form one map.

    Raises:
        DtypeError: if one is not a dense tensor with values, or not of a floating dtype that torch computes in.
        DeviceError: if they are on several devices.
        ShapeError: if the width is zero.
    """
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    devices = {name: tensor.device for name, tensor in present.items() if isinstance(tensor, Tensor)}
    if len(set(devices.values())) > 1:
        text = ", ".join(f"{name} is on {device}" for name, device in devices.items())
        raise DeviceError(f"the tensors of a map must be on one device: {text}; move them with .to(device)")
    for name, tensor in present.items():
        check_dense(name, tensor)
        if tensor.dtype not in dispatch.SUPPORTED:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dispatch.SUPPORTED)
            raise DtypeError(f"{name} has dtype {tensor.dtype}; give one of {names}")
    if any(tensor.ndim and not len(tensor) for tensor in present.values()):
        raise ShapeError("a map needs a width of at least 1; is the tensor it was made from empty?")


def check_dense(name: str, value: object) -> None:
    """Refuse anything but a dense tensor with values.

    Raises:
        DtypeError: with what it is.
    """
    if not isinstance(value, Tensor):
        raise DtypeError(f"{name} is a {type(value).__name__}; give a tensor")
    if value.layout != torch.strided or value.is_meta:
        what = "has no values (it is on the meta device)" if value.is_meta else f"is sparse ({value.layout})"
        raise DtypeError(f"{name} {what}; give a dense tensor with values")


def to_work_dtype(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic: float64 stays, everything else is float32.

    Raises:
        DtypeError: if x holds integers, booleans or complex numbers.
    """
    if not x.is_floating_point():
        raise DtypeError(f"a map acts on floating-point numbers, the tensor is {x.dtype}; convert it with .float()")
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


# --- Low-rank maps: projections that remove a subspace, and steering


@dataclass(frozen=True, eq=False)
@checked
class LowRank(AffineMap):
    """x -> x - U V^T (x - center); U, V are (d, k), an empty basis is (d, 0)."""

    u: Float[Tensor, "d k"]
    v: Float[Tensor, "d k"]
    center: Float[Tensor, " d"] | None = None

    def __post_init__(self) -> None:
        check_together(u=self.u, v=self.v, center=self.center)
        center = None if self.center is None else tuple(self.center.shape)
        if self.u.ndim != 2 or self.u.shape != self.v.shape or center not in (None, tuple(self.u.shape[:1])):
            raise ShapeError(
                f"u {tuple(self.u.shape)}, v {tuple(self.v.shape)}, center {center} do not fit: give (d, k), (d, k), (d,)"
            )
        if self.u.shape[1] > self.u.shape[0]:
            raise RankError(
                f"u and v of shape {tuple(self.u.shape)} have rank {self.u.shape[1]}, the width is {self.u.shape[0]}; a map of "
                "this width has at most that rank, so compress the factors first"
            )

    @staticmethod
    @checked
    def projection(basis: Float[Tensor, "d k"], center: Float[Tensor, " d"] | None = None) -> LowRank:
        """The orthogonal projection that removes span(basis): x - Q Q^T (x - center), Q an orthonormal basis in float64.

        Raises:
            RankError: if the columns are linearly dependent or more than the width. NotFinite: if a number is not finite.
        """
        check_together(basis=basis)
        if basis.ndim != 2:
            raise ShapeError(f"the basis has shape {tuple(basis.shape)}; give (d, k), a direction as (d, 1)")
        index = not_finite_at(basis)
        if index is not None:
            raise NotFinite(f"the basis of shape {tuple(basis.shape)} is not finite at {index}")
        q, r = torch.linalg.qr(basis.double())
        # The part of a column orthogonal to those before it; of a dependent column, only rounding.
        independent = r.diagonal().abs() / r.norm(dim=0)[: len(r)]
        if basis.shape[1] > basis.shape[0] or not bool(
            (independent > max(1e-10, 8 * torch.finfo(basis.dtype).eps)).all()
        ):
            raise RankError(
                f"a basis of shape {tuple(basis.shape)} is not of full column rank; remove dependent columns"
            )
        q = q.to(torch.promote_types(basis.dtype, torch.float32)).contiguous()
        return LowRank(q, q, center)

    @staticmethod
    @checked
    def oblique(u: Float[Tensor, "d k"], v: Float[Tensor, "d k"], center: Float[Tensor, " d"] | None = None) -> LowRank:
        """The oblique projection along span(u) onto the complement of span(v): x - U (V^T U)^-1 V^T (x - center).

        Raises:
            RankError: if V^T U is singular. NotFinite: if a number is not finite.
        """
        LowRank(u, v, center).check_finite()
        inner = v.double().T @ u.double()
        if u.shape[1] and not torch.linalg.cond(inner) <= 1e12:
            raise RankError("V^T U is singular: u and v of an oblique projection must not be orthogonal to each other")
        return LowRank((u.double() @ torch.linalg.inv(inner)).to(u.dtype), v, center)

    @property
    def width(self) -> int:
        return self.u.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"u": self.u, "v": self.v} | ({} if self.center is None else {"center": self.center})

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
        u, v, center = self._factors_for(x)
        return dispatch.project(x, u, v, center)

    @checked
    def left(self, w: Float[Tensor, "d i"], *, out: Float[Tensor, "d i"] | None = None) -> Float[Tensor, "d i"]:
        self._check(w.shape[0])
        u, v, _ = self._factors_for(w)
        return dispatch.left(w, u, v, out=out)

    @checked
    def right(self, w: Float[Tensor, "o d"], *, out: Float[Tensor, "o d"] | None = None) -> Float[Tensor, "o d"]:
        self._check(w.shape[1])
        u, v, _ = self._factors_for(w)
        return dispatch.right(w, u, v, out=out)

    def _factors_for(self, x: Tensor) -> Factors:
        """The factors on the device of x, in one dtype; copies are cached as long as the map exists."""
        factors = self.u, self.v, self.center
        present = [t for t in factors if t is not None]
        if all(t.device == x.device and t.dtype == self.u.dtype for t in present):
            return factors
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if torch.compiler.is_compiling() or any(t.requires_grad or t.is_inference() for t in present):
            return _moved(factors, x.device, dtype)
        copies = _COPIES.setdefault(self, {})
        # The version of a tensor counts its changes in place, so a stale copy is not used.
        key = (x.device, dtype, *(t._version for t in present))
        copy = copies.get(key)  # another thread may remove it meanwhile
        if copy is None:
            copy = _moved(factors, x.device, dtype)
            copies.clear()
            copies[key] = copy
        return copy


Factors = tuple[Tensor, Tensor, Tensor | None]
_COPIES: WeakKeyDictionary[LowRank, dict[tuple[Any, ...], Factors]] = WeakKeyDictionary()


def _moved(factors: Factors, device: torch.device, dtype: torch.dtype) -> Factors:
    u, v, center = factors
    return u.to(device, dtype), v.to(device, dtype), None if center is None else center.to(device, dtype)


# --- Elementwise maps: masks of neurons and constant fills


@dataclass(frozen=True, eq=False)
@checked
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
    @checked
    def mask(keep: Bool[Tensor, " d"]) -> Diagonal:
        """Zero the neurons where `keep` is False.

        Raises:
            DtypeError: if `keep` does not hold True and False.
        """
        _check_bool(keep)
        return Diagonal(keep.float())

    @staticmethod
    @checked
    def fill(keep: Bool[Tensor, " d"], value: Float[Tensor, " d"]) -> Diagonal:
        """Set the neurons where `keep` is False to `value` (their mean, say).

        Raises:
            DtypeError: if `keep` does not hold True and False.
        """
        _check_bool(keep)
        return Diagonal(keep.float(), torch.where(keep, torch.zeros_like(value), value).float())

    @property
    def width(self) -> int:
        return self.scale.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale} | ({} if self.shift is None else {"shift": self.shift})

    @property
    def kept(self) -> Bool[Tensor, " d"]:
        """True where a neuron is not pruned."""
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
        work = to_work_dtype(x)
        scaled = work * self.scale.to(work)
        return (scaled if self.offset is None else scaled + self.offset.to(work)).to(x.dtype)

    @checked
    def left(self, w: Float[Tensor, "d i"], *, out: Float[Tensor, "d i"] | None = None) -> Float[Tensor, "d i"]:
        self._check(w.shape[0])
        return _scaled(w, self.scale[:, None], out)

    @checked
    def right(self, w: Float[Tensor, "o d"], *, out: Float[Tensor, "o d"] | None = None) -> Float[Tensor, "o d"]:
        self._check(w.shape[1])
        return _scaled(w, self.scale, out)


def _scaled(w: Tensor, scale: Tensor, out: Tensor | None) -> Tensor:
    work = to_work_dtype(w)
    if out is not None and work is w:
        return torch.mul(w, scale.to(w), out=out)
    new = (work * scale.to(work)).to(w.dtype)
    return new if out is None else out.copy_(new)


# --- Composition: a single map if there is one, otherwise a chain


@dataclass(frozen=True, eq=False)
@checked
class Chain(AffineMap):
    """Several maps, the first one applied first; for compositions with no simpler form."""

    maps: tuple[LowRank | Diagonal, ...]

    def __post_init__(self) -> None:
        if not self.maps or len({m.width for m in self.maps}) != 1:
            raise ShapeError(
                f"a chain needs at least one map and one width, the widths are {[m.width for m in self.maps]}; compose maps of one site"
            )

    @property
    def width(self) -> int:
        return self.maps[0].width

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": value for i, map_ in enumerate(self.maps) for name, value in map_.tensors.items()}

    @property
    def rank_removed(self) -> int:
        return self.width - int(torch.linalg.matrix_rank(self.as_matrix(), rtol=1e-6))

    @property
    def offset(self) -> Float[Tensor, " d"] | None:
        if all(m.offset is None for m in self.maps):
            return None
        return self(torch.zeros(self.width, dtype=torch.float64))

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        work = to_work_dtype(x)
        for map_ in self.maps:
            work = map_(work)
        return work.to(x.dtype)

    @checked
    def left(self, w: Float[Tensor, "d i"], *, out: Float[Tensor, "d i"] | None = None) -> Float[Tensor, "d i"]:
        work = to_work_dtype(w)
        for map_ in self.maps:
            work = map_.left(work, out=out if out is not None and out.dtype == work.dtype else None)
        return _written_to(work.to(w.dtype), out)

    @checked
    def right(self, w: Float[Tensor, "o d"], *, out: Float[Tensor, "o d"] | None = None) -> Float[Tensor, "o d"]:
        work = to_work_dtype(w)
        for map_ in reversed(self.maps):
            work = map_.right(work, out=out if out is not None and out.dtype == work.dtype else None)
        return _written_to(work.to(w.dtype), out)


def _written_to(result: Tensor, out: Tensor | None) -> Tensor:
    """The result, copied into `out` if there is one."""
    return result if out is None or out is result else out.copy_(result)


def composed(last: AffineMap, first: AffineMap) -> AffineMap:
    """The map that applies `first`, then `last`."""
    if isinstance(last, Diagonal) and isinstance(first, Diagonal):
        return _diagonal_product(last, first)
    product = _low_rank_product(last, first) if isinstance(last, LowRank) and isinstance(first, LowRank) else None
    links = (*_links(first), *_links(last))
    return Chain(cast("tuple[LowRank | Diagonal, ...]", links)) if product is None else product


def _diagonal_product(last: Diagonal, first: Diagonal) -> Diagonal:
    scale = last.scale.double() * first.scale.to(last.scale.device).double()
    start = torch.zeros_like(scale) if first.offset is None else first.offset.to(scale)
    shift = None if first.offset is None and last.offset is None else last(start)
    return Diagonal(scale.to(torch.promote_types(last.scale.dtype, first.scale.dtype)), shift)


def _links(map_: AffineMap) -> tuple[AffineMap, ...]:
    return map_.maps if isinstance(map_, Chain) else (map_,)


def _low_rank_product(last: LowRank, first: LowRank) -> LowRank | None:
    """One LowRank equal to last after first, or None if no center gives its offset.

    M2 M1 = I - [U1 - U2 V2^T U1, U2] [V1, V2]^T, compressed in float64 by QR of both factors and an SVD of the core.
    """
    u1, v1, u2, v2 = (t.double().cpu() for t in (first.u, first.v, last.u, last.v))
    u, v = torch.cat([u1 - u2 @ (v2.T @ u1), u2], 1), torch.cat([v1, v2], 1)
    qu, ru = torch.linalg.qr(u)
    qv, rv = torch.linalg.qr(v)
    left, size, right = torch.linalg.svd(ru @ rv.T)
    # float32 factors are exact to 6e-8: a direction below 1e-6 of their size is rounding of one already removed.
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


def _check_bool(keep: Tensor) -> None:
    if keep.dtype != torch.bool:
        raise DtypeError(
            f"keep is {keep.dtype}; give a boolean tensor, one value for each neuron: keep = torch.ones(width, dtype=torch.bool), and "
            "keep[indices] = False for the neurons to prune"
        )


__all__ = ["AffineMap", "Chain", "Diagonal", "LowRank", "check_dense", "not_finite_at"]
