"""What every closed form asks of its statistics, and the space it may choose from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.errors import NotEnoughRows, NotFinite, RankError, ShapeError
from repedit.fit.subspace import complement, orthonormal
from repedit.maps import LowRank
from repedit.stats import CrossMoments, Moments

Statistic = Moments | CrossMoments


@dataclass(frozen=True, eq=False)
class Space:
    """What earlier projections have left: coordinates in the complement of span(previous.u), and the way back."""

    width: int
    taken: int
    basis: Float[Tensor, "d c"] | None
    """None where nothing was removed before: the coordinates are the entries of x."""

    @staticmethod
    def after(previous: LowRank | None, width: int) -> Space:
        """The space outside of an earlier projection.

        Raises:
            ShapeError: if the projection has another width.
        """
        if previous is None or not previous.u.numel():
            return Space(width, 0, None)
        if previous.width != width:
            raise ShapeError(
                f"previous has width {previous.width}, the statistics have width {width}; was it fitted on another model?"
            )
        taken = orthonormal(previous.u.cpu())
        return Space(width, taken.shape[1], complement(taken))

    def check(self, rank: int) -> None:
        """Refuse a rank that is not there.

        Raises:
            RankError: if it is not positive, or not below what is left.
        """
        largest = self.width - self.taken - 1
        if not 1 <= rank <= largest:
            raise RankError(
                f"rank {rank} was asked for, 1 to {largest} is possible: the width is {self.width}, {self.taken} "
                "directions are removed already and one must remain; to remove nothing give a (d, 0) basis"
            )

    def restricted(self, matrix: Float[Tensor, "d d"]) -> Float[Tensor, "c c"]:
        """N^T M N: a symmetric form on what is left."""
        matrix = matrix.cpu()
        return matrix if self.basis is None else self.basis.T @ matrix @ self.basis

    def coordinates(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "c k"]:
        """N^T v."""
        return vectors.cpu() if self.basis is None else self.basis.T @ vectors.cpu()

    def back(self, vectors: Float[Tensor, "c k"]) -> Float[Tensor, "d k"]:
        """N w: vectors of full width, orthogonal to what was removed."""
        return vectors if self.basis is None else self.basis @ vectors


def prepared(forget: Statistic, retain: Statistic, previous: LowRank | None) -> tuple[Space, torch.dtype]:
    """The space to choose from and the dtype of the factors.

    Raises:
        ShapeError: if the widths differ. NotFinite: if a statistic is not finite.
    """
    if forget.width != retain.width:
        raise ShapeError(
            f"forget has width {forget.width}, retain has width {retain.width}; were they collected at one site, "
            "or was one fitted on another model?"
        )
    for name, statistic in (("forget", forget), ("retain", retain)):
        check_finite(name, statistic.second)
    dtype = torch.promote_types(forget.dtype, retain.dtype)
    if previous is not None:
        dtype = torch.promote_types(dtype, previous.u.dtype)
    return Space.after(previous, forget.width), dtype


def check_finite(name: str, matrix: Float[Tensor, "d k"]) -> None:
    """Refuse NaN and infinity.

    Raises:
        NotFinite: with the first bad coordinate.
    """
    if not bool(torch.isfinite(matrix).all()):
        bad = int((~torch.isfinite(matrix)).nonzero()[0, 0])
        raise NotFinite(f"the {name} statistic is not finite at coordinate {bad}; collect it again in float32?")


def check_rows(needed: int, why: str, **counts: int) -> None:
    """Refuse statistics of too few rows.

    Raises:
        NotEnoughRows: with the rows found and needed.
    """
    for name, count in counts.items():
        if count < needed:
            raise NotEnoughRows(f"{name} has {count} rows, {needed} are needed ({why}); collect more text")


def ridged(matrix: Float[Tensor, "c c"], ridge: float) -> Float[Tensor, "c c"]:
    """M + lam I with lam = ridge * tr(M) / d.

    Raises:
        NotEnoughRows: if M has no energy at all.
    """
    mean = float(matrix.trace()) / matrix.shape[0]
    if not mean > 0:
        raise NotEnoughRows("the retain statistic has no energy here; does the site carry anything, after `previous`?")
    return matrix + ridge * mean * torch.eye(matrix.shape[0], dtype=matrix.dtype)
