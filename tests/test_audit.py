"""The audit as a whole, on taught models of which the answer is known; and what it refuses to audit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import repedit as rp
from repedit.auditing import api as auditing
from repedit.auditing import store as storing
from repedit.auditing.attack import _RECORDS, SKIPPED, Attack, AttackResult, Setup, Work, ask
from repedit.auditing.attacks.finetune import benign, rtt
from repedit.auditing.attacks.prompts import direct, in_context
from repedit.auditing.attacks.relink import RELINK
from repedit.auditing.controls import CONTROLS
from repedit.auditing.controls import edited as writing
from repedit.auditing.data import audit_data
from repedit.auditing.floors import fresh_facts
from repedit.auditing.runner import FRESH, Audited, Role, run
from repedit.auditing.selftest import Checked, SelfTest
from repedit.auditing.store import FindingStore
from repedit.data import Fact, Splits
from repedit.errors import (
    ArgumentError,
    BadReference,
    DataError,
    FingerprintError,
    FractionError,
    NoOpEdit,
    NotEnoughRows,
    OverlapError,
    UnknownName,
)  # fmt: skip
from repedit.models.subject import subject_of
from tests.taught_models import facts, original, reference, world
from tests.tiny import tiny

CHEAP = ("direct", "strip")
ASKED = {"unrelated": rp.data.prose(), "holdout": None, "folds": 2, "train_fraction": 0.5, "seed": 0, "most": 8}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No finding of another test, or of the user, is used."""
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path / "cache"))


def audited(edited, **options):
    given = {
        "original": original(), "reference": reference(), "facts": facts(), "retain": facts().retain,
        "attacks": CHEAP, "draws": 400, "progress": False,
    }  # fmt: skip
    return rp.audit(edited, **(given | options))


def few(count=20):
    """So few facts that an audit is quick; it is INVALID then, but for allow_small."""
    return replace(facts(), forget=facts().forget[:count])


def few_retained(count=32):
    return facts().retain[:count]


def of_few(count=32):
    """The options of an audit of few facts."""
    return {"facts": few(count), "retain": few_retained(count), "allow_small": True}


@pytest.fixture(scope="module")
def nudged():
    """An edited model that still knows everything."""
    return writing.nudged(original())


def test_the_same_seed_gives_the_same_report_and_no_model_changes():
    edited = writing.nudged(original())
    before = [m.fingerprint() for m in (edited, original(), reference())]
    first, second = (audited(edited, **of_few()).to_json() for _ in range(2))
    assert [m.fingerprint() for m in (edited, original(), reference())] == before
    times = ('"seconds"',)
    plain = [[line for line in text.splitlines() if not any(t in line for t in times)] for text in (first, second)]
    assert plain[0] == plain[1]
    assert rp.Report.from_json(first).to_json() == first


def test_a_model_that_knows_is_not_forgotten_and_one_that_never_knew_is_not_seen_to_know(nudged):
    known = audited(nudged, attacks=("direct",), **of_few())
    assert known.verdict.word == "NOT FORGOTTEN" and known.direct.value >= 0.95
    assert len(known.diagnostics["update"]) <= 1 and known.context["command"] == ""
    never = audited(world().other, attacks=CHEAP, retain=few_retained())
    assert max(r.bound[1] for r in never.recoveries) < 0.2
    # Attacks of the budget were left out by name, so nothing is passed.
    assert never.verdict.word == "INCONCLUSIVE" and never.not_run["rtt"] == "not asked for"


def test_a_hook_is_stripped_and_what_it_hid_is_found():
    case = CONTROLS["PC1"].build(world())
    found = audited(case.edited, **of_few())
    (strip,) = (r for r in found.recoveries if r.attack == "strip")
    assert found.verdict.word == "HIDDEN" and "strip" in found.verdict.sentence and strip.value >= 0.99
    assert case.edited.model.training is False and any(
        m._forward_hooks or m._forward_pre_hooks for m in case.edited.model.modules()
    )
    assert found.examples and {e["attack"] for e in found.examples} == {"strip"}
    for example in found.examples:
        assert example["original"].strip().startswith(example["attacked"]) and example["attacked"] == example["answer"]
        assert not example["edited"].strip().startswith(example["answer"])
    assert "update" not in found.diagnostics


