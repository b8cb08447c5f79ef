"""Several audits of the same facts side by side: one table, one plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from repedit.auditing.report import Report
from repedit.errors import ArgumentError
from repedit.io.files import make_folder
from repedit.plot.reports import KEPT, lines_of_several, ordered, thresholds
from repedit.report.html import document, element, forest, heading, note, section, table
from repedit.report.markdown import grid
from repedit.report.tables import COLUMNS, INTERVALS, Table, kept, recovered, row
from repedit.report.writing import picture, write_parts


@dataclass(frozen=True, eq=False)
class ReportComparison:
    """Reports over the same facts, by name."""

    reports: Mapping[str, Report]

    @property
    def verdicts(self) -> Table:
        """One row a report: its verdict, and its retain check."""
        rows = []
        for name, report in self.reports.items():
            retain = "; ".join(f"{r[0]} {r[2]} to {r[3]}" for r in kept(report).rows)
            rows.append([name, report.verdict.word, report.verdict.sentence, retain])
        return Table(("model", "verdict", "what has been shown", "kept, original to edited"), rows)

    @property
    def recovered(self) -> Table:
        """One row an attack, one column a report: R with its interval."""
        found = {name: {r.attack: r for r in ordered(report)} for name, report in self.reports.items()}
        drawn = dict.fromkeys(line.group for line in lines_of_several(self.reports))
        attacks = dict.fromkeys([*drawn, *(attack for rows in found.values() for attack in rows)])
        rows = [
            [attack, *(recovered(held[attack]) if attack in held else "not run" for held in found.values())]
            for attack in attacks
        ]
        return Table(("attack", *self.reports), rows, INTERVALS)

    @property
    def short(self) -> Table:
        """What the console shows: the rows of every report under one another, attack by attack."""
        held = [(name, r) for name, report in self.reports.items() for r in ordered(report)]
        order = [line[0] for line in self.recovered.rows]
        rows = [[r.attack, name, *row(r)[1:]] for name, r in sorted(held, key=lambda pair: order.index(pair[1].attack))]
        return Table((COLUMNS[0], "model", *COLUMNS[1:]), rows, INTERVALS)

    def markdown(self) -> str:
        """Both tables."""
        parts = [
            f"# Audits of {len(self.reports)} models over the same facts",
            grid(self.verdicts),
            "## What each attack brings back",
        ]
        return "\n\n".join([*parts, grid(self.recovered)]) + "\n"

    def page(self) -> str:
        """Verdicts, one forest plot, one table, as one HTML page."""
        words = {tone: f"{name}: {report.verdict.word}" for tone, (name, report) in enumerate(self.reports.items())}
        bands = thresholds(next(iter(self.reports.values())))
        heads = [
            element(
                "div",
                heading(report.verdict, "h3", f"{name}: "),
                element("p", text=shown),
                note(f"Kept: {retain}" if retain else ""),
            )
            for report, (name, _, shown, retain) in zip(self.reports.values(), self.verdicts.rows, strict=True)
        ]
        plotted = forest(lines_of_several(self.reports), bands, words)
        body = [
            element("h1", text=f"Audits of {len(self.reports)} models over the same facts"), *heads,
            section("What each attack brings back", plotted, note("An attack that is evidence for no model is in the table only."), table(self.recovered)),
        ]  # fmt: skip
        return document("Audits side by side", body)

    def write(self, folder: str | Path) -> list[Path]:
        """Write audits.md, audits.html and recovery.png, each by one rename; no text of a fact is in them.

        Raises:
            CheckpointError: if the folder cannot be made.
            ReportError: if one of them cannot be made or written, once the others are.
        """
        from repedit.plot import audits

        makers = {
            "audits.md": lambda: self.markdown().encode(), "audits.html": lambda: self.page().encode(),
            "recovery.png": lambda: picture(lambda: audits(self.reports)),
        }  # fmt: skip
        return write_parts(make_folder(folder), makers)


def compare_reports(reports: Mapping[str, Report]) -> ReportComparison:
    """Several reports side by side, by name.

    Raises:
        ArgumentError: if there are fewer than two, or they were asked different facts, or judged by other thresholds.
    """
    if len(reports) < 2:
        raise ArgumentError(f"compare_reports() was given {len(reports)} report; give at least two, or use page()")
    odd = [name for name, report in reports.items() if report.gaps]
    if odd:
        raise ArgumentError(
            f"{', '.join(map(repr, odd))}: audits of classifiers stand side by side in rp.plot.gap(reports), not here"
        )
    first, *others = reports.items()
    for name, report in others:
        mine, theirs = _asked(first[1]), _asked(report)
        if mine != theirs:
            raise ArgumentError(
                f"{first[0]!r} was asked {len(mine)} facts and {name!r} {len(theirs)}, {len(mine & theirs)} of them the same; "
                "only audits over the same facts can be shown side by side"
            )
        if thresholds(first[1]) != thresholds(report):
            raise ArgumentError(
                f"{first[0]!r} has thresholds {thresholds(first[1])} and {name!r} {thresholds(report)}; audit both with the same recovery_threshold and pass_threshold"
            )
    return ReportComparison(dict(reports))


def _asked(report: Report) -> set[str]:
    """Ids of the facts that the edited model was asked in any attack; fresh facts are of another role."""
    return {item for f in report.findings.get("edited", ()) if f.attack != KEPT for item in f.items}
