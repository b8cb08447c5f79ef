"""A report can be read anywhere: its pages say what its JSON holds, show it where it belongs, and keep what is withheld."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from typer.testing import CliRunner

from repedit import plot
from repedit.auditing import report as auditing_report
from repedit.auditing.report import Recovery, Report, RetainCheck, Verdict
from repedit.cli import app
from repedit.errors import ArgumentError, CheckpointError, ReportError, TargetExists
from repedit.outcomes import INVALID
from repedit.plot.canvas import canvas
from repedit.plot.reports import (
    audits_forest,
    curves,
    forest_rows,
    interval_text,
    layer_curves,
    recovery_forest,
    relearning_curves,
)
from repedit.report import compare_reports, markdown, page, pages, redacted, schema, write
from repedit.report.redaction import digest
from repedit.report.tables import format_recovery
from tests.figure_laws import laid_out, outside, overlapping
from tests.handmade_reports import CITIES, ITEMS, LAYERS, STEPS, clean, finding, other_items, recovery, report

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)> | `*_x_*` [a](http://b) &amp;\n# end"
FIXED = {"edited", "original", "reference", "fresh facts", "floor"}
INF, NAN = float("inf"), float("nan")
BARE = Report(
    Verdict(INVALID, "The original never knew the facts.", "known 0.02 < 0.15", "facts the original knows"),
    (Recovery("direct", "ran", level="B"),), RetainCheck(), {}, {}, {},
)  # fmt: skip


class Elements(HTMLParser):
    """Tags, attributes and words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def of(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and kind in [*(a.get("class") or "").split(), ""]]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def hostile(found: Report) -> Report:
    """The report with markup after every free text."""

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {k if k in FIXED else k + HOSTILE: spoil(v) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v) for v in value]
        return value + HOSTILE if isinstance(value, str) else value

    held = json.loads(found.to_json())
    for key in ("not_run", "heuristics", "diagnostics"):
        held[key] = spoil(held[key])
    held["examples"] = [
        {k if k in ("id", "prompt") else k + HOSTILE: spoil(v) for k, v in e.items()} for e in held["examples"]
    ]
    for key in ("sentence", "rule", "settle"):
        held["verdict"][key] = spoil(held["verdict"][key])
    context = held["context"]
    held["context"] = {
        k: v if k in ("sites", "n_test", "recovery_threshold", "pass_threshold") else spoil(v)
        for k, v in context.items()
    }
    for row in held["recoveries"]:
        row |= {k: spoil(row[k]) for k in ("attack", "reason", "floor_name", "settings")}
    for row in (row for rows in held["findings"].values() for row in rows):
        row |= {k: spoil(row[k]) for k in ("attack", "reason", "settings", "details")}
    return Report.from_json(json.dumps(held))


def spoiled(text: str) -> list[str]:
    """Elements and attributes that no page has, and addresses it would fetch."""
    page = Elements(text)
    tags = {tag for tag, _ in page.tags} & {"script", "img", "a", "link", "iframe", "object", "b"}
    attributes = {pair for _, held in page.tags for pair in held.items()}
    names = {name for name, _ in attributes if name.startswith("on") or name == "src"}
    # A mark of a figure is defined once and used where it stands; a heat map is a picture inside its figure.
    inside = ("#", "data:image/png;base64,")
    names |= {name for name, value in attributes if name.endswith("href") and not str(value).startswith(inside)}
    fetched = re.findall(r"@import|url\((?!#)", text)
    return [*tags, *names, *fetched]


def torn(text: str) -> list[str]:
    """Rows of Markdown tables with more or fewer cells than their heading, and headings nobody wrote."""
    found, width = [line for line in text.split("\n") if line.startswith("# ")][1:], 0
    for line in text.split("\n"):
        cells = len(re.findall(r"(?<!\\)\|", line))
        width = 0 if not line.startswith("|") else width or cells
        found += [line] if line.startswith("|") and cells != width else []
    return found


# What a page holds.


@cache
def standard_page() -> str:
    return page(report())