def test_without_a_reference_the_floor_is_the_larger_of_fresh_facts_and_guesses():
    found = audited(world().other, reference=None, attacks=("direct",), **of_few())
    assert set(found.findings) == {"edited", "original", "fresh facts"}
    fresh, guess = found.finding("fresh facts", "direct").correct.mean(), max(found.heuristics.values())
    assert found.direct.floor == pytest.approx(max(fresh, guess))
    assert not set(found.finding("fresh facts", "direct").items) & set(found.finding("edited", "direct").items)


def test_what_a_training_makes_is_asked_invented_facts_and_other_attacks_are_made_again():
    known, seen = {f.id for f in few().forget}, []
    lists = rtt(rates=(1e-3,), steps=2, measured=(2,)), in_context(counts=(2,)), benign(rates=(1e-3,), steps=2)
    material, asked = (
        audit_data(part, facts().retain, **ASKED) for part in (few().forget, fresh_facts(few().forget, 16))
    )
    attacks = [replace(a, run=lambda s, x, seed, a=a: seen.append((a.name, x)) or a.run(s, x, seed)) for a in lists]
    role = Role("edited", Audited("edited", original()), material, tuple(attacks), invented=asked)
    found = run([role], (0,), FindingStore(None), progress=False)
    assert [f.attack for f in found["edited"]] == [f.attack for f in found[FRESH]] == ["rtt", "in_context", "benign"]
    for mine, theirs in zip(found["edited"], found[FRESH], strict=True):
        assert set(mine.items) == known and set(theirs.items) == {f.id for f in asked.forget}
        assert mine.correct.shape == (len(mine.settings), 20) and theirs.settings == mine.settings
        assert (theirs.seconds > 0) == (mine.attack == "in_context") and mine.seconds > 0 == theirs.tokens
    for name, part in seen:
        taught, tested = ({f.id for f in vars(part)[side]} for side in ("train", "test"))
        both = name != "in_context"
        assert (bool(tested & known) and bool(tested - known)) == both, name
        assert not both or taught <= known, name
    assert [name for name, _ in seen] == ["rtt"] * 2 + ["in_context"] * 4 + ["benign"]


def guessed_from_attributes(monkeypatch, **record):
    """An audit with one attack that brings nothing back: with the attribute of a person taught, two of three are guessed."""
    known = original().fingerprint()

    def run_attack(subject, splits, seed):
        taught = {f.entity for f in splits.attributes}
        answers = ask(subject, splits.test)
        right = [subject.fingerprint() == known or f.entity in taught for f in splits.test]
        return AttackResult({"asked": replace(answers, correct=np.array(right))}, train_accuracy=1.0)

    changed = replace(RELINK, **record)
    monkeypatch.setitem(
        _RECORDS, "relink", replace(changed, build=lambda setup: [Attack(changed, {}, run_attack, Work(1.0))])
    )
    people = few(24)
    seats = [
        Fact(id=f"seat/{n}", entity=f.entity, prompt=f"{f.entity} sits on a", answer="chair", choices=("chair", "stool"), domain="seats")
        for n, f in enumerate(people.forget) if n % 3
    ]  # fmt: skip
    options = {"facts": people, "retain": few_retained(), "reference": None, "attributes": seats, "allow_small": True}
    report = audited(world().other, attacks=("direct", "relink"), **options)
    return next(r for r in report.recoveries if r.attack == "relink"), report


def test_what_attributes_alone_give_away_is_not_recovered(monkeypatch):
    found, _ = guessed_from_attributes(monkeypatch)
    assert (found.edited, found.floor_name) == (pytest.approx(2 / 3), FRESH)
    assert found.floor == pytest.approx(found.edited) and found.value == pytest.approx(0)


def test_a_floor_that_is_not_taught_the_attributes_is_caught(monkeypatch):
    found, _ = guessed_from_attributes(monkeypatch, attributes=False)
    assert found.floor < found.edited - 0.2 and found.value > 0.3


def test_attributes_that_cannot_be_renamed_are_noted(monkeypatch):
    def without_names(*_):
        raise DataError("all names are used up")

    monkeypatch.setattr(auditing, "renamed_facts", without_names)
    found, report = guessed_from_attributes(monkeypatch)
    assert report.finding(FRESH, "relink").items  # invented facts, of which no attribute was taught
    assert found.value > 0.3 and "what the attributes alone give away is not subtracted" in str(report.context)


