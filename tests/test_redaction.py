"""Withheld texts: a mark in every text of an audit and of a run is in no file that is written without the texts of items."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from repedit import auditing
from repedit.auditing import conclusion
from repedit.auditing.classifier import UNTRIED
from repedit.auditing.report import Recovery, Report, RetainCheck
from repedit.auditing.verdict import verdict
from repedit.report import redacted, write
from repedit.report.redaction import REDACTED, SENTENCES, redacted_values
from repedit.report.run_pages import rendered
from repedit.runs import RunReport, StepRecord, StepReport
from tests.handmade_reports import ITEMS, finding, recovery, report

MARK = "xMARKx"


def marked(value: Any, *, keys: bool = True) -> Any:
    """The value with a mark in every text and every key; numbers stay."""
    if isinstance(value, str):
        return f"{MARK} {value}"
    if isinstance(value, Mapping):
        return {marked(k) if keys else k: marked(v, keys=keys) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(marked(v, keys=keys) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        # The status of a finding is one of four words and nothing else.
        changed = {
            f.name: marked(getattr(value, f.name), keys=keys) for f in fields(value) if f.init and f.name != "status"
        }
        return replace(value, **changed)
    return value


def everywhere() -> list[tuple[str, Report]]:
    """Reports with a mark in every text, with every key as it is and as a mark, and with the word of the verdict kept."""
    whole = replace(
        report(),
        context={
            **report().context,
            "command": "repedit audit x",
            "models": {"edited": {"name": "a", "fingerprint": "ff"}},
        },
    )
    found = []
    for keys in (True, False):
        one = marked(whole, keys=keys)
        # Readers know roles and the attack "direct" by name; they are no texts of items.
        held = dict(zip(whole.findings, one.findings.values(), strict=True))
        recoveries = tuple(
            replace(r, attack=old.attack, settings=old.settings if not keys else r.settings)
            for r, old in zip(one.recoveries, whole.recoveries, strict=True)
        )
        named = {
            role: tuple(replace(f, attack=old.attack) for f, old in zip(held[role], whole.findings[role], strict=True))
            for role in held
        }
        word = replace(one.verdict, word=whole.verdict.word)
        same = {"verdict": word, "state": whole.state}
        found.append((f"keys {keys}", replace(one, findings=named, recoveries=recoveries, **same)))
    return found


REPORTS = dict(everywhere())


def written(folder: Path) -> Iterator[tuple[str, bytes]]:
    return ((path.name, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.parametrize("name", REPORTS)
def test_no_text_of_a_report_is_in_any_file(name, tmp_path):
    assert MARK in REPORTS[name].to_json()
    write(REPORTS[name], tmp_path, hide_items=True)
    files = dict(written(tmp_path))
    assert {"audit.json", "audit.md", "audit.html", "recovery.png"} <= set(files)
    assert [file for file, data in files.items() if MARK.encode() in data] == []


def test_a_text_that_stays_is_caught(tmp_path, monkeypatch):
    """The law finds a withholding that forgets one field."""
    monkeypatch.setattr("repedit.report.pages.redacted", lambda r: replace(redacted(r), not_run=r.not_run))
    write(REPORTS["keys False"], tmp_path, hide_items=True)
    assert any(MARK.encode() in data for _, data in written(tmp_path))


def test_numbers_verdicts_and_own_words_stay():
    shown = redacted(report())
    assert shown.verdict.word == report().verdict.word and shown.retain == report().retain
    assert [r.attack for r in shown.recoveries] == [r.attack for r in report().recoveries]
    assert [r.value for r in shown.recoveries] == pytest.approx([r.value for r in report().recoveries], nan_ok=True)
    assert shown.recoveries[0].settings == report().recoveries[0].settings
    assert shown.not_run["translate"] == "the facts have no translations"
    assert shown.context["hashes"] == report().context["hashes"] and shown.context["notes"] == report().context["notes"]


RAN = (recovery("direct", 0.02, "B"), recovery("rtt", 0.05), recovery("benign", 0.01))
KNOWN: dict[str, Any] = {"knowledge_low": 0.8, "n_test": 240, "budget": "fast"}
VERDICTS = {
    "no recovery": verdict(RAN, RetainCheck(), **KNOWN),
    "hidden": verdict((*RAN, recovery("probe", 0.8), recovery("format", 0.7)), RetainCheck(), **KNOWN),
    "not forgotten": verdict((recovery("direct", 0.9),), RetainCheck(), **KNOWN),
    "inconclusive": verdict((RAN[0], recovery("rtt", 0.1, half=0.2)), RetainCheck(), **KNOWN),
    "unknown": verdict(RAN, RetainCheck(), **(KNOWN | {"knowledge_low": 0.05, "n_test": 40})),
    "destroyed": verdict(RAN, RetainCheck(accuracy=(0.9, 0.2)), **KNOWN),
    "not asked for": verdict(RAN, RetainCheck(), not_run={"probe": "not asked for"}, **KNOWN),
    "skipped": verdict((*RAN, Recovery("membership", "skipped", "needs holdout text never trained on")), RetainCheck(), **KNOWN),
}  # fmt: skip


@pytest.mark.parametrize("name", VERDICTS)
def test_what_a_verdict_says_is_not_withheld(name):
    assert redacted(report(VERDICTS[name])).verdict == VERDICTS[name]


def test_reasons_that_are_always_the_same_are_not_withheld():
    for longest in (None, 200, 500):
        reasons = UNTRIED | conclusion.untried(longest)
        assert redacted(replace(report(), not_run=reasons)).not_run == reasons


EARLIER = ("material", "clear", "attacks", "repedit.attacks.classifier.shadows does it")
"""Words that only reports of earlier versions hold."""


def literals() -> str:
    """Every literal text in the sources of the audit, those of its f-strings included."""
    paths = sorted(Path(auditing.__file__).parent.rglob("*.py"))
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text())))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def absent_pieces(sentences: str) -> list[str]:
    """Pieces of sentences, between their numbers, names and choices, that no literal of the audit holds."""
    lines = [line.strip() for line in sentences.strip().splitlines()]
    pieces = [piece for line in lines for piece in re.split(r"\b(?:NAMES?|WORD|N)\b|\(\?:|(?<!\\)[|)]\??|: ", line)]
    said = literals()
    words = [re.sub(r"\\(.)", r"\1", piece).strip(" ,:%'().") for piece in pieces]
    return [word for word in words if re.search("[a-z]{3}", word) and word not in said and word not in EARLIER]


def test_every_sentence_that_is_kept_is_one_that_the_audit_says():
    assert absent_pieces(SENTENCES) == []


def test_a_sentence_that_the_audit_does_not_say_is_caught():
    assert absent_pieces("V has N facts, fewer than N\n the secret is NAME") == ["the secret is"]


FILLED = {"record.name": "upstream"}


def reasons_of_skipped_attacks() -> list[str]:
    """The arguments of `skipped(...)` in the attacks, with a number or a name where a value is filled in."""
    calls = [
        node
        for path in sorted((Path(auditing.__file__).parent / "attacks").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "skipped"
    ]
    texts = [argument for call in calls for argument in call.args if isinstance(argument, ast.Constant | ast.JoinedStr)]
    return [
        "".join(
            str(part.value) if isinstance(part, ast.Constant) else FILLED.get(ast.unparse(part.value), "7")
            for part in getattr(text, "values", [text])
        )
        for text in texts
    ]


def test_why_an_attack_was_skipped_is_not_withheld():
    reasons = reasons_of_skipped_attacks()
    assert len(reasons) > 5
    for reason in reasons:
        shown = redacted(replace(report(), not_run={"probe": reason})).not_run["probe"]
        # The names of languages come from the file of facts.
        assert shown == reason.replace("some have 7", REDACTED)


def test_a_reason_within_a_verdict_is_withheld():
    failed = (*RAN, Recovery("probe", "failed to train", f"the fact {MARK} is too long; {MARK}"))
    said = verdict(failed, RetainCheck(), **KNOWN)
    assert MARK in said.rule and MARK not in str(redacted(report(said)).verdict)
    assert "probe failed to train (" in redacted(report(said)).verdict.rule


@pytest.mark.parametrize(
    "details",
    [
        {"nearest": ["4711", "yes", "code"]},
        {"4711": 0.5},
        {"layers": {"Paris": 1.0}},
        {"kind": "9f" * 32},
        {ITEMS[0]: 1},
        {"score": {ITEMS[0]: {"loss": "Paris"}}},
    ],
)
def test_an_answer_that_looks_like_a_number_a_word_or_a_hash_is_withheld(details):
    held = replace(report(), findings={"edited": (finding("direct", {"prompt": 0.5}, details=details),)})
    said = json.dumps(redacted(held).findings["edited"][0].details)
    assert not any(word in said for word in ("4711", "yes", '"code"', "Paris", "9f9f", ITEMS[0]))


def test_an_id_that_looks_like_a_field_is_a_digest():
    item = replace(finding("direct", {"prompt": 0.5}, items=("loss",) * 1 + ITEMS[1:]), details={"loss": 0.5})
    assert "loss" not in redacted(replace(report(), findings={"edited": (item,)})).findings["edited"][0].details


# The page of a run.


def run_of() -> RunReport:
    """A run of two steps, with a mark in every text it was given and showed."""
    asked = {"verb": "compare", "base": MARK, "edited": "edited", "prompt": [MARK, f"--{MARK}"], "limit_tokens": 300}
    shown = (
        {"kind": "table", "title": MARK, "columns": ["text", "tokens", MARK], "rows": [[MARK, "300", MARK], ["code", "12.5 % (1.0 to 2.0)", "1969"]]},
        {"kind": "generations", "title": MARK, "columns": ["prompt", "original", MARK], "rows": [[MARK, MARK, MARK]]},
        {"kind": "line", "text": MARK}, {"kind": "json", "value": {MARK: MARK, "generations": [{"prompt": MARK}], "score": 0.25}},
    )  # fmt: skip
    record = StepRecord(
        1, "compare", "k", asked, ("compare", MARK, "--prompt", MARK), 0, 1.5, None, {}, {f"{MARK}.jsonl": "a" * 64}, shown,
        {"repedit": "0.1.0"},
    )  # fmt: skip
    other = {"verb": "score", "forget": f"{MARK}.txt", "out": "scores.safetensors", "retain": "prose"}
    fault = f"Step 1, compare: prompt was {MARK}."
    steps = (StepReport(1, asked, record, (fault,)), StepReport(2, other, None, ()))
    audited = replace(REPORTS["keys False"], examples=())
    return RunReport(Path("run.toml"), f'prompt = "{MARK}"', steps, {}, {}, {"audit": audited}, {"other": MARK})


def test_no_text_of_a_run_is_on_its_page():
    shown = rendered(run_of())
    assert MARK in shown and "12.5 % (1.0 to 2.0)" in shown
    hidden = rendered(run_of(), hide_items=True)
    assert MARK not in hidden and REDACTED in hidden
    for stays in (
        "12.5 % (1.0 to 2.0)",
        "limit_tokens = 300",
        "--limit-tokens 300",
        "scores.safetensors",
        "prose",
        "a" * 64,
        "300",
    ):
        assert stays in hidden
    assert "1969" not in hidden


def test_a_mark_on_the_page_is_caught(monkeypatch):
    monkeypatch.setattr("repedit.report.run_pages.redacted_run", lambda run: run)
    assert MARK in rendered(run_of(), hide_items=True)


def test_provenance_is_numbers_and_names():
    origin = {
        "method": "mrp",
        "options": {"rank": 8, "note": MARK, "importance": "abs"},
        "data": {"forget": {"name": MARK, "tokens": 300, "hash": "a" * 64}},
        MARK: 1,
    }
    held = redacted_values(origin)
    assert MARK not in json.dumps(held)
    assert held["options"]["rank"] == 8 and held["options"]["importance"] == "abs"
    assert held["data"]["forget"] == {"name": REDACTED, "tokens": 300, "hash": "a" * 64}
