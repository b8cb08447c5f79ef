"""After LEACE no linear probe is better than a constant, and it is the published one."""

import pytest
import torch

import repedit as rp
from tests.structured_rows import EXACT, D, earlier, labelled, moments_of, normal, projects, statistics_of

pytestmark = pytest.mark.numeric


def _probe(x, z):
    """Accuracy of a logistic probe on the rows it was fitted on, over the share of the largest class."""
    from sklearn.linear_model import LogisticRegression

    rows = ((x - x.mean(0)) / x.std(0)).numpy()
    found = LogisticRegression(C=1e4, max_iter=2000).fit(rows, z.argmax(1)).score(rows, z.argmax(1))
    return found - float(z.mean(0).max())


def _no_probe_is_left(fit):
    x, z = labelled()
    assert _probe(x, z) > 0.3, "the classes were not there to begin with"
    gain = _probe(fit(*statistics_of(x, z))(x), z)
    assert gain <= 0.01, f"the probe gains {gain:.2f}"


@pytest.mark.parametrize("affine", [True, False])
def test_no_linear_probe_survives_leace(affine):
    _no_probe_is_left(lambda xx, xz: rp.fit.leace(xx, xz, affine=affine))


def test_a_projection_along_one_class_leaves_a_probe():
    with pytest.raises(AssertionError, match="the probe gains"):
        _no_probe_is_left(lambda xx, xz: rp.LowRank.projection(xz.covariance[:, :1]))


def test_a_subspace_of_the_same_rank_leaves_a_probe():
    with pytest.raises(AssertionError, match="the probe gains"):
        _no_probe_is_left(lambda xx, xz: rp.fit.random_basis(D, rank=3, seed=0))


@pytest.mark.parametrize("shrinkage", [True, False])
def test_leace_keeps_the_mean_and_is_smallest(shrinkage):
    x, z = labelled()
    xx, xz = statistics_of(x, z)
    map_ = rp.fit.leace(xx, xz, shrinkage=shrinkage)
    projects(map_)
    torch.testing.assert_close(map_(x).mean(0), x.mean(0), rtol=1e-9, atol=1e-9)
    assert map_.rank_removed == 3 and float((map_.left(xz.covariance)).abs().max()) <= 1e-10
    other = rp.LowRank.projection(xz.covariance[:, :3], xx.mean)
    assert rp.fit.distortion(map_, xx) < rp.fit.distortion(other, xx)
    assert rp.fit.norm_ratio(map_, xx) <= 1 + 1e-3


@pytest.mark.parametrize("shrinkage", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("n", "d"), [(1500, D), (80, 60)])
def test_leace_equals_the_published_one(n, d, affine, shrinkage):
    peer = pytest.importorskip("concept_erasure", reason="concept-erasure is not installed (the dev extra has it)")
    x, z = labelled(n, d=d)
    options = {"affine": affine, "shrinkage": shrinkage, "svd_tol": 0.01}
    theirs = peer.LeaceFitter.fit(x, z, constrain_cov_trace=False, **options).eraser
    ours = rp.fit.leace(*statistics_of(x, z), **options)
    torch.testing.assert_close(ours.as_matrix(), theirs.P, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("n", "d"), [(1500, D), (80, 60), (30, 60)])
def test_shrinkage_equals_the_published_one(n, d):
    peer = pytest.importorskip("concept_erasure.shrinkage", reason="concept-erasure is not installed")
    sigma = moments_of(normal(n, d) @ normal(d, d, seed=1)).covariance
    theirs = peer.optimal_linear_shrinkage(sigma, n)[None].reshape(d, d)
    torch.testing.assert_close(rp.fit.shrunk(sigma, n), theirs, rtol=1e-10, atol=1e-10)


def test_leace_without_full_rank_stays_in_the_span_of_the_rows():
    x, z = labelled()
    flat = earlier()(x)
    map_ = rp.fit.leace(*statistics_of(flat, z), shrinkage=False)
    assert map_.rank_removed == 3 and float((map_.u.T @ earlier().u).abs().max()) <= 1e-10
    later = rp.fit.leace(*statistics_of(x, z), previous=earlier())
    assert max(float((f.T @ earlier().u).abs().max()) for f in (later.u, later.v)) <= EXACT * float(later.v.norm())


def test_a_coordinate_that_is_only_rounding_is_not_read():
    x, z = labelled()
    x[:, -1] = 1e-8 * z[:, 0]
    map_ = rp.fit.leace(*statistics_of(x, z), shrinkage=False)
    assert float(map_.v.abs().max()) < 1e3 and float(map_.v[-1].abs().max()) < 1e-3
