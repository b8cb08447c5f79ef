"""Write a report into a directory, and the schema of its JSON."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from repedit.auditing.report import Report
from repedit.errors import ReportError, TargetExists
from repedit.escaping import shortened
from repedit.io.files import replacing
from repedit.io.text import parse_json
from repedit.report.html import page
from repedit.report.markdown import markdown
from repedit.report.redaction import redacted


def write(report: Report, folder: str | Path, hide_items: bool = False) -> list[Path]:
    """Write audit.json, audit.md, audit.html and recovery.png; the folder is made where it is absent.

    Of a classifier gap.png and membership.png stand in place of recovery.png. The data are written first, and each file
    by one rename; a page or a figure that fails leaves the others.

    Args:
        hide_items: withhold every text of an item in all of them, see `redacted`.
    Raises:
        TargetExists: if texts are to be withheld and the folder holds an audit, or findings of one, that has them: it
            would be lost, or lie beside the pages.
        CheckpointError: if the folder or audit.json cannot be written.
        ReportError: if a page or a figure cannot be made or written, once everything else is.
    """
    from repedit.plot import gap, membership, recovery

    target = Path(folder)
    shown = redacted(report) if hide_items else report
    if hide_items:
        _check_free(target)
    written = [shown.save(target)]
    pictures = (
        {"gap": lambda: gap({"edited": shown}), "membership": lambda: membership(shown)}
        if shown.gaps
        else {"recovery": lambda: recovery(shown)}
    )
    makers: dict[str, Callable[[], bytes]] = {
        "audit.md": lambda: markdown(shown).encode(),
        "audit.html": lambda: page(shown).encode(),
    }
    makers |= {f"{name}.png": partial(picture, draw) for name, draw in pictures.items()}
    return [*written, *write_parts(target, makers, "audit.json")]


def write_parts(target: Path, makers: Mapping[str, Callable[[], bytes]], whole: str = "") -> list[Path]:
    """Make each file and write it by one rename; one that fails leaves the others.

    Args:
        makers: by name in the folder, what makes its content.
        whole: the file that holds everything the others show, for the message.
    Raises:
        ReportError: naming each file that could not be made or written, once all others are.
    """
    written, failures = [], []
    for name, make in makers.items():
        try:
            content = make()
            with replacing(target / name) as file:
                file.write(content)
            written.append(target / name)
        except Exception as error:  # whatever a page stumbles over must not cost the rest
            failures.append((name, error))
    if failures:
        reasons = "; ".join(f"{name}: {type(error).__name__}: {shortened(error, 300)}" for name, error in failures)
        there = ", ".join(path.name for path in written) or "nothing else"
        rest = f"{there} and {whole}, which holds all of it, are" if whole else f"{there} is"
        raise ReportError(
            f"{target} lacks {len(failures)} of {len(makers)} files ({reasons}); {rest} written"
        ) from failures[0][1]
    return written


def picture(draw: Callable[[], Any]) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    draw().savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _check_free(target: Path) -> None:
    old = target / "audit.json"
    if old.exists() and "withheld" not in Report.load(old).context:
        raise TargetExists(
            f"{old.absolute()} holds the texts of its facts, which would be lost; give another directory to write to"
        )
    if (target / "findings").exists():
        raise TargetExists(
            f"{(target / 'findings').absolute()} names the facts of an earlier audit; give another directory to write to"
        )


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of audit.json."""
    found: dict[str, Any] = parse_json(
        files("repedit.report").joinpath("schema.json").read_text(encoding="utf-8"), "schema.json"
    )
    return found
