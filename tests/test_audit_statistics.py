"""Cross-fitted settings, the bootstrap of the recovered fraction, and the bound over all attacks."""

import re
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from repedit.auditing import statistics
from repedit.auditing.attack import FAILED, RAN, SKIPPED, UNINFORMATIVE, Finding, Setting, lengthened, merged_folds
from repedit.auditing.report import Recovery, RetainCheck
from repedit.auditing.statistics import Series, cross_fitted, in_first_half, knowledge, recoveries
from repedit.auditing.verdict import certain, verdict
from repedit.errors import ArgumentError, DataError, FractionError, NotEnoughRows, ShapeError
from repedit.plot.reports import interval_text
from repedit.report.tables import format_recovery

N = 100
ITEMS = tuple(f"f{i}" for i in range(N))
OWN = {item: item for item in ITEMS}


def finding(correct, attack="direct", items=None, **changes) -> Finding:
    rows = np.atleast_2d(np.asarray(correct)).astype(np.int8)
    items = items or tuple(f"f{i}" for i in range(rows.shape[1]))
    names = tuple(f"s{i}" for i in range(len(rows)))
    return replace(Finding(attack, 0, RAN, "", items, names, rows, np.zeros(rows.shape)), **changes)


def coins(rng, chance) -> np.ndarray:
    """A row of right and wrong answers for each chance."""
    return rng.random((np.size(chance), N)) < np.reshape(chance, (-1, 1))


def series(edited, original, floor, attack="direct", **options) -> Series:
    def found(rows):
        return (finding(rows, attack),)

    return Series(found(edited), found(original), floor if isinstance(floor, float) else found(floor), **options)


def null(rng, attack="direct", settings=1, floor=0.25) -> Series:
    """An attack that brings nothing back: the edited model answers as the reference does."""
    return series(coins(rng, [floor] * settings), coins(rng, [0.95] * settings), coins(rng, [floor] * settings), attack)


# Choosing settings


def test_each_half_is_scored_under_the_best_setting_of_the_other():
    rng, first, used = np.random.default_rng(0), in_first_half(ITEMS, OWN), set()
    assert first.sum() == N // 2
    for _ in range(5):
        found = finding(coins(rng, [0.5] * 6))
        values, settings = cross_fitted(found, OWN)
        for half, name in zip((first, ~first), settings, strict=True):
            best = found.correct[:, ~half].sum(1).argmax()
            assert name == f"s{best}"
            np.testing.assert_array_equal(values[half], found.correct[best, half])
        used.add(len(set(settings)))
    assert 2 in used


def check_the_scored_half_is_not_read():
    rng = np.random.default_rng(1)
    for _ in range(20):
        found = finding(coins(rng, [0.4, 0.5, 0.5, 0.6]))
        first = in_first_half(ITEMS, OWN)
        for half, number in ((first, 0), (~first, 1)):
            noise = found.correct.copy()
            noise[:, half] = coins(rng, rng.random(4))[:, half]
            assert cross_fitted(finding(noise), OWN).settings[number] == cross_fitted(found, OWN).settings[number]


def test_the_scored_half_is_not_read():
    check_the_scored_half_is_not_read()


def test_choosing_on_all_facts_is_caught(monkeypatch):
    monkeypatch.setattr(statistics, "_best", lambda correct, choosing: int(correct.sum(1).argmax()))
    with pytest.raises(AssertionError):
        check_the_scored_half_is_not_read()


def test_halves_share_no_entity_and_follow_seed_and_entities_alone():
    entities = {item: f"e{i // 3}" for i, item in enumerate(ITEMS)}
    first = dict(zip(ITEMS, in_first_half(ITEMS, entities, 5), strict=True))
    sides = [{entities[item] for item in ITEMS if first[item] == side} for side in (True, False)]
    assert not sides[0] & sides[1] and abs(len(sides[0]) - len(sides[1])) <= 1
    backwards = dict(zip(ITEMS[::-1], in_first_half(ITEMS[::-1], entities, 5), strict=True))
    assert backwards == first
    assert list(in_first_half(ITEMS, entities, 6)) != list(first.values())


def test_of_equal_settings_the_first_is_used():
    row = coins(np.random.default_rng(2), 0.9)
    assert cross_fitted(finding(np.concatenate([~row, row, row])), OWN).settings == ("s1", "s1")


