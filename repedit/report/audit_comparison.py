"""Several audits of the same facts side by side: one table, one plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from repedit.auditing.report import RETAIN_CHECK, Report
from repedit.errors import ArgumentError
from repedit.io.files import make_folder, user_path
from repedit.plot.reports import (
    audits_forest,
    grouped_forest_rows,
    recoveries_by_strength,
    thresholds,
)
from repedit.report.audit_pages import markdown_table
from repedit.report.rendering import PAGE_WIDTH, PHONE_WIDTH, render, svg
from repedit.report.tables import COLUMNS, INTERVALS, Table, format_recovery, recovery_row, retain_check
from repedit.report.writing import png, write_parts


@dataclass(frozen=True, eq=False)
class ReportComparison:
    """Reports over the same facts, by name."""

    reports: Mapping[str, Report]

    @property
    def verdicts(self) -> Table:
        """One row per report: its verdict, and its retain check."""
        rows = []
        for name, report in self.reports.items():
            retain = "; ".join(f"{r[0]} {r[2]} to {r[3]}" for r in retain_check(report).rows)
            rows.append([name, report.title, report.verdict.sentence, retain])
        return Table(("model", "verdict", "what has been shown", "kept, original to edited"), rows)

    @property
    def recoveries(self) -> Table:
        """One row per attack, one column per report: R with its interval."""
        by_report = {
            name: {r.attack: r for r in recoveries_by_strength(report)} for name, report in self.reports.items()
        }
        ordered = dict.fromkeys(row.group for row in grouped_forest_rows(self.reports))
        attacks = dict.fromkeys([*ordered, *(attack for recoveries in by_report.values() for attack in recoveries)])
        rows = [
            [attack, *(format_recovery(of[attack]) if attack in of else "not run" for of in by_report.values())]
            for attack in attacks
        ]
        return Table(("attack", *self.reports), rows, INTERVALS)

    @property
    def summary(self) -> Table:
        """One row per attack and report, as on the console."""
        order = [row[0] for row in self.recoveries.rows]
        pairs = [(name, r) for name, report in self.reports.items() for r in recoveries_by_strength(report)]
        pairs.sort(key=lambda pair: order.index(pair[1].attack))
        rows = [[r.attack, name, *recovery_row(r)[1:]] for name, r in pairs]
        return Table((COLUMNS[0], "model", *COLUMNS[1:]), rows, INTERVALS)

    def markdown(self) -> str:
        """Both tables."""
        parts = [
            f"# Audits of {len(self.reports)} models over the same facts", markdown_table(self.verdicts),
            "## What each attack brings back", markdown_table(self.recoveries),
        ]  # fmt: skip
        return "\n\n".join(parts) + "\n"

    def page(self) -> str:
        """Verdicts, one forest plot, one table, as one HTML page."""
        widths = (PAGE_WIDTH, PHONE_WIDTH) if grouped_forest_rows(self.reports) else ()
        forest = [svg(audits_forest(self.reports, width=width)) for width in widths]
        return render("comparison", title="Audits side by side", comparison=self, forest=forest)

    def write(self, folder: str | Path) -> list[Path]:
        """Write audits.md, audits.html and recovery.png, each by one rename; they hold no text of a fact.

        Raises:
            CheckpointError: if the folder cannot be made.
            ReportError: if a file cannot be made or written, once the others are.
        """
        from repedit.plot import audits

        makers = {
            "audits.md": lambda: self.markdown().encode(), "audits.html": lambda: self.page().encode(),
            "recovery.png": lambda: png(audits(self.reports)),
        }  # fmt: skip
        return write_parts(make_folder(user_path(folder)), makers)


def compare_reports(reports: Mapping[str, Report]) -> ReportComparison:
    """Several reports side by side, by name.

    Raises:
        ArgumentError: if there are fewer than two, if their facts or thresholds differ, or if one is of a classifier.
    """
    if len(reports) < 2:
        raise ArgumentError(f"compare_reports() was given {len(reports)} report; give at least two, or use page()")
    classifiers = [name for name, report in reports.items() if report.gaps]
    if classifiers:
        raise ArgumentError(
            f"{', '.join(map(repr, classifiers))}: audits of classifiers are compared by rp.plot.gap(reports), not here"
        )
    (name, first), *others = reports.items()
    for other, report in others:
        ids, other_ids = _fact_ids(first), _fact_ids(report)
        if ids != other_ids:
            raise ArgumentError(
                f"{name!r} was asked {len(ids)} facts and {other!r} {len(other_ids)}, {len(ids & other_ids)} of them the same; "
                "only audits over the same facts can be compared"
            )
        if thresholds(first) != thresholds(report):
            raise ArgumentError(
                f"{name!r} has thresholds {thresholds(first)} and {other!r} {thresholds(report)}; audit both with the same "
                "recovery_threshold and pass_threshold"
            )
    return ReportComparison(dict(reports))


def _fact_ids(report: Report) -> set[str]:
    """Ids of the facts that the edited model was asked in any attack; fresh facts have another role."""
    return {item for f in report.findings.get("edited", ()) if f.attack != RETAIN_CHECK for item in f.items}
