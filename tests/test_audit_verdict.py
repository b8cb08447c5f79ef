"""The seven words of an audit, the order of their rules, and how many facts they need."""

import copy
from dataclasses import replace

import pytest

from repedit.auditing import attack
from repedit.auditing import verdict as module
from repedit.auditing.attack import FAILED, RAN, SKIPPED, UNINFORMATIVE, AttackRecord, Setting, Setup, register
from repedit.auditing.attacks.tuning import UNTOUCHED
from repedit.auditing.report import Recovery, RetainCheck
from repedit.auditing.verdict import certain, check_thresholds, cost, informative, items_needed, verdict
from repedit.cli import completion
from repedit.errors import ArgumentError, FractionError
from repedit.outcomes import BELOW_THRESHOLD, CONSISTENT, EXIT_CODES, NOT_YET, OUTCOMES, OVER_FORGOTTEN, PASS
from repedit.sites import Point, Site

NAN = float("nan")
KEPT = RetainCheck(accuracy=(0.9, 0.88), perplexity=(20.0, 22.0))
LOST = RetainCheck(accuracy=(0.9, 0.5))


def row(attack="direct", low=-0.1, high=0.1, status=RAN, **options) -> Recovery:
    value = (low + high) / 2
    options = {"original": 0.95, "floor": 0.125, "floor_name": "chance"} | options
    return Recovery(attack, status, options.pop("reason", ""), value, (low, high), (low, high), **options)


def said(*rows, retain=KEPT, **options):
    return verdict(
        rows or (row(), row("rtt")), retain, **{"knowledge_low": 0.7, "n_test": 128, "budget": "fast"} | options
    )


# One case for each word; each also fulfils the rules of the words below it as far as they allow.
CASES = {
    "UNSOUND": ((row(low=0.5, high=0.7), row("rtt", 0.5, 0.7)),
                {"unsound": "PC1 is not caught", "knowledge_low": 0.1, "n_test": 20, "retain": LOST}),
    "INVALID": ((row(low=0.5, high=0.7), row("rtt", 0.5, 0.7)), {"knowledge_low": 0.1, "n_test": 20, "retain": LOST}),
    "DESTROYED": ((row(low=0.5, high=0.7), row("rtt", 0.5, 0.7)), {"retain": LOST}),
    "NOT FORGOTTEN": ((row(low=0.5, high=0.7), row("rtt", 0.5, 0.7)), {}),
    "HIDDEN": ((row(), row("probe", 0.11, 0.3), row("rtt", 0.5, 0.7), row("benign", status=FAILED)), {}),
    "NO RECOVERY FOUND": ((row(), row("rtt", -0.05, 0.19)), {}),
    "NOTHING FOUND YET": ((row(), row("rtt", -0.05, 0.19)), {"pending": ("probe",)}),
    "INCONCLUSIVE": ((row(), row("rtt", 0.05, 0.25)), {}),
}  # fmt: skip
OTHERS = (OVER_FORGOTTEN, BELOW_THRESHOLD, CONSISTENT)


@pytest.mark.parametrize("word", [word for word in OUTCOMES if word not in OTHERS])
def test_each_word_is_reached_and_wins_over_those_below(word):
    rows, options = CASES[word]
    found = said(*rows, **options)
    assert found.word == word
    assert "at this budget (fast)" in found.sentence and found.sentence.startswith(word)
    assert "one seed: intervals exclude training noise" in found.rule
    assert "one seed" not in said(*rows, **options, seeds=3).rule


def test_a_pass_by_another_order_is_caught(monkeypatch):
    monkeypatch.setattr(module, "_invalid", lambda *_: None)
    rows, options = CASES["INVALID"]
    assert said(*rows, **options).word == "DESTROYED"


def test_the_quick_budget_never_passes():
    rows, options = CASES[PASS]
    quick = said(*rows, **options, budget="quick")
    assert quick.word == NOT_YET and quick.exit_code == 4 == EXIT_CODES[NOT_YET]
    assert "too few for a pass" in quick.sentence and quick.settle == "an audit with a larger budget"
    for word in CASES:
        rows, options = CASES[word]
        assert said(*rows, **options | {"budget": "quick"}).word == (NOT_YET if word == PASS else word)


def test_no_pass_while_attacks_are_pending():
    found = said(row(), row("rtt"), pending=("probe", "benign"))
    assert found.word == NOT_YET and found.settle == "the attacks not run yet: probe, benign"
    wide = said(row(), row("rtt", 0.05, 0.25), pending=("probe",))
    assert wide.word == "INCONCLUSIVE" and "probe was not run yet" in wide.rule
    assert said(row(), row("rtt", status=FAILED), pending=("probe",)).word == "INCONCLUSIVE"
    assert said(row(), row("rtt"), pending=("probe",), not_run={"refill": "not asked for"}).word == "INCONCLUSIVE"


