"""Subspaces to remove from second moments of forget and retain rows: one eigenproblem each, no training.

S_f, S_r are the uncentred second moments E[x x^T] of the two sets, k the rank. With `previous`, a fit chooses in the
complement of what is removed already, and its result is orthogonal to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repedit.errors import ArgumentError, FractionError, NothingLeft, ShapeError
from repedit.fit.energy import capped, cut
from repedit.fit.inputs import Space, check_rows, prepared, ridged
from repedit.fit.subspace import orthonormal, projector, sign_fixed, symmetric, top_eigenvectors
from repedit.maps import LowRank
from repedit.stats import CrossMoments, Moments

# Below this share of the forget energy the residual is rounding, and its principal directions mean nothing.
NOTHING = 1e-6


def residual_pca(
    forget: Moments, retain: Moments, *, rank: int = 16, energy: float = 0.95, previous: LowRank | None = None
) -> LowRank:
    """The directions of most forget energy outside the span that holds the retain energy.

    Q = top-m eigenvectors of S_r, m the fewest with at least `energy` of tr S_r and at most d - k;
    U = top-k eigenvectors of (I - Q Q^T) S_f (I - Q Q^T). It changes retain rows by at most (1 - energy) tr S_r, unless
    d - k cut m short.

    Raises:
        FractionError: if energy is not a fraction. RankError, NotEnoughRows, ShapeError, NotFinite: as every fit.
        NothingLeft: if less than 1e-6 of the forget energy, or fewer than k directions, lie outside.
    Reference: the start of MRP, arXiv 2508.15449, with the truncation it needs to have a complement at all.
    """
    if not 0 <= energy <= 1:
        raise FractionError(f"energy={energy} is not a fraction between 0 and 1")
    space, dtype = _ready(forget, retain, rank, previous)
    values, vectors = torch.linalg.eigh(space.restricted(retain.second))
    m = cut(values.flip(0), energy, rank)
    outside = vectors.flip(1)[:, m:]
    forgotten = space.restricted(forget.second)
    residual = symmetric(outside.T @ forgotten @ outside)
    share = float(residual.trace()) / max(float(forgotten.trace()), 1e-300)
    top, chosen = top_eigenvectors(residual, rank)
    if share < NOTHING or float(top[-1]) < NOTHING**2 * float(forgotten.trace()):
        raise NothingLeft(
            f"outside the {m} directions that hold {energy:.0%} of the retain energy, {share:.1e} of the forget energy "
            f"is left, not enough for rank {rank}; use a lower energy or rank"
        )
    return projector(sign_fixed(space.back(outside @ chosen)), dtype)


def cpca(
    forget: Moments, retain: Moments, *, rank: int = 16, alpha: float = 1.2, previous: LowRank | None = None
) -> LowRank:
    """The directions of most contrast: top-k eigenvectors of S_f - alpha S_r.

    Raises:
        NothingLeft: if no direction holds more forget energy than alpha times its retain energy.
    Reference: contrastive PCA, Abid et al. 2017, arXiv 1709.06716.
    """
    space, dtype = _ready(forget, retain, rank, previous)
    return _leading(space, space.restricted(forget.second - alpha * retain.second), rank, dtype, f"alpha={alpha}")


def gen_eig(
    forget: Moments, retain: Moments, *, rank: int = 16, ridge: float = 1e-3, previous: LowRank | None = None
) -> LowRank:
    """The span that reads most forget energy for its retain energy: U = orth(W), S_f w = l R w, largest l first.

    R = S_r + lam I, lam = ridge tr(S_r) / d. The w are directions to read along, not the ones that forget rows are
    written along: `oblique` uses both.
    """
    space, dtype = _ready(forget, retain, rank, previous)
    readers, _ = _generalised(space, forget, retain, rank, ridge)
    return projector(orthonormal(space.back(readers), tol=0.0), dtype)


def oblique(
    forget: Moments,
    retain: Moments,
    *,
    rank: int = 16,
    ridge: float = 1e-3,
    norm_cap: float = 1.05,
    previous: LowRank | None = None,
) -> LowRank:
    """The projection along the forget directions F = S_f W that moves retain rows least.

    P = I - F (F^T R^-1 F)^-1 F^T R^-1, W and R as in `gen_eig`, which makes it I - R W W^T. Among the projections with
    kernel span F its distortion in the metric R, tr((F^T R^-1 F)^-1 F^T F), is smallest; the orthogonal one has more.
    What is removed of a forget row is uncorrelated with what is left (S_f W = R W l), and the ridge only helps retain
    rows, so neither set grows; `norm_cap` guards that as it guards `lda` (see `capped`).
    """
    space, dtype = _ready(forget, retain, rank, previous)
    readers, metric = _generalised(space, forget, retain, rank, ridge)
    # U = R W a^-1 is orthonormal and V = W a^T, so that U V^T = R W W^T and V^T U = I.
    u, a = torch.linalg.qr(metric @ readers)
    found = LowRank(space.back(u).contiguous(), space.back(readers @ a.T).contiguous())
    found, _ = capped(found, [forget, retain], norm_cap)
    return LowRank(found.u.to(dtype), found.v.to(dtype))


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
    -sym(A_f) + retain_weight sym(A_r). An argument about small steps: U U^T x is none.

    Args:
        forget, retain: from collect(..., statistic=CrossMoments, gradients=True).
    Raises:
        NothingLeft: if no direction would raise it.
        ShapeError: if the statistics are not of gradients, which are as wide as the rows.
    """
    for name, statistic in (("forget", forget), ("retain", retain)):
        check_gradients(name, statistic)
    space, dtype = _ready(forget, retain, rank, previous)
    slope = retain_weight * retain.second - forget.second
    return _leading(space, space.restricted(symmetric(slope)), rank, dtype, f"retain_weight={retain_weight}")


def random_basis(d: int, *, rank: int, seed: int, previous: LowRank | None = None) -> LowRank:
    """A uniformly random subspace, the control of every other fit: orthonormalised Gaussian columns."""
    space = Space.after(previous, d)
    space.check(rank)
    draw = torch.randn(d - space.taken, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    dtype = torch.float32 if previous is None else torch.promote_types(torch.float32, previous.u.dtype)
    return projector(sign_fixed(space.back(torch.linalg.qr(draw).Q)), dtype)


def check_gradients(name: str, statistic: CrossMoments) -> None:
    """Refuse cross moments with labels where gradients are needed."""
    if statistic.other != statistic.width:
        raise ShapeError(
            f"{name} pairs rows of width {statistic.width} with values of width {statistic.other}, which are no "
            "gradients; collect with gradients=True"
        )


def _ready(
    forget: Moments | CrossMoments, retain: Moments | CrossMoments, rank: int, previous: LowRank | None
) -> tuple[Space, torch.dtype]:
    space, dtype = prepared(forget, retain, previous)
    space.check(rank)
    check_rows(rank, f"rank {rank}", forget=forget.count, retain=retain.count)
    return space, dtype


def _leading(space: Space, contrast: Tensor, rank: int, dtype: torch.dtype, what: str) -> LowRank:
    values, vectors = top_eigenvectors(symmetric(contrast), rank)
    if not float(values[0]) > 1e-12 * float(contrast.norm()):
        raise NothingLeft(
            f"no direction favours forget over retain with {what} (the largest eigenvalue is {float(values[0]):.1e}); "
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
