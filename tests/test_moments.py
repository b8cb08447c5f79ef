"""Moments equal one naive float64 pass however the rows arrive, and are those of the very tensor that an edit is given."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repedit.errors import (  # fmt: skip
    ArgumentError,
    NotEnoughRows,
    NotFinite,
    ShapeError,
)
from repedit.stats import CrossMoments, Moments, moments, pooled

pytestmark = pytest.mark.numeric


# Relative to the largest entry. Measured against a naive float64 pass, 64 to 60000 rows, mean 0 and -40: float32 rows
# 3e-6, float64 rows 2e-14; merges of float64 rows about a mean of 1000: 1e-16 (mean), 5e-15 (covariance).
NAIVE = {torch.float32: 1e-5, torch.float64: 1e-12}
MERGED = {"mean": 1e-12, "covariance": 1e-11, "second": 1e-11}


def _rows(n, d, seed=0, mean=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, d, generator=generator, dtype=torch.float64) @ torch.randn(
        d, d, generator=generator, dtype=torch.float64
    )
    return (mixed + mean).to(dtype)


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def _assert_naive(stat, rows, limit):
    x = rows.double()
    assert stat.count == len(x)
    assert error(stat.mean, x.mean(0)) <= limit
    assert error(stat.covariance, torch.cov(x.T, correction=0)) <= limit, "covariance"
    assert error(stat.second, x.T @ x / len(x)) <= limit, "second moment"


def assert_merged(a, b):
    for name, limit in MERGED.items():
        assert error(getattr(a, name), getattr(b, name)) <= limit, name


def _streamed(rows, sizes, width):
    stat = Moments(width)
    for part in rows.split(sizes):
        stat.update(part)
    return stat


@given(
    n=st.integers(2, 400),
    d=st.integers(2, 9),
    seed=st.integers(0, 10**6),
    mean=st.sampled_from([0.0, -40.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=40, deadline=None)
def test_moments_equal_a_naive_float64_pass(n, d, seed, mean, dtype):
    rows = _rows(n, d, seed, mean, dtype)
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[:2] = True
    stat = Moments(d).update(rows, mask)
    _assert_naive(stat, rows[mask], NAIVE[dtype])
    assert stat.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [255, 256, 300])
def test_wide_sites_are_summed_by_halves(width, dtype):
    rows, mask = _rows(700, width, mean=5.0, dtype=dtype), torch.arange(700) % 5 > 0
    stat = Moments(width).update(rows[:300], mask[:300]).update(rows[300:], mask[300:])
    _assert_naive(stat, rows[mask], NAIVE[dtype])
    assert torch.equal(stat.second, stat.second.T)
    assert_merged(stat + Moments(width), stat)


@given(cuts=st.lists(st.integers(0, 300), max_size=4), mean=st.sampled_from([0.0, 1e3]), back=st.booleans())
@settings(max_examples=30, deadline=None)
def test_merging_is_exact(cuts, mean, back):
    x, z = _rows(300, 5, mean=mean), _rows(300, 3, seed=1, mean=-mean)
    edges = [0, *sorted(cuts), 300]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    merged, crossed = Moments(5), CrossMoments(5, 3)
    for part in reversed(parts) if back else parts:
        merged = merged + Moments(5).update(x[part])
        crossed = CrossMoments(5, 3).update(x[part], z[part]) + crossed
    assert_merged(merged, Moments(5).update(x))
    assert_merged(crossed, CrossMoments(5, 3).update(x, z))


def test_a_merge_goes_on_counting():
    x = _rows(300, 5, mean=100.0)
    merged = (Moments(5).update(x[:100]) + Moments(5).update(x[100:200])).update(x[200:])
    assert_merged(merged, Moments(5).update(x))
    _assert_naive(merged, x, 1e-12)


# Measured: 1.1e-7.
def _long_stream(limit=1e-6):
    rows = _rows(200_000, 6, mean=3.0, dtype=torch.float32)
    _assert_naive(_streamed(rows, 10_000, 6), rows, limit)


def test_a_long_stream_loses_nothing():
    _long_stream()


def test_a_long_stream_of_float32_sums_is_caught(monkeypatch):
    whole = Moments.__init__

    def single(self, *arguments):
        whole(self, *arguments)
        self._square = self._square.float()

    monkeypatch.setattr(Moments, "__init__", single)
    monkeypatch.setattr(moments, "BLOCK", 8)
    with pytest.raises(AssertionError):
        _long_stream()


# Measured: 1.1e-6.
def _large_mean():
    rows = _rows(20_000, 6, mean=3e4, dtype=torch.float32)
    covariance = torch.cov(rows.double().T, correction=0)
    assert error(_streamed(rows, 1000, 6).covariance, covariance) <= 1e-5


def test_a_large_mean_costs_no_digits():
    _large_mean()


def test_a_large_mean_without_the_shift_is_caught(monkeypatch):
    monkeypatch.setattr(moments, "shift_of", lambda rows: torch.zeros(rows.shape[1]).double())
    with pytest.raises(AssertionError):
        _large_mean()


def _padding_is_nothing(update=Moments.update):
    rows = _rows(36, 5, dtype=torch.float32).reshape(4, 9, 5)
    expected = update(Moments(5), rows, torch.ones(4, 9).bool())
    for before, after in ((0, 3), (3, 0), (4, 17)):
        padded = torch.nn.functional.pad(rows, (0, 0, before, after), value=torch.nan)
        mask = torch.nn.functional.pad(torch.ones(4, 9).bool(), (before, after))
        found = update(Moments(5), padded, mask)
        for name in MERGED:
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_padding_changes_no_bit_and_may_be_nan():
    _padding_is_nothing()


def test_padding_that_counts_is_caught():
    with pytest.raises(AssertionError):
        _padding_is_nothing(lambda stat, x, mask: stat.update(x.nan_to_num(0.0)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_what_is_counted_must_be_finite(bad):
    x, z = _rows(9000, 3, dtype=torch.float32), _rows(9000, 2, dtype=torch.float32)
    x[8999, 2] = bad
    stat, cross = Moments(3), CrossMoments(3, 2)
    with pytest.raises(NotFinite, match="of squares of coordinate 2 is not finite; load the model in float32"):
        stat.update(x)
    with pytest.raises(NotFinite, match=r"coordinate 2 is not finite") if bad != 1e30 else pytest.raises(NotFinite):
        cross.update(x, z * bad if bad == 1e30 else z)
    assert stat.count == cross.count == 0 and not bool(stat.second.any()) and not bool(cross.second.any())


def test_cross_moments_equal_a_naive_float64_pass():
    x, z = _rows(5000, 4, mean=7.0, dtype=torch.float32), _rows(5000, 3, seed=1, mean=-2.0, dtype=torch.float32)
    z = z + x[:, :3]
    mask = torch.arange(5000) % 3 > 0
    dirty = torch.where(mask[:, None], x, torch.nan)
    found = CrossMoments(4, 3).update(dirty, z, mask)
    a, b = x[mask].double(), z[mask].double()
    assert error(found.covariance, (a - a.mean(0)).T @ (b - b.mean(0)) / len(a)) <= 5e-6
    assert error(found.second, a.T @ b / len(a)) <= 5e-6
    assert error(found.mean, a.mean(0)) <= 1e-6 and error(found.other_mean, b.mean(0)) <= 1e-6


def test_what_does_not_fit_is_refused():
    stat, cross = Moments(3), CrossMoments(3, 2)
    with pytest.raises(ShapeError, match="statistic has width 3, the activations have width 4"):
        stat.update(_rows(5, 4))
    with pytest.raises(ShapeError, match=r"mask \(4,\) must have the leading shape of the activations, \(5,\)"):
        stat.update(_rows(5, 3), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ShapeError, match="cannot merge statistics of widths 3 and 4; are they of one site"):
        stat + Moments(4)
    with pytest.raises(ShapeError, match=r"x \(5, 3\) and z \(4, 2\) must have the same leading shape"):
        cross.update(_rows(5, 3), _rows(4, 2))
    with pytest.raises(ShapeError, match="cannot merge statistics of widths 3 x 2 and 3 x 4"):
        cross + CrossMoments(3, 4)


def test_no_rows_are_nothing():
    stat = Moments(3).update(_rows(5, 3), torch.zeros(5, dtype=torch.bool))
    assert stat.count == 0 and not any(bool(v.any()) for v in (stat.mean, stat.scatter, stat.second))
    assert repr(stat + Moments(3)) == "Moments(width=3, count=0)"


def test_pooling_weighs_every_site_alike():
    small, large = _rows(50, 4), 1e3 * _rows(70, 4, seed=1, mean=1.0)
    by_hand = torch.cat([x * (4 / (x.square().sum(1).mean())).sqrt() for x in (small, large)])
    parts = [Moments(4).update(x) for x in (small, large)]
    assert_merged(pooled(parts), Moments(4).update(by_hand))
    assert float(pooled(parts).second.trace()) == pytest.approx(4.0)
    twice = [Moments(4).update(2 * x) for x in (small, large)]
    assert float(pooled(twice, like=parts).second.trace()) == pytest.approx(16.0)
    with pytest.raises(ArgumentError, match="0 statistics to pool"):
        pooled([])
    with pytest.raises(NotEnoughRows, match="statistic 1 has no energy"):
        pooled([parts[0], Moments(4)])
