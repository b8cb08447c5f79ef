"""Subspaces as orthonormal bases in float64, and how much of the energy of rows a projection removes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from repedit.arguments import checked
from repedit.errors import (
    ArgumentError,
    FractionError,
    NotConverged,
    NotEnoughRows,
    NotFinite,
    RankError,
    ShapeError,
    UnknownName,
    nearest,
)
from repedit.linear_maps import LowRank
from repedit.stats import CrossMoments, Moments

SOLVERS = ("auto", "eigh", "eigsh")
# Lanczos is faster from this width on, for at most a tenth of the vectors: 15 times at width 2048 and k = 16 (the top-16
# subspace agrees to 2e-14).
LANCZOS_WIDTH = 1024
RESIDUAL = 1e-8

# --- Bases: unions, complements, angles, and leading eigenvectors


@checked
def orthonormal(basis: Float[Tensor, "d k"], *, tol: float = 1e-6) -> Float[Tensor, "d r"]:
    """An orthonormal basis of span(basis), in float64; directions with singular value < tol * the largest are dropped.

    Raises:
        ShapeError: if it is no matrix. NotFinite: if it holds NaN or infinity.
    """
    if basis.ndim != 2:
        raise ShapeError(
            f"the basis is {tuple(basis.shape)}; give a tensor (width, rank), such as vector[:, None] for one direction"
        )
    if not bool(torch.isfinite(basis).all()):
        raise NotFinite("the basis holds NaN or infinity; was it fitted on finite statistics?")
    left, size, _ = torch.linalg.svd(basis.double(), full_matrices=False)
    keep = size > tol * size[:1].sum()
    return sign_fixed(left[:, keep])


@checked
def union(*maps: LowRank) -> LowRank:
    """The orthogonal projection whose kernel is the sum of the kernels: it removes what any of the maps removes.

    [U_1 .. U_t] is re-orthonormalised in float64, so P_union P_i = P_i P_union = P_union. Products of projectors that
    are not jointly orthogonal are neither commuting nor idempotent.

    Raises:
        ArgumentError: if there is no map, or one is oblique or has a center.
        ShapeError: if the widths differ. RankError: if nothing would remain.
    """
    if not maps:
        raise ArgumentError("a union needs at least one map; an empty one is LowRank of a (d, 0) basis")
    width = maps[0].width
    for number, map_ in enumerate(maps):
        if map_.width != width:
            raise ShapeError(
                f"map 0 has width {width}, map {number} has width {map_.width}; are they for the same site?"
            )
        if map_.center is not None or not is_orthogonal(map_):
            what = "has a center" if map_.center is not None else "is oblique"
            raise ArgumentError(f"map {number} {what}: a union is of orthogonal projections; compose the maps with @")
    basis = orthonormal(torch.cat([map_.u.double().cpu() for map_ in maps], 1))
    if width and basis.shape[1] == width:
        raise RankError(f"the union removes all {width} directions; at least one must remain")
    dtype = torch.float64 if any(map_.u.dtype == torch.float64 for map_ in maps) else torch.float32
    return projector(basis, dtype)


@checked
def extend(basis: Float[Tensor, "d k"], retain: Moments, rank: int) -> Float[Tensor, "d r"]:
    """The basis extended to a rank by the directions that retain uses least.

    The added directions are the eigenvectors of E[x x^T], in the complement of the basis, with the smallest values.

    Raises:
        ShapeError: if the widths differ. RankError: if the basis already has a larger rank, or nothing would remain.
    """
    if basis.shape[0] != retain.width:
        raise ShapeError(
            f"the basis has width {basis.shape[0]}, retain has width {retain.width}; are they of one site?"
        )
    start = orthonormal(basis)
    if not start.shape[1] <= rank < retain.width:
        raise RankError(f"rank {rank} was asked for; the basis has {start.shape[1]}, the largest is {retain.width - 1}")
    outside = complement(start)
    _, vectors = torch.linalg.eigh(outside.T @ retain.second.cpu() @ outside)
    return torch.cat([start, sign_fixed(outside @ vectors[:, : rank - start.shape[1]])], 1)


@checked
def top_eigenvectors(
    c: Float[Tensor, "d e"], k: int, *, solver: str = "auto"
) -> tuple[Float[Tensor, " k"], Float[Tensor, "d k"]]:
    """The k largest eigenvalues of a symmetric matrix, descending, and their eigenvectors, in float64.

    Each vector has its largest-magnitude entry positive. "eigh" computes all of them; "eigsh" (Lanczos, from a fixed
    start) only k; "auto" takes eigsh where d >= 1024 and k <= d / 10, and eigh if that does not converge.

    Raises:
        ShapeError: if c is not square. ArgumentError: if it is not symmetric to 1e-6. NotFinite: if it holds NaN.
        RankError: if k is negative or above d. UnknownName: if there is no such solver.
        NotConverged: if eigsh leaves a residual ||C q - q l|| above 1e-8 ||C||.
    """
    _check_symmetric(c)
    if not 0 <= k <= c.shape[0]:
        raise RankError(f"{k} eigenvectors were asked for; a matrix of width {c.shape[0]} has 0 to {c.shape[0]}")
    if solver not in SOLVERS:
        raise UnknownName(f"solver={solver!r} does not exist; {nearest(solver, SOLVERS)}")
    c = symmetric(c.double().cpu())
    large = c.shape[0] >= LANCZOS_WIDTH and k <= c.shape[0] // 10
    if k and (solver == "eigsh" or (solver == "auto" and large)):
        try:
            return _lanczos(c, k)
        except NotConverged:
            if solver == "eigsh":
                raise
    values, vectors = torch.linalg.eigh(c)
    return values.flip(0)[:k], sign_fixed(vectors.flip(1)[:, :k])


@checked
def principal_angles(a: Float[Tensor, "d k"], b: Float[Tensor, "e j"]) -> Float[Tensor, " r"]:
    """Cosines of the principal angles between two spans, descending: 1 for a shared direction, 0 for an orthogonal one.

    Raises:
        ShapeError: if the widths differ.
    """
    if a.shape[0] != b.shape[0]:
        raise ShapeError(f"the bases have widths {a.shape[0]} and {b.shape[0]}; are they of one site?")
    return torch.linalg.svdvals(orthonormal(a).T @ orthonormal(b.to(a.device))).clamp(max=1.0)


def complement(basis: Float[Tensor, "d k"]) -> Float[Tensor, "d c"]:
    """An orthonormal basis, in float64, of the orthogonal complement of an orthonormal basis."""
    return torch.linalg.qr(basis.double(), mode="complete").Q[:, basis.shape[1] :]


def projector(basis: Float[Tensor, "d k"], dtype: torch.dtype = torch.float32) -> LowRank:
    """x - U U^T x for an orthonormal basis U."""
    u = basis.to(dtype).contiguous()
    return LowRank(u, u)


def sign_fixed(vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """The columns, each with its largest-magnitude entry positive."""
    if not vectors.numel():
        return vectors
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def symmetric(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """(M + M^T) / 2."""
    return (matrix + matrix.T) / 2


def is_orthogonal(map_: LowRank) -> bool:
    """Whether U V^T is an orthogonal projector: V in span U and V^T U = I, within the precision of float32 factors."""
    u, v = map_.u.double(), map_.v.double()
    q, r = torch.linalg.qr(u)
    # U V^T = q (r V^T): it is q q^T exactly where r V^T = q^T.
    return bool((r @ v.T - q.T).abs().max() < 1e-5) if u.numel() else True


def _check_symmetric(c: Tensor) -> None:
    if c.shape[0] != c.shape[1]:
        raise ShapeError(f"eigenvectors need a square matrix, this one is {tuple(c.shape)}")
    if not bool(torch.isfinite(c).all()):
        row, column = (~torch.isfinite(c)).nonzero()[0].tolist()
        raise NotFinite(f"the matrix is not finite at ({row}, {column}); were the statistics?")
    worst = float((c - c.T).abs().max()) if c.numel() else 0.0
    if worst > 1e-6 * float(c.abs().max() if c.numel() else 0.0):
        raise ArgumentError(f"the matrix is not symmetric: entries differ by up to {worst:.1e}; give (C + C^T) / 2")


def _lanczos(c: Tensor, k: int) -> tuple[Tensor, Tensor]:
    from scipy.sparse.linalg import ArpackError, eigsh

    matrix = c.numpy()
    # ARPACK's default start is random; this one is fixed and has a part in every direction.
    start = np.random.default_rng(0).standard_normal(len(matrix))
    try:
        values, vectors = eigsh(matrix, k=k, which="LA", tol=1e-10, v0=start)
    except (ArpackError, TypeError) as error:  # TypeError: k is the width, which only eigh can do
        raise NotConverged(
            f"eigsh found no {k} eigenvectors of width {len(matrix)} ({error}); use solver='eigh'"
        ) from error
    order = np.argsort(-values, kind="stable")
    values, vectors = values[order], vectors[:, order]
    residual = np.linalg.norm(matrix @ vectors - vectors * values, axis=0).max() / max(np.linalg.norm(matrix), 1e-300)
    if not residual <= RESIDUAL:
        raise NotConverged(f"eigsh left a residual of {residual:.1e}, {RESIDUAL:.0e} is allowed; use solver='eigh'")
    return torch.from_numpy(values), sign_fixed(torch.from_numpy(vectors))


# --- What every closed form checks of its statistics, and the space it chooses from


Statistic = Moments | CrossMoments


@dataclass(frozen=True, eq=False)
class Space:
    """Coordinates in the complement of what earlier projections remove, span(previous.u)."""

    width: int
    taken: int
    basis: Float[Tensor, "d c"] | None
    """None if nothing was removed before: the coordinates are the entries of x."""

    @staticmethod
    def after(previous: LowRank | None, width: int) -> Space:
        """The space outside an earlier projection.

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
        """Refuse a rank that is not possible.

        Raises:
            RankError: if it is not positive, or not below what remains.
        """
        largest = self.width - self.taken - 1
        if not 1 <= rank <= largest:
            raise RankError(
                f"rank {rank} was asked for, 1 to {largest} is possible: the width is {self.width}, {self.taken} "
                "directions are removed already and one must remain; to remove nothing, give a (d, 0) basis"
            )

    def restricted(self, matrix: Float[Tensor, "d d"]) -> Float[Tensor, "c c"]:
        """N^T M N: a symmetric form in the coordinates."""
        matrix = matrix.cpu()
        return matrix if self.basis is None else self.basis.T @ matrix @ self.basis

    def coordinates(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "c k"]:
        """N^T v."""
        return vectors.cpu() if self.basis is None else self.basis.T @ vectors.cpu()

    def back(self, vectors: Float[Tensor, "c k"]) -> Float[Tensor, "d k"]:
        """N w: the vectors in full width, orthogonal to what was removed."""
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
        check_finite_matrix(name, statistic.second)
    dtype = torch.promote_types(forget.dtype, retain.dtype)
    if previous is not None:
        dtype = torch.promote_types(dtype, previous.u.dtype)
    return Space.after(previous, forget.width), dtype


