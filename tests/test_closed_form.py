"""What closed forms find is what was planted, what they promise holds, and each promise has a twin that breaks it."""

import pytest
import torch

import repedit as rp
from repedit.fit import FITS, linalg
from repedit.stats import CrossMoments, Moments
from tests.structured_rows import (
    EXACT,
    PAIRED,
    D,
    K,
    cosine,
    earlier,
    fitted,
    moments_of,
    normal,
    pair,
    projects,
    spanning,
)

PLANTED = 0.95


def _planted(n=4000, seed=0):
    """(forget, retain, the span that only forget uses): both share six strong directions and a weak floor."""
    frame = spanning(D, 6 + K, seed=seed)
    shared, own = frame[:, :6], frame[:, 6:]
    sizes = torch.linspace(4.0, 2.0, 6, dtype=torch.float64)
    rows = [(normal(n, 6, seed=s) * sizes) @ shared.T + 0.1 * normal(n, D, seed=s + 10) for s in (1, 2)]
    return rows[0] + 1.5 * normal(n, K, seed=3) @ own.T, rows[1], own


def _finds(fit, n=4000):
    forget, retain, own = _planted(n)
    found = cosine(fit(moments_of(forget), moments_of(retain)), own)
    assert found >= PLANTED, f"cosine {found:.3f}"


def published_start(forget, retain):
    """The start of the published code: PCA of the *retain* rows outside the *forget* span, with no energy cut."""
    values, vectors = torch.linalg.eigh(forget.second)
    span = vectors[:, values > 0]
    outside = torch.eye(forget.width, dtype=torch.float64) - span @ span.T
    return linalg.projector(rp.fit.top_eigenvectors(outside @ retain.second @ outside, K)[1])


def swapped(fit):
    return lambda forget, retain: fit(retain, forget, rank=K)


# More rows than the width: the published span keeps every direction then, and its complement is rounding.
@pytest.mark.parametrize("n", [1000, 4000, 60_000])
@pytest.mark.parametrize("name", ["residual_pca", "cpca", "gen_eig"])
def test_the_planted_subspace_is_found(name, n):
    _finds(lambda forget, retain: FITS[name](forget, retain, rank=K), n)


@pytest.mark.parametrize("n", [D - 4, 4000])
def test_the_published_start_is_caught(n):
    with pytest.raises(AssertionError, match="cosine"):
        _finds(published_start, n)


def test_a_swapped_start_is_caught():
    with pytest.raises(AssertionError, match="cosine"):
        _finds(swapped(rp.fit.cpca))
    with pytest.raises(AssertionError, match="cosine"):
        _finds(lambda *_: rp.fit.random_basis(D, rank=K, seed=0))


def test_gradients_find_the_directions_the_loss_depends_on():
    own = spanning(D, K, seed=5)
    rows, other = normal(3000, D, seed=1), normal(3000, D, seed=2)
    # L = -|U^T x|^2 / 2 on forget: its gradient is -U U^T x, and removing U raises it.
    forget = CrossMoments(D, D).update(rows, -rows @ own @ own.T)
    retain = CrossMoments(D, D).update(other, 0.01 * normal(3000, D, seed=3))
    assert cosine(rp.fit.grad_pca(forget, retain, rank=K), own) >= PLANTED
    opposite = CrossMoments(D, D).update(rows, rows @ own @ own.T)
    assert cosine(rp.fit.grad_pca(opposite, retain, rank=K), own) < 0.7


@pytest.mark.parametrize("name", [*PAIRED, "mean_difference", "lda"])
def test_every_fit_is_a_projection(name):
    map_ = fitted(name, *pair())
    projects(map_)
    if name not in ("oblique", "lda"):
        p = map_.as_matrix()
        assert float((p - p.T).abs().max()) <= EXACT


def test_a_projection_with_a_basis_that_is_not_orthonormal_is_caught():
    bad = fitted("cpca", *pair()).u * 1.01
    with pytest.raises(AssertionError, match="idempotent"):
        projects(rp.LowRank(bad, bad))


