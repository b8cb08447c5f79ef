"""The verdict on made-up scores of a classifier: each word is reached, and each rule is missed once it is broken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from repedit.auditing import verdict
from repedit.auditing.classifier import Measured, gaps
from repedit.auditing.report import AUC, FORGET, RELEARNING, Verdict
from repedit.auditing.verdict import classifier_verdict
from repedit.errors import ArgumentError, MetricError
from repedit.outcomes import DESTROYED, HIDDEN, INCONCLUSIVE, INVALID, NOT_FORGOTTEN, OUTCOMES, OVER_FORGOTTEN, PASS

FORGOTTEN, OTHERS = 120, 60


def scores(shift: float, count: int, seed: int = 0) -> np.ndarray:
    """Scores of images: what is easy is the same for every model, a model adds its own noise and what it memorised."""
    ease = np.random.default_rng(count).permutation(norm.ppf((np.arange(count) + 0.5) / count))
    return ease + shift + np.random.default_rng(seed).normal(0, 0.3, count)


def measured(shift: float = 0.0, **more: Any) -> Measured:
    """A model like a retrained one, but for what is said; `shift` is how much more familiar the forget images look."""
    seed = more.pop("seed", 1)
    found = {"forget": 0.0, "retain": 0.97, "test": 0.96, "relearned": np.linspace(0.1, 0.8, 10), "seed": seed} | more
    del found["seed"]
    return Measured(
        members=scores(shift, FORGOTTEN, seed), others=scores(0.0, OTHERS, seed + 50), sizes={"retain": 1080, "test": 437}, **found
    )  # fmt: skip


ORIGINAL = measured(3.0, forget=0.95, relearned=np.full(10, 0.97), seed=7)
RETRAINED = measured(seed=2)
EASY = np.full(10, 0.85)
CASES = {
    PASS: measured(),
    DESTROYED: measured(retain=0.2, test=0.18),
    NOT_FORGOTTEN: measured(forget=0.13),
    HIDDEN: measured(1.5),
    OVER_FORGOTTEN: measured(-1.5),
    INCONCLUSIVE: measured(forget=0.08),
}


def judged(edited: Measured, *references: Measured, original: Measured = ORIGINAL) -> Verdict:
    return classifier_verdict(gaps(edited, original, references or (RETRAINED,), draws=300), OTHERS)


@pytest.mark.parametrize("word", CASES)
def test_each_word_is_reached(word):
    found = judged(CASES[word])
    assert found.word == word and found.sentence.startswith(word) and found.rule


@pytest.mark.parametrize(("rule", "word"), [
    ("_worse_than_retrained", DESTROYED), ("_still_labelled", NOT_FORGOTTEN), ("_hidden_images", HIDDEN),
    ("_over_forgotten", OVER_FORGOTTEN), ("_no_gap", PASS),
])  # fmt: skip
def test_a_rule_that_is_left_out_is_missed(rule, word, monkeypatch):
    monkeypatch.setattr(verdict, rule, lambda *_: None)
    assert judged(CASES[word]).word != word


def swapped(model: Measured) -> Measured:
    return replace(model, members=model.others, others=model.members)


def test_swapping_members_and_others_turns_hidden_into_over_forgotten():
    alike = measured(0.0, seed=3)
    assert judged(CASES[HIDDEN]).word == HIDDEN
    assert judged(swapped(CASES[HIDDEN]), swapped(RETRAINED), original=swapped(ORIGINAL)).word == OVER_FORGOTTEN
    assert judged(swapped(alike), swapped(RETRAINED), original=swapped(ORIGINAL)).word == PASS


def test_a_broken_model_that_no_attack_can_tell_is_destroyed():
    wrecked = measured(0.0, retain=0.15, test=0.15)
    told = next(gap for gap in gaps(wrecked, ORIGINAL, [RETRAINED], draws=50) if gap.measure == AUC)
    assert abs(told.edited - 0.5) < 0.05 and judged(wrecked).word == DESTROYED


def test_a_model_as_bad_as_the_original_is_not_said_to_be_damaged_by_the_edit():
    worse = replace(ORIGINAL, test=0.9)
    assert "as the original is" in judged(measured(test=0.89), original=worse).sentence
    assert "damaged, not edited" in judged(measured(test=0.89)).sentence


def test_the_first_rule_that_matches_wins():
    everything = measured(1.5, forget=0.9, retain=0.1, relearned=EASY + 0.1)
    assert judged(everything).word == DESTROYED
    assert judged(replace(everything, retain=0.97)).word == NOT_FORGOTTEN
    assert judged(replace(everything, retain=0.97, forget=0.0)).word == HIDDEN


def test_what_comes_back_by_relearning_is_hidden():
    found = judged(measured(relearned=EASY))
    assert found.word == HIDDEN and RELEARNING in found.sentence and AUC not in found.sentence
    assert judged(measured(relearned=RETRAINED.relearned + 0.19)).word == PASS


def test_what_comes_back_by_rounding_is_hidden_unless_rounding_breaks_the_model():
    reference = measured(rounded={"int8": (0.0, 0.96), "int4": (0.0, 0.95)}, seed=2)
    original = replace(ORIGINAL, rounded={"int8": (0.95, 0.96), "int4": (0.9, 0.95)})
    back, broken = ({"int8": (0.0, 0.96), "int4": (0.4, test)} for test in (0.95, 0.3))
    found = judged(measured(rounded=back), reference, original=original)
    assert found.word == HIDDEN and "forget accuracy, int4" in found.sentence
    assert judged(measured(rounded=broken), reference, original=original).word == PASS


def test_what_lies_among_the_retrained_models_is_never_hidden():
    retrained = [measured(seed=2), measured(seed=3), measured(1.6, seed=5)]
    assert judged(measured(1.5), *retrained).word not in (HIDDEN, OVER_FORGOTTEN)
    assert judged(measured(1.5), *retrained[:2], measured(0.1, seed=5)).word == HIDDEN
    slow, fast = [measured(seed=seed) for seed in (2, 3)], measured(seed=5, relearned=EASY + 0.1)
    assert judged(measured(relearned=EASY), *slow).word == HIDDEN
    found = judged(measured(relearned=EASY), *slow, fast)
    assert found.word == PASS and "among the retrained models" in found.rule
    low = [measured(-1.6, seed=3), measured(seed=2), measured(seed=5)]
    assert judged(measured(-1.5), *low).word != OVER_FORGOTTEN == judged(measured(-1.5), *low[1:]).word


def test_one_retraining_that_went_wrong_does_not_set_the_measure():
    dead = measured(seed=5, relearned=np.zeros(10))
    alone, three = judged(measured(), dead), judged(measured(), dead, measured(seed=2), measured(seed=3))
    assert alone.word == HIDDEN and "two more retrained models" in alone.settle and three.word == PASS


def test_it_is_the_retrained_model_that_counts_and_not_a_half():
    """A retrained model that is told apart, as one is where holdout has other classes, is still what to be near to."""
    told = measured(2.0, seed=2)
    assert judged(measured(2.0), told).word == PASS and judged(measured(0.0), told).word == OVER_FORGOTTEN


def test_without_a_retrained_model_nothing_can_be_said():
    for edited in CASES.values():
        found = classifier_verdict(gaps(edited, ORIGINAL, draws=20), OTHERS)
        assert found.word == INCONCLUSIVE and "none was given" in found.rule and "rp.vision.retrain" in found.settle


def test_no_pass_without_relearning():
    empty = [replace(model, relearned=np.zeros(0)) for model in (measured(), ORIGINAL, RETRAINED)]
    found = classifier_verdict(gaps(empty[0], empty[1], empty[2:], draws=100), OTHERS)
    assert found.word == INCONCLUSIVE and "relearning was not tried" in found.rule and "relearn=True" in found.settle


def test_no_pass_where_the_original_passes_too():
    found = judged(measured(), original=measured(0.1, forget=0.02, seed=9))
    assert found.word == INVALID and "nothing to forget" in found.sentence


def test_no_pass_by_attacks_that_do_not_find_the_original_either():
    """A class that every model learns at once: the original is no better known, so a recipe's pass would be worth nothing."""
    quick = np.full(10, 0.93)
    knows = replace(ORIGINAL, members=scores(0.0, FORGOTTEN, 9), relearned=quick + 0.06)
    models = [measured(relearned=quick + 0.05), knows, measured(relearned=quick, seed=2)]
    found = classifier_verdict(gaps(models[0], models[1], models[2:], draws=100), OTHERS)
    assert (
        found.word == INCONCLUSIVE
        and "neither attack tells even the original" in found.rule
        and "fewer images" in found.settle
    )
    assert judged(models[0], models[2]).word == PASS


