"""Mean and covariance of the rows at a site, alone or with labels or gradients.

Float64 sums, updated batch by batch, that merge exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import reduce
from operator import add
from typing import ClassVar, TypeVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.arguments import checked
from repedit.distributed import ProcessGroup
from repedit.errors import ArgumentError, NotEnoughRows, NotFinite, ShapeError, check_whole

# From this width on half a product beats a whole one on a CPU: of its time it takes 1.05 at width 128, 0.92 at 256,
# 0.67 at 576, 0.53 at 1536 (1024 rows, one thread).
TRIANGLE_WIDTH = 256
# Rows whose products are summed in float32 before they are added to float64: 1e6 rows err by 4e-6 of a block
# instead of the 6e-2 (worst case) of float32 throughout.
BLOCK = 4096
S = TypeVar("S", bound="_Sums")

# --- Moments: mean and covariance of the rows at a site


class _Sums:
    """What both statistics share: a count, a dtype, and float64 tensors about shifts frozen at the first block."""

    _AXES: ClassVar[Mapping[str, str]]
    """Name of each tensor -> its axes, for files; the attribute is the name after an underscore."""

    def __init__(self, sizes: Mapping[str, int], device: torch.device | str) -> None:
        self.count = 0
        self.dtype = torch.float32
        """float64 once a float64 row of x was seen: the precision that what is fitted should have."""
        self._shift_frozen = False
        for name, axes in self._AXES.items():
            shape = [sizes[axis] for axis in axes.split()]
            setattr(self, f"_{name}", torch.zeros(shape, dtype=torch.float64, device=device))

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"_{name}") for name in self._AXES}

    def reset(self) -> None:
        """Discard the rows and keep the shifts: float32 products about one shift are the same in every process."""
        self.count, self._shift_frozen = 0, bool(self.count) or self._shift_frozen
        for name, tensor in self._tensors().items():
            if not name.endswith("shift"):
                tensor.zero_()

    def cpu(self: S) -> S:
        """The same values on the CPU."""
        return self._copy(self.count, self.dtype, {name: tensor.cpu() for name, tensor in self._tensors().items()})

    def state(self) -> dict[str, Tensor]:
        """Count, shifts, sums and whether a row was float64, as tensors for a file."""
        plain = {"count": torch.tensor(self.count), "wide": torch.tensor(self.dtype == torch.float64)}
        return plain | self._tensors()

    @classmethod
    def of_state(cls: type[S], state: Mapping[str, Tensor]) -> S:
        """The statistic with this state.

        Raises:
            ShapeError: if a tensor is missing, is unexpected, or has another shape.
        """
        check_state(state, {"count": "", "wide": "", **cls._AXES})
        dtype = torch.float64 if bool(state["wide"]) else torch.float32
        return cls.__new__(cls)._copy(int(state["count"]), dtype, {name: state[name] for name in cls._AXES})

    def _copy(self: S, count: int, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> S:
        new = copy(self)
        new.count, new.dtype, new._shift_frozen = count, dtype, False
        for name, tensor in tensors.items():
            setattr(new, f"_{name}", tensor)
        return new


class Moments(_Sums):
    """Count, mean and scatter of the counted rows: what closed-form fits are made of.

    Sums of x - shift and (x - shift)(x - shift)^T are kept in float64, with the shift frozen at the mean of the first
    block, so a mean far from zero costs no digits. `+` merges: C = Ca + Cb + (na nb / n) delta delta^T.
    """

    _AXES: ClassVar[Mapping[str, str]] = {"shift": "d", "total": "d", "square": "d d"}
    _shift: Tensor
    _total: Tensor
    """sum (x - shift)"""
    _square: Tensor
    """sum (x - shift)(x - shift)^T; the lower triangle is valid."""

    @checked
    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        check_whole(width=width)
        super().__init__({"d": width}, device)

    @property
    def width(self) -> int:
        """Width of the rows."""
        return self._total.shape[0]

    def __repr__(self) -> str:
        return f"Moments(width={self.width}, count={self.count})"

    @checked
    def update(self, x: Float[Tensor, "... d"], mask: Bool[Tensor, "*_"] | None = None) -> Moments:
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
            return (other if other.count else self).scaled(1.0)
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        scatter = self.scatter + other.scatter + (self.count * other.count / count) * torch.outer(delta, delta)
        return self._from_scatter(count, mean, scatter, torch.promote_types(self.dtype, other.dtype))

    @checked
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

    @checked
    def scaled(self, factor: float) -> Moments:
        """The statistic of the rows multiplied by a factor."""
        return self._from_scatter(self.count, self.mean * factor, self.scatter * factor**2, self.dtype)

    def _from_scatter(self, count: int, mean: Tensor, scatter: Tensor, dtype: torch.dtype) -> Moments:
        # Rounded as in `shift_of`; what the rounding leaves of the mean stays in the sums.
        shift = mean.float().double()
        rest = mean - shift
        square = scatter + count * torch.outer(rest, rest)
        return self._copy(count, dtype, {"shift": shift, "total": count * rest, "square": square})


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


class CrossMoments(_Sums):
    """Count, both means and the cross scatter of rows x (width d) and z (width k): cov(x, z) and E[x z^T].

    z are labels of the rows (one-hot classes, say), or the gradient dL/dx. Sums are kept as in `Moments`.
    """

    _AXES: ClassVar[Mapping[str, str]] = {
        "x_shift": "d",
        "x_total": "d",
        "z_shift": "k",
        "z_total": "k",
        "product": "d k",
    }
    _x_shift: Tensor
    _x_total: Tensor
    """sum (x - x_shift)"""
    _z_shift: Tensor
    _z_total: Tensor
    """sum (z - z_shift)"""
    _product: Tensor
    """sum (x - x_shift)(z - z_shift)^T"""

    @checked
    def __init__(self, width: int, other: int, device: torch.device | str = "cpu") -> None:
        check_whole(width=width, other=other)
        super().__init__({"d": width, "k": other}, device)

    @property
    def width(self) -> int:
        """Width of x."""
        return self._product.shape[0]

    @property
    def other(self) -> int:
        """Width of z."""
        return self._product.shape[1]

    def __repr__(self) -> str:
        return f"CrossMoments(width={self.width}, other={self.other}, count={self.count})"

    @checked
    def update(
        self, x: Float[Tensor, "... d"], z: Float[Tensor, "... k"], mask: Bool[Tensor, "*_"] | None = None
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
        frozen = bool(self.count) or self._shift_frozen
        shifts = (self._x_shift, self._z_shift) if frozen else (shift_of(xs), shift_of(zs))
        sums = []
        with exact_products():
            for a, b in zip(xs.split(BLOCK), zs.split(BLOCK), strict=True):
                a, b = subtract_shift(a, shifts[0]), subtract_shift(b, shifts[1])
                work = torch.promote_types(a.dtype, b.dtype)
                sums.append((a.sum(0), b.sum(0), a.to(work).T @ b.to(work)))
                check_finite_sums(sums[-1][0], "the sum of coordinate")
                check_finite_sums(sums[-1][1], "the sum of label or gradient")
                check_finite_sums(sums[-1][2].sum(1), "the product with coordinate")
        self.count += xs.shape[0]
        self.dtype = torch.promote_types(self.dtype, sums[0][0].dtype)
        self._x_shift, self._z_shift = shifts
        for a, b, product in sums:
            self._x_total += a
            self._z_total += b
            self._product += product
        return self

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

    @checked
    def all_reduced(self, ranks: ProcessGroup) -> CrossMoments:
        """The statistic of the rows of all ranks, on every rank: scatters about common shifts, added up."""
        if ranks.size == 1:
            return self
        sums = (self._x_total + self.count * self._x_shift, self._z_total + self.count * self._z_shift)
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
        return self._x_shift + self._x_total / max(self.count, 1)

    @property
    def other_mean(self) -> Float[Tensor, " k"]:
        """Mean of z."""
        return self._z_shift + self._z_total / max(self.count, 1)

    @property
    def scatter(self) -> Float[Tensor, "d k"]:
        """sum (x - mean)(z - other_mean)^T."""
        return self._product - torch.outer(self._x_total, self._z_total / max(self.count, 1))

    @property
    def covariance(self) -> Float[Tensor, "d k"]:
        """cov(x, z): scatter / count."""
        return self.scatter / max(self.count, 1)

    @property
    def second(self) -> Float[Tensor, "d k"]:
        """E[x z^T]."""
        return self.covariance + torch.outer(self.mean, self.other_mean)

    def _from_scatter(
        self, count: int, means: tuple[Tensor, Tensor], scatter: Tensor, dtype: torch.dtype
    ) -> CrossMoments:
        shifts = [mean.float().double() for mean in means]
        totals = [count * (mean - shift) for mean, shift in zip(means, shifts, strict=True)]
        product = scatter + torch.outer(totals[0], totals[1]) / max(count, 1)
        sides = {"x_shift": shifts[0], "x_total": totals[0], "z_shift": shifts[1], "z_total": totals[1]}
        return self._copy(count, dtype, {**sides, "product": product})


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


def selected_rows(x: Float[Tensor, "... d"], mask: Bool[Tensor, "*_"] | None, width: int) -> Float[Tensor, "n d"]:
    """The rows where `mask` is True; the others may hold NaN, so they are removed and not multiplied by zero.

    Raises:
        ShapeError: if x is not of this width, or the mask does not have its leading shape.
    """
    check_row_shape(x, mask, width)
    rows = rearrange(x.detach(), "... d -> (...) d")
    # Always removed, so that the same rows give the same bits wherever the padding is.
    return rows if mask is None else rows[mask.reshape(-1).to(rows.device)]


def check_row_shape(x: Float[Tensor, "... d"], mask: Bool[Tensor, "*_"] | None, width: int) -> None:
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
