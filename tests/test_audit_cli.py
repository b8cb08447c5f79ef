"""The verb `audit`: what it prints, writes and exits with; and the self-test whole."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import signal
from dataclasses import asdict, replace

import pytest
import torch
from typer.testing import CliRunner

from repedit.auditing import selftest as testing
from repedit.auditing.api import audit, estimate
from repedit.auditing.controls import CONTROLS, edited
from repedit.auditing.selftest import Checked, SelfTest, selftest
from repedit.auditing.store import save_selftest, selftest_failures
from repedit.cli import app
from repedit.errors import (
    ArgumentError,
    DataError,
    NotEnoughRows,
    OverlapError,
    ProcessFailed,
    RepeditError,
    UnknownName,
)
from tests.taught_models import facts, kept_model, original, reference, world

FEW = 40
"""Facts of each role, and so few that they count by --allow-small alone."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The original, an edited model that still knows, the reference, and the facts, as a user has them."""
    root = tmp_path_factory.mktemp("audit")
    for name, subject in (("original", original()), ("edited", edited.nudged(original())), ("reference", reference())):
        subject.model.save_pretrained(root / name)
        subject.tokenizer.save_pretrained(root / name)
    rows = [(fact, role) for role in ("forget", "retain") for fact in getattr(facts(), role)[:FEW]]
    keep = ("id", "prompt", "answer", "entity", "domain", "choices")
    lines = [json.dumps({k: v for k, v in asdict(f).items() if k in keep} | {"role": role}) for f, role in rows]
    (root / "facts.jsonl").write_text("\n".join(lines))
    return root


def run(*words, code):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout


def asked(files):
    return (
        "audit", files / "edited", "--original", files / "original", "--facts", files / "facts.jsonl",
        "--reference", files / "reference", "--allow-small", "--attacks", "direct,strip",
    )  # fmt: skip


def test_an_audit_prints_its_verdict_writes_its_pages_and_exits_with_its_code(files, tmp_path):
    text = run(*asked(files), "--out", tmp_path / "out", code=3)
    assert "NOT FORGOTTEN" in text and "direct" in text
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"audit.json", "audit.md", "audit.html", "recovery.png"}
    hidden = json.loads(run(*asked(files), "--out", tmp_path / "hidden", "--hide-items", "--json", code=3))
    assert hidden["verdict"]["word"] == "NOT FORGOTTEN" and hidden["verdict"]["exit_code"] == 3
    assert "command" not in json.loads((tmp_path / "hidden/audit.json").read_text())["context"]
    texts = {text for fact in facts().forget[:FEW] for text in (fact.id, fact.prompt)}
    pages = list((tmp_path / "hidden").rglob("*.*"))
    assert {path.name for path in pages} >= {"audit.json", "audit.md", "audit.html"}
    for path in pages:
        assert [text for text in texts if text.encode() in path.read_bytes()] == []


def test_a_report_names_the_command_that_repeats_it(files, tmp_path, monkeypatch):
    options = (
        "--attacks", "direct", "--unrelated", "prose", "--holdout", "prose", "--folds", "1",
        "--seeds", "0,1", "--sites", "1.mlp.out", "--out", tmp_path / "a folder",
    )  # fmt: skip
    words = [str(word) for word in (*asked(files)[:-2], *options)]
    for start, command in (("/usr/bin/repedit", ["repedit", *words]), ("/usr/bin/python", [])):
        monkeypatch.setattr("sys.argv", [start, *words] if command else [start, "-m", "pytest"])
        run(*words, code=3)
        found = json.loads((tmp_path / "a folder/audit.json").read_text())
        assert shlex.split(found["context"]["command"]) == command


