"""How active each neuron of a site is: a few float64 vectors, updated batch by batch, that merge exactly.

Nothing of size tokens x width is kept, so data-parallel collection is one all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.arguments import checked
from repedit.distributed import ProcessGroup
from repedit.errors import MissingStatistic, ShapeError, check_whole
from repedit.kernels import dispatch
from repedit.stats.moments import check_finite_sums, check_row_shape, check_state

GRADIENT_FIELDS = ("gxa_abs", "gxa", "gxa_square", "grad")
# A first batch whose |mean| exceeds 30 standard deviations is summed about its mean: float32 block sums of squares
# lose (mean/std)^2 * 6e-8 of the variance, 5e-5 at 30 (tests/test_stats.py::test_variance_survives_a_large_mean).
SHIFT_RATIO = 30.0


@dataclass(eq=False)
@checked
class Activity:
    """Sums of neuron activations z over the counted tokens, and of z * dL/dz with gradients.

    Every field is a float64 vector with one entry for each neuron. `count` is a vector because an expert's neurons
    count only the tokens routed to them. First positions are summed separately: they reveal attention-sink neurons.
    """

    count: Float[Tensor, " d"]
    total: Float[Tensor, " d"]
    """sum (z - shift)"""
    abs: Float[Tensor, " d"]
    """sum |z|"""
    square: Float[Tensor, " d"]
    """sum (z - shift)^2"""
    positive: Float[Tensor, " d"]
    """count z > 0"""
    first_count: Float[Tensor, " d"]
    first_abs: Float[Tensor, " d"]
    first_square: Float[Tensor, " d"]
    shift: Float[Tensor, " d"] | None = None
    gxa_abs: Float[Tensor, " d"] | None = None
    """sum |z g|"""
    gxa: Float[Tensor, " d"] | None = None
    """sum z g"""
    gxa_square: Float[Tensor, " d"] | None = None
    """sum (z g)^2"""
    grad: Float[Tensor, " d"] | None = None
    """sum g"""

    @staticmethod
    @checked
    def zeros(width: int, *, gradients: bool = False, device: torch.device | str = "cpu") -> Activity:
        """The statistic of no tokens.

        Raises:
            ArgumentError: if the width is not a whole number of at least 1.
        """
        check_whole(width=width)
        plain = {f.name: torch.zeros(width, dtype=torch.float64, device=device) for f in fields(Activity)}
        absent = {"shift"} | (set() if gradients else set(GRADIENT_FIELDS))
        return Activity(**{name: None if name in absent else value for name, value in plain.items()})  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        """Number of neurons."""
        return self.count.shape[0]

    @property
    def has_gradients(self) -> bool:
        """Whether the sums with gradients were collected."""
        return self.gxa is not None

    @checked
    def update(
        self,
        x: Float[Tensor, "... d"],
        mask: Bool[Tensor, "*_"] | None = None,
        *,
        grad: Float[Tensor, "... d"] | None = None,
        first: Bool[Tensor, "*_"] | None = None,
        at: slice = slice(None),
    ) -> Activity:
        """Add the rows of x where `mask` is True, in place; `first` marks first positions, summed separately.

        Args:
            at: the neurons that x holds, for a site whose neurons arrive in parts (experts).
        Raises:
            ShapeError: if x or the mask does not fit.
            NotFinite: if a counted activation or gradient is NaN or infinite.
        """
        rows, marks = self._rows(x, mask, at)
        if bool(marks.any()):
            if self.shift is None and at == slice(None) and not bool(self.count.any()):
                self.shift = _shift(rows, marks)
            gradient = None if grad is None else rearrange(grad, "... d -> (...) d")
            part = None if self.shift is None else self.shift[at]
            self._add(dispatch.activity(rows, marks, gradient, part), float(marks.sum()), at)
        if first is not None and bool(first.any()):
            picked = rows[first.reshape(-1)].double()
            self.first_count[at] += picked.shape[0]
            self.first_abs[at] += picked.abs().sum(0)
            self.first_square[at] += picked.square().sum(0)
        return self

    def __add__(self, other: Activity) -> Activity:
        """The statistic of both sets of tokens; exact up to float64 rounding."""
        if self.width != other.width:
            raise ShapeError(f"cannot merge statistics of widths {self.width} and {other.width}; are they of one site?")
        if self.has_gradients != other.has_gradients:
            raise MissingStatistic(
                "one statistic has gradient sums, the other has none; use collect(..., gradients=True) for both"
            )
        a, b = self._about(self.shift), other._about(self.shift)
        merged: Any = {
            name: value if name == "shift" or value is None else value + getattr(b, name) for name, value in a._items()
        }
        return Activity(**merged)

    @checked
    def all_reduced(self, ranks: ProcessGroup) -> Activity:
        """The statistic of the tokens of all ranks, on every rank: sums about the first rank's shift, added up."""
        if ranks.size == 1:
            return self
        shift = ranks.broadcast(torch.zeros_like(self.count) if self.shift is None else self.shift.clone())
        local = self._about(shift)
        names = [name for name in local.state() if name != "shift"]
        sums = ranks.sum(torch.stack([getattr(local, name) for name in names]))
        return replace(local, shift=shift if bool(shift.any()) else None, **dict(zip(names, sums, strict=True)))

    def cpu(self) -> Activity:
        """The same values on the CPU."""
        moved: Any = {name: None if value is None else value.cpu() for name, value in self._items()}
        return Activity(**moved)

    def state(self) -> dict[str, Tensor]:
        """Every vector by its name, as tensors for a file."""
        return {name: value for name, value in self._items() if value is not None}

    @staticmethod
    @checked
    def of_state(state: Mapping[str, Tensor]) -> Activity:
        """The statistic with this state.

        Raises:
            ShapeError: if a tensor is missing, is unexpected, or has another shape.
        """
        check_state(state, {f.name: "d" for f in fields(Activity)}, {"shift", *GRADIENT_FIELDS})
        return Activity(**{f.name: state.get(f.name) for f in fields(Activity)})  # type: ignore[arg-type]

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean activation; 0 where no token counted."""
        mean = self.total / self.count.clamp(min=1)
        return mean if self.shift is None else mean + self.shift * (self.count > 0)

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """Population variance of the activation."""
        n = self.count.clamp(min=1)
        return (self.square / n - (self.total / n).square()).clamp(min=0)

    @property
    def rms(self) -> Float[Tensor, " d"]:
        """sqrt(mean z^2)."""
        return (self.variance + self.mean.square()).sqrt()

    def _items(self) -> Iterator[tuple[str, Any]]:
        return ((f.name, getattr(self, f.name)) for f in fields(self))

    def _rows(self, x: Tensor, mask: Tensor | None, at: slice) -> tuple[Tensor, Tensor]:
        check_row_shape(x, mask, len(range(*at.indices(self.width))))
        rows = rearrange(x.detach(), "... d -> (...) d")
        return rows, torch.ones(rows.shape[0], dtype=torch.bool, device=x.device) if mask is None else mask.reshape(-1)

    def _add(self, sums: dict[str, Tensor], count: float, at: slice) -> None:
        for name, value in sums.items():
            check_finite_sums(value, f"the sum {name!r} of neuron")
        for name, value in sums.items():
            getattr(self, name)[at] += value
        self.count[at] += count

    def _about(self, shift: Tensor | None) -> Activity:
        """The same statistic with its sums taken about another shift: S1' = S1 + n d, S2' = S2 + 2 d S1 + n d^2."""
        zero = torch.zeros_like(self.count)
        old, new = (zero if s is None else s for s in (self.shift, shift))
        d = old - new
        total = self.total + self.count * d
        square = self.square + 2 * d * self.total + self.count * d.square()
        return replace(self, shift=shift, total=total, square=square)


def _shift(rows: Tensor, mask: Tensor) -> Tensor | None:
    # 64 rows say whether a mean is far from zero; a pass over the whole batch would cost more than the sums.
    sample = rows[mask.nonzero()[:64, 0]].double()
    std, mean = torch.std_mean(sample, dim=0, correction=0)
    far = mean.abs() > SHIFT_RATIO * std
    return torch.where(far & torch.isfinite(mean), mean, 0.0) if bool((far & (mean != 0)).any()) else None