def test_the_number_that_would_settle_it():
    few = slice(0, 25)
    cut = [replace(m, members=m.members[few], others=m.others[few]) for m in (measured(0.42), ORIGINAL, RETRAINED)]
    found = classifier_verdict(gaps(cut[0], cut[1], cut[2:], draws=300), 25)
    assert found.word == INCONCLUSIVE and "AUC of the loss" in found.rule
    needed = int(found.settle.split()[1])
    assert 25 < needed < 200
    # With that many images, the same gap of the mean is found.
    many = [Measured(m.forget, m.retain, m.test, scores(shift, 4 * needed, seed), scores(0.0, 4 * needed + 1, seed + 50), m.relearned)
            for m, shift, seed in ((measured(), 0.42, 1), (ORIGINAL, 3.0, 7), (RETRAINED, 0.0, 2))]  # fmt: skip
    assert classifier_verdict(gaps(many[0], many[1], many[2:], draws=300), 4 * needed).word == HIDDEN


@pytest.mark.parametrize(("name", "value", "word"), [
    ("retain", 0.92, PASS), ("retain", 0.919, DESTROYED), ("test", 0.91, PASS), ("forget", 0.10, INCONCLUSIVE),
    ("forget", 0.1001, NOT_FORGOTTEN), ("forget", 0.05, PASS), ("forget", 0.0501, INCONCLUSIVE),
])  # fmt: skip
def test_margins_hold_to_nine_digits(name, value, word):
    assert judged(measured(**{name: value})).word == word