def test_what_rows_are_measured_in_is_what_the_factors_are_in():
    forget, retain = pair()
    assert rp.fit.cpca(forget, retain, rank=K).u.dtype == torch.float64
    halves = [Moments(D).update(normal(100, D, seed=s).float() * (s + 1)) for s in (0, 1)]
    found = rp.fit.cpca(halves[1], halves[0], rank=K)
    assert found.u.dtype == torch.float32 and found.u.is_contiguous()


def _left(rows_or_moments, previous):
    """Statistics of what an earlier projection has left."""
    rows = previous(normal(3000, D, seed=rows_or_moments) @ normal(D, D, seed=rows_or_moments + 1))
    return moments_of(rows + 0.3)


@pytest.mark.parametrize("collected", ["with the earlier edit", "without it"])
@pytest.mark.parametrize("name", [*PAIRED, "mean_difference", "lda"])
def test_a_later_task_is_orthogonal_to_an_earlier_one(name, collected):
    previous = earlier()
    sides = (_left(1, previous), _left(4, previous)) if collected == "with the earlier edit" else pair()
    new = fitted(name, *sides, previous=previous)
    for factor in (new.u, new.v):
        assert float((factor.T @ previous.u).abs().max()) <= EXACT * float(factor.norm())
    both = (new @ previous).as_matrix()
    assert float((both - (previous @ new).as_matrix()).abs().max()) <= EXACT * max(1.0, float(both.norm()))


def test_a_later_task_that_ignores_the_earlier_one_is_caught():
    new = fitted("cpca", *pair())
    assert float((new.u.T @ earlier().u).abs().max()) > 0.1


def test_tasks_one_after_another_are_nested():
    forget, retain = pair()
    done, ranks = rp.fit.cpca(forget, retain, rank=K), []
    for seed in (3, 5, 8):
        more = rp.fit.cpca(*pair(seed), rank=K, previous=done)
        after = rp.fit.union(done, more)
        p, q = done.as_matrix(), after.as_matrix()
        assert float((q @ p - q).abs().max()) <= 1e-10 and float((p @ q - q).abs().max()) <= 1e-10
        done = after
        ranks.append(done.rank_removed)
    assert ranks == [2 * K, 3 * K, 4 * K]


# Retain rows: how far they move.


def test_retain_rows_move_by_at_most_the_energy_left_out():
    forget, retain = pair()
    for share in (0.5, 0.9, 0.95, 0.99):
        map_ = rp.fit.residual_pca(forget, retain, rank=K, energy=share)
        assert rp.fit.distortion(map_, retain) <= 1 - share + EXACT
    assert rp.fit.distortion(rp.fit.residual_pca(forget, retain, rank=K, energy=0.0), retain) > 0.05


def _distortion_in(metric, map_):
    return float(((map_.v.T @ metric @ map_.v) * (map_.u.T @ map_.u)).sum())


def _moves_least(map_, forget, retain):
    metric = retain.second + 1e-3 * retain.second.trace() / D * torch.eye(D, dtype=torch.float64)
    orthogonal = rp.LowRank.projection(map_.u)
    assert _distortion_in(metric, map_) <= _distortion_in(metric, orthogonal) * (1 + EXACT), "moves more"
    kernel = map_.u
    inner = torch.linalg.inv(kernel.T @ torch.linalg.solve(metric, kernel))
    assert _distortion_in(metric, map_) == pytest.approx(float((inner @ kernel.T @ kernel).trace()))


def test_the_oblique_projection_moves_retain_rows_least():
    forget, retain = pair()
    map_ = rp.fit.oblique(forget, retain, rank=K, norm_cap=1e9)
    _moves_least(map_, forget, retain)
    readers = rp.fit.gen_eig(forget, retain, rank=K)
    assert cosine(rp.LowRank(map_.v, map_.v), readers.u) == pytest.approx(1.0)


def test_an_oblique_projection_in_the_wrong_metric_is_caught():
    forget, retain = pair()
    right = rp.fit.oblique(forget, retain, rank=K, norm_cap=1e9)
    wrong = rp.LowRank.oblique(right.u, retain.second @ right.u)
    with pytest.raises(AssertionError, match="moves more"):
        _moves_least(wrong, forget, retain)