def test_a_page_needs_no_network_and_no_script():
    assert spoiled(standard_page()) == []
    assert "http" not in standard_page() and "<style>" in standard_page()


def test_no_text_of_a_report_becomes_markup():
    text = page(hostile(report()))
    assert spoiled(text) == []
    assert Elements(text).text.count("<script>alert(1)</script>") > 40


def test_unescaped_text_is_caught(monkeypatch):
    monkeypatch.setattr(pages, "ENVIRONMENT", pages.ENVIRONMENT.overlay(autoescape=False))
    assert {"script", "img", "src", "onerror"} <= set(spoiled(page(hostile(report()))))


def test_no_text_of_a_report_breaks_markdown():
    assert torn(markdown(hostile(report()))) == []
    assert "<script" not in markdown(hostile(report()))


def test_torn_markdown_is_caught(monkeypatch):
    monkeypatch.setattr("repedit.report.pages.for_markdown", lambda text: text)
    assert torn(markdown(hostile(report())))


def test_a_comparison_escapes_as_well():
    comparison = compare_reports({"a" + HOSTILE: hostile(report()), "b": hostile(clean())})
    assert spoiled(comparison.page()) == [] and torn(comparison.markdown()) == []


@pytest.mark.parametrize("render", [markdown, lambda r: Elements(page(r)).text], ids=["markdown", "page"])
def test_the_verdict_comes_first_and_everything_is_said(render):
    found = report()
    text = re.sub(r"\\(?=[\[\]*])", "", render(found))
    order = ["HIDDEN", found.verdict.sentence, found.verdict.rule, "What each attack brings back", "What was not tried"]
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)
    for row in found.recoveries:
        assert row.attack in text and (np.isnan(row.value) or f"{row.value:.2f}" in text)
    for words in (*found.not_run, *found.not_run.values(), *found.heuristics, found.context["command"], *CITIES[:10]):
        assert words in text
    assert "one seed: intervals exclude training noise" in text and "2 more are in audit.json" in text
    assert CITIES[10] not in text


@pytest.mark.parametrize("render", [markdown, lambda r: Elements(page(r)).text], ids=["markdown", "page"])
def test_an_audit_that_no_command_repeats_has_no_line_for_one(render):
    found = report()
    assert "repedit audit" in render(found)
    assert "command" not in render(replace(found, context={**found.context, "command": ""}))


def test_a_report_with_nothing_measured_is_a_page_all_the_same():
    text = Elements(page(BARE)).text
    assert "INVALID" in text and "facts the original knows" in text and "No retain set was given." in text
    assert "Relearning" not in text and "Facts that came back" not in text and "nan" not in text.lower()
    assert "n/a" in markdown(BARE)


def test_large_reports_stay_below_two_megabytes():
    many = {f"model.layers.{n}.mlp.down_proj.weight": 0.1 for n in range(20_000)}
    text = page(replace(report(), diagnostics={"relative update": many}))
    assert len(text.encode()) < 2e6 and "19600 more rows are in audit.json." in text


WIDTHS = (pages.PAGE_WIDTH, pages.PHONE_WIDTH)


@pytest.mark.parametrize("width", WIDTHS)
def test_intervals_are_drawn_where_they_are(width):
    lines = [
        line.get_xdata() for line in recovery_forest(report(), width=width).axes[0].lines if line.get_zorder() == 3
    ]
    wanted = [row.recovery.bound for row in forest_rows(report()) if row.recovery.status != "skipped"]
    assert_allclose(lines, np.clip(wanted, -0.3, 1.3))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_shows_the_forest_plot_as_it_is(width):
    assert pages.svg(recovery_forest(report(), width=width)) in standard_page()
    both = {"a": report(), "b": clean()}
    assert pages.svg(audits_forest(both, width=width)) in compare_reports(both).page()