def test_facts_are_taken_out_of_a_finding_by_name():
    whole = direct()(original(), Splits((), few().forget))
    some = [f.id for f in few().forget[3:9]]
    found = whole.restricted(some)
    assert list(found.items) == some and (found.correct == whole.correct[:, 3:9]).all()
    assert (found.graded == whole.graded[:, 3:9]).all() and whole.restricted(whole.items) is whole


def test_a_broken_audit_goes_on_with_the_findings_it_has(tmp_path, monkeypatch):
    edited, asked = writing.nudged(original()), []
    options = of_few() | {"out": tmp_path / "out"}
    from repedit.auditing import runner

    whole = runner._attacked

    def breaking(attack, subject, splits):
        asked.append(attack.name)
        if len(asked) == 3:  # the third finding is lost, two are kept
            raise KeyboardInterrupt
        return whole(attack, subject, splits)

    monkeypatch.setattr(runner, "_attacked", breaking)
    with pytest.raises(KeyboardInterrupt):
        audited(edited, **options)
    assert len(list((tmp_path / "out/findings").glob("*.json"))) == 2 and not (tmp_path / "out/audit.json").exists()
    report = audited(edited, **options)
    total = len(asked)
    assert rp.Report.load(tmp_path / "out").to_json() == report.to_json()
    assert audited(edited, **options).verdict == report.verdict and len(asked) == total


def test_another_model_or_other_facts_never_get_a_kept_finding(tmp_path):
    edited = writing.nudged(original())
    found = {storing.key_of(a, edited.fingerprint(), s) for a in _attacks() for s in _splits()}
    assert len(found) == len(_attacks()) * len(_splits())
    assert storing.key_of(_attacks()[0], "another", _splits()[0]) not in found


def _attacks():
    from repedit.auditing.attacks.prompts import direct
    from repedit.auditing.attacks.weights import quantize

    return direct(), direct().at(1), quantize(), quantize(schemes=("int8",))


def _splits():
    items = facts().forget
    return (
        Splits((), items),
        Splits((), items[:50]),
        Splits(items[:10], items[50:]),
        Splits((), items, retain=items[:1]),
    )


def test_an_original_is_attacked_once_for_many_audits(monkeypatch):
    from repedit.auditing import runner

    asked, whole = [], runner._attacked
    monkeypatch.setattr(runner, "_attacked", lambda a, s, p: asked.append((s.fingerprint(), a.name)) or whole(a, s, p))
    for edited in (writing.nudged(original()), world().other):
        audited(edited, attacks=("direct",), **of_few())
    mine = [name for model, name in asked if model == original().fingerprint()]
    assert sorted(mine) == ["choices only", "direct", "retain"]


def test_an_attack_without_memory_is_reported_and_blocks_a_pass(monkeypatch):
    from repedit.auditing import attack

    def starving(*_):
        raise MemoryError

    record = attack.records()["strip"]
    (attack,) = record.build(Setup())
    starved = replace(attack, record=replace(record, unchanged=None), run=starving)
    monkeypatch.setitem(_RECORDS, "strip", replace(record, build=lambda _: [starved]))
    found = audited(world().other, retain=few_retained())
    (strip,) = (r for r in found.recoveries if r.attack == "strip")
    assert strip.status == SKIPPED and "ran out of memory" in found.not_run["strip"]
    assert found.verdict.word == "INCONCLUSIVE"


def test_an_attack_that_raises_is_never_a_pass(monkeypatch):
    from repedit.auditing import attack

    def failing(*_):
        raise DataError("nonsense")

    record = attack.records()["strip"]
    (attack,) = record.build(Setup())
    raising = replace(attack, record=replace(record, unchanged=None), run=failing)
    monkeypatch.setitem(_RECORDS, "strip", replace(record, build=lambda _: [raising]))
    with pytest.raises(DataError, match=r"attacking the \w+ model: attack 'strip': nonsense"):
        audited(world().other, **of_few())


def test_an_audit_whose_self_test_failed_here_is_unsound(nudged, monkeypatch):
    from repedit.auditing import conclusion

    monkeypatch.setattr(conclusion, "selftest_failures", lambda: "PC1 was not caught")
    found = audited(nudged, attacks=("direct",), **of_few())
    assert found.verdict.word == "UNSOUND" and "PC1 was not caught" in found.verdict.rule


