"""Mean and covariance of the rows at a site, alone or with labels or gradients.

Float64 sums, updated batch by batch, that merge exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.distributed import ProcessGroup
from repedit.errors import ArgumentError, NotEnoughRows, NotFinite, ShapeError

# From this width on half a product beats a whole one on a CPU: of its time it takes 1.05 at width 128, 0.92 at 256,
# 0.67 at 576, 0.53 at 1536 (1024 rows, one thread).
TRIANGLE_WIDTH = 256
# Rows whose products are summed in float32 before they are added to float64: 1e6 rows err by 4e-6 of a block
# instead of the 6e-2 (worst case) of float32 throughout.
BLOCK = 4096

# --- Moments: mean and covariance of the rows at a site


class Moments:
    """Count, mean and scatter of the counted rows: what closed-form fits are made of.

    Sums of x - shift and (x - shift)(x - shift)^T are kept in float64, with the shift frozen at the mean of the first
    block, so a mean far from zero costs no digits. `+` merges: C = Ca + Cb + (na nb / n) delta delta^T.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.width = width
        self.count = 0
        self.dtype = torch.float32
        """float64 once a float64 row was seen: the precision that what is fitted should have."""
        self._shift = torch.zeros(width, dtype=torch.float64, device=device)
        self._total = torch.zeros(width, dtype=torch.float64, device=device)
        self._shift_frozen = False
        # Of sum (x - shift)(x - shift)^T the lower triangle.
        self._square = torch.zeros(width, width, dtype=torch.float64, device=device)

    def __repr__(self) -> str:
        return f"Moments(width={self.width}, count={self.count})"

    def update(self, x: Float[Tensor, "... d"], mask: Bool[Tensor, ...] | None = None) -> Moments:
        """Add the rows of x where `mask` is True, in place; rows outside it may hold anything.

        Products of at most 4096 rows are formed in float32 (float64 for float64 rows) and added to float64.

        Raises:
            ShapeError: if x or the mask does not fit.
            NotFinite: if a counted value is NaN or infinite; nothing is added then.
        """
        rows = selected_rows(x, mask, self.width)
        if not rows.shape[0]:
            return self
        shift = self._shift if self.count or self._shift_frozen else shift_of(rows)
        sums, products = [], []
        with exact_products():
            for block in rows.split(BLOCK):
                rest = subtract_shift(block, shift)
                sums.append(rest.sum(0))
                products.append(lower_gram(rest))
                check_finite_sums(products[-1].diagonal(), "the sum of squares of coordinate")
        self._shift, self.count = shift, self.count + rows.shape[0]
        self.dtype = torch.promote_types(self.dtype, sums[0].dtype)
        for total, product in zip(sums, products, strict=True):
            self._total += total
            self._square += product
        return self

    def reset(self) -> None:
        """Discard the rows and keep the shift: float32 products about one shift are the same in every process."""
        self.count, self._shift_frozen = 0, bool(self.count) or self._shift_frozen
        self._total.zero_()
        self._square.zero_()

    def __add__(self, other: Moments) -> Moments:
        """The statistic of both sets of rows.

        Raises:
            ShapeError: if the widths differ.
        """
        if not isinstance(other, Moments):
            return NotImplemented
        if self.width != other.width:
            raise ShapeError(f"cannot merge statistics of widths {self.width} and {other.width}; are they of one site?")
        if not self.count or not other.count:
            return (other if other.count else self)._scaled(1.0)
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        scatter = self.scatter + other.scatter + (self.count * other.count / count) * torch.outer(delta, delta)
        return self._from_scatter(count, mean, scatter, torch.promote_types(self.dtype, other.dtype))

    def all_reduced(self, ranks: ProcessGroup) -> Moments:
        """The statistic of the rows of all ranks, on every rank: scatters about one common shift, added up."""
        if ranks.size == 1:
            return self
        summed = ranks.sum(torch.cat([self._total + self.count * self._shift, self._total.new_tensor([self.count])]))
        count = int(summed[-1])
        mean = summed[:-1] / max(count, 1)
        rest = self.mean - mean if self.count else torch.zeros_like(mean)
        scatter = ranks.sum(self.scatter + self.count * torch.outer(rest, rest))
        wide = ranks.any(self.dtype == torch.float64, mean.device)
        return self._from_scatter(count, mean, scatter, torch.float64 if wide else torch.float32)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean of the rows; 0 where there are none."""
        return self._shift + self._total / max(self.count, 1)

    @property
    def scatter(self) -> Float[Tensor, "d d"]:
        """sum (x - mean)(x - mean)^T."""
        return symmetric(self._square) - torch.outer(self._total, self._total) / max(self.count, 1)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Population covariance: scatter / count."""
        return self.scatter / max(self.count, 1)

    @property
    def second(self) -> Float[Tensor, "d d"]:
        """Uncentred second moment E[x x^T]: covariance + mean mean^T."""
        return self.covariance + torch.outer(self.mean, self.mean)

    def scaled(self, factor: float) -> Moments:
        """The statistic of the rows multiplied by a factor."""
        return self._scaled(factor)

    def cpu(self) -> Moments:
        """The same values on the CPU."""
        moved = Moments(0)
        moved.width, moved.count, moved.dtype = self.width, self.count, self.dtype
        moved._shift, moved._total, moved._square = self._shift.cpu(), self._total.cpu(), self._square.cpu()
        return moved

    def state(self) -> dict[str, Tensor]:
        """Count, shift, sums and whether a row was float64, as tensors for a file."""
        plain = {"count": torch.tensor(self.count), "wide": torch.tensor(self.dtype == torch.float64)}
        return plain | {"shift": self._shift, "total": self._total, "square": self._square}

    @staticmethod
    def of_state(state: Mapping[str, Tensor]) -> Moments:
        """The statistic with this state.

        Raises:
            ShapeError: if a tensor is missing, is unexpected, or has another shape.
        """
        check_state(state, {"count": "", "wide": "", "shift": "d", "total": "d", "square": "d d"})
        new = Moments(0)
        new.width, new.count = len(state["shift"]), int(state["count"])
        new.dtype = torch.float64 if bool(state["wide"]) else torch.float32
        new._shift, new._total, new._square = (state[name] for name in ("shift", "total", "square"))
        return new

    def _scaled(self, factor: float) -> Moments:
        return self._from_scatter(self.count, self.mean * factor, self.scatter * factor**2, self.dtype)

    def _from_scatter(self, count: int, mean: Tensor, scatter: Tensor, dtype: torch.dtype) -> Moments:
        new = Moments(0)
        new.width, new.count, new.dtype = self.width, count, dtype
        # Rounded as in `shift_of`; what the rounding leaves of the mean stays in the sums.
        new._shift = mean.float().double()
        rest = mean - new._shift
        new._total = count * rest
        new._square = scatter + count * torch.outer(rest, rest)
        return new


