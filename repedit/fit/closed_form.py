"""Subspaces to remove, in closed form: eigenproblems of second moments, discriminants, and LEACE.

S_f and S_r are the uncentred second moments E[x x^T] of the forget and retain rows, k is the rank. With `previous`, a fit
chooses in the complement of what is removed already, and its result is orthogonal to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.arguments import checked
from repedit.errors import (
    ArgumentError,
    NoSignal,
    NotEnoughRows,
    NothingLeft,
    RankError,
    ShapeError,
    check_seed,
    check_whole,
)
from repedit.fit.linalg import (
    Space,
    capped,
    check_energy,
    check_finite_matrix,
    check_rows,
    cut,
    orthonormal,
    prepared,
    projector,
    ridged,
    sign_fixed,
    symmetric,
    top_eigenvectors,
)
from repedit.linear_maps import LowRank
from repedit.stats import CrossMoments, Moments

# Below this share of the forget energy the residual is rounding error, and its principal directions are meaningless.
_NEGLIGIBLE = 1e-6

# --- Second moments of forget and retain rows: one eigenproblem each


@checked
def residual_pca(
    forget: Moments, retain: Moments, *, rank: int = 16, energy: float = 0.95, previous: LowRank | None = None
) -> LowRank:
    """The directions with the most forget energy outside the span that holds the retain energy.

    Q = top-m eigenvectors of S_r, m the fewest with at least `energy` of tr S_r and at most d - k;
    U = top-k eigenvectors of (I - Q Q^T) S_f (I - Q Q^T). It changes retain rows by at most (1 - energy) tr S_r, unless
    d - k limits m.

    Raises:
        FractionError: if energy is not a fraction. RankError, NotEnoughRows, ShapeError, NotFinite: as in every fit.
        NothingLeft: if less than 1e-6 of the forget energy, or fewer than k directions, are outside.
    Reference: the start of MRP, arXiv 2508.15449, with the truncation it needs to have a complement at all.
    """
    check_energy(energy)
    space, dtype = _ready(forget, retain, rank, previous)
    values, vectors = torch.linalg.eigh(space.restricted(retain.second))
    m = cut(values.flip(0), energy, rank)
    outside = vectors.flip(1)[:, m:]
    forgotten = space.restricted(forget.second)
    residual = symmetric(outside.T @ forgotten @ outside)
    share = float(residual.trace()) / max(float(forgotten.trace()), 1e-300)
    top, chosen = top_eigenvectors(residual, rank)
    if share < _NEGLIGIBLE or float(top[-1]) < _NEGLIGIBLE**2 * float(forgotten.trace()):
        raise NothingLeft(
            f"outside the {m} directions that hold {energy:.0%} of the retain energy, {share:.1e} of the forget energy "
            f"is left, not enough for rank {rank}; use a lower energy or rank"
        )
    return projector(sign_fixed(space.back(outside @ chosen)), dtype)


@checked
def cpca(
    forget: Moments, retain: Moments, *, rank: int = 16, alpha: float = 1.2, previous: LowRank | None = None
) -> LowRank:
    """The directions with the most contrast: top-k eigenvectors of S_f - alpha S_r.

    Raises:
        NothingLeft: if no direction holds more forget energy than alpha times its retain energy.
    Reference: contrastive PCA, Abid et al. 2017, arXiv 1709.06716.
    """
    space, dtype = _ready(forget, retain, rank, previous)
    return _leading(space, space.restricted(forget.second - alpha * retain.second), rank, dtype, f"alpha={alpha}")


@checked
def gen_eig(
    forget: Moments, retain: Moments, *, rank: int = 16, ridge: float = 1e-3, previous: LowRank | None = None
) -> LowRank:
    """The span with the largest ratio of forget to retain energy: U = orth(W), S_f w = l R w, largest l first.

    R = S_r + lam I, lam = ridge tr(S_r) / d. The w are the directions to read along, not those along which forget rows are
    written: `oblique` uses both.
    """
    space, dtype = _ready(forget, retain, rank, previous)
    readers, _ = _generalised(space, forget, retain, rank, ridge)
    return projector(orthonormal(space.back(readers), tol=0.0), dtype)


@checked
def oblique(
    forget: Moments,
    retain: Moments,
    *,
    rank: int = 16,
    ridge: float = 1e-3,
    norm_cap: float = 1.05,
    previous: LowRank | None = None,
) -> LowRank:
    """The projection along the forget directions F = S_f W that changes retain rows least.

    P = I - F (F^T R^-1 F)^-1 F^T R^-1, W and R as in `gen_eig`, which makes it I - R W W^T. Among the projections with
    kernel span F it has the smallest distortion in the metric R, tr((F^T R^-1 F)^-1 F^T F); the orthogonal one has more.
    What is removed from a forget row is uncorrelated with what remains (S_f W = R W l), and the ridge only helps retain
    rows, so neither set grows; `norm_cap` enforces this as it does for `lda` (see `capped`).
    """
    space, dtype = _ready(forget, retain, rank, previous)
    readers, metric = _generalised(space, forget, retain, rank, ridge)
    # U = R W a^-1 is orthonormal and V = W a^T, so that U V^T = R W W^T and V^T U = I.
    u, a = torch.linalg.qr(metric @ readers)
    map_ = LowRank(space.back(u).contiguous(), space.back(readers @ a.T).contiguous())
    map_, _ = capped(map_, [forget, retain], norm_cap)
    return LowRank(map_.u.to(dtype), map_.v.to(dtype))


@checked
def grad_pca(
    forget: CrossMoments,
    retain: CrossMoments,
    *,
    rank: int = 16,
    retain_weight: float = 1.2,
    previous: LowRank | None = None,
) -> LowRank:
    """The span whose removal raises L_f - retain_weight * L_r most, to first order.

    Removing U changes a loss by -tr(U^T A U) + O(2), A = E[x g^T], g = dL/dx. So U = top-k eigenvectors of
    -sym(A_f) + retain_weight sym(A_r). This is an argument about small steps, which U U^T x is not.

    Args:
        forget, retain: from collect(..., statistic=CrossMoments, gradients=True).
    Raises:
        NothingLeft: if no direction would raise it.
        ShapeError: if the statistics are not of gradients, which have the width of the rows.
    """
    for name, statistic in (("forget", forget), ("retain", retain)):
        check_gradients(name, statistic)
    space, dtype = _ready(forget, retain, rank, previous)
    slope = retain_weight * retain.second - forget.second
    return _leading(space, space.restricted(symmetric(slope)), rank, dtype, f"retain_weight={retain_weight}")


@checked
def random_basis(d: int, *, rank: int, seed: int, previous: LowRank | None = None) -> LowRank:
    """A uniformly random subspace, the control for every other fit: orthonormalised Gaussian columns.

    Raises:
        ArgumentError: if the width or the seed is out of range. RankError: if the rank is.
    """
    check_whole(d=d)
    check_seed(seed=seed)
    space = Space.after(previous, d)
    space.check(rank)
    draw = torch.randn(d - space.taken, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    dtype = torch.float32 if previous is None else torch.promote_types(torch.float32, previous.u.dtype)
    return projector(sign_fixed(space.back(torch.linalg.qr(draw).Q)), dtype)


def check_gradients(name: str, statistic: CrossMoments) -> None:
    """Refuse cross moments with labels where gradients are needed.

    Raises:
        ShapeError: with both widths.
    """
    if statistic.other != statistic.width:
        raise ShapeError(
            f"{name} pairs rows of width {statistic.width} with values of width {statistic.other}, which are not "
            "gradients; collect with gradients=True"
        )


def _ready(
    forget: Moments | CrossMoments, retain: Moments | CrossMoments, rank: int, previous: LowRank | None
) -> tuple[Space, torch.dtype]:
    space, dtype = prepared(forget, retain, previous)
    space.check(rank)
    check_rows(rank, f"rank {rank}", forget=forget.count, retain=retain.count)
    return space, dtype


def _leading(space: Space, contrast: Tensor, rank: int, dtype: torch.dtype, option: str) -> LowRank:
    values, vectors = top_eigenvectors(symmetric(contrast), rank)
    if not float(values[0]) > 1e-12 * float(contrast.norm()):
        raise NothingLeft(
            f"no direction favours forget over retain with {option} (the largest eigenvalue is {float(values[0]):.1e}); "
            "are the two sets different? Lower it, or collect other text"
        )
    return projector(sign_fixed(space.back(vectors)), dtype)


def _generalised(space: Space, forget: Moments, retain: Moments, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """(W, R): S_f w = l R w with W^T R W = I, by Cholesky of R and an ordinary eigenproblem of L^-1 S_f L^-T."""
    metric = ridged(space.restricted(retain.second), ridge)
    lower, failed = torch.linalg.cholesky_ex(metric)
    if int(failed):
        raise ArgumentError(f"the retain second moment is singular with ridge={ridge}; use a larger one, 1e-3 say")
    half = torch.linalg.solve_triangular(lower, space.restricted(forget.second), upper=False)
    ratio = torch.linalg.solve_triangular(lower, half.T, upper=False)
    _, vectors = top_eigenvectors(symmetric(ratio), rank)
    return torch.linalg.solve_triangular(lower.T, vectors, upper=True), metric


# --- Directions that separate classes: the mean difference, Fisher's discriminant, and LEACE
#
# Means carry the topic of a text. Facts of one topic differ by variance within it, which only labels of the answers (LEACE)
# or second moments capture.


@checked
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


@checked
def lda(
    forget: Moments, retain: Moments, *, ridge: float = 1e-3, norm_cap: float = 1.05, previous: LowRank | None = None
) -> LowRank:
    """The projection along the mean difference that changes rows least within their class, rank 1.

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
    map_, _ = capped(LowRank(space.back(u), space.back(reader / (u.T @ reader))), [forget, retain], norm_cap)
    return LowRank(map_.u.to(dtype), map_.v.to(dtype))


