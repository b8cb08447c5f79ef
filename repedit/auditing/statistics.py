"""Every statistic of an audit: cross-fitted settings, recovered fractions with their intervals, and intervals of shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import ceil, inf, log, sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repedit.auditing.attack import FAILED, RAN, SKIPPED, UNINFORMATIVE, Finding
from repedit.auditing.report import Recovery
from repedit.auditing.verdict import informative
from repedit.data.fact_sets import seeded_order
from repedit.errors import ArgumentError, DataError, FractionError, NotEnoughRows, ShapeError, is_whole

# --- The best setting of an attack, chosen on one half of the facts and scored on the other
#
# An attacker has many settings and reports the best. The best of fifty useless ones looks useful on the facts that
# chose it, so no fact is ever scored under a setting it helped to choose.


Values = NDArray[np.float64]


class CrossFitted(NamedTuple):
    """A finding with the setting of each half of V chosen on the other half."""

    values: NDArray[np.int8]
    """1 where a fact was right under the setting that the other half chose; one an item."""
    settings: tuple[str, str]
    """The setting used on half 1 (the best on half 2), and the one used on half 2."""


@dataclass(frozen=True, eq=False)
class Series:
    """What one attack found on the three models, a finding a seed; each model chooses its own settings.

    Raises:
        ArgumentError: if the findings are of several attacks, or edited and original were asked different facts.
        ShapeError: if the floor is an array and has not one value a fact.
    """

    edited: tuple[Finding, ...]
    original: tuple[Finding, ...]
    floor: tuple[Finding, ...] | Values | float
    """Findings on a reference (the same facts) or on fresh ones (others); one value for each fact of the first edited
    finding, as a guess gives; or a number that is known exactly, as 1 / choices is."""
    floor_name: str = ""
    level: str = ""
    decides: bool = True
    seed: int = 0
    """Draws the halves of V on which settings are chosen."""

    def __post_init__(self) -> None:
        if len({finding.attack for finding in self._findings}) != 1 or not (self.edited and self.original):
            raise ArgumentError(
                f"a series of findings {[f.attack for f in self.edited]} on the edited model and "
                f"{[f.attack for f in self._findings[len(self.edited) :]]} on others; give those of one attack for each"
            )
        if self.status == SKIPPED:
            return
        asked = set(self.edited[0].items)
        for number, finding in enumerate(self._findings):
            other_items = set(finding.items) ^ asked
            # Fresh facts are all others; a reference is asked the very same.
            if other_items and (number < len(self.edited) + len(self.original) or asked & set(finding.items)):
                raise ArgumentError(
                    f"attack {self.attack!r}, seed {finding.seed}: {len(other_items)} facts were asked of one model alone; "
                    "edited, original and reference are asked the same"
                )
        if isinstance(self.floor, np.ndarray) and self.floor.shape != (len(self.edited[0].items),):
            raise ShapeError(
                f"attack {self.attack!r}: a floor of shape {self.floor.shape} for {len(self.edited[0].items)} facts; "
                "give one value a fact"
            )

    @cached_property
    def attack(self) -> str:
        """The name of the attack."""
        return self.edited[0].attack

    @cached_property
    def status(self) -> str:
        """The worst of any model: an attack skipped on one is skipped, one that failed to train on one failed."""
        statuses = {finding.status for finding in self._findings}
        return next(status for status in (SKIPPED, FAILED, UNINFORMATIVE, RAN) if status in statuses)

    @cached_property
    def reason(self) -> str:
        """Why the status is not "ran"; else what the edited model's finding says."""
        return next((f.reason for f in self._findings if f.status == self.status and f.reason), "")

    @cached_property
    def _measured(self) -> tuple[Finding, ...]:
        return self.floor if isinstance(self.floor, tuple) else ()

    @cached_property
    def _findings(self) -> tuple[Finding, ...]:
        return (*self.edited, *self.original, *self._measured)