def test_the_figures_of_a_page_refer_to_their_own_parts():
    text = standard_page()
    drawings = re.findall("<svg.*?</svg>", text, re.S)
    assert len(drawings) == 2 + 1 + 4 and page(report()) == text
    for drawing in drawings:
        names = re.findall(r' id="([^"]+)"', drawing)
        assert set(names) == set(re.findall(r'["(]#([^")]+)[")]', drawing))
    every = re.findall(r' id="([^"]+)"', text)
    assert len(every) == len(set(every)) > 20


def test_the_figures_of_a_page_have_its_colours():
    text = standard_page()
    defined = set(re.findall(r"(--[\w-]+):", text))
    assert {"--ink", "--paper", "--series-0"} <= set(re.findall(r"var\((--[\w-]+)\)", text)) <= defined
    for drawing in re.findall("<svg.*?</svg>", text, re.S):
        assert not re.search(r"(fill|stroke)[^;]*#[0-9a-f]{6}", drawing)


@pytest.mark.parametrize("width", WIDTHS)
def test_an_infinite_interval_reaches_both_ends(width):
    infinite = replace(BARE, recoveries=(recovery("direct", 0.5, bound=(-INF, INF)),))
    lines = [line.get_xdata() for line in recovery_forest(infinite, width=width).axes[0].lines]
    assert any(len(x) == 2 and list(x) == [-0.3, 1.3] for x in lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_values_beyond_the_ends_are_arrows_that_point_there(width):
    beyond = replace(BARE, recoveries=(recovery("rtt", 3.0, "B"), recovery("direct", -3.0, "B")))
    points = [line for line in recovery_forest(beyond, width=width).axes[0].lines if line.get_zorder() == 4]
    assert [(line.get_marker(), line.get_xdata()[0]) for line in points] == [(">", 1.3), ("<", -0.3)]


# Order and curves.


def test_strongest_first_then_what_does_not_decide_then_what_is_no_evidence():
    names = [line.name for line in forest_rows(report())]
    assert names[:3] == ["rtt", "probe", "int4"]
    assert names[8:] == ["membership", "int3", "refill", "translate", "direction"]
    assert [line.evidence for line in forest_rows(report())] == [True] * 8 + [False] * 5
    assert "retain" not in names


def test_a_curve_is_the_worst_case_of_the_mean_over_seeds():
    shares = [{"step=0": 0.1, "lr=1 step=5": a, "lr=2 step=5 how=lora": b} for a, b in ((0.6, 0.2), (0.1, 0.4))]
    found = replace(report(), findings={"edited": tuple(finding("rtt", s, seed=n) for n, s in enumerate(shares))})
    (chart,) = relearning_curves(found)
    # The worst of each seed, (0.6 + 0.4) / 2, would be chosen after the fact.
    assert_allclose(chart.series["edited"], [(0, 0.1), (5, 0.35)])
    assert_allclose(chart.series["floor"], [(0, 0.13), (5, 0.13)])


def test_steps_and_layers_are_read_from_the_settings():
    (rtt,) = relearning_curves(report())
    assert [x for x, _ in rtt.series["edited"]] == list(STEPS) and set(rtt.series) == {
        "edited",
        "original",
        "reference",
    }
    charts = layer_curves(report())
    assert [c.name for c in charts] == [f"{a}, {s}" for a in ("logit_lens", "probe") for s in ("resid.post", "mlp.out")]
    assert all(len(points) == LAYERS for c in charts for points in c.series.values())
    assert charts[0].marked == {2, 3} and max(charts[0].series["edited"], key=lambda p: p[1])[0] == 5
    by_number = replace(report(), context={"sites": [2, 3]})
    assert layer_curves(by_number)[0].marked == {2, 3}


def test_intervals_say_which_they_are():
    alone = recovery("direct", 0.5, bound=(NAN, NAN), interval=(0.4, 0.6))
    assert interval_text(alone) == "[0.40, 0.60]*" and interval_text(recovery("rtt", 0.5)) == "[0.41, 0.59]"
    assert format_recovery(Recovery("gcg", "skipped")) == "skipped"


# The JSON.


def small() -> Report:
    """The report with the simplest findings of every status."""
    return replace(
        report(),
        findings={role: tuple(f for f in held if len(f.settings) < 2) for role, held in report().findings.items()},
    )


def test_the_schema_takes_what_is_written():
    for found in (small(), BARE, redacted(small()), replace(BARE, recoveries=(recovery("direct", INF),))):
        jsonschema.validate(json.loads(found.to_json()), schema())


TWINS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a word that is no verdict": lambda j: j["verdict"].update(word="REMOVED"),
    "an exit code that is none": lambda j: j["verdict"].update(exit_code=1),
    "a verdict without its rule": lambda j: j["verdict"].pop("rule"),
    "a state that is none": lambda j: j.update(state="finished"),
    "an audit without its state": lambda j: j.pop("state"),
    "a field nobody knows": lambda j: j.update(mood="good"),
    "another schema": lambda j: j.update(schema=3),
    "an accuracy that is a text": lambda j: j["recoveries"][0].update(edited="0.8"),
    "an interval with one end": lambda j: j["recoveries"][0].update(interval=[0.1]),
    "a status that is none": lambda j: j["findings"]["edited"][0].update(status="passed"),
    "an answer that is neither right nor wrong": lambda j: j["findings"]["edited"][0].update(correct=["012"]),
    "a model that has no role": lambda j: j["findings"].update(other=[]),
    "a reason that is missing": lambda j: j["not_run"].update(gcg=None),
    "a guess that is right more than always": lambda j: j["heuristics"].update(longest=1.2),
    "an example without an answer": lambda j: j["examples"][0].pop("answer"),
}


