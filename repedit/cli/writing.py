"""What the verbs that make an edit do with it: show its plan, write it, check what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write(edit: Any, subject: Any, out: Path, overwrite: bool) -> None:
    """The edit as a file (.safetensors), or the edited checkpoint as a directory, verified."""
    from repedit import console
    from repedit.rewrite.checkpoint import export

    if out.suffix == ".safetensors":
        edit.save(out)
    else:
        export(edit, subject, out, overwrite=overwrite)
        verify(out)
    console.err.print(f"written: {out}")


def verify(out: Path) -> None:
    """Load a checkpoint in a process without repedit."""
    from repedit import console
    from repedit.rewrite.reloading import reload_check

    found = reload_check(out)
    console.err.print(
        f"verified: plain transformers loads {found.parameters:,} parameters in a process without repedit"
    )


def plan_of(edit: Any, subject: Any) -> str:
    """The dry run."""
    from repedit.lower import lower

    return lower(edit, subject.architecture, subject.specs).summary(subject.specs)