def cross_fitted(finding: Finding, entities: Mapping[str, str], seed: int = 0) -> CrossFitted:
    """Each half of V under the setting that is best on the other half; of equal ones the first.

    The halves share no entity and depend on the entities and the seed alone, so every model and attack asked the same
    facts has the same halves.

    Args:
        entities: item id to entity, for every item of the finding.
    Raises:
        ArgumentError: if the finding asked nothing.
        DataError: if there is a choice of settings, and an item has no entity.
        NotEnoughRows: if there is a choice of settings and a single entity.
    """
    if not finding.items:
        raise ArgumentError(f"finding {finding.attack!r} ({finding.status}) asked nothing, so no setting can be chosen")
    if len(finding.settings) == 1:
        return CrossFitted(finding.correct[0], (finding.settings[0], finding.settings[0]))
    first = in_first_half(finding.items, entities, seed)
    if first.all():
        raise NotEnoughRows(
            f"finding {finding.attack!r}: {len(finding.settings)} settings and one entity; choosing a setting on other "
            "facts than those scored needs at least 2 entities"
        )
    rows = _best(finding.correct, ~first), _best(finding.correct, first)
    values = np.where(first, finding.correct[rows[0]], finding.correct[rows[1]])
    return CrossFitted(values, (finding.settings[rows[0]], finding.settings[rows[1]]))