def pooled(moments: Sequence[Moments], like: Sequence[Moments] | None = None) -> Moments:
    """The statistics of several sites as one, each scaled to mean square 1 so that late layers do not dominate.

    The rows of a site are multiplied by sqrt(d / tr S), S = E[x x^T].

    Args:
        like: the statistics whose traces set the scales, where two sets must share them (the retain set's, say).
    Raises:
        ArgumentError: if there is nothing to pool, or `like` is of other sites.
        NotEnoughRows: if a site has no energy.
    """
    scales = moments if like is None else like
    if not moments or len(scales) != len(moments):
        raise ArgumentError(
            f"{len(moments)} statistics to pool, {len(scales)} to scale them by; give one for each site"
        )
    traces = [float(m.second.trace()) for m in scales]
    if not all(trace > 0 for trace in traces):
        raise NotEnoughRows(f"statistic {traces.index(min(traces))} has no energy; were any rows counted there?")
    return reduce(add, (m.scaled((m.width / t) ** 0.5) for m, t in zip(moments, traces, strict=True)))


# --- CrossMoments: covariance between the rows at a site and labels or gradients


class CrossMoments:
    """Count, both means and the cross scatter of rows x (width d) and z (width k): cov(x, z) and E[x z^T].

    z are labels of the rows (one-hot classes, say), or the gradient dL/dx. Sums are kept as in `Moments`.
    """

    def __init__(self, width: int, other: int, device: torch.device | str = "cpu") -> None:
        self.width, self.other = width, other
        self.count = 0
        self.dtype = torch.float32
        """float64 once a float64 row of x was seen."""
        self._x, self._z, self._shift_frozen = _Side.zeros(width, device), _Side.zeros(other, device), False
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
        xs, zs = selected_rows(x, mask, self.width), selected_rows(z.to(x.device), mask, self.other)
        if not xs.shape[0]:
            return self
        at = (self._x.shift, self._z.shift) if self.count or self._shift_frozen else (shift_of(xs), shift_of(zs))
        sums = []
        with exact_products():
            for a, b in zip(xs.split(BLOCK), zs.split(BLOCK), strict=True):
                a, b = subtract_shift(a, at[0]), subtract_shift(b, at[1])
                work = torch.promote_types(a.dtype, b.dtype)
                sums.append((a.sum(0), b.sum(0), a.to(work).T @ b.to(work)))
                check_finite_sums(sums[-1][0], "the sum of coordinate")
                check_finite_sums(sums[-1][1], "the sum of label or gradient")
                check_finite_sums(sums[-1][2].sum(1), "the product with coordinate")
        self.count += xs.shape[0]
        self.dtype = torch.promote_types(self.dtype, sums[0][0].dtype)
        self._x, self._z = _Side(at[0], self._x.total), _Side(at[1], self._z.total)
        for a, b, product in sums:
            self._x.total.add_(a)
            self._z.total.add_(b)
            self._product += product
        return self

    def reset(self) -> None:
        """Discard the rows and keep the shifts: float32 products about one shift are the same in every process."""
        self.count, self._shift_frozen = 0, bool(self.count) or self._shift_frozen
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
        return self._from_scatter(self.count + other.count, (mean, other_mean), scatter, dtype)

    def all_reduced(self, ranks: ProcessGroup) -> CrossMoments:
        """The statistic of the rows of all ranks, on every rank: scatters about common shifts, added up."""
        if ranks.size == 1:
            return self
        sums = [side.total + self.count * side.shift for side in (self._x, self._z)]
        summed = ranks.sum(torch.cat([*sums, self._product.new_tensor([self.count])]))
        count = int(summed[-1])
        mean, other_mean = (summed[:-1] / max(count, 1)).split([self.width, self.other])
        rest = (self.mean - mean, self.other_mean - other_mean) if self.count else (0 * mean, 0 * other_mean)
        scatter = ranks.sum(self.scatter + self.count * torch.outer(*rest))
        wide = ranks.any(self.dtype == torch.float64, mean.device)
        return self._from_scatter(count, (mean, other_mean), scatter, torch.float64 if wide else torch.float32)

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
        """The same values on the CPU."""
        moved = CrossMoments(0, 0)
        moved.width, moved.other, moved.count, moved.dtype = self.width, self.other, self.count, self.dtype
        moved._x, moved._z = (_Side(side.shift.cpu(), side.total.cpu()) for side in (self._x, self._z))
        moved._product = self._product.cpu()
        return moved

    def state(self) -> dict[str, Tensor]:
        """Count, shifts, sums and whether a row was float64, as tensors for a file."""
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
        """The statistic with this state.

        Raises:
            ShapeError: if a tensor is missing, is unexpected, or has another shape.
        """
        sides = {"x_shift": "d", "x_total": "d", "z_shift": "k", "z_total": "k"}
        check_state(state, {"count": "", "wide": "", **sides, "product": "d k"})
        new = CrossMoments(0, 0)
        new.width, new.other = state["product"].shape
        new.count, new.dtype = int(state["count"]), torch.float64 if bool(state["wide"]) else torch.float32
        new._x, new._z = (_Side(state[f"{side}_shift"], state[f"{side}_total"]) for side in ("x", "z"))
        new._product = state["product"]
        return new

    def _from_scatter(
        self, count: int, means: tuple[Tensor, Tensor], scatter: Tensor, dtype: torch.dtype
    ) -> CrossMoments:
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