def check_finite_matrix(name: str, matrix: Float[Tensor, "d k"]) -> None:
    """Refuse NaN and infinity.

    Raises:
        NotFinite: with the first such coordinate.
    """
    if not bool(torch.isfinite(matrix).all()):
        bad = int((~torch.isfinite(matrix)).nonzero()[0, 0])
        raise NotFinite(f"the {name} statistic is not finite at coordinate {bad}; collect it again in float32?")


def check_rows(needed: int, why: str, **counts: int) -> None:
    """Refuse statistics of too few rows.

    Raises:
        NotEnoughRows: with the number of rows and the number needed.
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


# --- Energy: what a projection removes of the rows, and where the energy of two sets lies


@checked
def norm_ratio(map_: LowRank, moments: Moments) -> float:
    """E ||P x||^2 / E ||x||^2, both about the map's center; above 1 the map makes rows longer."""
    return _energy(map_, _about(map_, moments), 0.0)


@checked
def distortion(map_: LowRank, moments: Moments) -> float:
    """E ||P x - x||^2 / E ||x||^2, about the map's center: the share of the energy that the map changes."""
    second = _about(map_, moments)
    u, v = _factors(map_)
    return float(((v.T @ second @ v) * (u.T @ u)).sum() / second.trace())


@checked
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
@checked
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


@checked
def spectra(
    forget: Moments, retain: Moments, *, rank: int = 16, energy: float = 0.95, previous: LowRank | None = None
) -> Spectra:
    """The eigenvalues of S_f, S_r and of S_f outside the retain span, as `residual_pca` uses them.

    Raises:
        FractionError: if energy is not a fraction. RankError, NotEnoughRows, ShapeError, NotFinite: as in every fit.
    """
    check_energy(energy)
    space, _ = prepared(forget, retain, previous)
    space.check(rank)
    forgotten = space.restricted(forget.second)
    values, vectors = torch.linalg.eigh(space.restricted(retain.second))
    m = cut(values.flip(0), energy, rank)
    outside = vectors.flip(1)[:, m:]
    residual = _eigenvalues(outside.T @ forgotten @ outside)
    return Spectra(_eigenvalues(forgotten), values.flip(0).clamp(min=0), residual, m)


def check_energy(energy: float) -> None:
    """Refuse a share of the energy that is no fraction.

    Raises:
        FractionError: with the value.
    """
    if not 0 <= energy <= 1:
        raise FractionError(f"energy={energy} is not a fraction between 0 and 1")


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