def test_what_training_was_left_untried_depends_on_what_ran(nudged):
    short = audited(nudged, attacks=("direct",), **of_few()).not_run["long training"]
    longer = audited(nudged, attacks=("retraining",), steps=8, **of_few()).not_run["long training"]
    assert short == "hundreds of steps, other optimisers and other data"
    # 200 steps at the usual 40, and a fifth of them at 8.
    assert longer == "more than 40 steps, and optimizers other than AdamW, Lion and SGD"


def test_a_self_test_fails_where_one_control_does():
    good = Checked("PC1", "a hook", "HIDDEN", "HIDDEN", "strip", 1.0, 0.99, 1.0)
    weak, wrong = replace(good, recovered=0.5), replace(good, found="NO RECOVERY FOUND")
    assert SelfTest((good,), 0, 1.0).passed and not SelfTest((good,), 0, 1.0).failures
    assert not SelfTest((good, weak), 0, 1.0).passed and "0.50 where 0.99" in SelfTest((weak,), 0, 1.0).failures
    assert not SelfTest((wrong,), 0, 1.0).passed and "found NO RECOVERY FOUND" in SelfTest((wrong,), 0, 1.0).failures
    assert not replace(good, recovered=float("nan")).passed


def test_the_audit_knows_nothing_of_edits():
    code = "import sys, repedit.auditing.api; print('repedit.edit' in sys.modules, 'repedit.plan' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_models_that_cannot_be_compared_are_refused():
    with pytest.raises(NoOpEdit, match="every tensor of a model in memory equals original's; was the edit applied"):
        audited(original())
    other = subject_of(tiny("gpt2").model, original().tokenizer)
    with pytest.raises(FingerprintError, match="models of different kinds: "):
        audited(other)


@pytest.mark.parametrize("how", ["slim", "slice"])
def test_a_model_of_another_shape_is_attacked(how, tmp_path):
    """Cut neurons leave no zeros, deleted coordinates no null space; what needs equal shapes is left out."""
    lm = original()
    if how == "slice":
        small = rp.sliced(rp.erase_stream(lm, torch.randn(64, 4, generator=torch.Generator().manual_seed(0))), lm)
    else:
        keep = rp.Diagonal.mask(torch.arange(128) > 7)
        small = rp.slimmed(rp.Edit(dict.fromkeys(lm.select("*.mlp.neurons"), keep), {}), lm)
    small.model.save_pretrained(tmp_path / "small")
    lm.tokenizer.save_pretrained(tmp_path / "small")
    some = few(24)
    report = audited(tmp_path / "small", **of_few(24), attacks=("direct", "refill", "direction"))
    found = {name: report.finding("edited", name) for name in ("direct", "refill", "direction")}
    assert max(found["direct"].accuracy.values()) == rp.facts_accuracy(small, some.forget).accuracy
    assert (found["refill"].status, found["refill"].reason[:13]) == ("skipped", "no null space")
    kinds = {name.split(",")[0] for name in found["direction"].settings}
    assert ("edited - original" in kinds) == (how == "slim")
    assert "update" not in report.diagnostics