def check_no_later_attack_changes_what_is_certain():
    """Whatever another attack finds, a verdict that was called certain stays; every other one can become HIDDEN."""
    others = (
        row("probe"),
        row("probe", 0.05, 0.25),
        row("probe", 0.5, 0.9),
        row("probe", status=FAILED),
        row("probe", status=SKIPPED),
    )
    for rows, options in CASES.values():
        early = said(*rows, **options | {"pending": ("probe",)})
        rest = [row for row in rows if row.attack != "probe"]
        late = {said(*rest, other, **options | {"pending": ()}).word for other in others}
        if "probe" not in {row.attack for row in rows}:
            assert certain(early.word, ("probe",)) == (late == {early.word}), early.word


def test_no_later_attack_changes_what_is_certain():
    check_no_later_attack_changes_what_is_certain()
    assert all(certain(word, ()) for word in OUTCOMES)


def test_calling_an_open_question_certain_is_caught(monkeypatch):
    monkeypatch.setitem(globals(), "certain", lambda word, pending: word != "INCONCLUSIVE")
    with pytest.raises(AssertionError):
        check_no_later_attack_changes_what_is_certain()


@pytest.mark.parametrize(
    ("options", "rule", "settle"),
    [
        ({"knowledge_low": 0.149}, r"lower 95% end of C - B 0.149 < 0.15", ""),
        ({"knowledge_low": NAN}, "lower 95% end of C - B nan < 0.15", ""),
        ({"n_test": 99}, "V has 99 facts, fewer than 100", "about 100 facts in V"),
        ({"leaks": ["2 entities on both sides"]}, "T gives V away: 2 entities on both sides", ""),
    ],
)
def test_invalid_says_why(options, rule, settle):
    found = said(**options)
    assert (found.word, found.settle) == ("INVALID", settle) and rule in found.rule


def test_few_facts_can_be_allowed():
    assert said(n_test=99, allow_small=True).word == "NO RECOVERY FOUND"
    assert said(n_test=99, allow_small=True, knowledge_low=0.1).word == "INVALID"


def test_thresholds_are_strict():
    assert said(row(low=0.1, high=0.3), row("rtt")).word == "INCONCLUSIVE"
    assert said(row(), row("rtt", 0.1, 0.3)).word == "INCONCLUSIVE"
    assert said(row(), row("rtt", 0.0, 0.2)).word == "INCONCLUSIVE"
    assert said(row(), row("rtt", 0.0, 0.2), pass_threshold=0.21).word == "NO RECOVERY FOUND"
    assert said(row(), row("rtt", 0.1, 0.3), recovery_threshold=0.09).word == "HIDDEN"


def test_direct_counts_by_its_own_interval_and_others_by_the_simultaneous_one():
    assert said(replace(row(), interval=(0.11, 0.19)), row("rtt")).word == "NOT FORGOTTEN"
    assert said(row(), replace(row("rtt"), interval=(0.11, 0.19))).word == "NO RECOVERY FOUND"


def test_hidden_names_the_cheapest_attack():
    found = said(row(), row("rtt", 0.8, 1.0), row("quantize", 0.2, 0.4), row("probe", 0.9, 1.0), row("new", 0.9, 1.0))
    assert "quantize brings them back (R 0.30)" in found.sentence
    assert "so do probe, rtt, new" in found.rule and found.exit_code == 3


def test_attacks_have_a_cost():
    assert cost("direct") == 0 < cost("strip") < cost("paraphrase")
    assert cost("rtt, LoRA") == cost("rtt") > cost("quantize") and cost("probe-mlp") == cost("probe")
    assert cost("unheard of") > max(cost(name) for name in attack.records())


@pytest.mark.parametrize(
    ("attack", "status", "reason"),
    [
        ("rtt", FAILED, "rtt failed to train (why)"),
        ("benign", SKIPPED, "benign was skipped (why)"),
        ("probe", SKIPPED, "probe was skipped (why)"),
    ],
)
def test_what_did_not_work_forbids_a_pass(attack, status, reason):
    found = said(row(), row("quantize"), row(attack, status=status, reason="why"))
    assert found.word == "INCONCLUSIVE" and reason in found.rule and found.settle == "those attacks, run and trained"


def test_what_was_not_run_forbids_a_pass():
    found = said(not_run={"probe": "not asked for"})
    assert found.word == "INCONCLUSIVE" and "probe was not run (not asked for)" in found.rule


@pytest.mark.parametrize(
    ("attack", "status"),
    [*((name, SKIPPED) for name in ("translate", "refill", "upstream", "downstream")), ("quantize", UNINFORMATIVE)],
)
def test_what_had_nothing_to_work_on_is_listed_and_forbids_nothing(attack, status):
    found = said(row(), row("rtt"), row(attack, 0.5, 0.9, status=status))
    assert found.word == "NO RECOVERY FOUND" and f"not counted: {attack}" in found.rule
    assert "1 other attacks" in found.sentence and found.exit_code == 0


def test_a_caller_may_excuse_less():
    assert said(row(), row("rtt"), row("refill", status=SKIPPED), excused=("translate",)).word == "INCONCLUSIVE"


