"""Write a report into a directory, and the schema of its JSON."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from repedit.attacks.judging.evidence import Report
from repedit.errors import TargetExists
from repedit.io.text import parse_json
from repedit.report.pages import page
from repedit.report.prose import markdown
from repedit.report.withholding import withheld


def write(report: Report, folder: str | Path, hide_items: bool = False) -> list[Path]:
    """Write audit.json, audit.md, audit.html and recovery.png; the folder is made where it is absent.

    Of a classifier gap.png and membership.png stand in place of recovery.png.

    Args:
        hide_items: leave out the texts of facts in all of them, see `withheld`.
    Raises:
        TargetExists: if texts are to be left out and the folder holds an audit.json that has them: it would be lost.
    """
    from repedit.plot import gap, membership, recovery

    target = Path(folder)
    shown = withheld(report) if hide_items else report
    old = target / "audit.json"
    if hide_items and old.exists() and "withheld" not in Report.load(old).context:
        raise TargetExists(
            f"{old.absolute()} holds the texts of its facts, which would be lost; give another directory to write to"
        )
    target.mkdir(parents=True, exist_ok=True)
    (target / "audit.md").write_text(markdown(shown), encoding="utf-8")
    (target / "audit.html").write_text(page(shown), encoding="utf-8")
    figures = (
        {"gap": gap({"edited": shown}), "membership": membership(shown)}
        if shown.gaps
        else {"recovery": recovery(shown)}
    )
    for name, figure in figures.items():
        figure.savefig(target / f"{name}.png", dpi=150)
    written = ("audit.md", "audit.html", *(f"{name}.png" for name in figures))
    return [shown.save(target), *(target / name for name in written)]


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of audit.json."""
    found: dict[str, Any] = parse_json(
        files("repedit.report").joinpath("schema.json").read_text(encoding="utf-8"), "schema.json"
    )
    return found