@pytest.mark.parametrize("twin", TWINS)
def test_the_schema_refuses(twin):
    held = json.loads(small().to_json())
    jsonschema.validate(held, schema())
    TWINS[twin](held)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(held, schema())


# What is withheld.


@pytest.fixture
def blank(monkeypatch):
    """Figures that are drawn at once: an empty one in place of each."""
    for name in ("recovery", "audits"):
        monkeypatch.setattr(f"repedit.plot.{name}", lambda _: canvas(1.0, 1.0))


def told(folder: Path) -> set[str]:
    """Texts of facts that stand in what was written; words of ordinary prose are none."""
    text = " ".join(path.read_text() for path in folder.iterdir() if path.suffix != ".png")
    return {word for word in (*ITEMS, *CITIES, "The capital of country", "a town") if word in text}


def test_withheld_texts_are_nowhere(tmp_path, blank):
    found = replace(
        report(), diagnostics={"membership": {"nearest": ["Paris is the capital"], ITEMS[0]: 0.4, "auc": 0.6}}
    )
    write(found, tmp_path / "shown")
    write(found, tmp_path / "hidden", hide_items=True)
    assert told(tmp_path / "hidden") == set() and len(told(tmp_path / "shown")) > 40
    back = Report.load(tmp_path / "hidden")
    assert back.findings["edited"][0].items == tuple(digest(item) for item in ITEMS)
    assert (
        back.diagnostics["membership"]["auc"] == 0.6
        and back.findings["edited"][2].accuracy == found.findings["edited"][2].accuracy
    )
    assert "12 facts came back" in page(back) and page(found, hide_items=True) == page(redacted(found))
    assert markdown(found, hide_items=True) == markdown(redacted(found)) != markdown(found)


def test_texts_that_stay_are_caught(tmp_path, monkeypatch, blank):
    monkeypatch.setattr("repedit.report.pages.redacted", lambda found: replace(found, examples=()))
    write(report(), tmp_path, hide_items=True)
    assert told(tmp_path)


def test_withholding_twice_is_withholding_once():
    once = redacted(report())
    assert redacted(once).to_json() == once.to_json() != report().to_json()


def test_a_report_with_its_texts_is_not_overwritten_by_one_without(tmp_path, blank):
    write(report(), tmp_path)
    with pytest.raises(TargetExists, match="holds the texts of its facts, which would be lost; give another directory"):
        write(report(), tmp_path, hide_items=True)
    assert Report.load(tmp_path).examples