def test_every_word_has_an_exit_code():
    assert {word: Verdict(word, "", "").exit_code for word in OUTCOMES}[OVER_FORGOTTEN] == 3
    assert Verdict(PASS, "", "").exit_code == 0 and len(OUTCOMES) == 11


def test_gaps_say_what_they_are_of():
    found = {gap.measure: gap for gap in gaps(measured(1.5), ORIGINAL, [RETRAINED, measured(seed=5)], draws=100)}
    told = found[AUC]
    assert told.members == "120 forget images" and told.others == "60 holdout images"
    assert told.interval[0] < told.value < told.interval[1] and told.value == pytest.approx(
        told.edited - told.reference
    )
    assert 0 < told.error < 0.06 and found[FORGET].spread == (0, 0) and told.spread[0] < told.reference < told.spread[1]
    assert found[RELEARNING].edited == pytest.approx(measured().relearned.mean())


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: judged(replace(measured(), relearned=np.zeros(3))), ArgumentError, "the models were measured differently"),
    (lambda: judged(replace(measured(), members=np.zeros(0))), ArgumentError, "measured differently"),
    (lambda: judged(replace(measured(), members=np.full(FORGOTTEN, np.nan))), MetricError, "120 scores of the members are not finite"),
    (lambda: classifier_verdict(gaps(measured(), ORIGINAL, draws=5)[:2]), ArgumentError, "needs test accuracy, AUC of the loss as well"),
])  # fmt: skip
def test_what_cannot_be_judged_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
