"""What a fit cannot do it refuses, with what was asked, what was found and what to do."""

import pytest
import torch

import repedit as rp
from repedit.errors import (
    ArgumentError,
    FractionError,
    NoSignal,
    NotEnoughRows,
    NotFinite,
    NothingLeft,
    RankError,
    ShapeError,
    UnknownName,
)
from repedit.fit import FITS, linalg
from repedit.stats import CrossMoments, Moments
from tests.structured_rows import (
    PAIRED,
    D,
    K,
    earlier,
    fitted,
    labelled,
    moments_of,
    normal,
    pair,
    spanning,
    statistics_of,
)


@pytest.mark.parametrize("name", PAIRED)
def test_ranks_that_are_not_there_are_refused(name):
    sides = pair()
    for rank in (0, -1, D, D + 1):
        with pytest.raises(
            RankError, match=rf"rank {rank} was asked for, 1 to 23 is possible: the width is 24, 0 direct"
        ):
            FITS[name](*sides, rank=rank)
    with pytest.raises(RankError, match="rank 19 was asked for, 1 to 18 is possible: the width is 24, 5 directions"):
        FITS[name](*sides, rank=19, previous=earlier())


def test_other_ranks_that_are_not_there_are_refused():
    x, z = labelled(d=3)
    with pytest.raises(RankError, match="the labels span all 3 directions that are left"):
        rp.fit.leace(*statistics_of(x, z))
    with pytest.raises(RankError, match="rank 24 was asked for, 1 to 23"):
        rp.fit.random_basis(D, rank=D, seed=0)
    with pytest.raises(RankError, match="the union removes all 24 directions; at least one must remain"):
        rp.fit.union(*(linalg.projector(spanning(D, 12, seed=s)) for s in (1, 2)))
    with pytest.raises(RankError, match="rank 3 was asked for; the basis has 4, the largest is 23"):
        rp.fit.extend(spanning(D, 4), pair()[0], 3)
    with pytest.raises(RankError, match="25 eigenvectors were asked for; a matrix of width 24 has 0 to 24"):
        rp.fit.top_eigenvectors(pair()[0].second, 25)


@pytest.mark.parametrize("name", [*PAIRED, "mean_difference", "lda"])
def test_widths_that_differ_are_refused(name):
    forget, _ = pair()
    with pytest.raises(ShapeError, match="forget has width 24, retain has width 9; were they collected at one site"):
        fitted(name, forget, moments_of(normal(50, 9)))
    with pytest.raises(
        ShapeError, match="previous has width 9, the statistics have width 24; was it fitted on another"
    ):
        fitted(name, *pair(), previous=rp.fit.random_basis(9, rank=2, seed=0))


@pytest.mark.parametrize("name", [*PAIRED, "mean_difference", "lda"])
def test_statistics_that_are_not_finite_are_refused(name):
    forget, retain = pair()
    retain._total[4] = torch.nan
    with pytest.raises(NotFinite, match="the retain statistic is not finite at coordinate"):
        fitted(name, forget, retain)


@pytest.mark.parametrize("name", PAIRED)
def test_too_few_rows_are_refused(name):
    few = moments_of(normal(2, D))
    with pytest.raises(NotEnoughRows, match=r"forget has 2 rows, 3 are needed \(rank 3\); collect more text"):
        FITS[name](few, pair()[0], rank=3)


def test_too_few_rows_for_a_covariance_are_refused():
    x, z = labelled(D)
    with pytest.raises(NotEnoughRows, match=r"xx has 24 rows, 25 are needed \(width \+ 1\)"):
        rp.fit.leace(*statistics_of(x, z))
    with pytest.raises(NotEnoughRows, match=r"forget and retain has 24 rows, 25 are needed"):
        rp.fit.lda(moments_of(x[:10]), moments_of(x[10:]))
    with pytest.raises(NotEnoughRows, match="forget has 0 rows, 1 are needed"):
        rp.fit.mean_difference(Moments(D), moments_of(x))


def test_a_fit_that_finds_nothing_says_so():
    frame = spanning(D, 8)
    inside, narrow = (moments_of(normal(500, 8, seed=s) @ frame.T) for s in (1, 2))
    with pytest.raises(
        NothingLeft, match=r"outside the 8 directions that hold 100% of the retain energy, .* lower energy"
    ):
        rp.fit.residual_pca(inside, narrow, rank=K, energy=1.0)
    two = moments_of(normal(500, 8, seed=1) @ frame.T + normal(500, 2, seed=3) @ spanning(D, 10)[:, 8:].T)
    with pytest.raises(NothingLeft, match="not enough for rank 3"):
        rp.fit.residual_pca(two, narrow, rank=3, energy=1.0)
    same, _ = pair()
    with pytest.raises(
        NothingLeft, match=r"no direction favours forget over retain with alpha=1.2 .* are the two sets d"
    ):
        rp.fit.cpca(same, same, rank=K)
    rows = normal(100, D)
    cross = CrossMoments(D, D).update(rows, rows)
    with pytest.raises(NothingLeft, match=r"no direction favours forget over retain with retain_weight=0.5"):
        rp.fit.grad_pca(cross, cross, rank=K, retain_weight=0.5)