def test_everything_is_written(tmp_path):
    paths = write(report(), tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["audit.json", "audit.md", "audit.html", "recovery.png"]
    assert paths[1].read_text() == markdown(report()) and paths[2].read_text() == standard_page()
    assert paths[3].read_bytes().startswith(b"\x89PNG") and Report.load(paths[0]).to_json() == report().to_json()


# Several audits.


def test_audits_of_the_same_facts_stand_side_by_side(tmp_path):
    comparison = compare_reports({"first": report(), "second": clean()})
    rows = {row[0]: row[1:] for row in comparison.recoveries.rows}
    assert rows["rtt"] == ["0.82 [0.73, 0.91]", "0.01 [-0.07, 0.10]"] and rows["int3"][1] == "not run"
    assert [row[:2] for row in comparison.summary.rows[:3]] == [["rtt", "first"], ["rtt", "second"], ["probe", "first"]]
    text = Elements(comparison.page()).text
    assert "first: HIDDEN" in text and "second: NO RECOVERY FOUND" in text
    assert [path.name for path in comparison.write(tmp_path)] == ["audits.md", "audits.html", "recovery.png"]


REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "other facts": (lambda: compare_reports({"a": report(), "b": other_items(report())}), "asked 40 facts and 'b' 40, 0 of them the same; only audits over the same facts"),
    "one": (lambda: compare_reports({"a": report()}), "given 1 report; give at least two"),
    "other thresholds": (lambda: compare_reports({"a": report(), "b": replace(report(), context={"material": 0.2, "clear": 0.3})}), r"thresholds \(0.1, 0.2\) and 'b' \(0.2, 0.3\); audit both"),
    "no steps": (lambda: plot.relearning(BARE), "settings of at least two steps, such as 'lr=5e-05 step=40'; audit with an attack that fine-tunes"),
    "no layers": (lambda: plot.lenses(BARE), "settings such as 'resid.post 3'; audit with logit_lens or probe"),
    "no attack": (lambda: plot.recovery(replace(BARE, recoveries=())), "holds no attack to draw; was the audit finished"),
    "no report": (lambda: plot.audits({}), "given no report to draw; pass"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_what_was_found_and_what_to_do(case):
    call, message = REFUSALS[case]
    with pytest.raises(ArgumentError, match=message):
        call()


def test_other_retain_facts_are_no_other_facts():
    rows = {
        role: tuple(replace(f, items=tuple(f"x{i}" for i in f.items)) if f.attack == "retain" else f for f in held)
        for role, held in report().findings.items()
    }
    assert compare_reports({"a": report(), "b": replace(report(), findings=rows)}).reports


# Figures.

FIGURES: dict[str, Callable[[], Figure]] = {
    "recovery": lambda: plot.recovery(report()),
    "audits": lambda: plot.audits(
        {"gradient difference": report(), "retrained": clean(), "projected, rank 16": clean()}
    ),
    "relearning": lambda: plot.relearning(report()),
    "lenses": lambda: plot.lenses(report()),
    "recovery on a phone": lambda: recovery_forest(report(), width=pages.PHONE_WIDTH),
    "audits on a phone": lambda: audits_forest({"gradient difference": report(), "projected, rank 16": clean()}, width=pages.PHONE_WIDTH),
    "curves": lambda: curves(layer_curves(report())[0], "layer"),
}  # fmt: skip


@cache
def drawn(name: str) -> Figure:
    return laid_out(FIGURES[name]())


@pytest.mark.parametrize("name", FIGURES)
def test_every_text_of_a_figure_is_whole_and_alone(name):
    assert not outside(drawn(name)) and not overlapping(drawn(name), slanted=False)


def test_a_figure_shows_the_recoveries_in_order():
    left, right = drawn("recovery").axes
    found = [
        float(item.get_xdata()[0]) for item in left.lines if len(item.get_xdata()) == 1 and item.get_marker() != "|"
    ]
    wanted = [line.recovery.value for line in forest_rows(report()) if line.recovery.status != "skipped"]
    assert_allclose(found, np.clip(wanted, -0.3, 1.3))
    assert [t.get_text() for t in left.get_yticklabels()] == [line.name for line in forest_rows(report())]
    assert left.get_ylim()[0] > left.get_ylim()[1] and "0.82 [0.73, 0.91]" in [t.get_text() for t in right.texts]


def test_a_figure_of_several_has_a_heading_an_attack():
    names = [t.get_text() for t in drawn("audits").axes[0].get_yticklabels()]
    assert names[:5] == ["rtt", "gradient difference", "retrained", "projected, rank 16", "probe"]
    # Evidence in none of them: only the table has it.
    assert "translate" not in names and "int3" not in names


def test_edited_layers_are_marked():
    spans = [patch.get_x() for patch in drawn("lenses").axes[0].patches]
    assert spans == [1.5, 2.5]


# The command line.


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, words)])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.stdout


