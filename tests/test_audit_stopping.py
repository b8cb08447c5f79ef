"""An audit that ends early, one that is interrupted, the quick budget, and the progress that is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
from tqdm import tqdm

import repedit as rp
from repedit.auditing import api, runner
from repedit.auditing.api import audit
from repedit.auditing.attack import Setup, built, planned
from repedit.auditing.attacks.prompts import direct
from repedit.auditing.controls import CONTROLS, SCALE, STEPS
from repedit.auditing.controls import edited as writing
from repedit.auditing.report import ENDED_EARLY, INTERRUPTED, AuditInterrupted, Report
from repedit.auditing.runner import Part, TimeLeft
from repedit.outcomes import NOT_YET, PASS
from repedit.report import compare_reports, markdown, page, schema, tables, write
from tests import handmade_reports
from tests.taught_models import case, facts, original, reference, world


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path / "cache"))


def audited(edited, **options):
    """An audit of a few facts."""
    some = replace(facts(), forget=facts().forget[:40], retain=facts().retain[:40])
    given = {
        "original": original(), "reference": reference(), "facts": some, "retain": some.retain, "draws": 400,
        "unrelated": some.retain, "allow_small": True, "progress": False,
    }  # fmt: skip
    return audit(edited, **(given | options))


@pytest.fixture
def made(monkeypatch):
    """(model, attack) of everything that is done to a model, in order."""
    tasks, whole = [], runner._attacked_and_stored
    monkeypatch.setattr(
        runner, "_attacked_and_stored", lambda t, s, store: tasks.append((t.role, t.attack.name)) or whole(t, s, store)
    )
    return tasks


# Ending early


def test_an_audit_ends_before_any_training_when_the_verdict_is_certain(made, tmp_path):
    hidden = CONTROLS["PC1"].build(world()).edited
    early = audited(hidden, attacks=("direct", "strip", "probe", "rtt", "membership"), until="verdict")
    assert {attack for _, attack in made} == {"direct", "retain", "choices only", "strip"}
    assert (early.verdict.word, early.state) == ("HIDDEN", ENDED_EARLY)
    reason = "not needed, since no further attack changes the verdict HIDDEN"
    assert [early.not_run[name] for name in ("probe", "rtt", "membership")] == [reason] * 3
    assert {r.attack for r in early.recoveries} == {"direct", "strip"} and early.examples
    # The bound is that of all planned attacks that decide, of which two are pending.
    alone = audited(hidden, attacks=("direct", "strip"))
    by_name = [{r.attack: r for r in found.recoveries} for found in (early, alone)]
    assert by_name[0]["direct"].bound[0] < by_name[1]["direct"].bound[0]
    assert alone.state == "complete" and alone.verdict.word == "HIDDEN"


def test_not_forgotten_is_certain_once_the_facts_are_asked(made):
    found = audited(writing.nudged(original()), until="verdict")
    assert {attack for _, attack in made} == {"direct", "retain", "choices only", "choices only, reverse_question"}
    assert (found.verdict.word, found.state) == ("NOT FORGOTTEN", ENDED_EARLY)


def test_an_open_question_takes_every_attack_that_decides():
    found = audited(world().other, attacks=("direct", "strip", "paraphrase"), until="verdict")
    assert found.state == "complete" and {r.attack for r in found.recoveries} == {"direct", "strip", "paraphrase"}


def test_models_are_attacked_in_turn_and_few_are_opened_again(made):
    audited(world().other, attacks=("direct", "strip", "paraphrase"))
    assert [attack for _, attack in made if attack in ("strip", "paraphrase")] == ["strip"] * 3 + ["paraphrase"] * 3
    roles = [role for role, _ in made]
    assert sum(a != b for a, b in pairwise(roles)) == 6
    assert roles[0] == "edited" and roles[-1] == "reference"


def verdicts(name: str, folder) -> tuple[str, str]:
    """The verdict of a control with all attacks of the fast budget, and the one an audit ends with early."""
    control, inputs = CONTROLS[name], case(name)
    options = {
        "original": inputs.original, "reference": inputs.reference, "facts": inputs.facts, "retain": inputs.facts.retain,
        "attributes": inputs.attributes, "attacks": (*planned("fast"), *control.attacks), "scale_lrs": SCALE,
        "steps": STEPS if control.verdict == PASS else control.steps, "out": folder / name,
    }  # fmt: skip
    return tuple(audited(inputs.edited, **options, until=until).verdict.word for until in ("all", "verdict"))


@pytest.mark.parametrize("name", ["PC0", "NC4b", "NC3"])
def test_an_early_verdict_of_a_control_is_the_final_one(name, tmp_path):
    control, inputs = CONTROLS[name], CONTROLS[name].build(world())
    options = {"attacks": ("direct", "strip", "paraphrase", "quantize"), "facts": inputs.facts, "out": tmp_path}
    early, late = (audited(inputs.edited, **options, until=until) for until in ("verdict", "all"))
    assert early.verdict.word == late.verdict.word == control.verdict
    assert early.state == ENDED_EARLY and late.state == "complete"


@pytest.fixture(scope="module")
def one_cache(tmp_path_factory):
    """For all controls, most of which share the original and the reference."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, control in CONTROLS.items() if control.quick])