def test_labels_and_means_without_signal_are_refused():
    x, _ = labelled()
    with pytest.raises(NoSignal, match=r"no direction of x predicts z \(svd_tol=0.01\); 1 of 4 labels occur"):
        rp.fit.leace(*statistics_of(x, torch.eye(4, dtype=torch.float64)[:1].expand(len(x), 4)))
    same, _ = pair()
    for fit in (rp.fit.lda, rp.fit.mean_difference):
        with pytest.raises(NoSignal, match="the means of forget and retain agree, so there is no direction"):
            fit(same, same)
    along = linalg.projector(
        torch.nn.functional.normalize((pair()[0].mean - pair()[1].mean)[:, None], dim=0), torch.float64
    )
    with pytest.raises(NoSignal, match="agree outside of what `previous` removed"):
        rp.fit.mean_difference(*pair(), previous=along)


def test_options_out_of_range_are_refused():
    forget, retain = pair()
    with pytest.raises(FractionError, match=r"energy=1.5 is not a fraction between 0 and 1"):
        rp.fit.residual_pca(forget, retain, rank=K, energy=1.5)
    with pytest.raises(ArgumentError, match=r"norm_cap=0.9 is below 1"):
        rp.fit.oblique(forget, retain, rank=K, norm_cap=0.9)
    flat = moments_of(normal(100, 2) @ normal(2, D))
    with pytest.raises(ArgumentError, match=r"the retain second moment is singular with ridge=0.0; use a larger one"):
        rp.fit.gen_eig(forget, flat, rank=K, ridge=0.0)
    with pytest.raises(NotEnoughRows, match="the retain statistic has no energy here"):
        rp.fit.gen_eig(forget, moments_of(torch.zeros(50, D).double()), rank=K)
    with pytest.raises(
        ShapeError, match="forget pairs rows of width 24 with values of width 4, which are not gradients"
    ):
        rp.fit.grad_pca(CrossMoments(D, 4), CrossMoments(D, D), rank=K)
    with pytest.raises(
        ShapeError, match="xx holds 1500 rows of width 24, xz 20 of width 24; collect both on one corpus"
    ):
        rp.fit.leace(statistics_of(*labelled())[0], statistics_of(*labelled(20))[1])


def test_maps_and_matrices_that_do_not_fit_are_refused():
    forget, retain = pair()
    with pytest.raises(ArgumentError, match="map 1 is oblique: a union is of orthogonal projections"):
        rp.fit.union(earlier(), rp.fit.oblique(forget, retain, rank=K))
    with pytest.raises(ArgumentError, match="map 0 has a center: a union is"):
        rp.fit.union(rp.LowRank(earlier().u, earlier().v, forget.mean))
    with pytest.raises(ArgumentError, match="a union needs at least one map"):
        rp.fit.union()
    with pytest.raises(ShapeError, match="map 0 has width 24, map 1 has width 9"):
        rp.fit.union(earlier(), rp.fit.random_basis(9, rank=2, seed=0))
    with pytest.raises(ShapeError, match="the basis has width 24, retain has width 9"):
        rp.fit.extend(spanning(D, 2), moments_of(normal(50, 9)), 3)
    with pytest.raises(ShapeError, match="the bases have widths 24 and 9"):
        rp.fit.principal_angles(spanning(D, 2), spanning(9, 2))
    with pytest.raises(NotFinite, match="the basis holds NaN or infinity"):
        rp.fit.orthonormal(torch.full((D, 2), torch.nan))
    for c, error, message in (
        (normal(4, 5), ShapeError, r"eigenvectors need a square matrix, this one is \(4, 5\)"),
        (normal(4, 4), ArgumentError, "the matrix is not symmetric: entries differ by up to"),
        (torch.full((4, 4), torch.inf), NotFinite, r"the matrix is not finite at \(0, 0\)"),
    ):
        with pytest.raises(error, match=message):
            rp.fit.top_eigenvectors(c, 2)
    with pytest.raises(UnknownName, match=r"solver='eig' does not exist; did you mean 'eigh' or 'eigsh'"):
        rp.fit.top_eigenvectors(forget.second, 2, solver="eig")
