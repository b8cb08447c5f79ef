"""Measures of a projection: what it does to the energy of rows, and where the energy of two sets lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.errors import ArgumentError
from repedit.fit.linalg import prepared
from repedit.linear_maps import LowRank
from repedit.stats import Moments


def norm_ratio(map_: LowRank, moments: Moments) -> float:
    """E ||P x||^2 / E ||x||^2, both about the map's center; above 1 the map makes rows longer."""
    return _energy(map_, _about(map_, moments), 0.0)


def distortion(map_: LowRank, moments: Moments) -> float:
    """E ||P x - x||^2 / E ||x||^2, about the map's center: the share of the energy that the map changes."""
    second = _about(map_, moments)
    u, v = _factors(map_)
    return float(((v.T @ second @ v) * (u.T @ u)).sum() / second.trace())


def capped(map_: LowRank, moments: Sequence[Moments], norm_cap: float = 1.05) -> tuple[LowRank, float]:
    """The map with V replaced by (1 - t) V + t U, U orthonormal, with the smallest t that bounds the norms.

    For each set of rows E ||P x||^2 <= norm_cap E ||x||^2, about the map's center. V^T U = I for every t, so the kernel
    does not change; t = 1 is the orthogonal projection, which never makes a row longer. Returns (map, t).

    Raises:
        ArgumentError: if norm_cap is below 1.
    """
    if not norm_cap >= 1:
        raise ArgumentError(
            f"norm_cap={norm_cap} is below 1, which a projection with this kernel may be unable to satisfy"
        )
    seconds = [_about(map_, m) for m in moments]
    t = max((_mixture(map_, second, norm_cap) for second in seconds), default=0.0)
    if t == 0.0:
        return map_, 0.0
    u, v = _orthonormal_factors(map_)
    mixed = (1 - t) * v + t * u
    return LowRank(u.to(map_.u.dtype).contiguous(), mixed.to(map_.v.dtype).contiguous(), map_.center), t


@dataclass(frozen=True, eq=False)
class Spectra:
    """Energies along the principal directions of two sets, descending, each summing to the trace."""

    forget: Float[Tensor, " d"]
    retain: Float[Tensor, " d"]
    residual: Float[Tensor, " r"]
    """Forget energy outside the first `cut` principal directions of retain."""
    cut: int
    """Number of principal directions of retain that `residual_pca` avoids."""

    @property
    def share(self) -> float:
        """Share of the forget energy that is outside the cut."""
        return float(self.residual.sum() / self.forget.sum())


def spectra(
    forget: Moments, retain: Moments, *, rank: int = 16, energy: float = 0.95, previous: LowRank | None = None
) -> Spectra:
    """The eigenvalues of S_f, S_r and of S_f outside the retain span, as `residual_pca` uses them."""
    space, _ = prepared(forget, retain, previous)
    space.check(rank)
    forgotten = space.restricted(forget.second)
    values, vectors = torch.linalg.eigh(space.restricted(retain.second))
    m = cut(values.flip(0), energy, rank)
    outside = vectors.flip(1)[:, m:]
    residual = _eigenvalues(outside.T @ forgotten @ outside)
    return Spectra(_eigenvalues(forgotten), values.flip(0).clamp(min=0), residual, m)


def cut(values: Float[Tensor, " c"], energy: float, rank: int) -> int:
    """How many of the descending eigenvalues hold this share of their sum, at most as many as leave room for the rank."""
    sums = values.clamp(min=0).cumsum(0)
    # 1e-12: the last partial sum is the total, whatever the rounding of the previous ones.
    enough = int((sums < energy * sums[-1] * (1 - 1e-12)).sum()) + 1 if energy > 0 else 0
    return min(enough, len(values) - rank)


def _eigenvalues(matrix: Float[Tensor, "c c"]) -> Float[Tensor, " c"]:
    """Descending, without negative rounding errors."""
    return torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0)


def _about(map_: LowRank, moments: Moments) -> Tensor:
    """E (x - c)(x - c)^T, c the center of the map (0 without one)."""
    if map_.center is None:
        return moments.second.cpu()
    offset = (moments.mean - map_.center.to(moments.mean)).cpu()
    return moments.covariance.cpu() + torch.outer(offset, offset)


def _factors(map_: LowRank) -> tuple[Tensor, Tensor]:
    return map_.u.double().cpu(), map_.v.double().cpu()


def _orthonormal_factors(map_: LowRank) -> tuple[Tensor, Tensor]:
    """(Q, V r^T) with U = Q r: the same product, with an orthonormal first factor."""
    u, v = _factors(map_)
    q, r = torch.linalg.qr(u)
    return q, v @ r.T


def _energy(map_: LowRank, second: Tensor, t: float) -> float:
    """E ||P_t x||^2 / E ||x||^2."""
    u, v = _orthonormal_factors(map_)
    v = (1 - t) * v + t * u
    changed = (v.T @ second @ v).trace() - 2 * (v.T @ second @ u).trace()
    return float(1 + changed / second.trace())


def _mixture(map_: LowRank, second: Tensor, norm_cap: float) -> float:
    """The smallest t in [0, 1] with energy at most norm_cap: the energy is a parabola a + b t + c t^2 in t."""
    a, middle, end = (_energy(map_, second, t) for t in (0.0, 0.5, 1.0))
    if a <= norm_cap:
        return 0.0
    c = 2 * (a - 2 * middle + end)
    b = end - a - c
    t = 2 * (a - norm_cap) / (-b + max(b * b - 4 * c * (a - norm_cap), 0.0) ** 0.5)
    return min(max(t, 0.0), 1.0)
