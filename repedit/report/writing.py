"""Write a report into a directory, and the schema of its JSON."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path

from matplotlib.figure import Figure

from repedit.auditing.report import Report
from repedit.errors import ReportError, TargetExists
from repedit.escaping import shortened
from repedit.io.files import atomic_write, user_path
from repedit.io.text import parse_json
from repedit.report.audit_pages import markdown, page
from repedit.report.redaction import redacted


def write(report: Report, folder: str | Path, hide_items: bool = False) -> list[Path]:
    """Write audit.json, audit.md, audit.html and recovery.png; the folder is made if it is absent.

    For a classifier, gap.png and membership.png take the place of recovery.png. The data are written first, and each
    file by one rename; a page or a figure that fails leaves the others.

    Args:
        hide_items: redact every text of an item in all of them, see `redacted`.
    Raises:
        TargetExists: if texts are to be redacted and the folder holds an audit, or findings of one, that has them: it
            would be lost, or lie beside the pages.
        CheckpointError: if the folder or audit.json cannot be written.
        ReportError: if a page or a figure cannot be made or written, once everything else is.
    """
    from repedit.plot import gap, membership, recovery

    target = user_path(folder)
    if hide_items:
        _check_holds_no_texts(target)
        report = redacted(report)
    makers: dict[str, Callable[[], bytes]] = {
        "audit.md": lambda: markdown(report).encode(),
        "audit.html": lambda: page(report).encode(),
    }
    if report.gaps:
        makers["gap.png"] = lambda: png(gap({"edited": report}))
        makers["membership.png"] = lambda: png(membership(report))
    else:
        makers["recovery.png"] = lambda: png(recovery(report))
    return [report.save(target), *write_parts(target, makers, "audit.json")]


def write_parts(target: Path, makers: Mapping[str, Callable[[], bytes]], data_file: str = "") -> list[Path]:
    """Make each file and write it by one rename; one that fails leaves the others.

    Args:
        makers: what makes the content of each file, by its name in the folder.
        data_file: the file that holds all the data of the others, for the message.
    Raises:
        ReportError: naming each file that could not be made or written, once all others are.
    """
    written, failures = [], []
    for name, make in makers.items():
        try:
            content = make()
            with atomic_write(target / name) as file:
                file.write(content)
            written.append(target / name)
        except Exception as error:  # no failure of one page may cost the others
            failures.append((name, error))
    if failures:
        reasons = "; ".join(f"{name}: {type(error).__name__}: {shortened(error, 300)}" for name, error in failures)
        names = ", ".join(path.name for path in written) or "nothing else"
        rest = f"{names} and {data_file}, which holds all of it, are" if data_file else f"{names} is"
        raise ReportError(
            f"{target} lacks {len(failures)} of {len(makers)} files ({reasons}); {rest} written"
        ) from failures[0][1]
    return written


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def schema() -> dict[str, object]:
    """The JSON schema (draft 2020-12) of audit.json."""
    text = files("repedit.report").joinpath("schema.json").read_text(encoding="utf-8")
    return dict(parse_json(text, "schema.json"))


def _check_holds_no_texts(target: Path) -> None:
    audit = target / "audit.json"
    if audit.exists() and "withheld" not in Report.load(audit).context:
        raise TargetExists(
            f"{audit.absolute()} holds the texts of its facts, which would be lost; give another directory to write to"
        )
    findings = target / "findings"
    if findings.exists():
        raise TargetExists(
            f"{findings.absolute()} names the facts of an earlier audit; give another directory to write to"
        )
