"""An audit as one HTML page and as Markdown: the verdict first, then what it rests on, then what was not tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from repedit.auditing.report import Report
from repedit.escaping import for_markdown
from repedit.plot.reports import Curves, curves, forest_rows, layer_curves, recovery_forest, relearning_curves
from repedit.report import tables
from repedit.report.redaction import redacted
from repedit.report.rendering import PAGE_WIDTH, PHONE_WIDTH, render, svg
from repedit.report.tables import Table, format_value, table_of


@dataclass(frozen=True)
class AuditFigures:
    """An audit with its figures as SVG, as the templates take it."""

    report: Report
    forest: tuple[Markup, ...]
    """The forest plot for pages and for phones; empty if no attack is drawn."""
    relearning: list[tuple[str, Markup]]
    """(attack, curves)."""
    layers: list[tuple[str, Markup]]
    """(attack and stream, curves)."""

    @classmethod
    def of(cls, report: Report) -> AuditFigures:
        """Draw the figures of a report."""
        widths = (PAGE_WIDTH, PHONE_WIDTH) if forest_rows(report) and not report.gaps else ()
        x = "epoch" if report.gaps else "training step"
        return cls(
            report,
            tuple(svg(recovery_forest(report, width=width)) for width in widths),
            [(chart.name, svg(curves(chart, x))) for chart in relearning_curves(report)],
            [(chart.name, svg(curves(chart, "layer"))) for chart in layer_curves(report)],
        )


def page(report: Report, *, hide_items: bool = False) -> str:
    """The text of audit.html.

    Args:
        hide_items: leave out the texts of facts, see `redacted`.
    """
    report = redacted(report) if hide_items else report
    elsewhere = ("notes", "command", "withheld")
    origin = {key: value for key, value in report.context.items() if key not in elsewhere}
    return render("audit", title=f"{report.title}: audit", audit=AuditFigures.of(report), origin=origin)


def markdown(report: Report, *, hide_items: bool = False) -> str:
    """The text of audit.md: the tables of the page, and its curves as tables.

    Args:
        hide_items: leave out the texts of facts, see `redacted`.
    """
    report = redacted(report) if hide_items else report
    verdict = report.verdict
    parts = [f"# {for_markdown(report.title)}", for_markdown(verdict.sentence), f"Rule: {for_markdown(verdict.rule)}"]
    parts += [f"What would settle it: {for_markdown(verdict.settle)}"] if verdict.settle else []
    parts.append("\n".join(f"- {for_markdown(fact)}" for fact in tables.headline(report)))
    for title, texts in (_gap_sections(report) if report.gaps else _recovery_sections(report)).items():
        if any(texts):
            parts += [f"## {title}", *filter(None, texts)]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table in Markdown with its note; only the note if there are no rows."""
    head, *lines = [f"| {' | '.join(map(for_markdown, cells))} |" for cells in (table.columns, *table.rows)]
    text = "\n".join([head, f"| {' | '.join(['---'] * len(table.columns))} |", *lines]) if lines else ""
    return "\n\n".join(filter(None, (text, for_markdown(table.note))))


def _recovery_sections(report: Report) -> dict[str, list[str]]:
    contents = {
        "What each attack brings back": [tables.summary(report), tables.recoveries(report)],
        "What was not tried, or counts for nothing": [tables.not_run(report)],
        "What should have been kept": [tables.retain_check(report)],
        "Relearning: highest accuracy over learning rates at each step": list(map(_curves_table, relearning_curves(report))),
        "Layer by layer": list(map(_curves_table, layer_curves(report))),
        "Facts that came back": [tables.examples(report)],
        "Settings": [tables.chosen_settings(report), tables.attack_settings(report)],
        "Guesses that need no knowledge": [tables.heuristics(report)],
    }  # fmt: skip
    sections = {title: list(map(markdown_table, content)) for title, content in contents.items()}
    return {**sections, "Diagnostics, which decide nothing": [_markdown_list(report.diagnostics)], **_origin(report)}


def _gap_sections(report: Report) -> dict[str, list[str]]:
    contents = {
        "Gap to the retrained model": [tables.gaps(report)],
        "Membership": [tables.memberships(report)],
        "What was not tried, or counts for nothing": [tables.not_run(report)],
        "Settings": [tables.attack_settings(report)],
        "Relearning": list(map(_curves_table, relearning_curves(report))),
    }
    return {title: list(map(markdown_table, content)) for title, content in contents.items()} | _origin(report)


def _origin(report: Report) -> dict[str, list[str]]:
    context = {key: value for key, value in report.context.items() if value or key != "command"}
    return {"How this was made": [_markdown_list(context)]}


def _curves_table(chart: Curves) -> Table:
    steps = sorted({x for points in chart.series.values() for x, _ in points})
    rows = []
    for role, points in chart.series.items():
        accuracies = dict(points)
        rows.append([role, *(f"{accuracies[x]:.2f}" if x in accuracies else "" for x in steps)])
    return Table([chart.name, *map(str, steps)], rows)


def _markdown_list(values: Mapping[str, object]) -> str:
    """A list of values; a nested mapping is a list inside it."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines.append(f"- {for_markdown(key)}:")
            lines += [f"  - {for_markdown(' '.join(filter(None, row)))}" for row in table_of(value).rows]
        else:
            lines.append(f"- {for_markdown(key)}: {for_markdown(format_value(value))}")
    return "\n".join(lines)
