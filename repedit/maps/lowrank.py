"""Low-rank maps: projections that remove a subspace, and steering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.errors import NotFinite, RankError, ShapeError
from repedit.kernels import dispatch
from repedit.maps.affine import AffineMap, check_together, not_finite_at


@dataclass(frozen=True, eq=False)
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
    def projection(basis: Float[Tensor, "d k"], center: Float[Tensor, " d"] | None = None) -> LowRank:
        """The orthogonal projection that removes span(basis): x - Q Q^T (x - center), Q an orthonormal basis in float64.

        Raises:
            RankError: if the columns are linearly dependent or more than the width. NotFinite: if a number is not finite.
        """
        check_together(basis=basis)
        if basis.ndim != 2:
            raise ShapeError(f"the basis has shape {tuple(basis.shape)}; give (d, k), a direction as (d, 1)")
        place = not_finite_at(basis)
        if place is not None:
            raise NotFinite(f"the basis of shape {tuple(basis.shape)} is not finite at {place}")
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
        u, v, center = self._beside(x)
        return dispatch.project(x, u, v, center)

    def left(self, w: Float[Tensor, "d i"], *, out: Float[Tensor, "d i"] | None = None) -> Float[Tensor, "d i"]:
        self._check(w.shape[0])
        u, v, _ = self._beside(w)
        return dispatch.left(w, u, v, out=out)

    def right(self, w: Float[Tensor, "o d"], *, out: Float[Tensor, "o d"] | None = None) -> Float[Tensor, "o d"]:
        self._check(w.shape[1])
        u, v, _ = self._beside(w)
        return dispatch.right(w, u, v, out=out)

    def _beside(self, x: Tensor) -> Factors:
        """The factors on the device of x, in one dtype; copies made for that are kept for as long as the map lives."""
        own = self.u, self.v, self.center
        present = [t for t in own if t is not None]
        if all(t.device == x.device and t.dtype == self.u.dtype for t in present):
            return own
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if torch.compiler.is_compiling() or any(t.requires_grad or t.is_inference() for t in present):
            return _moved(own, x.device, dtype)
        copies = _COPIES.setdefault(self, {})
        # A tensor's version counts its in-place changes, so a stale copy is not used.
        key = (x.device, dtype, *(t._version for t in present))
        if key not in copies:
            copies.clear()
            copies[key] = _moved(own, x.device, dtype)
        return copies[key]


Factors = tuple[Tensor, Tensor, Tensor | None]
_COPIES: WeakKeyDictionary[LowRank, dict[tuple[Any, ...], Factors]] = WeakKeyDictionary()


def _moved(own: Factors, device: torch.device, dtype: torch.dtype) -> Factors:
    u, v, center = own
    return u.to(device, dtype), v.to(device, dtype), None if center is None else center.to(device, dtype)