def in_first_half(items: Iterable[str], entities: Mapping[str, str], seed: int = 0) -> NDArray[np.bool_]:
    """Whether each item is in half 1, which has half of the entities, drawn by the seed.

    Raises:
        DataError: if an item has no entity.
    """
    ids = tuple(items)
    missing = sorted(item for item in ids if item not in entities)
    if missing:
        raise DataError(f"{len(missing)} items have no entity, such as {missing[:5]}; give one for each, or its own id")
    order = seeded_order({entities[item] for item in ids}, f"{seed}:halves")
    half = set(order[: (len(order) + 1) // 2])
    return np.array([entities[item] in half for item in ids], dtype=np.bool_)


def _best(correct: NDArray[np.int8], choosing: NDArray[np.bool_]) -> int:
    """The row with most facts right among those that choose."""
    return int(correct[:, choosing].sum(1).argmax())


# --- Intervals of the recovered fraction, for each attack and for the strongest of all
#
# R = (A - B) / (C - B), with A, C, B the accuracies of edited, original and floor after one attack. A draw takes seeds
# and entities with replacement; all models and attacks see the same draw, so what they share cancels. A floor measured
# on other facts is drawn by itself.
#
# A lower end keeps the settings that cross-fitting chose: it says what they bring back at least, and so what the best
# does. An upper end chooses anew in every draw: with the settings kept it would lie below what the best of twelve truly
# brings back in 16 of 100 audits, and chosen anew in 0.5 (100 facts, 600 simulated runs, nominal 2.5).


LEAST_DRAWS = 200


def recoveries(
    series: Sequence[Series],
    entities: Mapping[str, str],
    *,
    draws: int = 2000,
    alpha: float = 0.05,
    seed: int = 0,
    pending: int = 0,
) -> list[Recovery]:
    """The recovered fraction of every attack, with its own interval and a bound that holds for all at once.

    The interval has the (alpha / 2)- and (1 - alpha / 2)-quantiles of the draws as its ends; C - B <= 0 in a draw
    counts as minus infinity for the lower one and as infinity for the upper. Where a model is always right, or always
    wrong, no draw can differ from another, and the ends of the Clopper-Pearson interval over the entities stand for
    its accuracy A or B.

    The bound widens each side of every interval by one factor: the (1 - alpha / 2)-quantile of the largest deviation
    of any attack in a draw, each in units of its own interval. That is the max-statistic; it knows how alike the
    attacks are, where Bonferroni would widen twelve of them by 1.46. With one attack the bound is the interval.

    An attack that breaks the original is marked uninformative. It stays outside the bound, as does one that does not
    decide; one that failed to train stays inside, since what it brings back it has shown.

    With `pending` attacks still to come, the bound is one over all planned attacks. Each attack that has not run is
    counted by the union bound: for k attacks that ran, the factor q is the smallest with

        P(largest deviation of the k > q) + pending * P(deviation of one attack > q) <= alpha / 2,

    where the second probability is the largest of those of the k attacks and that of a normal deviation in the same
    units. If no pending attack has a heavier tail than that, q is at least the factor after all attacks. The bounds at
    every stage are then at least as wide as those at the end, so an attack that is above a threshold at any stage is
    above it at the end, and looking after every attack raises no more false alarms than looking once.

    Args:
        entities: item id to entity, fresh facts included.
        pending: deciding attacks that are planned and have not run; 0 gives the bound over the attacks given.
    Raises:
        ArgumentError: if there are fewer than 200 draws, or too few for alpha.
        FractionError: unless alpha is strictly between 0 and 1.
        DataError: if an item has no entity.
        NotEnoughRows: if settings are to be chosen and all facts have one entity.
    """
    sampler = _Bootstrap([one for one in series if one.status != SKIPPED], entities, draws, alpha, seed)
    fractions = [None if one.status == SKIPPED else _fraction(one, sampler) for one in series]
    direct = next((r for one, r in zip(series, fractions, strict=True) if r and one.attack == "direct"), None)
    rows = [_recovery(one, r, direct) for one, r in zip(series, fractions, strict=True)]
    family = [i for i, row in enumerate(rows) if row.decides and row.status in (RAN, FAILED)]
    bounds = _simultaneous([r for i in family if (r := fractions[i])], sampler.tail, pending)
    for i, bound in zip(family, bounds, strict=True):
        rows[i] = replace(rows[i], bound=bound)
    return rows


def knowledge(
    one: Series, entities: Mapping[str, str], *, draws: int = 2000, alpha: float = 0.05, seed: int = 0
) -> tuple[float, float, float]:
    """C - B, how far the original is above the floor: its value and the ends of its interval.

    Raises:
        RepeditError: as `recoveries`.
    """
    sampler = _Bootstrap([one], entities, draws, alpha, seed)
    _, original, floor = _accuracies(one, sampler)
    gaps = [c - b for c, b in product(original.ends(original.fixed), floor.ends(floor.fixed))]
    low, high = np.sort(np.min(gaps, 0)), np.sort(np.max(gaps, 0))
    return original.value - floor.value, float(low[sampler.tail]), float(high[-1 - sampler.tail])


class _Accuracy(NamedTuple):
    """An accuracy over seeds and facts, and its draws."""

    value: float
    fixed: Values
    """With the settings that cross-fitting chose."""
    rechosen: Values
    """With the settings chosen anew in each draw."""
    exact: tuple[float, float] | None = None
    """Ends that stand for the draws where none can differ from another."""
    settings: tuple[str, ...] = ()

    def ends(self, draws: Values) -> list[Values]:
        """The draws, or two constant arrays in their place."""
        return [draws] if self.exact is None else [np.full_like(draws, end) for end in self.exact]


class _Fraction(NamedTuple):
    """R, the accuracies it is made of, its draws for the lower and the upper end, and those ends."""

    value: float
    edited: _Accuracy
    original: _Accuracy
    floor: _Accuracy
    low: Values
    high: Values
    interval: tuple[float, float]

    @property
    def gap(self) -> float:
        """C - B."""
        return self.original.value - self.floor.value


def check_draws(draws: int, alpha: float) -> None:
    """Refuse a number of bootstrap draws that gives no interval at level alpha.

    Raises:
        ArgumentError: if there are fewer than 200 draws, or too few for alpha.
        FractionError: if alpha is not strictly between 0 and 1.
    """
    if not 0 < alpha < 1:
        raise FractionError(f"alpha={alpha}; give a fraction strictly between 0 and 1, such as 0.05")
    if not is_whole(draws, LEAST_DRAWS) or _tail(draws, alpha) < 0:
        least = max(LEAST_DRAWS, ceil(2 / alpha))
        raise ArgumentError(f"draws={draws!r}; the ends of an interval at alpha={alpha} need at least {least}")


def _tail(draws: int, alpha: float) -> int:
    return int(alpha / 2 * (draws + 1)) - 1


class _Bootstrap:
    """The draws that all series share; facts that only a floor was measured on have draws of their own."""

    def __init__(
        self, series: Sequence[Series], entities: Mapping[str, str], draws: int, alpha: float, seed: int
    ) -> None:
        check_draws(draws, alpha)
        self.tail = _tail(draws, alpha)
        """How many draws lie beyond either end of an interval."""
        self._asked = {item for one in series for finding in (*one.edited, *one.original) for item in finding.items}
        floors = {
            item for one in series if isinstance(one.floor, tuple) for finding in one.floor for item in finding.items
        }
        missing = sorted(item for item in self._asked | floors if item not in entities)
        if missing:
            raise DataError(f"{len(missing)} items have no entity, such as {missing[:5]}; give one for each")
        self._entities, self._draws, self._alpha, self._seed = entities, draws, alpha, seed
        self._sides = [self._side(items, number) for number, items in enumerate((self._asked, floors - self._asked))]

    def measured(self, findings: Sequence[Finding], halves: int) -> _Accuracy:
        """The accuracy of an attack on a model, over its seeds."""
        selected = [cross_fitted(finding, self._entities, halves) for finding in findings]
        values = np.array([choice.values for choice in selected])
        draws = [
            self._drawn(finding, halves, [finding.settings.index(name) for name in choice.settings])
            for finding, choice in zip(findings, selected, strict=True)
        ]
        fixed, rechosen = (self._over_seeds(np.stack(choice, 1)) for choice in zip(*draws, strict=True))
        exact = _exact(values, len({self._entities[item] for item in findings[0].items}), self._alpha)
        settings = tuple(name for choice in selected for name in choice.settings)
        return _Accuracy(float(values.mean()), fixed, rechosen, exact, settings)

    def known(self, values: Values | float, items: tuple[str, ...]) -> _Accuracy:
        """An accuracy of one value a fact, or one that needs no measuring."""
        if isinstance(values, float):
            drawn = np.full(self._draws, values)
        else:
            right, counts, size, _ = self._totals(values[None], items)
            drawn = (counts @ right)[:, 0] / size
        return _Accuracy(float(np.mean(values)), drawn, drawn)

    def _over_seeds(self, drawn: Values) -> Values:
        """The mean over seeds drawn with replacement; draws x seeds. Attacks with as many seeds draw the same."""
        count = drawn.shape[1]
        if count == 1:
            return drawn[:, 0]
        return (drawn * _resampled(count, self._draws, [self._seed, 2, count])).sum(1) / count

    def _drawn(self, finding: Finding, halves: int, used: Sequence[int]) -> tuple[Values, Values]:
        """The accuracy in every draw: under the settings used on either half, and under the best of the draw."""
        right, counts, size, index = self._totals(finding.correct.astype(np.float64), finding.items)
        if len(finding.settings) == 1:
            drawn = (counts @ right)[:, 0] / size
            return drawn, drawn
        first = np.zeros(len(right), dtype=np.bool_)
        first[index] = in_first_half(finding.items, self._entities, halves)
        one, two = (counts * first) @ right, (counts * ~first) @ right
        row = np.arange(self._draws)
        fixed = (one[:, used[0]] + two[:, used[1]]) / size
        return fixed, (one[row, two.argmax(1)] + two[row, one.argmax(1)]) / size

    def _totals(self, rows: Values, items: tuple[str, ...]) -> tuple[Values, Values, Values, NDArray[np.int64]]:
        """Right answers by entity and row; the draws of entities; facts in each draw; the entity of each item."""
        place, counts = self._sides[0 if items[0] in self._asked else 1]
        index = np.array([place[self._entities[item]] for item in items])
        right = np.zeros((len(place), len(rows)))
        np.add.at(right, index, rows.T)
        size = counts @ np.bincount(index, minlength=len(place))
        # A draw that misses every entity of an attack is nan, which counts as knowing nothing.
        return right, counts, np.where(size > 0, size, np.nan), index

    def _side(self, items: Iterable[str], number: int) -> tuple[dict[str, int], Values]:
        names = sorted({self._entities[item] for item in items})
        return {name: i for i, name in enumerate(names)}, _resampled(len(names), self._draws, [self._seed, number])


def _resampled(count: int, draws: int, key: list[int]) -> Values:
    """How often each of `count` things comes up in each of the draws, `count` with replacement; draws x things."""
    if not count:
        return np.zeros((draws, 0))
    picked = np.random.default_rng(key).integers(0, count, (draws, count)) + count * np.arange(draws)[:, None]
    return np.bincount(picked.ravel(), minlength=draws * count).reshape(draws, count).astype(np.float64)


def _exact(values: NDArray[np.int8], entities: int, alpha: float) -> tuple[float, float] | None:
    """Clopper-Pearson's interval over the entities, where every answer is right or every answer wrong."""
    if values.any() and not values.all():
        return None
    return clopper_pearson(entities if values.all() else 0, entities, alpha)


def _accuracies(one: Series, sampler: _Bootstrap) -> tuple[_Accuracy, _Accuracy, _Accuracy]:
    """Edited, original, floor."""
    if isinstance(one.floor, tuple):
        floor = sampler.measured(one.floor, one.seed)
    else:
        floor = sampler.known(one.floor, one.edited[0].items)
    return sampler.measured(one.edited, one.seed), sampler.measured(one.original, one.seed), floor


def _fraction(one: Series, sampler: _Bootstrap) -> _Fraction:
    edited, original, floor = _accuracies(one, sampler)
    # R rises with A, but falls with B only while A < C; so every pair of ends is looked at.
    fixed = product(edited.ends(edited.fixed), floor.ends(floor.fixed))
    rechosen = product(edited.ends(edited.rechosen), floor.ends(floor.rechosen))
    low = np.min([_ratio(a, original.fixed, b, -np.inf) for a, b in fixed], 0)
    high = np.max([_ratio(a, original.rechosen, b, np.inf) for a, b in rechosen], 0)
    gap = original.value - floor.value
    value = (edited.value - floor.value) / gap if gap > 0 else float("nan")
    ends = float(np.sort(low)[sampler.tail]), float(np.sort(high)[-1 - sampler.tail])
    return _Fraction(value, edited, original, floor, low, high, ends)


def _ratio(a: Values, c: Values, b: Values, unknown: float) -> Values:
    return np.divide(a - b, c - b, out=np.full_like(a, unknown), where=c - b > 0)


def _simultaneous(family: Sequence[_Fraction], tail: int, pending: int) -> list[tuple[float, float]]:
    """The bounds of all attacks at once, in their order, with as many more to come as are pending."""
    values = [r.value for r in family]
    lower = _widened(values, [r.interval[0] for r in family], [r.low for r in family], tail, pending)
    upper = _widened(values, [r.interval[1] for r in family], [r.high for r in family], tail, pending)
    return list(zip(lower, upper, strict=True))


def _widened(
    values: Sequence[float], ends: Sequence[float], draws: Sequence[Values], tail: int, pending: int
) -> list[float]:
    """One side's ends, moved away from their values by the factor that covers the largest deviation."""
    widths = [end - value for value, end in zip(values, ends, strict=True)]
    # An end that lies on its value, or at infinity, gives no unit to measure by; it stays where it is.
    usable = [bool(np.isfinite(width) and width) for width in widths]
    moved = [(d - v) / w for v, d, w, ok in zip(values, draws, widths, usable, strict=True) if ok]
    factor = _factor(np.array(moved), tail, pending) if moved else 1.0
    return [v + factor * w if ok else end for v, w, end, ok in zip(values, widths, ends, usable, strict=True)]


def _factor(moved: Values, tail: int, pending: int) -> float:
    """The factor that at most `tail` draws exceed: in the attacks given (attacks x draws), or in one of those pending."""
    largest, each = np.sort(moved.max(0)), np.sort(moved, 1)
    count = len(largest)
    low = float(largest[-1 - tail])
    if not pending or not np.isfinite(low):
        return low
    normal = NormalDist()
    # In units of its own interval, a normal deviation exceeds 1 in `tail` draws too.
    unit = normal.inv_cdf(1 - max(tail, 0.5) / count)

    def exceeding(factor: float) -> float:
        alone = max(count - int(np.searchsorted(row, factor, side="right")) for row in each)
        beyond = count * (1 - normal.cdf(factor * unit))
        return float(count - int(np.searchsorted(largest, factor, side="right")) + pending * max(alone, beyond))

    # No finite factor is enough where an attack has draws that give no ratio.
    high = 2 * max(low, 1.0)
    while exceeding(high) > tail:
        if exceeding(float(np.finfo(np.float64).max)) > tail:
            return inf
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if exceeding(middle) > tail else (low, middle)
    return high


def _recovery(one: Series, fraction: _Fraction | None, direct: _Fraction | None) -> Recovery:
    row = Recovery(one.attack, one.status, one.reason, floor_name=one.floor_name, level=one.level, decides=one.decides)
    if fraction is None:
        return row
    roles = {"edited": fraction.edited, "original": fraction.original, "floor": fraction.floor}
    settings = {role: accuracy.settings for role, accuracy in roles.items() if accuracy.settings}
    row = replace(
        row, value=fraction.value, interval=fraction.interval, settings=settings,
        edited=fraction.edited.value, original=fraction.original.value, floor=fraction.floor.value,
    )  # fmt: skip
    if one.status != RAN or direct is None or informative(fraction.gap, direct.gap):
        return row
    reason = (
        f"it breaks the original too: {fraction.gap:.3f} above the floor after the attack, less than half of "
        f"{direct.gap:.3f} before"
    )
    if direct.gap <= 0:
        reason = f"simply asked, the original is no better than the floor: {direct.gap:.3f} above it"
    return replace(row, status=UNINFORMATIVE, reason=reason)


# --- Intervals of a share, and of a whole distribution


def clopper_pearson(successes: int, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """The exact interval of a share, which covers it with probability at least 1 - alpha.

    Raises:
        ArgumentError: unless 0 <= successes <= n and n >= 1.
        FractionError: unless 0 < alpha < 1.
    """
    from scipy.stats import binomtest

    if not (n >= 1 and 0 <= successes <= n):
        raise ArgumentError(f"{successes} successes of {n}; give 0 to n of at least 1")
    _check_alpha(alpha)
    interval = binomtest(successes, n).proportion_ci(1 - alpha, method="exact")
    return float(interval.low), float(interval.high)


class Band(NamedTuple):
    """Between which bounds a distribution function lies."""

    points: NDArray[np.float64]
    """The values, ascending; repeated ones stand as often as they came."""
    lower: NDArray[np.float64]
    """At a point and up to the next one."""
    upper: NDArray[np.float64]
    width: float
    """How far either bound is from the sample's own distribution function, before it is cut to [0, 1]."""

    def mean(self, low: float = 0.0, high: float = 1.0) -> tuple[float, float]:
        """The least and the largest mean of a distribution on [low, high] that lies inside the band."""
        steps = np.diff(np.concatenate([[low], self.points, [high]]))
        above = np.concatenate([[min(self.width, 1.0)], self.upper])
        below = np.concatenate([[0.0], self.lower])
        return float(high - (steps * above).sum()), float(high - (steps * below).sum())


def dkw_band(values: ArrayLike, alpha: float = 0.05) -> Band:
    """Bounds that hold a whole distribution function with at least 1 - alpha, from independent values.

    F_n -+ sqrt(ln(2 / alpha) / (2 n)), cut to [0, 1]: the Dvoretzky-Kiefer-Wolfowitz inequality.

    Raises:
        DataError: if there are no values, or one is not finite.
        FractionError: unless 0 < alpha < 1.
    Reference: Scholten et al. 2024, arXiv:2410.03523.
    """
    points = np.sort(np.asarray(values, dtype=np.float64).ravel())
    if not points.size or not np.isfinite(points).all():
        raise DataError(f"a band from {points.size} values; give at least one, all finite")
    _check_alpha(alpha)
    width = sqrt(log(2 / alpha) / (2 * points.size))
    # The function steps at the last of equal values; the earlier ones stand for nothing, the distance to them is 0.
    share = np.searchsorted(points, points, side="right") / points.size
    return Band(points, np.clip(share - width, 0.0, 1.0), np.clip(share + width, 0.0, 1.0), width)


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise FractionError(f"alpha={alpha}; give a fraction strictly between 0 and 1, such as 0.05")
