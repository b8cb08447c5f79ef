"""The verb that shows audits: from their audit.json alone, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from repedit.cli.options import Json


def report(
    audits: Annotated[list[Path], typer.Argument(help="The --out of an audit; several are shown side by side.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write the pages; for one audit, its own directory by default.")
    ] = None,
    hide_items: Annotated[bool, typer.Option("--hide-items", help="Leave out the texts of the facts.")] = False,
    json: Json = False,
) -> None:
    """Show an audit again and write its pages; several over the same facts in one table and one plot."""
    from repedit import console
    from repedit.attacks.judging.evidence import Report
    from repedit.report import together, withheld, write

    reports = {name: Report.load(path) for name, path in zip(_names(audits), audits, strict=True)}
    if hide_items:
        reports = {name: withheld(found) for name, found in reports.items()}
    if len(reports) > 1:
        joint = together(reports)
        written = [] if out is None else joint.write(out)
    else:
        home = audits[0] if audits[0].is_dir() else audits[0].parent
        written = write(next(iter(reports.values())), home if out is None else out, hide_items=hide_items)
    if json:
        console.show_json(_plain(reports))
        return
    if len(reports) > 1:
        console.table("Verdicts", joint.verdicts.columns, joint.verdicts.rows)
        console.table("What each attack brings back", joint.short.columns, joint.short.rows)
    else:
        show(next(iter(reports.values())))
    for path in written:
        console.out.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


def show(found: Any) -> None:
    """Verdict, recoveries, and what was not run."""
    from repedit import console
    from repedit.report import tables

    for line in (
        f"{found.verdict.word}: {found.verdict.sentence}",
        f"Rule: {found.verdict.rule}",
        found.verdict.settle,
    ):
        if line:
            console.out.print(line, highlight=False, markup=False)
    console.out.print("; ".join(tables.headline(found)), highlight=False, markup=False)
    for title, shown in (
        ("What each attack brings back", tables.short(found)),
        ("Not run, or not counted", tables.untried(found)),
    ):
        if shown.rows:
            console.table(title, shown.columns, shown.rows)


def _names(paths: list[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    whole = [path.absolute() if path.is_dir() else path.absolute().parent for path in paths]
    for count in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-count:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {path}" for number, path in enumerate(whole, 1)]


def _plain(reports: dict[str, Any]) -> Any:
    """One audit as its own JSON, several by name."""
    import json

    found = {name: json.loads(report.to_json()) for name, report in reports.items()}
    return found if len(found) > 1 else next(iter(found.values()))
