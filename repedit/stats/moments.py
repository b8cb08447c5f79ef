"""Mean and covariance of the rows at a site, added to batch by batch and merged exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.errors import ArgumentError, NotEnoughRows, ShapeError
from repedit.ranks import Ranks
from repedit.stats.rows import (
    BLOCK,
    centre,
    centred,
    check_finite,
    check_state,
    counted,
    exact_products,
    triangle,
    whole,
)


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
        self._kept = False
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
        rows = counted(x, mask, self.width)
        if not rows.shape[0]:
            return self
        shift = self._shift if self.count or self._kept else centre(rows)
        sums, products = [], []
        with exact_products():
            for block in rows.split(BLOCK):
                rest = centred(block, shift)
                sums.append(rest.sum(0))
                products.append(triangle(rest))
                check_finite(products[-1].diagonal(), "the sum of squares of coordinate")
        self._shift, self.count = shift, self.count + rows.shape[0]
        self.dtype = torch.promote_types(self.dtype, sums[0].dtype)
        for total, product in zip(sums, products, strict=True):
            self._total += total
            self._square += product
        return self

    def empty(self) -> None:
        """Forget the rows and keep the shift: float32 products about one shift are the same in every process."""
        self.count, self._kept = 0, bool(self.count) or self._kept
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
            return (other if other.count else self)._like(1.0)
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        scatter = self.scatter + other.scatter + (self.count * other.count / count) * torch.outer(delta, delta)
        return self._of(count, mean, scatter, torch.promote_types(self.dtype, other.dtype))

    def over(self, ranks: Ranks) -> Moments:
        """The statistic of the rows of all ranks, on every rank: scatters about one common shift, added up."""
        if ranks.size == 1:
            return self
        summed = ranks.total(torch.cat([self._total + self.count * self._shift, self._total.new_tensor([self.count])]))
        count = int(summed[-1])
        mean = summed[:-1] / max(count, 1)
        rest = self.mean - mean if self.count else torch.zeros_like(mean)
        scatter = ranks.total(self.scatter + self.count * torch.outer(rest, rest))
        wide = ranks.any(self.dtype == torch.float64, mean.device)
        return self._of(count, mean, scatter, torch.float64 if wide else torch.float32)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean of the rows; 0 where there are none."""
        return self._shift + self._total / max(self.count, 1)

    @property
    def scatter(self) -> Float[Tensor, "d d"]:
        """sum (x - mean)(x - mean)^T."""
        return whole(self._square) - torch.outer(self._total, self._total) / max(self.count, 1)

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
        return self._like(factor)

    def cpu(self) -> Moments:
        """The same values in main memory."""
        moved = Moments(0)
        moved.width, moved.count, moved.dtype = self.width, self.count, self.dtype
        moved._shift, moved._total, moved._square = self._shift.cpu(), self._total.cpu(), self._square.cpu()
        return moved

    def state(self) -> dict[str, Tensor]:
        """Count, shift, sums and whether a row was float64, for a file."""
        plain = {"count": torch.tensor(self.count), "wide": torch.tensor(self.dtype == torch.float64)}
        return plain | {"shift": self._shift, "total": self._total, "square": self._square}

    @staticmethod
    def of_state(state: Mapping[str, Tensor]) -> Moments:
        """What `state` gave.

        Raises:
            ShapeError: if the tensors are others.
        """
        check_state(state, {"count": "", "wide": "", "shift": "d", "total": "d", "square": "d d"})
        new = Moments(0)
        new.width, new.count = len(state["shift"]), int(state["count"])
        new.dtype = torch.float64 if bool(state["wide"]) else torch.float32
        new._shift, new._total, new._square = (state[name] for name in ("shift", "total", "square"))
        return new

    def _like(self, factor: float) -> Moments:
        return self._of(self.count, self.mean * factor, self.scatter * factor**2, self.dtype)

    def _of(self, count: int, mean: Tensor, scatter: Tensor, dtype: torch.dtype) -> Moments:
        new = Moments(0)
        new.width, new.count, new.dtype = self.width, count, dtype
        # Rounded as in `centre`; what the rounding leaves of the mean stays in the sums.
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
