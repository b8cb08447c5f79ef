"""What a page and a Markdown text show of a classifier's audit: gaps to the retrained model in place of recoveries."""

from __future__ import annotations

from repedit.attacks.judging.evidence import Report
from repedit.plot.summaries import relearning_charts
from repedit.report import tables
from repedit.report.curves import curves
from repedit.report.sections import note, section, table
from repedit.report.tables import Table

RELEARNED = "Accuracy on forget images that were never trained on, while the other half of them is."
GAPS, TOLD, UNTRIED, SETTINGS = (
    "Gap to the retrained model", "Membership", "What was not tried, or counts for nothing", "Settings",
)  # fmt: skip


def tabled(report: Report) -> dict[str, Table]:
    """The tables of an audit of a classifier, by title."""
    return {
        GAPS: tables.gaps(report), TOLD: tables.memberships(report), UNTRIED: tables.untried(report),
        SETTINGS: tables.settings(report),
    }  # fmt: skip


def sections(report: Report) -> list[str]:
    """The same as HTML, with the curves of relearning."""
    drawn = {title: section(title, table(found)) for title, found in tabled(report).items()}
    charts = relearning_charts(report)
    curve = section("Relearning", curves(charts, "epoch"), note(RELEARNED)) if charts else ""
    return [drawn[GAPS], drawn[TOLD], curve, drawn[UNTRIED], drawn[SETTINGS]]