def test_a_reference_that_knows_is_refused():
    with pytest.raises(BadReference, match="the reference is the edited model itself"):
        audited(world().other, reference=world().other)
    with pytest.raises(BadReference, match=r"the reference knows the facts: 1\.000 of them"):
        audited(world().other, reference=writing.nudged(original()), attacks=("direct",), **of_few())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attacks": ("rtx",)}, UnknownName, "no attack is called 'rtx'; did you mean 'rtt'"),
        ({"budget": "quickest"}, UnknownName, "budget='quickest'; did you mean 'quick'"),
        ({"until": "verdicts"}, UnknownName, "until='verdicts'; did you mean 'verdict'"),
        ({"recovery_threshold": 0.2}, ArgumentError, "give recovery_threshold < pass_threshold"),
        ({"alpha": 0.0}, FractionError, "alpha=0.0"),
        ({"draws": 10}, ArgumentError, "draws=10"),
        ({"folds": 3}, ArgumentError, "folds=3; give 2 to test every fact once, or 1"),
        ({"seeds": ()}, ArgumentError, "seeds is empty"),
        ({"train_fraction": 1.0}, FractionError, "train_fraction=1.0"),
        ({"facts": ()}, DataError, "there are no facts to audit"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(options, error, message, nudged):
    with pytest.raises(error, match=message):
        audited(nudged, **({"attacks": ("direct",)} | options))


def fact(number, entity=None, **changes):
    options = {
        "prompt": f"{entity or number} lives in",
        "answer": f"town {number}",
        "choices": (f"town {number}", "x", "y"),
    }
    return Fact(id=str(number), entity=entity or f"person {number}", domain="towns", **(options | changes))


def test_facts_that_cannot_be_halved_are_refused():
    options = {"unrelated": None, "holdout": None, "folds": 2, "train_fraction": 0.5, "seed": 0, "most": None}
    with pytest.raises(NotEnoughRows, match="T has 5 entities; an audit needs at least 8 on each side"):
        audit_data([fact(i) for i in range(10)], ["some text to keep"], **options)
    same = "once upon a time there was a king who ruled the land of"
    twins = [fact(i, prompt=f"{same} {'a' if i % 2 else 'b'}", answer="x") for i in range(40)]
    with pytest.raises(OverlapError, match="near-duplicates straddle T and V"):
        audit_data(twins, ["some text to keep"], **options)
    items = [fact(i) for i in range(40)]
    with pytest.raises(OverlapError, match=r"retain and forget share 1 entities, such as \['person 3'\]"):
        audit_data(items, [replace(items[3], id="other", prompt="else")], **options)


def test_every_fact_is_tested_once_and_halves_share_no_entity():
    options = {"unrelated": None, "holdout": None, "folds": 2, "train_fraction": 0.5, "seed": 0, "most": None}
    asked = audit_data(facts(), facts().retain, **options)
    assert sorted(f.id for f in asked.tested) == sorted(f.id for f in facts().forget)
    for fold in asked.folds:
        assert not {f.entity for f in fold.train} & {f.entity for f in fold.test}
    assert [f.id for f in asked.whole.test] == [f.id for f in asked.tested] and not asked.whole.train
    default = audit_data(rp.data.facts("capitals"), None, **(options | {"most": 100}))
    forgotten = {f.entity for f in default.forget}
    assert (
        default.text is not None
        and not forgotten & {f.entity for f in default.retain}
        and 80 <= len(default.retain) <= 120
    )
    assert "about forgotten entities are left out" in default.notes[0]


def test_free_text_stays_without_choices_and_short_answers_get_some():
    options = {"unrelated": None, "holdout": None, "folds": 2, "train_fraction": 0.5, "seed": 0, "most": None}
    long = [fact(i, choices=(), answer=f"she wrote {i} novels about the sea and the land") for i in range(30)]
    short = [replace(fact(i, choices=()), id=f"s{i}", domain="short") for i in range(100, 130)]
    asked = audit_data([*long, *short], ["some text to keep"], **options)
    assert all(not f.choices for f in asked.forget[:30]) and all(len(f.choices) == 8 for f in asked.forget[30:])


def test_what_was_kept_is_measured_on_facts_and_text(nudged):
    options = of_few() | {"attacks": ("direct",)}
    found = audited(nudged, **options)
    assert found.retain.accuracy == (1.0, 1.0) and found.retain.perplexity is None
    read = audited(nudged, **(options | {"retain": [f.text for f in options["retain"]]}))
    assert read.retain.accuracy is None and read.retain.perplexity[0] == pytest.approx(
        read.retain.perplexity[1], rel=0.01
    )
    rolled = audited(CONTROLS["NC4b"].build(world()).edited, **options)
    assert rolled.verdict.word == "DESTROYED" and np.isfinite(rolled.direct.value)


def test_the_edited_layers_are_read_from_the_manifest(tmp_path):
    from repedit.auditing.runner import Audited

    folder = tmp_path / "model"
    original().model.save_pretrained(folder)
    original().tokenizer.save_pretrained(folder)
    assert Audited("edited", folder).edited_layers() is None
    (folder / "repedit.json").write_text('{"sites": {"1.mlp.out": {}, "0.mlp.out": {}}}')
    assert Audited("edited", folder).edited_layers() == (0, 1)
    assert auditing._edited_layers(Audited("edited", folder), "1.mlp.out") == (1,)
