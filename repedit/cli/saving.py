"""What the verbs that make an edit do with it: show its plan, write it, check what was written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from repedit.io.files import exists, is_folder, make_folder


def shaped(out: Path | None, structure: str, layout: str, multiple: int | None) -> dict[str, Any]:
    """The options of an export that say which shape it has, checked before anything long begins."""
    from repedit.errors import ArgumentError

    if structure not in ("keep", "slim", "slice") or layout not in ("uniform", "ragged"):
        raise ArgumentError(f"--structure {structure} --layout {layout}: keep, slim or slice; uniform or ragged")
    if structure != "keep" and out is not None and out.suffix == ".safetensors":
        raise ArgumentError(f"--structure {structure} writes a checkpoint: give a directory as --out, not {out.name}")
    return {"structure": structure, "layout": layout, "multiple": multiple}


def check_out(out: Path | None, *reads: Any, overwrite: bool = False, file: bool = False) -> None:
    """Refuse a target before any work is done: one that cannot be written, that holds something else, or that is read.

    Args:
        out: x.safetensors is a file, everything else a directory.
        file: whether the verb writes a file whatever its name.
        reads: what the verb reads, by the words it was given.
    Raises:
        TargetExists: if something would be lost. CheckpointError: if nothing can be written there.
    """
    from repedit.errors import TargetExists
    from repedit.io.archive import check_replaceable
    from repedit.io.targets import check_file_target, check_target

    if out is None:
        return
    sources = [Path(word) for word in reads if word is not None and exists(word)]
    if file or out.suffix == ".safetensors":
        if any(source.samefile(out) for source in sources if out.exists()):
            raise TargetExists(f"{out} is read by this command and cannot be written by it; give another --out")
        check_file_target(out)
        check_replaceable(out)
        return
    check_target(out, overwrite=overwrite)
    for folder in (source for source in sources if is_folder(source)):
        check_target(out, overwrite=overwrite, source=folder)


def save(value: Any, out: Path) -> None:
    """Save what was computed to a file; where that fails after all, beside it under another name.

    Raises:
        RepeditError: of the type of the failure, saying where the value is kept.
    """
    with keeping(value, out):
        make_folder(Path(os.path.realpath(out)).parent)
        value.save(out)


@contextmanager
def keeping(value: Any, out: Path) -> Iterator[None]:
    """Keep a value that took long to find where writing it fails: beside the target, here, or in the temporary folder.

    Raises:
        RepeditError: of the type of the failure, saying where the value is kept.
    """
    from repedit.cli import output
    from repedit.errors import CheckpointError, RepeditError

    try:
        yield
    except (RepeditError, OSError, KeyboardInterrupt) as error:
        kept = _kept(value, out)
        where = f"what was computed is kept in {kept}" if kept else "what was computed could be saved nowhere"
        if kept and type(value).__name__ in ("Edit", "Delta"):
            where += f": repedit apply {kept} MODEL --out {out}"
        if isinstance(error, KeyboardInterrupt):
            output.err.print(f"Interrupted; {where}")
            raise
        raise (type(error) if isinstance(error, RepeditError) else CheckpointError)(f"{error}; {where}") from error


def _kept(value: Any, out: Path) -> Path | None:
    """The first free place that takes the value."""
    for folder in (out.absolute().parent, Path.cwd(), Path(tempfile.gettempdir())):
        for number in range(100):
            path = folder / f"{out.name.removesuffix('.safetensors')}.rescued{number or ''}.safetensors"
            if os.path.lexists(path):
                continue
            try:
                value.save(path)
            except Exception:  # of whatever kind: the next place may take it
                break
            return path
    return None


def write(edit: Any, subject: Any, out: Path, overwrite: bool, shape: dict[str, Any] | None = None) -> None:
    """The edit as a file (.safetensors), or the edited checkpoint as a directory, verified.

    Where that fails, the edit, which may have taken long to find, is kept beside the target.
    """
    from repedit.cli import output
    from repedit.rewrite.export import export

    if out.suffix == ".safetensors":
        save(edit, out)
    else:
        with keeping(edit, out):
            record = export(edit, subject, out, overwrite=overwrite, **(shape or {}))
        verify(out, record)
    output.err.print(f"written: {out}")


def verify(out: Path, record: Any) -> None:
    """Load a checkpoint in a process without repedit, or with it where nothing else can; and say which loaders work."""
    from repedit.cli import output
    from repedit.models.subject import load
    from repedit.rewrite.verification import reload_check

    if record.parameters is not None:
        output.err.print(
            f"{record.parameters['before']:,} parameters in the files before, {record.parameters['after']:,} now"
        )
    output.err.print(f"read by: {', '.join(record.loaders)}")
    if len(record.loaders) == 1:
        load(out)
        output.err.print("verified: repedit.load reads it; plain transformers cannot, its layers have different widths")
        return
    found = reload_check(out)
    output.err.print(f"verified: plain transformers loads {found.parameters:,} parameters in a process without repedit")


def show_plan(plan: str, out: Path | None, json: bool) -> None:
    """A dry run: the plan in words, or its lines in a JSON document."""
    from repedit.cli import output

    if json:
        output.show_json({"dry_run": True, "out": None if out is None else str(out), "plan": plan.splitlines()})
    else:
        output.out.print(plan)


def plan_of(edit: Any, subject: Any, shape: dict[str, Any] | None = None) -> str:
    """The dry run."""
    from repedit.rewrite.export import structured_plan

    return structured_plan(edit, subject.architecture, subject.specs, **(shape or {})).summary(subject.specs)