@checked
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
    of x. What is removed is uncorrelated with what remains, so no set of rows grows. Computed as U = C r / s,
    V = cov(x)^+ C r / s with C = cov(x, z) and s, r the singular values and right vectors of L^-1 C, cov(x) = L L^T.

    Args:
        xx: statistics of x, width d, at least d + 1 rows.
        xz: cross statistics of the same rows with their labels, such as one-hot classes.
        shrinkage: shrink cov(x) towards a multiple of I by random-matrix theory (`shrunk`).
        affine: keep the mean of x; otherwise the map is linear and needs no bias.
    Raises:
        NotEnoughRows: if there are fewer than d + 1 rows. NoSignal: if z does not vary with x.
        RankError: if nothing would remain. ShapeError: if the two are of different rows.
    Reference: Belrose et al. 2023, arXiv 2306.03819, section 4.
    """
    if (xx.width, xx.count) != (xz.width, xz.count):
        raise ShapeError(
            f"xx holds {xx.count} rows of width {xx.width}, xz {xz.count} of width {xz.width}; collect both on one corpus"
        )
    for name, matrix in (("xx", xx.second), ("xz", xz.second)):
        check_finite_matrix(name, matrix)
    check_rows(xx.width + 1, "width + 1", xx=xx.count)
    space = Space.after(previous, xx.width)
    sigma, cross = space.restricted(xx.covariance), space.coordinates(xz.covariance)
    if not float(sigma.trace()) > 0:
        raise NotEnoughRows("x does not vary; does the site carry anything, after `previous`?")
    u, v = _whitened_factors(shrunk(sigma, xx.count) if shrinkage else sigma, cross, svd_tol)
    if not u.shape[1]:
        occurring = int((xz.other_mean != 0).sum())
        raise NoSignal(
            f"no direction of x predicts z (svd_tol={svd_tol}); {occurring} of {xz.other} labels occur. "
            "Does z take several values, and does x carry them?"
        )
    if u.shape[1] >= xx.width - space.taken:
        raise RankError(
            f"the labels span all {u.shape[1]} directions that are left; use fewer labels or a larger svd_tol"
        )
    dtype = torch.float64 if previous is not None and previous.u.dtype == torch.float64 else xx.dtype
    center = xx.mean.cpu().to(dtype) if affine else None
    return LowRank(space.back(u).to(dtype).contiguous(), space.back(v).to(dtype).contiguous(), center)


@checked
def shrunk(sigma: Float[Tensor, "d d"], rows: int) -> Float[Tensor, "d d"]:
    """alpha sigma + (1 - alpha) (tr sigma / d) I, with the alpha of smallest Frobenius error for this many rows.

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
        # The tolerance of torch.linalg.pinv.
        nonzero = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        values, vectors = values[nonzero], vectors[:, nonzero]
        half = (vectors.T @ cross) / values.sqrt()[:, None]
        solved = vectors @ (half / values.sqrt()[:, None])
        cross = vectors @ (vectors.T @ cross)
    _, size, right = torch.linalg.svd(half, full_matrices=False)
    keep = size > svd_tol
    r = right.T[:, keep] / size[keep]
    return cross @ r, solved @ r


FITS: Mapping[str, Callable[..., LowRank]] = {
    "residual_pca": residual_pca,
    "cpca": cpca,
    "gen_eig": gen_eig,
    "oblique": oblique,
    "leace": leace,
    "lda": lda,
    "mean_difference": mean_difference,
    "grad_pca": grad_pca,
    "random": random_basis,
}
"""Every closed form by name; each returns a `LowRank`."""