def test_choosing_refuses_what_it_cannot_do():
    row = coins(np.random.default_rng(2), [0.5, 0.5])
    with pytest.raises(NotEnoughRows, match=r"2 settings and one entity"):
        cross_fitted(finding(row), dict.fromkeys(ITEMS, "one"))
    assert cross_fitted(finding(row[:1]), dict.fromkeys(ITEMS, "one")).settings == ("s0", "s0")
    with pytest.raises(DataError, match=r"100 items have no entity, such as \['f0'"):
        cross_fitted(finding(row), {})
    with pytest.raises(ArgumentError, match=r"\(skipped\) asked nothing"):
        cross_fitted(finding(np.zeros((0, 0)), status=SKIPPED), OWN)


def test_a_pure_noise_attack_recovers_nothing():
    """Fifty settings that do nothing: the best of them, scored on the facts that chose it, seems to recover."""
    rng = np.random.default_rng(3)
    fair, naive = [], []
    for _ in range(200):
        noise = null(rng, settings=50)
        rates = (cross_fitted(role[0], OWN).values.mean() for role in (noise.edited, noise.original, noise.floor))
        a, c, b = rates
        fair.append(((a - b) / (c - b), (a - 0.25) / (c - 0.25)))
        naive.append((noise.edited[0].correct.mean(1).max() - 0.25) / 0.70)
    assert (np.abs(np.mean(fair, 0)) < 0.03).all()
    assert np.mean(naive) > 0.1


# Series


def test_a_series_is_of_one_attack_asked_the_same_facts():
    row = np.ones(4)
    with pytest.raises(ArgumentError, match=r"\['a'\] on the edited model and \['b', 'a'\] on others"):
        Series((finding(row, "a"),), (finding(row, "b"),), (finding(row, "a"),))
    with pytest.raises(ArgumentError, match=r"'a', seed 0: 2 facts were asked of one model alone"):
        Series((finding(row, "a"),), (finding(row, "a", items=("f0", "f1", "f2", "x")),), 0.1)
    with pytest.raises(ArgumentError, match=r"'a', seed 0: 2 facts were asked of one model alone"):
        Series((finding(row, "a"),), (finding(row, "a"),), (finding(row, "a", items=("f0", "f1", "f2", "x")),))
    with pytest.raises(ShapeError, match=r"floor of shape \(3,\) for 4 facts"):
        Series((finding(row, "a"),), (finding(row, "a"),), np.zeros(3))


def test_the_worst_status_of_any_model_counts():
    row = np.ones(4)
    bad = finding(row, status=FAILED, reason="loss stays")
    gone = finding(np.zeros((0, 0)), status=SKIPPED, reason="no memory", items=())
    assert Series((finding(row),), (bad,), 0.1).status == FAILED
    found = Series((finding(row),), (bad,), (gone,))
    assert (found.status, found.reason) == (SKIPPED, "no memory")
    (shown,) = recoveries([found], OWN)
    assert (shown.status, shown.reason) == (SKIPPED, "no memory") and np.isnan(shown.value)


# Intervals


def slow_interval(edited, original, floor, entity, counts, alpha=0.05):
    """The percentile interval, draw by draw, fact by fact; settings of the upper end chosen in each draw."""
    first = in_first_half(ITEMS, entity)

    def accuracy(rows, weight, anew):
        by = weight if anew else np.ones(N)
        best = [max(range(len(rows)), key=lambda s: (sum((rows[s] * by)[half]), -s)) for half in (~first, first)]
        right = sum(weight[i] * rows[best[0 if first[i] else 1]][i] for i in range(N))
        return right / sum(weight)

    ends = []
    for anew, unknown in ((False, -np.inf), (True, np.inf)):
        found = []
        for weight in counts:
            a, c, b = (accuracy(rows, weight, anew) for rows in (edited, original, floor))
            found.append((a - b) / (c - b) if c > b else unknown)
        ends.append(sorted(found))
    tail = int(alpha / 2 * (len(counts) + 1)) - 1
    return ends[0][tail], ends[1][len(counts) - 1 - tail]