# --- Rows: selection, shift, products, and checks


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, str], optional: Collection[str] = ()) -> None:
    """Refuse tensors that are not the state of a statistic.

    Args:
        shapes: the axes of every tensor, such as "d d"; an axis has one size everywhere.
    Raises:
        ShapeError: with the name of the tensor that is missing, is unexpected, or has another shape.
    """
    odd = sorted((set(state) - set(shapes)) | (set(shapes) - set(state) - set(optional)))
    if odd:
        raise ShapeError(f"a statistic is made of {', '.join(shapes)}; {odd[0]!r} is missing, or is one too many")
    sizes: dict[str, int] = {}
    for name, value in state.items():
        axes = shapes[name].split()
        if len(axes) != value.ndim or any(sizes.setdefault(a, n) != n for a, n in zip(axes, value.shape, strict=True)):
            raise ShapeError(
                f"{name!r} of a statistic has shape {tuple(value.shape)}, expected ({shapes[name]}), {sizes}"
            )


def selected_rows(x: Float[Tensor, "... d"], mask: Bool[Tensor, ...] | None, width: int) -> Float[Tensor, "n d"]:
    """The rows where `mask` is True; the others may hold NaN, so they are removed and not multiplied by zero.

    Raises:
        ShapeError: if x is not of this width, or the mask does not have its leading shape.
    """
    check_row_shape(x, mask, width)
    rows = rearrange(x.detach(), "... d -> (...) d")
    # Always removed, so that the same rows give the same bits wherever the padding is.
    return rows if mask is None else rows[mask.reshape(-1).to(rows.device)]