def test_an_audit_is_shown_again_without_a_model(tmp_path, blank):
    report().save(tmp_path / "one")
    text = run(tmp_path / "one")
    assert text.startswith(f"HIDDEN: {report().verdict.sentence[:40]}")
    assert "0.82 [0.73, 0.91]" in text and "no budget tries it" in text and "audit.html" in text
    assert (tmp_path / "one" / "audit.html").read_text() == page(Report.load(tmp_path / "one"))
    assert json.loads(run(tmp_path / "one" / "audit.json", "--json")) == json.loads(report().to_json())


def test_several_audits_share_a_table(tmp_path, blank):
    report().save(tmp_path / "a" / "out")
    clean().save(tmp_path / "b" / "out")
    text = run(tmp_path / "a" / "out", tmp_path / "b" / "out", "--out", tmp_path / "both")
    assert "a/out" in text and "b/out" in text and (tmp_path / "both" / "audits.html").exists()
    assert set(json.loads(run(tmp_path / "a" / "out", tmp_path / "b" / "out", "--json"))) == {"a/out", "b/out"}
    assert "audits.html" not in run(tmp_path / "a" / "out", tmp_path / "b" / "out")


def test_items_are_hidden_on_request(tmp_path, blank):
    report().save(tmp_path / "one")
    run(tmp_path / "one", "--hide-items", "--out", tmp_path / "public")
    assert told(tmp_path / "public") == set()
    assert not told_in(run(tmp_path / "one", "--hide-items", "--json", "--out", tmp_path / "again"))


