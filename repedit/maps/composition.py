"""One map after another: a single map where there is one, a chain otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.errors import ShapeError
from repedit.maps.affine import AffineMap, working
from repedit.maps.diagonal import Diagonal
from repedit.maps.lowrank import LowRank


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
        work = working(x)
        for map_ in self.maps:
            work = map_(work)
        return work.to(x.dtype)

    def left(self, w: Float[Tensor, "d i"], *, out: Float[Tensor, "d i"] | None = None) -> Float[Tensor, "d i"]:
        work = working(w)
        for map_ in self.maps:
            work = map_.left(work, out=out if out is not None and out.dtype == work.dtype else None)
        return _given(work.to(w.dtype), out)

    def right(self, w: Float[Tensor, "o d"], *, out: Float[Tensor, "o d"] | None = None) -> Float[Tensor, "o d"]:
        work = working(w)
        for map_ in reversed(self.maps):
            work = map_.right(work, out=out if out is not None and out.dtype == work.dtype else None)
        return _given(work.to(w.dtype), out)


def _given(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None or out is result else out.copy_(result)


def composed(last: AffineMap, first: AffineMap) -> AffineMap:
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
