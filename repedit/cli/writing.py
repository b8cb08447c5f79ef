"""What the verbs that make an edit do with it: show its plan, write it, check what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def shaped(out: Path | None, structure: str, layout: str, multiple: int | None) -> dict[str, Any]:
    """The options of an export that say which shape it has, checked before anything long begins."""
    from repedit.errors import ArgumentError

    if structure not in ("keep", "slim", "slice") or layout not in ("uniform", "ragged"):
        raise ArgumentError(f"--structure {structure} --layout {layout}: keep, slim or slice; uniform or ragged")
    if structure != "keep" and out is not None and out.suffix == ".safetensors":
        raise ArgumentError(f"--structure {structure} writes a checkpoint: give a directory as --out, not {out.name}")
    return {"structure": structure, "layout": layout, "multiple": multiple}


def write(edit: Any, subject: Any, out: Path, overwrite: bool, shape: dict[str, Any] | None = None) -> None:
    """The edit as a file (.safetensors), or the edited checkpoint as a directory, verified.

    Where the shape asked for is refused, the edit, which may have taken long to find, is kept beside the directory.
    """
    from repedit import console
    from repedit.errors import NotSlimmable
    from repedit.rewrite.checkpoint import export

    if out.suffix == ".safetensors":
        edit.save(out)
    else:
        try:
            record = export(edit, subject, out, overwrite=overwrite, **(shape or {}))
        except NotSlimmable as error:
            kept = out.with_name(f"{out.name}-edit.safetensors")
            edit.save(kept)
            raise NotSlimmable(
                f"{error}. The edit is kept in {kept}: repedit apply {kept} MODEL --out {out}"
            ) from error
        verify(out, record)
    console.err.print(f"written: {out}")


def verify(out: Path, record: Any) -> None:
    """Load a checkpoint in a process without repedit, or with it where nothing else can; and say which loaders work."""
    from repedit import console
    from repedit.models import load
    from repedit.rewrite.reloading import reload_check

    if record.parameters is not None:
        console.err.print(
            f"{record.parameters['before']:,} parameters in the files before, {record.parameters['after']:,} now"
        )
    console.err.print(f"read by: {', '.join(record.loaders)}")
    if len(record.loaders) == 1:
        load(out)
        console.err.print(
            "verified: repedit.load reads it; plain transformers cannot, its layers have different widths"
        )
        return
    found = reload_check(out)
    console.err.print(
        f"verified: plain transformers loads {found.parameters:,} parameters in a process without repedit"
    )


def show_plan(plan: str, out: Path | None, json: bool) -> None:
    """A dry run: the plan in words, or its lines in a JSON document."""
    from repedit import console

    if json:
        console.show_json({"dry_run": True, "out": None if out is None else str(out), "plan": plan.splitlines()})
    else:
        console.out.print(plan)


def plan_of(edit: Any, subject: Any, shape: dict[str, Any] | None = None) -> str:
    """The dry run."""
    from repedit.rewrite.structures import structured

    return structured(edit, subject.architecture, subject.specs, **(shape or {})).summary(subject.specs)