def test_every_early_verdict_is_the_final_one(name, one_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("REPEDIT_CACHE", str(one_cache))
    late, early = verdicts(name, tmp_path)
    assert early == late


# Interrupted


def interrupted(monkeypatch, after, **options) -> AuditInterrupted:
    """What is raised where Ctrl-C comes in the place of the first task of an attack."""
    whole = runner._attacked

    def breaking(attack, subject, splits):
        if attack.name == after:
            raise KeyboardInterrupt
        return whole(attack, subject, splits)

    with monkeypatch.context() as patch, pytest.raises(AuditInterrupted) as raised:
        patch.setattr(runner, "_attacked", breaking)
        audited(world().other, attacks=("direct", "strip", "paraphrase"), **options)
    return raised.value


def test_an_interrupted_audit_leaves_a_partial_report_and_goes_on(monkeypatch, tmp_path, made):
    error = interrupted(monkeypatch, "paraphrase", out=tmp_path / "out")
    partial = Report.load(tmp_path / "out")
    assert partial.to_json() == error.report.to_json() and isinstance(error, KeyboardInterrupt)
    assert partial.state == INTERRUPTED and partial.verdict.word in (NOT_YET, "INCONCLUSIVE")
    assert partial.not_run["paraphrase"] == "the audit was interrupted"
    assert {r.attack for r in partial.recoveries} == {"direct", "strip"}
    done = len(made) - 1
    whole = audited(world().other, attacks=("direct", "strip", "paraphrase"), out=tmp_path / "out")
    assert len(made) == done + 1 + 3 and whole.state == "complete"
    assert Report.load(tmp_path / "out").to_json() == whole.to_json()
    fresh = audited(world().other, attacks=("direct", "strip", "paraphrase"))
    assert fresh.verdict == whole.verdict and fresh.recoveries == whole.recoveries


def test_an_interrupt_after_the_last_attack_leaves_a_report_as_well(monkeypatch, tmp_path):
    def interrupting(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "with_examples_and_diagnostics", interrupting)
    with pytest.raises(AuditInterrupted) as raised:
        audited(world().other, attacks=("direct",), out=tmp_path / "out")
    partial = Report.load(tmp_path / "out")
    assert partial.state == INTERRUPTED and partial.to_json() == raised.value.report.to_json()
    monkeypatch.undo()
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path / "cache"))
    assert audited(world().other, attacks=("direct",), out=tmp_path / "out").state == "complete"


def test_before_the_facts_are_asked_there_is_nothing_to_report(monkeypatch, tmp_path):
    error = interrupted(monkeypatch, "direct", out=tmp_path / "out")
    assert error.report is None and not (tmp_path / "out/audit.json").exists()


# What is not complete says so


