"""Scores of members against others: counted, recomputed with scikit-learn, and refused where they mean nothing."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit

from repedit.errors import ArgumentError, MetricError, NotEnoughRows, NotFinite, ShapeError
from repedit.metrics import membership
from repedit.metrics import membership as separation
from repedit.metrics.membership import (
    auc,
    auc_draws,
    lira,
    loss_attack,
    offline_lira,
    percentiles,
    standard_error,
    tpr,
    tpr_at,
)


def normal(count: int, mean: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, count)


def test_one_auc_for_texts_and_images():
    assert membership.auc is separation.auc and membership.tpr_at is separation.tpr_at


def check_scale(found) -> None:
    """One distribution is not told apart, disjoint ones are, and the order of the rows is no matter."""
    same, far = (normal(2000, seed=1), normal(2000, seed=2)), (normal(300) + 50, normal(70))
    assert abs(found(*same) - 0.5) < 0.05 and found(*far) >= 0.99
    assert found(same[0][::-1], np.roll(same[1], 7)) == pytest.approx(found(*same), abs=1e-12)
    assert found(far[1], far[0]) <= 0.01


def test_an_auc_is_a_half_for_one_distribution_and_one_for_two():
    check_scale(auc)


@pytest.mark.parametrize("broken", [
    lambda m, n: auc(n, m),
    lambda m, n: max(auc(m, n), auc(n, m)),
    lambda m, n: float((m[: len(n)] > n[: len(m)]).mean()),
], ids=["the sides swapped", "the better side", "pairs in order"])  # fmt: skip
def test_a_broken_auc_is_caught(broken):
    with pytest.raises(AssertionError):
        check_scale(broken)


def recomputed(member: np.ndarray, nonmember: np.ndarray) -> float:
    """The attack on sides of equal length, fold by fold."""
    x, y = np.concatenate((member, nonmember))[:, None], np.repeat([1, 0], len(member))
    hits = []
    for train, test in StratifiedShuffleSplit(10, random_state=0).split(x, y):
        hits.append((LogisticRegression().fit(x[train], y[train]).predict(x[test]) == y[test]).mean())
    return float(np.mean(hits))


def test_the_loss_attack_is_a_logistic_regression_on_the_loss():
    member, other = normal(120, 1), normal(120, seed=3)
    assert loss_attack(member, other) == pytest.approx(recomputed(member, other), abs=1e-12)
    assert loss_attack(member + 30, other) == 1.0 == loss_attack(other, member + 30)


def test_the_loss_attack_cuts_the_longer_side_by_a_draw_and_not_from_its_end():
    sorted_by_score, other = np.sort(normal(400)), normal(60, seed=3)
    assert abs(loss_attack(sorted_by_score, other) - 0.5) < 0.15
    # Broken: the first rows of a sorted file are no sample of it.
    assert loss_attack(sorted_by_score[:60], other) > 0.8
    drawn = [loss_attack(sorted_by_score, other, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_rates_of_false_alarms_need_rows_to_resolve_them():
    member, other = normal(50, 1), normal(50, seed=3)
    assert tpr_at(member, other, 0.02) == tpr(member, other, 0.02)
    with pytest.raises(MetricError, match=r"fpr=0.01; 50 non-members resolve fpr >= 0.02"):
        tpr_at(member, other, 0.01)


def test_the_standard_error_is_that_of_many_samples():
    # Exponential scores, for which the approximation is exact: A = r / (1 + r) with r the ratio of the means.
    rng = np.random.default_rng(0)
    found = [auc(rng.exponential(2, 120), rng.exponential(1, 50)) for _ in range(2000)]
    assert standard_error(2 / 3, 120, 50) == pytest.approx(np.std(found), rel=0.05)
    assert standard_error(0.5, 120, 50) == pytest.approx(0.0485, abs=1e-3) and standard_error(1.0, 9, 9) == 0


def test_draws_are_shared_between_models():
    member, other = normal(80, 0.5), normal(60, seed=4)
    found = auc_draws(np.stack([member, member, -member]), np.stack([other, other, -other]), draws=200)
    assert found.shape == (3, 200) and (found[0] == found[1]).all() and found[0] == pytest.approx(1 - found[2])
    low, high = percentiles(found[0])
    assert low < auc(member, other) < high and found[0].std() == pytest.approx(
        standard_error(auc(member, other), 80, 60), rel=0.2
    )
    assert (auc_draws(member[None], other[None], draws=5, seed=1) != found[:1, :5]).any()


def test_a_draw_is_the_auc_of_the_rows_drawn(monkeypatch):
    """Rows that are drawn so often, repeated so often, ties and all, in parts as well as at once."""
    member, other = normal(9, 0.5).round(), normal(7, seed=4).round()
    times, others = (np.random.default_rng(n).multinomial(n, np.full(n, 1 / n), size=20) for n in (9, 7))
    for pairs in (1_000_000, 10):
        monkeypatch.setattr(separation, "_PAIRS", pairs)
        found = separation._bootstrap_auc(member, other, times.astype(float), others.astype(float))
        by_hand = [auc(np.repeat(member, t), np.repeat(other, o)) for t, o in zip(times, others, strict=True)]
        assert found == pytest.approx(by_hand, abs=1e-12)


def test_deviations_above_models_that_never_saw_an_image_find_members():
    rng = np.random.default_rng(0)
    ease, member = rng.normal(0, 3, 600), np.arange(600) % 2 == 0
    outside = ease + rng.normal(0, 0.5, (8, 600))
    target = ease + member + rng.normal(0, 0.5, 600)
    found = offline_lira(target, outside)
    assert auc(target[member], target[~member]) < 0.65 and auc(found[member], found[~member]) > 0.85
    by_hand = (target[3] - outside[:, 3].mean()) / outside[:, 3].std(ddof=1)
    assert offline_lira(target, outside, pooled=False)[3] == pytest.approx(by_hand)
    assert (found == offline_lira(target, outside, pooled=True)).all()


NAN = np.array([0.0, np.nan, 1.0, np.inf])


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: auc(NAN, np.zeros(2)), MetricError, "2 scores of the members are not finite, rows 1, 3"),
    (lambda: tpr_at(np.zeros(2), NAN, 0.5), MetricError, "2 scores of the others are not finite, rows 1, 3"),
    (lambda: auc_draws(np.zeros((1, 2)), NAN[None]), MetricError, "2 scores of the others"),
    (lambda: loss_attack(np.zeros(0), np.zeros(2)), MetricError, "0 members and 2 others; give at least one of each"),
    (lambda: loss_attack(np.zeros(9), np.zeros(12)), MetricError, "9 members and 12 non-members; a tenth of the rows is tested"),
    (lambda: loss_attack(np.zeros(12), np.zeros(12), splits=0), ArgumentError, "splits=0; give at least 1"),
    (lambda: tpr_at(np.zeros(2), np.zeros(2), 1.0), MetricError, "fpr=1.0; 2 non-members resolve fpr >= 0.5, below 1"),
    (lambda: standard_error(1.2, 3, 3), MetricError, "AUC 1.2 of 3 members and 3 others"),
    (lambda: auc_draws(np.zeros((1, 2)), np.zeros((1, 2)), draws=0), ArgumentError, "draws=0; give at least 1"),
    (lambda: percentiles(np.zeros(0)), MetricError, "there are no draws"),
    (lambda: offline_lira(np.zeros(3), np.zeros((4, 2))), ShapeError, r"scores of \(3,\) texts, shadow scores \(4, 2\)"),
    (lambda: offline_lira(np.zeros(3), np.zeros((1, 3))), NotEnoughRows, "1 shadow models; train at least 2 without"),
    (lambda: offline_lira(NAN, np.zeros((3, 4))), NotFinite, "a score is not finite"),
    (lambda: offline_lira(np.zeros(0), np.zeros((3, 0))), ArgumentError, "there is no text"),
    (lambda: lira(np.zeros(0), np.zeros((4, 0)), np.zeros((4, 0), dtype=bool)), ArgumentError, "there is no text"),
])  # fmt: skip
def test_what_makes_no_metric_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
