"""The text of audit.md: what the page says, without plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repedit.auditing.report import Report
from repedit.escaping import for_markdown
from repedit.plot.reports import Chart, layer_charts, relearning_charts
from repedit.report import tables
from repedit.report.html import classifier_tables as tabled_gaps
from repedit.report.html import tabled
from repedit.report.redaction import redacted
from repedit.report.tables import Table, plain


def markdown(report: Report, *, hide_items: bool = False) -> str:
    """The text of audit.md: the verdict first, then the tables of the page.

    Args:
        hide_items: leave out the texts of facts, see `redacted`.
    """
    shown = redacted(report) if hide_items else report
    found = shown.verdict
    parts = [f"# {for_markdown(found.word)}", for_markdown(found.sentence), f"Rule: {for_markdown(found.rule)}"]
    parts += [f"What would settle it: {for_markdown(found.settle)}"] if found.settle else []
    parts.append("\n".join(f"- {for_markdown(fact)}" for fact in tables.headline(shown)))
    sections = {
        "What each attack brings back": [grid(tables.short(shown)), grid(tables.attacks(shown))],
        "What was not tried, or counts for nothing": [grid(tables.untried(shown))],
        "What should have been kept": [grid(tables.kept(shown))],
        "Relearning: highest accuracy over learning rates at each step": [grid(_curve(c)) for c in relearning_charts(shown)],
        "Layer by layer": [grid(_curve(c)) for c in layer_charts(shown)],
        "Facts that came back": [grid(tables.examples(shown))],
        "Settings": [grid(tables.chosen(shown)), grid(tables.settings(shown))],
        "Guesses that need no knowledge": [grid(tables.guesses(shown))],
        "Diagnostics, which decide nothing": [_values(shown.diagnostics)],
        "How this was made": [_values({k: v for k, v in shown.context.items() if v or k != "command"})],
    }  # fmt: skip
    if shown.gaps:
        listed = {title: [grid(found)] for title, found in tabled_gaps(shown).items()}
        names = ("Relearning: highest accuracy over learning rates at each step", "How this was made")
        sections = listed | {name.split(":")[0]: sections[name] for name in names}
    for title, held in sections.items():
        if any(held):
            parts += [f"## {title}", *(text for text in held if text)]
    return "\n\n".join(parts) + "\n"


def grid(found: Table) -> str:
    """A table in Markdown, with its note; only the note where there are no rows."""
    lines = []
    if found.rows:
        rows = [list(map(for_markdown, found.columns)), ["---"] * len(found.columns)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines += [f"| {' | '.join(map(for_markdown, row))} |" for row in found.rows]
    return "\n\n".join(text for text in ("\n".join(lines), for_markdown(found.note)) if text)


def _curve(chart: Chart) -> Table:
    steps = sorted({x for points in chart.series.values() for x, _ in points})
    rows = []
    for role, points in chart.series.items():
        known = dict(points)
        rows.append([role, *(f"{known[x]:.2f}" if x in known else "" for x in steps)])
    return Table([chart.name, *map(str, steps)], rows)


def _values(found: Mapping[str, Any]) -> str:
    lines = []
    for key, value in found.items():
        if isinstance(value, Mapping):
            lines.append(f"- {for_markdown(str(key))}:")
            lines += [f"  - {for_markdown(' '.join(filter(None, row)))}" for row in tabled(value).rows]
        else:
            lines.append(f"- {for_markdown(str(key))}: {for_markdown(plain(value))}")
    return "\n".join(lines)
