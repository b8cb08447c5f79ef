"""Directions that tell classes apart: the mean difference, Fisher's discriminant, and LEACE.

Means reach the *topic* of a text. What tells one fact of a topic from another is variance inside it, which only
labels of the answers (LEACE) or second moments (closed_form.py) see.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.errors import ArgumentError, NoSignal, NotEnoughRows, RankError, ShapeError
from repedit.fit.energy import capped
from repedit.fit.inputs import Space, check_finite, check_rows, prepared, ridged
from repedit.fit.subspace import projector
from repedit.maps import LowRank
from repedit.stats import CrossMoments, Moments


def mean_difference(forget: Moments, retain: Moments, *, previous: LowRank | None = None) -> LowRank:
    """The orthogonal projection along the difference of the means: direction ablation, rank 1.

    U = (m_f - m_r) / norm.

    Raises:
        NoSignal: if the means agree.
    Reference: Arditi et al. 2024, arXiv 2406.11717.
    """
    space, dtype = prepared(forget, retain, previous)
    space.check(1)
    check_rows(1, "a mean", forget=forget.count, retain=retain.count)
    direction = _difference(space, forget, retain)
    return projector(space.back(direction / direction.norm()), dtype)


def lda(
    forget: Moments,
    retain: Moments,
    *,
    ridge: float = 1e-3,
    norm_cap: float = 1.05,
    previous: LowRank | None = None,
) -> LowRank:
    """The projection along the mean difference that moves rows least within their class, rank 1.

    P = I - F F^T R^-1 / (F^T R^-1 F), F = m_f - m_r, R the pooled within-class covariance + lam I,
    lam = ridge tr / d. Norms are capped as in `oblique`.

    Raises:
        NotEnoughRows: if the two sets have fewer than d + 1 rows together. NoSignal: if the means agree.
        ArgumentError: if the covariance is singular and ridge is 0.
    """
    space, dtype = prepared(forget, retain, previous)
    space.check(1)
    check_rows(1, "a mean", forget=forget.count, retain=retain.count)
    check_rows(forget.width + 1, "width + 1", **{"forget and retain": forget.count + retain.count})
    direction = _difference(space, forget, retain)
    within = (forget.scatter + retain.scatter) / (forget.count + retain.count)
    lower, failed = torch.linalg.cholesky_ex(ridged(space.restricted(within), ridge))
    if int(failed):
        raise ArgumentError(f"the within-class covariance is singular with ridge={ridge}; use a larger one, 1e-3 say")
    u = direction / direction.norm()
    reader = torch.cholesky_solve(u, lower)
    found, _ = capped(LowRank(space.back(u), space.back(reader / (u.T @ reader))), [forget, retain], norm_cap)
    return LowRank(found.u.to(dtype), found.v.to(dtype))


def leace(
    xx: Moments,
    xz: CrossMoments,
    *,
    svd_tol: float = 0.01,
    shrinkage: bool = True,
    affine: bool = True,
    previous: LowRank | None = None,
) -> LowRank:
    """The least-squares smallest affine map after which no linear probe predicts z from x.

    P = I - W^+ u u^T W, W = cov(x)^(-1/2), u the left singular vectors of W cov(x, z) above `svd_tol`, center the mean
    of x. What is removed is uncorrelated with what is left, so no row set grows. Computed as U = C r / s,
    V = cov(x)^+ C r / s with C = cov(x, z) and s, r the singular values and right vectors of L^-1 C, cov(x) = L L^T.

    Args:
        xx: statistics of x, width d, at least d + 1 rows.
        xz: cross statistics of the same rows with their labels, one-hot classes say.
        shrinkage: shrink cov(x) towards a multiple of I by random-matrix theory (`shrunk`).
        affine: keep the mean of x where it is; without, the map is linear and needs no bias.
    Raises:
        NotEnoughRows: if there are fewer than d + 1 rows. NoSignal: if z does not vary with x.
        RankError: if nothing would remain. ShapeError: if the two are of other rows.
    Reference: Belrose et al. 2023, arXiv 2306.03819, section 4.
    """
    if (xx.width, xx.count) != (xz.width, xz.count):
        raise ShapeError(
            f"xx holds {xx.count} rows of width {xx.width}, xz {xz.count} of width {xz.width}; collect both on one corpus"
        )
    for name, matrix in (("xx", xx.second), ("xz", xz.second)):
        check_finite(name, matrix)
    check_rows(xx.width + 1, "width + 1", xx=xx.count)
    space = Space.after(previous, xx.width)
    sigma, cross = space.restricted(xx.covariance), space.coordinates(xz.covariance)
    if not float(sigma.trace()) > 0:
        raise NotEnoughRows("x does not vary; does the site carry anything, after `previous`?")
    u, v = _whitened_factors(shrunk(sigma, xx.count) if shrinkage else sigma, cross, svd_tol)
    if not u.shape[1]:
        seen = int((xz.other_mean != 0).sum())
        raise NoSignal(
            f"no direction of x predicts z (svd_tol={svd_tol}); {seen} of {xz.other} labels were seen. "
            "Does z take several values, and does x carry them?"
        )
    if u.shape[1] >= xx.width - space.taken:
        raise RankError(
            f"the labels span all {u.shape[1]} directions that are left; use fewer labels or a larger svd_tol"
        )
    dtype = torch.float64 if previous is not None and previous.u.dtype == torch.float64 else xx.dtype
    center = xx.mean.cpu().to(dtype) if affine else None
    return LowRank(space.back(u).to(dtype).contiguous(), space.back(v).to(dtype).contiguous(), center)


def shrunk(sigma: Float[Tensor, "d d"], rows: int) -> Float[Tensor, "d d"]:
    """alpha sigma + (1 - alpha) (tr sigma / d) I, with the alpha of least Frobenius error for this many rows.

    1 - alpha = tr(sigma)^2 / (n ||sigma - (tr sigma / d) I||^2) with ||.|| the Frobenius norm, in [0, 1].

    Reference: Bodnar et al. 2014, arXiv 1308.2608, equations 2.10-2.11.
    """
    mean = sigma.trace() / sigma.shape[0]
    target = mean * torch.eye(sigma.shape[0], dtype=sigma.dtype)
    away = (sigma - target).square().sum()
    rest = (sigma.trace().square() / (rows * away.clamp(min=1e-300))).clamp(max=1.0)
    return (1 - rest) * sigma + rest * target


def _difference(space: Space, forget: Moments, retain: Moments) -> Float[Tensor, "c 1"]:
    direction = space.coordinates((forget.mean - retain.mean)[:, None])
    scale = float((forget.second.trace() + retain.second.trace()) ** 0.5)
    if not float(direction.norm()) > 1e-9 * scale:
        raise NoSignal(
            "the means of forget and retain agree"
            + (" outside of what `previous` removed" if space.taken else "")
            + ", so there is no direction between them; are the two sets different?"
        )
    return direction


def _whitened_factors(sigma: Tensor, cross: Tensor, svd_tol: float) -> tuple[Tensor, Tensor]:
    """(C r / s, sigma^+ C r / s) for the singular values s > svd_tol of sigma^(-1/2) C."""
    lower, failed = torch.linalg.cholesky_ex(sigma)
    pivots = lower.diagonal().square()
    if not int(failed) and float(pivots.min()) > 1e-10 * float(pivots.max()):
        half = torch.linalg.solve_triangular(lower, cross, upper=False)
        solved = torch.linalg.solve_triangular(lower.T, half, upper=True)
    else:
        values, vectors = torch.linalg.eigh(sigma)
        # What torch.linalg.pinv takes for zero.
        known = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        values, vectors = values[known], vectors[:, known]
        half = (vectors.T @ cross) / values.sqrt()[:, None]
        solved = vectors @ (half / values.sqrt()[:, None])
        cross = vectors @ (vectors.T @ cross)
    _, size, right = torch.linalg.svd(half, full_matrices=False)
    keep = size > svd_tol
    r = right.T[:, keep] / size[keep]
    return cross @ r, solved @ r