@pytest.mark.parametrize("state", [ENDED_EARLY, INTERRUPTED])
def test_no_page_of_an_incomplete_audit_looks_complete(state, tmp_path):
    whole = handmade_reports.clean()
    partial = replace(whole, state=state)
    assert json.loads(partial.to_json())["state"] == state and Report.from_json(partial.to_json()).state == state
    words = tables.INCOMPLETE[state]
    for make in (markdown, page):
        assert words in make(partial) and words not in make(whole) and partial.title in make(partial)
    compared = compare_reports({"a": whole, "b": partial})
    assert [row[1] for row in compared.verdicts.rows] == [PASS, partial.title] and partial.title in compared.page()
    assert state in partial.title.lower() and repr(partial).startswith(f"Report({partial.title}")
    write(partial, tmp_path, hide_items=True)
    assert Report.load(tmp_path).state == state and words in (tmp_path / "audit.md").read_text()


def test_audits_of_before_there_were_states_are_complete():
    old = json.loads(handmade_reports.clean().to_json())
    old.pop("state")
    assert Report.from_json(json.dumps(old | {"schema": 1})).state == "complete"
    with pytest.raises(rp.errors.CheckpointError, match="state 'done'"):
        Report.from_json(json.dumps(old | {"state": "done"}))
    assert set(schema()["properties"]["state"]["enum"]) == {"complete", ENDED_EARLY, INTERRUPTED}


# The quick budget


def test_the_quick_budget_asks_and_retrains_once():
    assert planned("quick") == (
        "direct", "paraphrase", "first_word", "respelled", "reverse_question", "head_rows", "in_context", "quantize", "rtt"
    )  # fmt: skip
    assert set(planned("quick")) < set(planned("fast"))
    (quick,), (fast,) = (built(["rtt"], Setup(budget)) for budget in ("quick", "fast"))
    assert (len(quick.options["rates"]), quick.folds) == (1, 1) and quick.options["steps"] == fast.options["steps"]
    assert fast.folds is None
    rounded = [built(["quantize"], Setup(budget))[0].options["schemes"] for budget in ("quick", "fast")]
    assert set(rounded[0]) < set(rounded[1])


def test_a_quick_audit_retrains_on_one_half_and_never_passes():
    found = audited(world().other, budget="quick", scale_lrs=SCALE, steps=16)
    rtt = found.finding("edited", "rtt")
    assert len(rtt.items) == 20 == len(found.direct.settings and found.finding("edited", "direct").items) // 2
    assert found.verdict.word in (NOT_YET, "INCONCLUSIVE")
    assert found.verdict.exit_code == 4 and found.not_run["probe"] == "needs a larger budget than 'quick'"


# Progress


def test_time_left_is_learned_from_what_is_most_alike():
    asking, training = built(["direct", "rtt"], Setup("fast"))
    clock = TimeLeft()
    assert clock.seconds([Part("edited", asking, 100)]) is None
    clock.learn(Part("edited", asking, 100), 10.0)
    assert clock.seconds([Part("original", asking, 50)]) == pytest.approx(5.0)
    assert clock.seconds([Part("original", training, 100)]) == pytest.approx(
        10 * Part("", training, 100).work / Part("", asking, 100).work
    )
    clock.learn(Part("edited", training, 100), 500.0)
    assert clock.seconds([Part("original", training, 100)] * 2) == pytest.approx(1000.0)
    other = direct()
    assert clock.seconds([Part("edited", replace(other, label="another"), 100)]) == pytest.approx(10.0)
    assert clock.seconds([]) == 0.0


def test_the_bar_shows_the_verdict_so_far_the_attack_and_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(runner, "tqdm", partial(tqdm, mininterval=0))
    audited(writing.nudged(original()), attacks=("direct", "strip", "paraphrase"), progress=True)
    shown = capsys.readouterr().err
    assert "NOT FORGOTTEN so far; edited: paraphrase; at most" in shown and " left]" in shown
    assert "so far; edited: direct" not in shown
