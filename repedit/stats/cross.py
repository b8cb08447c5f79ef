"""Covariance between the rows at a site and labels or gradients, added to batch by batch and merged exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.errors import ShapeError
from repedit.ranks import Ranks
from repedit.stats.rows import BLOCK, centre, centred, check_finite, check_state, counted, exact_products


class CrossMoments:
    """Count, both means and the cross scatter of rows x (width d) and z (width k): cov(x, z) and E[x z^T].

    z are labels of the rows (one-hot classes, say), or the gradient dL/dx. Sums are kept as in `Moments`.
    """

    def __init__(self, width: int, other: int, device: torch.device | str = "cpu") -> None:
        self.width, self.other = width, other
        self.count = 0
        self.dtype = torch.float32
        """float64 once a float64 row of x was seen."""
        self._x, self._z, self._kept = _Side.zeros(width, device), _Side.zeros(other, device), False
        self._product = torch.zeros(width, other, dtype=torch.float64, device=device)

    def __repr__(self) -> str:
        return f"CrossMoments(width={self.width}, other={self.other}, count={self.count})"

    def update(
        self, x: Float[Tensor, "... d"], z: Float[Tensor, "... k"], mask: Bool[Tensor, ...] | None = None
    ) -> CrossMoments:
        """Add the rows of x and z where `mask` is True, in place; rows outside it may hold anything.

        Raises:
            ShapeError: if x, z or the mask does not fit.
            NotFinite: if a counted value is NaN or infinite; nothing is added then.
        """
        if x.shape[:-1] != z.shape[:-1]:
            raise ShapeError(f"x {tuple(x.shape)} and z {tuple(z.shape)} must have the same leading shape")
        xs, zs = counted(x, mask, self.width), counted(z.to(x.device), mask, self.other)
        if not xs.shape[0]:
            return self
        at = (self._x.shift, self._z.shift) if self.count or self._kept else (centre(xs), centre(zs))
        sums = []
        with exact_products():
            for a, b in zip(xs.split(BLOCK), zs.split(BLOCK), strict=True):
                a, b = centred(a, at[0]), centred(b, at[1])
                work = torch.promote_types(a.dtype, b.dtype)
                sums.append((a.sum(0), b.sum(0), a.to(work).T @ b.to(work)))
                check_finite(sums[-1][0], "the sum of coordinate")
                check_finite(sums[-1][1], "the sum of label or gradient")
                check_finite(sums[-1][2].sum(1), "the product with coordinate")
        self.count += xs.shape[0]
        self.dtype = torch.promote_types(self.dtype, sums[0][0].dtype)
        self._x, self._z = _Side(at[0], self._x.total), _Side(at[1], self._z.total)
        for a, b, product in sums:
            self._x.total.add_(a)
            self._z.total.add_(b)
            self._product += product
        return self

    def empty(self) -> None:
        """Forget the rows and keep the shifts: float32 products about one shift are the same in every process."""
        self.count, self._kept = 0, bool(self.count) or self._kept
        for sums in (self._x.total, self._z.total, self._product):
            sums.zero_()

    def __add__(self, other: CrossMoments) -> CrossMoments:
        """The statistic of both sets of rows.

        Raises:
            ShapeError: if the widths differ.
        """
        if not isinstance(other, CrossMoments):
            return NotImplemented
        if (self.width, self.other) != (other.width, other.other):
            raise ShapeError(
                f"cannot merge statistics of widths {self.width} x {self.other} and {other.width} x {other.other}; "
                "are they of one site?"
            )
        count = max(self.count + other.count, 1)
        dx, dz = other.mean - self.mean, other.other_mean - self.other_mean
        share = other.count / count
        scatter = self.scatter + other.scatter + (self.count * share) * torch.outer(dx, dz)
        mean, other_mean = self.mean + share * dx, self.other_mean + share * dz
        dtype = torch.promote_types(self.dtype, other.dtype)
        return self._of(self.count + other.count, (mean, other_mean), scatter, dtype)

    def over(self, ranks: Ranks) -> CrossMoments:
        """The statistic of the rows of all ranks, on every rank: scatters about common shifts, added up."""
        if ranks.size == 1:
            return self
        sums = [side.total + self.count * side.shift for side in (self._x, self._z)]
        summed = ranks.total(torch.cat([*sums, self._product.new_tensor([self.count])]))
        count = int(summed[-1])
        mean, other_mean = (summed[:-1] / max(count, 1)).split([self.width, self.other])
        rest = (self.mean - mean, self.other_mean - other_mean) if self.count else (0 * mean, 0 * other_mean)
        scatter = ranks.total(self.scatter + self.count * torch.outer(*rest))
        wide = ranks.any(self.dtype == torch.float64, mean.device)
        return self._of(count, (mean, other_mean), scatter, torch.float64 if wide else torch.float32)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean of x; 0 where there are no rows."""
        return self._x.shift + self._x.total / max(self.count, 1)

    @property
    def other_mean(self) -> Float[Tensor, " k"]:
        """Mean of z."""
        return self._z.shift + self._z.total / max(self.count, 1)

    @property
    def scatter(self) -> Float[Tensor, "d k"]:
        """sum (x - mean)(z - other_mean)^T."""
        return self._product - torch.outer(self._x.total, self._z.total / max(self.count, 1))

    @property
    def covariance(self) -> Float[Tensor, "d k"]:
        """cov(x, z): scatter / count."""
        return self.scatter / max(self.count, 1)

    @property
    def second(self) -> Float[Tensor, "d k"]:
        """E[x z^T]."""
        return self.covariance + torch.outer(self.mean, self.other_mean)

    def cpu(self) -> CrossMoments:
        """The same values in main memory."""
        moved = CrossMoments(0, 0)
        moved.width, moved.other, moved.count, moved.dtype = self.width, self.other, self.count, self.dtype
        moved._x, moved._z = (_Side(side.shift.cpu(), side.total.cpu()) for side in (self._x, self._z))
        moved._product = self._product.cpu()
        return moved

    def state(self) -> dict[str, Tensor]:
        """Count, shifts, sums and whether a row was float64, for a file."""
        plain = {"count": torch.tensor(self.count), "wide": torch.tensor(self.dtype == torch.float64)}
        plain |= {
            "x_shift": self._x.shift,
            "x_total": self._x.total,
            "z_shift": self._z.shift,
            "z_total": self._z.total,
        }
        return plain | {"product": self._product}

    @staticmethod
    def of_state(state: Mapping[str, Tensor]) -> CrossMoments:
        """What `state` gave.

        Raises:
            ShapeError: if the tensors are others.
        """
        sides = {"x_shift": "d", "x_total": "d", "z_shift": "k", "z_total": "k"}
        check_state(state, {"count": "", "wide": "", **sides, "product": "d k"})
        new = CrossMoments(0, 0)
        new.width, new.other = state["product"].shape
        new.count, new.dtype = int(state["count"]), torch.float64 if bool(state["wide"]) else torch.float32
        new._x, new._z = (_Side(state[f"{side}_shift"], state[f"{side}_total"]) for side in ("x", "z"))
        new._product = state["product"]
        return new

    def _of(self, count: int, means: tuple[Tensor, Tensor], scatter: Tensor, dtype: torch.dtype) -> CrossMoments:
        new = CrossMoments(0, 0)
        new.width, new.other, new.count, new.dtype = self.width, self.other, count, dtype
        new._x, new._z = (_Side.at(mean, count) for mean in means)
        new._product = scatter + torch.outer(new._x.total, new._z.total) / max(count, 1)
        return new


class _Side(NamedTuple):
    """The frozen shift of x or z, and sum (value - shift)."""

    shift: Tensor
    total: Tensor

    @staticmethod
    def zeros(width: int, device: torch.device | str) -> _Side:
        return _Side(*(torch.zeros(width, dtype=torch.float64, device=device) for _ in range(2)))

    @staticmethod
    def at(mean: Tensor, count: int) -> _Side:
        shift = mean.float().double()
        return _Side(shift, count * (mean - shift))