def check_row_shape(x: Float[Tensor, "... d"], mask: Bool[Tensor, ...] | None, width: int) -> None:
    """Refuse rows whose shape does not fit a statistic.

    Raises:
        ShapeError: if x is not of this width, or the mask does not have its leading shape.
    """
    if x.shape[-1] != width:
        raise ShapeError(f"the statistic has width {width}, the activations have width {x.shape[-1]}")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ShapeError(
            f"mask {tuple(mask.shape)} must have the leading shape of the activations, {tuple(x.shape[:-1])}"
        )


def shift_of(rows: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The mean of the first block, rounded to float32 so that float32 rows are shifted by exactly the stored value."""
    return rows[:BLOCK].double().mean(0).float().double()


def subtract_shift(block: Float[Tensor, "n d"], shift: Float[Tensor, " d"]) -> Float[Tensor, "n d"]:
    """block - shift, in float32, or in float64 where the block is."""
    work = torch.float64 if block.dtype == torch.float64 else torch.float32
    return block.to(work) - shift.to(work)


def lower_gram(rows: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """X^T X in the lower triangle; the upper one may be 0, because a symmetric rank-n update computes one half."""
    if rows.device.type != "cpu" or rows.shape[1] < TRIANGLE_WIDTH:
        return rows.T @ rows
    from scipy.linalg import blas

    update = blas.dsyrk if rows.dtype == torch.float64 else blas.ssyrk
    # A row-major (n, d) is a column-major (d, n): the transposes cost nothing, and turn upper into lower.
    return torch.from_numpy(update(1.0, rows.contiguous().numpy().T).T)


def symmetric(lower: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The symmetric matrix with this lower triangle."""
    return lower.tril() + lower.tril(-1).T


def check_finite_sums(values: Float[Tensor, " d"], what: str) -> None:
    """Refuse sums that are not finite.

    Raises:
        NotFinite: with the first bad coordinate.
    """
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).nonzero()[0])
        raise NotFinite(f"{what} {bad} is not finite; load the model in float32?")


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products in full float32; TensorFloat-32 would err by 3e-4."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
