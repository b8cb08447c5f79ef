"""One HTML page that holds everything: no network, no scripts, light and dark, and made to be printed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from repedit.attacks.judging.evidence import HIDDEN, INCONCLUSIVE, NOT_FORGOTTEN, PASS, Report, Verdict
from repedit.plot.summaries import LEVELS, layer_charts, lines, relearning_charts, thresholds
from repedit.report import tables
from repedit.report.classifiers import sections
from repedit.report.curves import curves
from repedit.report.forest import forest
from repedit.report.sections import element, listed, note, section, table, values
from repedit.report.withholding import withheld

TONES: Mapping[str, str] = {PASS: "good", HIDDEN: "bad", NOT_FORGOTTEN: "bad", INCONCLUSIVE: "open"}
ASIDE = ("notes", "command", "withheld")
"""What of the context has a place of its own."""


def page(report: Report, *, hide_items: bool = False) -> str:
    """The text of audit.html: the verdict first, then what it rests on, then what was not tried.

    Args:
        hide_items: leave out the texts of facts, see `withheld`.
    """
    shown = withheld(report) if hide_items else report
    body = sections(shown) if shown.gaps else [*told(shown), *_details(shown)]
    return document(f"{shown.verdict.word}: audit", [opening(shown), *body, _origin(shown.context)])


def told(shown: Report, level: str = "h2") -> list[str]:
    """What an audit found: sections under headings of this level, the figure first."""
    levels = {r.level for r in shown.recoveries}
    legend = {tone: words for held, (tone, words) in LEVELS.items() if held in levels}
    plotted = forest(lines(shown), thresholds(shown), legend) if lines(shown) else ""
    examples = tables.examples(shown)
    parts = [
        ("What each attack brings back", plotted, note(tables.INTERVALS), table(tables.attacks(shown))),
        ("What was not tried, or counts for nothing", table(tables.untried(shown))),
        ("What should have been kept", table(tables.kept(shown))),
        _charts("Relearning", "training step", relearning_charts(shown), "Accuracy on facts that were never trained on; at every step the highest over learning rates."),
        _charts("Layer by layer", "layer", layer_charts(shown), "What can be read from each layer; grey bands are edited layers, where they are known."),
        ("Facts that came back", table(examples) if examples.rows or examples.note else ""),
    ]  # fmt: skip
    return [section(title, *inside, level=level) for title, *inside in parts]


def _details(shown: Report) -> list[str]:
    """How it was found."""
    return [
        section("Settings", table(tables.chosen(shown)), table(tables.settings(shown))),
        section("Guesses that need no knowledge", table(tables.guesses(shown))),
        section("Diagnostics, which decide nothing", values(shown.diagnostics) if shown.diagnostics else ""),
    ]


def document(title: str, body: list[str]) -> str:
    """A whole page with its style."""
    style = files("repedit.report").joinpath("page.css").read_text(encoding="utf-8")
    head = [
        '<meta charset="utf-8">', '<meta name="viewport" content="width=device-width, initial-scale=1">',
        element("title", text=title), f"<style>\n{style}</style>",
    ]  # fmt: skip
    inside = element("head", *head) + element("body", element("main", *body))
    return "<!DOCTYPE html>\n" + element("html", inside, lang="en") + "\n"


def heading(verdict: Verdict, level: str = "h1", before: str = "") -> str:
    """The word of a verdict, in the colour of good, bad or open."""
    return element(level, text=before + verdict.word, class_=TONES.get(verdict.word, "bad"))


def opening(report: Report, level: str = "h1", before: str = "") -> str:
    """The verdict with its sentence and rule, and what a reader must know beside it."""
    found = report.verdict
    parts = [
        heading(found, level, before),
        element("p", text=found.sentence, class_="lead"),
        element("p", text=f"Rule: {found.rule}.".replace("..", ".")),
    ]
    if found.settle:
        parts.append(element("p", text=f"What would settle it: {found.settle}"))
    return element("header", *parts, listed(tables.headline(report), "facts"))


def _charts(title: str, x: str, charts: list[Any], words: str) -> tuple[str, ...]:
    return (title, curves(charts, x), note(words)) if charts else (title,)


def _origin(context: Mapping[str, Any]) -> str:
    """The command that makes it again, and everything else that is known."""
    command = element("pre", text=str(context["command"])) if context.get("command") else ""
    rest = {key: value for key, value in context.items() if key not in ASIDE}
    return section("How this was made", command, values(rest) if rest else "")