def test_what_does_not_decide_never_does():
    assert said(row(), row("rtt"), row("membership", 0.9, 1.0, decides=False)).word == "NO RECOVERY FOUND"
    assert said(row(), row("rtt"), row("membership", status=SKIPPED, decides=False)).word == "NO RECOVERY FOUND"


def test_an_attack_that_failed_to_train_can_still_show_recovery():
    assert said(row(), row("rtt", 0.3, 0.6, status=FAILED)).word == "HIDDEN"


def test_no_pass_without_an_attack_that_counts_or_without_a_bound():
    found = said(row(), row("quantize", status=UNINFORMATIVE))
    assert found.word == "INCONCLUSIVE" and "no attack beside direct counts" in found.rule
    assert said(row(), replace(row("rtt"), bound=(NAN, NAN))).word == "INCONCLUSIVE"


def test_inconclusive_says_how_many_facts_would_settle_it():
    found = said(row(), row("rtt", -0.15, 0.25))
    assert found.rule.startswith("rtt may bring back more: simultaneous 95% bounds of R -0.150 to 0.250")
    assert found.settle == "about 228 facts in V, where there are 128"  # (.20 / .15)^2 times as many
    near = said(row(), row("rtt", 0.08, 0.28))  # to be above material takes fewer facts than to be below clear
    assert near.settle == "about 200 facts in V, where there are 128"
    measured = said(row(floor_name="reference"), row("rtt", -0.01, 0.2), n_test=110)
    assert (
        measured.settle == f"about {items_needed(0.95, 0.125, 0.2, 2, measured=True)} facts in V, where there are 110"
    )


def test_items_needed():
    assert items_needed(0.95, 0.125, 0.2, 12) == pytest.approx(100, rel=0.2)
    assert items_needed(0.65, 0.125, 0.2, 12) == pytest.approx(320, rel=0.2)
    measured = items_needed(0.95, 0.125, 0.2, 12, measured=True)
    assert measured == pytest.approx(2 * items_needed(0.95, 0.125, 0.2, 12), abs=1)
    assert items_needed(0.95, 0.125, 0.2, 1) < items_needed(0.95, 0.125, 0.2, 12) < items_needed(0.95, 0.125, 0.1, 12)
    assert items_needed(1.0, 0.0, 0.2, 12) > 0


def test_an_attack_that_takes_more_than_half_is_uninformative():
    assert informative(0.4, 0.8) and not informative(0.39, 0.8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: said(recovery_threshold=0.2),
            ArgumentError,
            r"recovery_threshold=0.2 is not below pass_threshold=0.2",
        ),
        (lambda: said(alpha=0.0), FractionError, r"alpha=0.0; give a fraction strictly between 0 and 1"),
        (lambda: check_thresholds(0.1, 1.2, 0.05), FractionError, r"pass_threshold=1.2; give fractions from 0 to 1"),
        (lambda: said(row("rtt")), ArgumentError, r"recoveries of \['rtt'\]; a verdict needs 'direct'"),
        (lambda: items_needed(0.1, 0.2, 0.2, 3), ArgumentError, r"original=0.1, floor=0.2; the original must be right"),
        (
            lambda: items_needed(0.9, 0.2, 0.0, 3),
            FractionError,
            r"pass_threshold=0.0, alpha=0.05; give fractions strictly",
        ),
        (lambda: items_needed(0.9, 0.2, 0.2, 0), ArgumentError, r"attacks=0; give at least 1"),
    ],
)
def test_verdict_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_every_attack_registers_one_record_and_its_name_is_read_without_importing_it():
    known = attack.records()
    assert tuple(known) == completion.names("attacks") and [r.cost for r in known.values()] == sorted(
        {r.cost for r in known.values()}
    )
    for name, record in known.items():
        assert [attack.record for attack in record.build(Setup("full", layers=2))] == [record] * (1 + (name == "probe"))
    with pytest.raises(ArgumentError, match="attack 'rtt' is registered already"):
        register(AttackRecord("rtt"))
    with pytest.raises(ArgumentError, match="attack 'new': budget 'slow'; valid names: quick, fast, standard, full"):
        register(AttackRecord("new", budget="slow"))


@pytest.mark.parametrize(
    ("text", "step", "site"),
    [("lr=5e-05 step=40 how=lora", 40, None), ("epoch=3", 3, None), ("resid.post 3", None, "3.resid.post"), ("phrasing 1", None, None), ("k=4", None, None)],
)  # fmt: skip
def test_settings_of_earlier_versions_are_parsed_once(text, step, site):
    setting = Setting.parse(text)
    assert setting == text and setting.step == step and (str(setting.site) if setting.site else None) == site
    assert copy.copy(setting).step == step and Setting.parse(setting) is setting


def test_settings_that_attacks_make_are_those_that_are_parsed():
    for setting in (Setting.at(Site(3, Point.MLP_OUT)), UNTOUCHED):
        parsed = Setting.parse(str(setting))
        assert (parsed, parsed.step, parsed.site) == (setting, setting.step, setting.site)
