"""How well one score tells members of a training set from others: the same for texts, images or anything else.

A higher score looks more like a member, so an AUC of 1 tells all members from all others and .5 none. Well below .5
tells them apart as well: what was forgotten too much looks stranger than what was never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import NDArray

from repedit.errors import ArgumentError, MetricError

Values = NDArray[np.float64]
"""Scores of examples, (n,); higher is more like a member."""
# Pairs of rows that are compared at once.
_PAIRS = 1_000_000


def auc(member: Values, nonmember: Values) -> float:
    """Chance that a member scores above one that is none, ties counting half (Mann-Whitney), exactly; 1 means member.

    Raises:
        MetricError: if a side is empty, or a score is not finite; with the rows.
    """
    _check_sides(member, nonmember)
    return _auc(member, nonmember)


def tpr(member: Values, nonmember: Values, fpr: float = 0.01) -> float:
    """Share of members above a threshold that at most the share `fpr` of the others is above; 1 means member.

    With fewer than 1 / fpr others no false alarm is allowed at all; `tpr_at` refuses that.

    Raises:
        MetricError: if a side is empty, or a score is not finite; with the rows.
    """
    _check_sides(member, nonmember)
    threshold = np.sort(nonmember)[::-1][int(fpr * len(nonmember))]
    return float((member > threshold).mean())


def tpr_at(member: Values, nonmember: Values, fpr: float) -> float:
    """The same where there are enough others to resolve the rate: n of them resolve 1 / n.

    Raises:
        MetricError: if the rate is not in [1 / n, 1), a side is empty, or a score is not finite.
    """
    _check_sides(member, nonmember)
    if not 1 / len(nonmember) <= fpr < 1:
        raise MetricError(
            f"fpr={fpr}; {len(nonmember)} non-members resolve fpr >= {1 / len(nonmember):.3g}, below 1; give more "
            "non-members or a larger fpr"
        )
    return tpr(member, nonmember, fpr)


def loss_attack(member: Values, nonmember: Values, *, splits: int = 10, seed: int = 0) -> float:
    """Accuracy of a logistic regression that reads membership off one score, as a fraction; .5 is no sign.

    The longer side is cut to the length of the shorter one by a seeded draw; the accuracy is the mean over `splits`
    stratified tests, each of a tenth of the rows. It is two-sided: members that score lower are told from others too.

    Raises:
        MetricError: if a side has fewer than ten scores, or one is not finite.
        ArgumentError: if splits < 1.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    _check_sides(member, nonmember)
    if splits < 1:
        raise ArgumentError(f"splits={splits}; give at least 1")
    count = min(len(member), len(nonmember))
    if count < 10:
        raise MetricError(
            f"{len(member)} members and {len(nonmember)} non-members; a tenth of the rows is tested, so give ten of each"
        )
    rng = np.random.default_rng(seed)
    sides = [side if len(side) == count else rng.choice(side, count, replace=False) for side in (member, nonmember)]
    folds = StratifiedShuffleSplit(splits, random_state=seed)
    rows, member_of = np.concatenate(sides)[:, None], np.repeat([1, 0], count)
    return float(cross_val_score(LogisticRegression(), rows, member_of, cv=folds).mean())


def standard_error(value: float, members: int, others: int) -> float:
    """Standard error of an AUC of so many rows, by the approximation of exponential scores.

    sqrt((A (1 - A) + (m - 1)(Q1 - A^2) + (n - 1)(Q2 - A^2)) / (m n)) with Q1 = A / (2 - A), Q2 = 2 A^2 / (1 + A).

    Raises:
        MetricError: if the AUC lies outside [0, 1], or a side is empty.
    Reference: Hanley and McNeil 1982, Radiology 143, equation 2.
    """
    if not (0 <= value <= 1 and members >= 1 and others >= 1):
        raise MetricError(
            f"AUC {value} of {members} members and {others} others; give one in [0, 1] and rows on both sides"
        )
    square = value**2
    spread = (members - 1) * (value / (2 - value) - square) + (others - 1) * (2 * square / (1 + value) - square)
    return float(np.sqrt(max(value * (1 - value) + spread, 0.0) / (members * others)))


def auc_draws(
    member: Float[ndarray, "models m"], nonmember: Float[ndarray, "models n"], *, draws: int = 1000, seed: int = 0
) -> Float[ndarray, "models draws"]:
    """The AUC of every model in bootstrap draws of the rows; all models see the same draws, so what they share cancels.

    Raises:
        MetricError: if a side is empty, or a score is not finite.
        ArgumentError: if draws < 1.
    """
    if draws < 1:
        raise ArgumentError(f"draws={draws}; give at least 1")
    for mine, theirs in zip(member, nonmember, strict=True):
        _check_sides(mine, theirs)
    rng = np.random.default_rng(seed)
    # How often each row is drawn; then a draw's AUC is a sum over pairs, and no draw is sorted anew.
    counts = [
        rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(float) for n in (member.shape[1], nonmember.shape[1])
    ]
    return np.stack([_drawn(m, n, *counts) for m, n in zip(member, nonmember, strict=True)])


def percentiles(drawn: Values, alpha: float = 0.05) -> tuple[float, float]:
    """The (alpha / 2)- and (1 - alpha / 2)-quantiles of draws.

    Raises:
        MetricError: if there is no draw.
    """
    if not len(drawn):
        raise MetricError("there are no draws to take quantiles of; give at least one")
    low, high = np.quantile(drawn, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def _auc(member: Values, nonmember: Values) -> float:
    order = np.sort(nonmember)
    below, upto = (np.searchsorted(order, member, side=side).sum() for side in ("left", "right"))
    return float((below + upto) / (2 * len(member) * len(nonmember)))


def _drawn(
    member: Values, nonmember: Values, times: Float[ndarray, "draws m"], others: Float[ndarray, "draws n"]
) -> Values:
    wins = np.zeros(len(times))
    size = max(1, _PAIRS // len(nonmember))
    for start in range(0, len(member), size):
        part = member[start : start + size, None]
        pairs = (part > nonmember) + 0.5 * (part == nonmember)
        wins += ((times[:, start : start + size] @ pairs) * others).sum(1)
    return wins / (len(member) * len(nonmember))


def _check_sides(member: Values, nonmember: Values) -> None:
    if not len(member) or not len(nonmember):
        raise MetricError(f"{len(member)} members and {len(nonmember)} others; give at least one of each")
    for name, side in (("members", member), ("others", nonmember)):
        bad = cast(Sequence[int], np.flatnonzero(~np.isfinite(side)).tolist())
        if bad:
            raise MetricError(
                f"{len(bad)} scores of the {name} are not finite, rows {', '.join(map(str, bad[:5]))}; "
                "was the model trained until its loss overflowed?"
            )