def test_the_interval_equals_a_slow_one():
    rng = np.random.default_rng(4)
    entity = {item: f"e{i // 2:02}" for i, item in enumerate(ITEMS)}
    tables = [coins(rng, chances).astype(float) for chances in ([0.4, 0.5], [0.9], [0.2, 0.25, 0.2])]
    (found,) = recoveries([series(*tables)], entity, draws=200, seed=7)
    drawn = np.random.default_rng([7, 0]).integers(0, 50, (200, 50))
    counts = np.array([[(row == i // 2).sum() for i in range(N)] for row in drawn])
    np.testing.assert_allclose(found.interval, slow_interval(*tables, entity, counts), atol=1e-12)
    assert found.bound == pytest.approx(found.interval)  # one attack: nothing to be simultaneous with
    assert found == recoveries([series(*tables)], entity, draws=200, seed=7)[0]
    assert found.interval != recoveries([series(*tables)], entity, draws=200, seed=8)[0].interval


def test_seeds_are_drawn_too():
    rng = np.random.default_rng(5)
    original, floor = finding(coins(rng, 0.95)), finding(coins(rng, 0.125))
    rows = [finding(coins(rng, chance), seed=i) for i, chance in enumerate((0.2, 0.5, 0.8))]
    many = recoveries([Series(tuple(rows), (original,), (floor,))], OWN)[0]
    one = recoveries([Series((rows[1],), (original,), (floor,))], OWN)[0]
    assert many.edited == pytest.approx(np.mean([row.correct.mean() for row in rows]))
    assert np.diff(many.interval) > 2 * np.diff(one.interval)
    same = recoveries([Series((rows[1],) * 3, (original,), (floor,))], OWN)[0]
    assert same.interval == pytest.approx(one.interval)


def test_recovery_is_one_for_the_original_and_none_for_the_floor():
    rng = np.random.default_rng(6)
    original, floor = coins(rng, [0.9, 0.95]), coins(rng, [0.1, 0.2])
    full, none = (recoveries([series(rows, original, floor)], OWN)[0] for rows in (original, floor))
    assert (full.value, none.value) == (1.0, 0.0)
    assert (full.interval, none.interval) == ((1.0, 1.0), (0.0, 0.0))


def test_a_model_always_wrong_gets_the_exact_interval():
    rng = np.random.default_rng(7)
    original = coins(rng, 0.95)
    (found,) = recoveries([series(np.zeros(N), np.ones(N), 0.125)], OWN)
    high = binomtest(0, N).proportion_ci(method="exact").high
    assert found.interval == pytest.approx((-0.125 / 0.875, (high - 0.125) / 0.875))
    (clear,) = recoveries([series(np.ones(N), np.ones(N), np.zeros(N))], OWN)
    low = binomtest(N, N).proportion_ci(method="exact").low
    assert clear.interval == pytest.approx(((low - high) / (1 - high), 1.0))
    # Facts of one entity are one observation.
    pairs = {item: f"e{i // 2}" for i, item in enumerate(ITEMS)}
    assert recoveries([series(np.zeros(N), original, 0.125)], pairs)[0].interval[1] > found.interval[1]


def test_a_draw_in_which_the_original_knows_nothing_widens_both_ends():
    rng = np.random.default_rng(8)
    (found,) = recoveries([series(coins(rng, 0.3), coins(rng, 0.31), coins(rng, 0.27))], OWN)
    assert found.interval == (-np.inf, np.inf) == found.bound


def test_a_floor_on_other_facts_is_drawn_by_itself():
    rng = np.random.default_rng(9)
    values = coins(rng, 0.3)
    fresh = tuple(f"fresh/{i}" for i in range(N))
    entities = OWN | {item: item for item in fresh}
    edited, original = finding(values), finding(coins(rng, 0.95))
    paired = recoveries([Series((edited,), (original,), (finding(values),))], entities)[0]
    apart = recoveries([Series((edited,), (original,), (finding(values, items=fresh),))], entities)[0]
    assert paired.value == apart.value == 0 and paired.interval == (0.0, 0.0)
    assert np.diff(apart.interval) > 0.3
    known = Series((edited,), (original,), 0.125)
    both = recoveries([known, Series((edited,), (original,), (finding(values, items=fresh),))], entities)
    assert both[0].interval == recoveries([known], OWN)[0].interval
    guessed = recoveries([Series((edited,), (original,), values[0].astype(float))], entities)[0]
    assert guessed.interval == (0.0, 0.0)


def test_knowledge_is_the_distance_of_original_and_floor():
    rng = np.random.default_rng(10)
    value, low, high = knowledge(series(coins(rng, 0.1), coins(rng, 0.6), 0.25), OWN)
    assert low < value < high and 0.15 < high - low < 0.25
    _, low, _ = knowledge(series(coins(rng, 0.1), np.ones(N), 0.25), OWN)
    assert low == pytest.approx(binomtest(N, N).proportion_ci(method="exact").low - 0.25)


def coverage(alike: bool, entities: dict[str, str], runs: int) -> np.ndarray:
    """How often the interval holds the truth, for R of 0, .1, .5 and 1; facts may be alike in fours."""
    rng = np.random.default_rng(11)
    truth, hits = np.array([0, 0.1, 0.5, 1]), np.zeros(4)

    def answers(chance):
        if not alike:
            return coins(rng, chance)
        return rng.random((1, N)) < rng.beta(1.5 * chance, 1.5 * (1 - chance), N // 4).repeat(4)

    for _ in range(runs):
        original, floor = answers(0.9), answers(0.15)
        rows = [series(answers(0.15 + r * 0.75), original, floor) for r in truth]
        found = recoveries(rows, entities, draws=400)
        hits += [row.interval[0] <= r <= row.interval[1] for row, r in zip(found, truth, strict=True)]
    return hits / runs


def test_the_interval_holds_the_truth_as_often_as_it_says():
    found = coverage(False, OWN, 500)
    assert ((found >= 0.92) & (found <= 0.98)).all(), found


def test_facts_of_one_entity_are_drawn_together():
    fours = {item: f"e{i // 4}" for i, item in enumerate(ITEMS)}
    assert coverage(True, fours, 80).min() > 0.88
    assert coverage(True, OWN, 80).max() < 0.88  # each fact by itself: the interval is too narrow


def test_the_upper_end_holds_the_best_setting():
    """Twelve settings from useless to good: with the choice kept in the draws, the upper end is too low too often."""
    rng = np.random.default_rng(12)
    chances = np.linspace(0.2, 0.5, 12)
    original, kept, anew, low = coins(rng, 0.95), 0, 0, 0
    truth = (0.5 - 0.125) / (original.mean() - 0.125)
    for _ in range(150):
        one = series(coins(rng, chances), original, 0.125)
        used = series(cross_fitted(one.edited[0], OWN).values, original, 0.125)
        (whole,), (frozen,) = (recoveries([s], OWN, draws=400) for s in (one, used))
        assert whole.interval[0] == frozen.interval[0]
        kept, anew = kept + (frozen.interval[1] < truth), anew + (whole.interval[1] < truth)
        low += whole.interval[0] > truth
    assert anew <= 6 and low <= 6 and kept >= 12


# All attacks at once


def false_alarms(runs: int) -> float:
    """How often any of twelve attacks that recover nothing has its lower bound above nothing."""
    rng = np.random.default_rng(13)
    alarms = 0
    for _ in range(runs):
        found = recoveries([null(rng, name) for name in "abcdefghijkl"], OWN, draws=400)
        alarms += any(row.bound[0] > 0 for row in found)
    return alarms / runs


def test_twelve_null_attacks_raise_few_alarms():
    assert false_alarms(120) <= 0.07


def test_bounds_of_one_attack_at_a_time_are_caught(monkeypatch):
    monkeypatch.setattr(statistics, "_simultaneous", lambda family, tail, pending: [r.interval for r in family])
    assert false_alarms(40) > 0.07


# Looking after every attack


def attacks_in_turn(rng, truth, *, alike=0.0) -> list[Series]:
    """Attacks that bring back these fractions; a share of their answers, and of the originals', is the same in all."""
    shared = rng.random((3, N))

    def answers(role, chance):
        mine = np.where(rng.random(N) < alike, shared[role], rng.random(N))
        return mine[None] < chance

    names = ("direct", *"abcdefghijklmnop")
    return [
        series(answers(0, 0.2 + 0.75 * r), answers(1, 0.95), answers(2, 0.2), name)
        for name, r in zip(names, truth, strict=False)
    ]


def looks(attacks, draws=200) -> list[list[Recovery]]:
    """What is known after each attack, the others pending."""
    return [recoveries(attacks[:n], OWN, draws=draws, pending=len(attacks) - n) for n in range(1, len(attacks) + 1)]


def coverage_of_looks(runs: int, alike: float) -> float:
    """How often the bounds of all attacks hold the truth at every look."""
    rng, truth = np.random.default_rng(20), 0.1
    held = 0
    for _ in range(runs):
        known = looks(attacks_in_turn(rng, [truth] * 5, alike=alike), draws=400)
        held += all(row.bound[0] <= truth <= row.bound[1] for rows in known for row in rows)
    return held / runs


@pytest.mark.parametrize(("alike", "runs"), [(0.0, 250), pytest.param(0.8, 400, marks=pytest.mark.slow)])
def test_bounds_hold_at_every_look_as_often_as_they_say(alike, runs):
    assert 0.92 <= coverage_of_looks(runs, alike) <= 0.98


def without_pending(moved, tail, pending):
    """The broken twin: the factor over the attacks that ran, as if no other were planned."""
    return float(np.sort(moved.max(0))[-1 - tail])


def test_bounds_over_the_attacks_that_ran_alone_are_caught(monkeypatch):
    monkeypatch.setattr(statistics, "_factor", without_pending)
    assert coverage_of_looks(120, 0.0) < 0.92


def check_an_early_verdict_is_the_final_one():
    """On 20 seeds, of attacks that bring back nothing, a little, or near to the threshold."""
    kept, early = RetainCheck(accuracy=(0.9, 0.9)), 0
    for seed in range(20):
        rng = np.random.default_rng([21, seed])
        known = looks(attacks_in_turn(rng, [0.0, *rng.choice([0.0, 0.22, 0.27, 0.5], 8, p=[0.76, 0.08, 0.08, 0.08])]))
        words = []
        for number, rows in enumerate(known, 1):
            pending = tuple(f"attack {n}" for n in range(number, len(known)))
            words.append(verdict(rows, kept, knowledge_low=0.7, n_test=N, budget="fast", pending=pending).word)
            if certain(words[-1], pending):
                break
        early += len(words) < len(known)
        rows = known[-1]
        assert words[-1] == verdict(rows, kept, knowledge_low=0.7, n_test=N, budget="fast").word, (seed, words)
    assert early >= 5


def test_an_early_verdict_is_the_final_one():
    check_an_early_verdict_is_the_final_one()


def test_stopping_by_an_uncorrected_bound_is_caught(monkeypatch):
    monkeypatch.setattr(statistics, "_factor", without_pending)
    with pytest.raises(AssertionError):
        check_an_early_verdict_is_the_final_one()


def test_pending_attacks_widen_the_bound_by_less_than_bonferroni_would():
    rng = np.random.default_rng(22)
    rows = attacks_in_turn(rng, [0.1] * 3)
    widths = [recoveries(rows, OWN, pending=n)[0].bound for n in (0, 1, 9)]
    assert widths[0][0] > widths[1][0] > widths[2][0] and widths[0][1] < widths[1][1] < widths[2][1]
    alone = recoveries(rows[:1], OWN, pending=11)[0]
    factor = (alone.bound[1] - alone.value) / (alone.interval[1] - alone.value)
    assert 1.2 < factor < 1.6  # twelve normal deviations by the union bound: 1.46


def test_a_bound_that_no_factor_gives_is_infinite():
    """Draws in which the original knows nothing are fewer than the tail for one attack, but not for ten."""
    deviations = np.concatenate([np.full(3, np.inf), np.linspace(-3, 1.2, 397)])[None]
    assert statistics._factor(deviations, 9, 0) < 1.3 and statistics._factor(deviations, 9, 1) < 3
    assert statistics._factor(deviations, 9, 5) == np.inf


def test_an_original_at_the_floor_leaves_nothing_to_recover():
    rng = np.random.default_rng(17)
    (row,) = recoveries([series(coins(rng, 0.25), coins(rng, 0.2), 0.3)], OWN)
    assert row.status == UNINFORMATIVE and np.isnan(row.value)
    assert re.fullmatch(r"simply asked, the original is no better than the floor: -0\.\d+ above it", row.reason)
    assert interval_text(row) == "" and format_recovery(row) == UNINFORMATIVE


def test_the_bound_widens_by_less_than_bonferroni_and_not_for_copies():
    rng = np.random.default_rng(14)
    rows = [null(rng, name) for name in "abcdefghijkl"]
    found = recoveries(rows, OWN)
    factors = {round((r.bound[1] - r.value) / (r.interval[1] - r.value), 9) for r in found}
    assert len(factors) == 1 and 1.2 < factors.pop() < 1.6
    copies = [replace(rows[0], **{role: tuple(replace(f, attack=name) for f in getattr(rows[0], role))
                                  for role in ("edited", "original", "floor")}) for name in "abc"]  # fmt: skip
    for row in recoveries(copies, OWN):
        assert row.bound == pytest.approx(row.interval)


def test_only_deciding_attacks_that_ran_widen_the_bound():
    rng = np.random.default_rng(15)
    direct, shown = null(rng), replace(null(rng, "shown"), decides=False)
    broken = series(coins(rng, 0.25), coins(rng, 0.4), 0.25, "broken")
    failed = series(coins(rng, 0.25), coins(rng, 0.95), 0.25, "failed")
    failed = replace(failed, edited=(replace(failed.edited[0], status=FAILED, reason="flat"),))
    found = {row.attack: row for row in recoveries([direct, shown, broken, failed], OWN)}
    assert found["broken"].status == UNINFORMATIVE and re.search(
        r"breaks the original too: 0\.\d+", found["broken"].reason
    )
    assert np.isnan(found["broken"].bound).all() and np.isnan(found["shown"].bound).all()
    assert np.isfinite(found["broken"].interval).all() and found["shown"].status == RAN
    assert found["failed"].status == FAILED and np.isfinite(found["failed"].bound).all()
    alone = {row.attack: row for row in recoveries([direct, failed], OWN)}
    assert alone["direct"].bound == found["direct"].bound


def test_what_is_shown_of_an_attack():
    rng = np.random.default_rng(16)
    edited = coins(rng, [0.1, 0.9])
    one = series(edited, coins(rng, 0.95), 0.125, "direct", floor_name="chance", level="W")
    (row,) = recoveries([one], OWN)
    assert (row.floor, row.floor_name, row.level) == (0.125, "chance", "W")
    assert row.settings == {"edited": ("s1", "s1"), "original": ("s0", "s0")}
    assert row.value == pytest.approx((row.edited - 0.125) / (row.original - 0.125))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draws": 199}, ArgumentError, r"draws=199; .* need at least 200"),
        ({"draws": 300, "alpha": 0.001}, ArgumentError, r"alpha=0.001 need at least 2000"),
        ({"alpha": 0.0}, FractionError, r"alpha=0.0; give a fraction strictly between 0 and 1"),
        ({"alpha": 1.0}, FractionError, r"alpha=1.0"),
    ],
)
def test_bootstrap_refusals(options, error, message):
    one = null(np.random.default_rng(17))
    for function in (lambda: recoveries([one], OWN, **options), lambda: knowledge(one, OWN, **options)):
        with pytest.raises(error, match=message):
            function()


def test_items_without_an_entity_are_named():
    with pytest.raises(DataError, match=r"100 items have no entity, such as \['f0'"):
        recoveries([null(np.random.default_rng(18))], {})


# --- Folds of which one trained for longer


def shorter_and_longer() -> tuple[Finding, Finding]:
    """Two folds of one attack: in the first T was learned in time, the second went on for four times the steps."""
    names = ("lr=1 step=2", "lr=1 step=4")
    first = finding([[0, 1], [1, 1]], "rtt", ("a", "b"), settings=names)
    second = finding([[0, 0], [0, 1], [1, 0]], "rtt", ("c", "d"), settings=(*names, "lr=1 step=16"))
    return first, second


def longer_stands_beside_the_end(joined: Finding) -> None:
    """The fold that learned in time answers as at its end where the other was trained for longer."""
    assert joined.settings == ("lr=1 step=2", "lr=1 step=4", "lr=1 step=16") and set(joined.items) == set("abcd")
    rows = {item: joined.correct[:, i].tolist() for i, item in enumerate(joined.items)}
    assert rows == {"a": [0, 1, 1], "b": [1, 1, 1], "c": [0, 0, 1], "d": [0, 1, 0]}


@pytest.mark.parametrize("turned", [False, True])
def test_folds_are_joined_where_one_trained_for_longer(turned):
    folds = shorter_and_longer()
    longer_stands_beside_the_end(merged_folds(folds[::-1] if turned else folds))
    with pytest.raises(AssertionError):  # the earlier step in the place of the end
        first = replace(folds[0], correct=folds[0].correct[[0, 0]])
        longer_stands_beside_the_end(merged_folds((first, folds[1])))


def test_folds_with_other_settings_are_not_joined():
    first, second = shorter_and_longer()
    other = replace(second, settings=("lr=1 step=2", "lr=1 step=4", "lr=2 step=16"))
    with pytest.raises(ArgumentError, match=r"cannot be joined"):
        merged_folds((first, other))


def test_a_setting_is_lengthened_in_its_own_words():
    assert lengthened(Setting.parse("lr=5e-05 step=40 how=lora steps=40")) == "lr=5e-05 step=160 how=lora steps=40"
    assert lengthened(Setting.parse("lr=1 epoch=6")).step == 24
    with pytest.raises(ArgumentError, match=r"setting 'prompt' names no step"):
        lengthened(Setting.parse("prompt"))