def test_a_figure_that_cannot_be_drawn_leaves_the_data_and_the_pages(tmp_path, monkeypatch):
    monkeypatch.setattr("repedit.plot.recovery", lambda _: (_ for _ in ()).throw(ValueError("no such glyph")))
    with pytest.raises(
        ReportError,
        match=r"lacks 1 of 3 files \(recovery\.png: ValueError: no such glyph\); audit\.md, audit\.html and audit\.json, which holds all of it, are written",
    ):
        write(report(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"audit.json", "audit.md", "audit.html"}
    text = run(tmp_path)
    assert "HIDDEN" in text


@pytest.mark.parametrize("part", ["markdown", "page"])
def test_a_page_that_fails_leaves_the_rest(part, tmp_path, monkeypatch, blank):
    monkeypatch.setattr(f"repedit.report.pages.{part}", lambda _: (_ for _ in ()).throw(KeyError("kind")))
    with pytest.raises(ReportError, match="KeyError"):
        write(report(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3 and Report.load(tmp_path)


def test_a_report_that_is_interrupted_is_the_old_one_or_the_new_one(tmp_path, monkeypatch, blank):
    write(report(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("repedit.io.files.os.fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write(replace(report(), heuristics={}), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_findings_of_an_earlier_audit_are_not_published_with_pages_without_texts(tmp_path):
    (tmp_path / "findings").mkdir()
    with pytest.raises(TargetExists, match="findings names the facts of an earlier audit; give another directory"):
        write(report(), tmp_path, hide_items=True)


def told_in(text: str) -> set[str]:
    return {word for word in (*ITEMS, *CITIES) if word in text}


@pytest.mark.parametrize("bad", ["nothing", "not json", "no text"])
def test_what_is_no_audit_is_refused(tmp_path, bad):
    if bad != "nothing":
        (tmp_path / "audit.json").write_bytes(b"[1]" if bad == "not json" else b"\xff\xfe\x00")
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(result.exception, CheckpointError) and re.search(
        "cannot be read|not the JSON of an audit", str(result.exception)
    )


# A browser.

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
MEASURE = """<script>addEventListener('load', () => {
  const seen = [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 0);
  const boxes = seen.map(s => [...s.querySelectorAll('text')].map(t => [t.getBoundingClientRect(), t.textContent]));
  const hit = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
  const pairs = boxes.flatMap(g => g.flatMap((a, i) => g.slice(i + 1).filter(b => hit(a[0], b[0])).map(b => a[1] + ' x ' + b[1])));
  const size = Math.min(...seen.flatMap(s => [...s.querySelectorAll('text')].map(t => parseFloat(getComputedStyle(t).fontSize) * s.getBoundingClientRect().width / s.viewBox.baseVal.width)));
  const out = boxes.flat().filter(b => b[0].left < 0 || b[0].right > innerWidth + 1).map(b => b[1]);
  document.title = JSON.stringify({width: innerWidth, scroll: document.documentElement.scrollWidth, pairs, out, size,
    paper: getComputedStyle(document.body).backgroundColor, wide: getComputedStyle(document.querySelector('.wide')).display});
})</script>"""


def measured(text: str, folder: Path, width: int, *flags: str) -> dict[str, Any]:
    """How a browser lays a page out."""
    (folder / "page.html").write_text(text.replace("</body>", MEASURE + "</body>"))
    command = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        *flags,
    ]
    done = subprocess.run(
        [*command, f"--window-size={width},900", "--dump-dom", (folder / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return json.loads(Elements(re.search(r"<title>.*?</title>", done.stdout, re.S)[0]).text)  # type: ignore[index]


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on the PATH")
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (500, True)])
def test_a_browser_lays_the_page_out(tmp_path, width, dark):
    flags = (
        ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]
        if dark
        else ["--blink-settings=preferredColorScheme=1"]
    )
    found = measured(standard_page(), tmp_path, width, *flags)
    assert found["pairs"] == [] and found["out"] == [] and found["scroll"] <= found["width"]
    assert found["size"] >= 10 and found["wide"] == ("none" if width < 700 else "block")
    assert found["paper"] == ("rgb(22, 24, 27)" if dark else "rgb(255, 255, 255)")


def test_a_finding_whose_items_are_not_texts_is_refused():
    content = json.loads(report().to_json())
    content["findings"]["edited"][0]["items"][0] = None
    with pytest.raises(CheckpointError, match="an item or a setting of a finding is not a text"):
        Report.from_json(json.dumps(content))


def changed_values(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a JSON value; of a list the first entry only."""
    yield path
    inner = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, child in inner:
        yield from changed_values(child, (*path, key))


def with_value(content: Any, path: tuple[Any, ...], new: object) -> Any:
    content = copy.deepcopy(content)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = new
    return content


def check_read_or_refused(content: Any, new: object) -> None:
    """An audit.json with another value somewhere is refused, or has pages."""
    for path in changed_values(content):
        if not path or path[0] == "diagnostics":
            continue
        try:
            report = Report.from_json(json.dumps(with_value(content, path, new)))
        except CheckpointError:
            continue
        assert markdown(report) and compare_reports({"a": report, "b": report}).markdown(), path


@pytest.mark.parametrize("new", [None, 5, "x", [], {}, True, [None], [[]]], ids=repr)
def test_a_report_with_another_value_is_refused_or_has_pages(new):
    check_read_or_refused(json.loads(report().to_json()), new)


def test_a_report_whose_types_are_not_looked_at_has_no_pages(monkeypatch):
    monkeypatch.setattr(auditing_report, "_check_types", lambda content: None)
    with pytest.raises((TypeError, AttributeError, ValueError)):
        check_read_or_refused(json.loads(report().to_json()), 5)