def _far():
    """Two sets whose common mean is far away: what is removed along their small difference moves it."""
    mix = [normal(D, D, seed=s) * torch.logspace(0, -2, D, dtype=torch.float64) for s in (11, 13)]
    away = 30 * normal(D, seed=9)
    return (
        moments_of(normal(2000, D, seed=5) @ mix[0] @ normal(D, D, seed=12) + away),
        moments_of(normal(2000, D, seed=6) @ mix[1] @ normal(D, D, seed=14) + away + normal(D, seed=8)),
    )


def _growth(map_, sides):
    return max(rp.fit.norm_ratio(map_, side) for side in sides)


def _norms_are_capped(fit, cap):
    map_ = fit(*_far(), norm_cap=cap)
    assert _growth(map_, _far()) <= cap * (1 + 1e-9), f"norms grow by {_growth(map_, _far()):.3f}"
    return map_


def test_norms_do_not_pass_the_cap():
    free = rp.fit.lda(*_far(), norm_cap=1e9)
    assert _growth(free, _far()) > 1.3, "nothing grows, so nothing is shown"
    for cap in (1.0, 1.05, 1.2):
        map_ = _norms_are_capped(rp.fit.lda, cap)
        projects(map_)
        assert cosine(map_, free.u) == pytest.approx(1.0), "the kernel must stay"
        mixed, t = rp.fit.capped(free, _far(), cap)
        assert 0 < t <= 1
        torch.testing.assert_close(mixed.as_matrix(), map_.as_matrix(), rtol=1e-9, atol=1e-9)
        less = rp.LowRank(free.u, (1 - t + 0.001) * free.v + (t - 0.001) * free.u)
        assert _growth(less, _far()) > cap, "t is not the smallest"
    same, t = rp.fit.capped(free, _far(), 1e9)
    assert same is free and t == 0.0


def test_norms_that_are_not_capped_are_caught():
    with pytest.raises(AssertionError, match="norms grow"):
        _norms_are_capped(lambda *sides, norm_cap: rp.fit.lda(*sides, norm_cap=1e9), 1.05)


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
@pytest.mark.parametrize("sides", [pair(), pair(3), _far()], ids=["0", "3", "far"])
def test_the_oblique_projection_makes_neither_set_longer(sides, ridge):
    assert _growth(rp.fit.oblique(*sides, rank=K, ridge=ridge, norm_cap=1e9), sides) <= 1 + 1e-9


# Facts to judge a fit by.


def test_facts_are_those_of_the_rows():
    rows = normal(500, D, seed=4) @ normal(D, D, seed=5) + 1.0
    map_ = rp.LowRank.oblique(normal(D, K, seed=6), normal(D, K, seed=7))
    for center in (None, normal(D, seed=6)):
        map_ = rp.LowRank(map_.u, map_.v, center)
        about = rows if center is None else rows - center
        out = map_(rows) if center is None else map_(rows) - center
        total = about.square().sum()
        assert rp.fit.norm_ratio(map_, moments_of(rows)) == pytest.approx(float(out.square().sum() / total))
        changed = (out - about).square().sum() / total
        assert rp.fit.distortion(map_, moments_of(rows)) == pytest.approx(float(changed))


def test_spectra_show_where_the_cut_is():
    forget, retain, _ = _planted()
    found = rp.fit.spectra(moments_of(forget), moments_of(retain), rank=K, energy=0.95)
    assert found.cut <= 6 and len(found.residual) == D - found.cut
    assert float(found.forget.sum()) == pytest.approx(float(moments_of(forget).second.trace()))
    assert float(found.retain[: found.cut].sum()) >= 0.95 * float(found.retain.sum())
    assert float(found.retain[: found.cut - 1].sum()) < 0.95 * float(found.retain.sum())
    assert 0.02 < found.share < 0.5 and bool((found.residual.diff() <= 0).all())