def test_an_interrupted_audit_shows_what_is_known_and_the_command_that_goes_on(files, tmp_path, monkeypatch, capsys):
    from repedit.auditing import runner
    from repedit.cli import main

    whole = runner._attacked_and_stored

    def breaking(task, subject, store):
        if task.attack.name == "strip":
            raise KeyboardInterrupt
        return whole(task, subject, store)

    monkeypatch.setattr(runner, "_attacked_and_stored", breaking)
    words = [str(w) for w in (*asked(files), "--until", "all", "--out", tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["repedit", *words])
    with pytest.raises(SystemExit) as raised:
        main()
    shown = capsys.readouterr()
    assert raised.value.code == 130 and "PARTIAL AUDIT, interrupted: NOT FORGOTTEN so far" in shown.out
    assert f"interrupted after direct; {shlex.join(['repedit', *words])} goes on from there" in shown.err
    assert json.loads((tmp_path / "out/audit.json").read_text())["state"] == "interrupted"
    assert (tmp_path / "out/audit.html").exists()
    monkeypatch.setattr(runner, "_attacked_and_stored", whole)
    run(*words, code=3)
    assert json.loads((tmp_path / "out/audit.json").read_text())["state"] == "complete"


def test_the_small_budgets_end_when_the_verdict_is_certain(files, monkeypatch):
    from repedit.auditing import api

    given = []

    def recording(*_, **options):
        given.append((options["budget"], options["until"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "audit", recording)
    for options in (("quick",), ("fast",), ("standard",), ("fast", "--until", "all"), ("full", "--until", "verdict")):
        CliRunner().invoke(app, [str(w) for w in (*asked(files), "--budget", *options)])
    assert given == [
        ("quick", "verdict"),
        ("fast", "verdict"),
        ("standard", "all"),
        ("fast", "all"),
        ("full", "verdict"),
    ]


def test_a_dry_run_attacks_nothing_and_says_what_it_would_cost(files):
    text = run(*asked(files), "--dry-run", code=0)
    assert text.splitlines()[0].endswith("nothing was attacked") and "strip" in text and "INVALID" not in text
    few = [word for word in asked(files) if word != "--allow-small"]
    assert f"at least 100 facts to forget, and there are {FEW}" in " ".join(run(*few, "--dry-run", code=0).split())
    cost = estimate(original(), facts(), attacks=("direct", "rtt", "quantize"))
    assert cost["attacks"]["rtt"]["steps"] == 2 * 3 * 40 and cost["attacks"]["quantize"]["questions"] == 4 * 160
    assert cost["minutes"] == pytest.approx(sum(c["seconds"] for c in cost["attacks"].values()) / 60)


def test_a_dry_run_refuses_facts_that_the_audit_would_refuse():
    with pytest.raises(NotEnoughRows, match=r"T has 6 entities.*about 16 entities or more"):
        estimate(original(), facts().forget[:12])


def test_attributes_come_from_a_file_and_are_refused_where_they_give_the_facts_away(files, tmp_path):
    fact, second = facts().forget[:2]
    row, other = (
        {"id": f.id, "prompt": f"{f.entity} works as a", "answer": "nurse", "entity": f.entity, "domain": "job"}
        for f in (fact, second)
    )
    for change, error, message in (
        ({"entity": "Nobody"}, DataError, "1 attributes are about no entity of the facts to forget"),
        ({"domain": fact.domain}, OverlapError, "1 attributes are of a domain of which facts are forgotten"),
        ({"answer": fact.answer}, OverlapError, "1 texts to train on state a fact that is asked"),
    ):
        (tmp_path / "attributes.jsonl").write_text(f"{json.dumps(row | change)}\n{json.dumps(other)}")
        result = CliRunner().invoke(app, [*map(str, asked(files)), "--attributes", str(tmp_path / "attributes.jsonl")])
        assert isinstance(result.exception, error) and message in str(result.exception)


def test_what_is_missing_is_named():
    result = CliRunner().invoke(app, ["audit", "somewhere"])
    assert isinstance(result.exception, RepeditError)
    assert "--original and --facts missing" in str(result.exception)


def test_a_self_test_is_remembered_and_a_failed_one_exits_with_6(monkeypatch):
    assert selftest_failures() is None
    good = Checked("PC1", "a hook", "HIDDEN", "HIDDEN", "strip", 1.0, 0.99, 1.0)
    bad = Checked("NC1", "never taught", "NO RECOVERY FOUND", "HIDDEN", "", float("nan"), 0.0, 1.0)
    for checks, code in (((good,), 0), ((good, bad), 6)):
        monkeypatch.setattr(testing, "selftest", lambda seed, checks=checks, **_: SelfTest(checks, seed, 2.0))
        text = run("audit", "--selftest", code=code)
        assert "PC1" in text and f"{len(checks) - (code == 6)} of {len(checks)} controls pass" in text
    save_selftest("NC1 failed", [asdict(bad)])
    assert selftest_failures() == "NC1 failed"


def brief(edited, *, facts, **options):
    """An audit of a few facts."""
    some = replace(facts, forget=facts.forget[:FEW], retain=facts.retain[:FEW])
    rest = {"retain": some.retain, "unrelated": some.retain, "attributes": None, "draws": 400, "allow_small": True}
    return audit(edited, facts=some, **(options | rest))


def test_a_self_test_of_some_controls_runs_them_and_is_not_recorded(monkeypatch):
    monkeypatch.setattr(testing, "world", world)
    found = selftest(controls=("PC0", "PC1"), workers=1, progress=False, audit_function=brief)
    assert [c.control for c in found.checks] == ["PC0", "PC1"] and found.passed and selftest_failures() is None
    with pytest.raises(UnknownName, match="no control is called 'PC99'"):
        selftest(controls=("PC99",))


def test_a_self_test_catches_an_audit_that_strips_nothing(monkeypatch):
    from repedit.auditing import attack
    from repedit.auditing.attack import _RECORDS
    from repedit.auditing.attacks.prompts import direct

    stripping = replace(attack.records()["strip"], build=lambda _: [replace(direct(), label="strip")])
    monkeypatch.setitem(_RECORDS, "strip", stripping)
    monkeypatch.setattr(testing, "world", world)
    found = selftest(controls=("PC1",), workers=1, progress=False, audit_function=brief)
    assert not found.passed and "PC1" in found.failures


def in_two_processes(monkeypatch, audit_function) -> SelfTest:
    """Two controls of the models that are kept."""
    monkeypatch.setattr(testing, "taught_model", kept_model)
    return selftest(controls=("PC0", "PC2"), workers=2, progress=False, audit_function=audit_function)


def test_a_self_test_in_two_processes_gives_what_one_gives_to_the_digit(monkeypatch):
    monkeypatch.setattr(testing, "world", lambda seed, models=None: world(seed))
    threads = torch.get_num_threads()
    one = selftest(controls=("PC0", "PC2"), workers=1, progress=False, audit_function=brief)
    monkeypatch.undo()
    two = in_two_processes(monkeypatch, brief)
    assert [replace(c, seconds=0.0) for c in one.checks] == [replace(c, seconds=0.0) for c in two.checks]
    assert [c.attack for c in one.checks] == ["direct", "probe"] and torch.get_num_threads() == threads
    with pytest.raises(ArgumentError, match="workers=0; give at least 1"):
        selftest(workers=0)


def refusing(edited, **options):
    raise DataError("there is nothing to ask")


def killed(edited, **options):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("audit_function", "error", "message"),
    [
        (refusing, DataError, "^control PC[02]: there is nothing"),
        (killed, ProcessFailed, r"\(.*control PC0.*\).*workers=1"),
    ],
)
def test_what_ends_a_process_of_the_self_test_names_its_control(monkeypatch, audit_function, error, message):
    with pytest.raises(error, match=message):
        in_two_processes(monkeypatch, audit_function)
    assert not multiprocessing.active_children() and selftest_failures() is None


@pytest.mark.slow
def test_every_control_comes_out_as_it_must():
    found = selftest(progress=False)
    assert found.passed, found.failures
    assert {c.control for c in found.checks} == {
        name for name, c in CONTROLS.items() if c.quick
    } and selftest_failures() == ""
