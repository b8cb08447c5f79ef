"""The verb that applies a saved edit or delta, or copies a model without one; and how every verb that makes an edit writes it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypedDict, runtime_checkable

import typer

from repedit.cli.application import Dequantize, DryRun, Json, Layout, Model, Multiple, Overwrite, load_model
from repedit.io.files import exists, is_folder, make_folder

if TYPE_CHECKING:
    from repedit.delta import Delta
    from repedit.edit import Edit
    from repedit.models.subject import Subject
    from repedit.rewrite.manifest import Manifest


def apply(
    edit: Annotated[
        Path, typer.Argument(help="A saved edit or delta: a file or hf://owner/name/file; 'none' copies the model.")
    ],
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Directory of the edited checkpoint.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Convert every tensor to this dtype, such as bfloat16.")] = None,
    dequantize: Dequantize = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    verify: Annotated[bool, typer.Option(help="Load the result in a process without repedit.")] = True,
    structure: Annotated[
        Literal["keep", "slim", "slice", "adapter"],
        typer.Option(
            help="keep: the original shapes; slim: pruned neurons are cut out of the tensors; slice: the erased residual stream becomes narrower; adapter: a LoRA for PEFT."
        ),
    ] = "keep",
    layout: Layout = "uniform",
    multiple: Multiple = None,
    workers: Annotated[
        int | None, typer.Option(help="Shards written at a time; by default one for each core.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Write the checkpoint of a saved edit or delta, streamed from the files of the model; or a LoRA adapter of it.

    A quantised checkpoint is edited as ordinary tensors with --dequantize. A plain copy of one, for any use:

    repedit apply none MODEL --dequantize --out plain/
    """
    from repedit.delta import Delta
    from repedit.edit import Edit
    from repedit.errors import ArgumentError
    from repedit.io import archive
    from repedit.models.default_model import DEFAULT
    from repedit.rewrite import export

    if not dry_run:
        check_out(out, edit, model, overwrite=overwrite)
    copied = str(edit) == "none"
    change = Edit({}) if copied else Delta.load(edit) if archive.kind_of(edit) == "delta" else Edit.load(edit)
    adapter = structure == "adapter"
    if adapter and (dtype, layout, multiple, workers) != (None, "uniform", None, None):
        raise ArgumentError(
            "--structure adapter takes no --dtype, --layout, --multiple or --workers: it is one file in float32"
        )
    shape = shape_options(out, "keep" if adapter else structure, layout, multiple)
    local = is_folder(model) or model == DEFAULT
    loaded = None if local and not adapter and not dequantize else load_model(model, dequantize=dequantize)
    source = model if loaded is None else loaded
    if dry_run:
        show_plan(export.dry_run(change, source, **shape), out, json)
        return
    if out is None:
        raise ArgumentError("--out is needed: the directory to write (or --dry-run)")
    if adapter and loaded is not None:
        _write_adapter(change, loaded, out, overwrite, json)
        return
    manifest = export.export(
        change, source, out, dtype=dtype, overwrite=overwrite, allow_identity=copied, workers=workers, **shape
    )
    if verify:
        verify_checkpoint(out, manifest)
    _show(manifest, out, json)


def _show(manifest: Manifest, out: Path, json: bool) -> None:
    from repedit.cli import output

    if json:
        output.show_json({
            "out": str(out), "tensors": len(manifest.plan), "largest_relative_change": manifest.relative_change,
            "structure": manifest.structure, "loaders": manifest.loaders, "left_out": manifest.left_out,
        })  # fmt: skip
    else:
        count, largest = len(manifest.plan), manifest.relative_change
        output.out.print(f"{out}: {count} tensors changed, largest relative change {largest:.3g}")


def _write_adapter(change: Edit | Delta, subject: Subject, out: Path, overwrite: bool, json: bool) -> None:
    from repedit.cli import output
    from repedit.rewrite.adapter import export_adapter

    adapter = export_adapter(change, subject, out, overwrite=overwrite)
    modules, rank = len(adapter.ranks), max(adapter.ranks.values())
    if json:
        output.show_json({
            "out": str(out), "modules": modules, "largest_rank": rank, "parameters": adapter.parameters, "residual": adapter.residual,
        })  # fmt: skip
        return
    output.out.print(
        f"{out}: adapter of {modules} modules, rank at most {rank}, {adapter.parameters:,} numbers; it and the base hold both models"
    )


# --- What the verbs that make an edit do with it: show its plan, write it, and verify what was written


@runtime_checkable
class Saveable(Protocol):
    """Any value of repedit that is saved to a file."""

    def save(self, path: Path, /) -> object:
        """Write the value."""


class Shape(TypedDict):
    """The options of an export that say which shapes its tensors have."""

    structure: str
    layout: str
    multiple: int | None


UNCHANGED: Shape = {"structure": "keep", "layout": "uniform", "multiple": None}


def shape_options(out: Path | None, structure: str, layout: str, multiple: int | None) -> Shape:
    """The same options, checked before any long work begins."""
    from repedit.errors import ArgumentError

    if structure != "keep" and out is not None and out.suffix == ".safetensors":
        raise ArgumentError(f"--structure {structure} writes a checkpoint: give a directory as --out, not {out.name}")
    return {"structure": structure, "layout": layout, "multiple": multiple}


def check_out(out: Path | None, *inputs: str | Path | None, overwrite: bool = False, file: bool = False) -> None:
    """Refuse an output path before any work is done if it cannot be written, holds something else, or is an input.

    Args:
        inputs: words of the command line, some of which may be paths that are read.
        file: whether the verb writes a file whatever its name; x.safetensors is always a file.
    Raises:
        TargetExists: if something would be lost. CheckpointError: if nothing can be written there.
    """
    from repedit.errors import TargetExists
    from repedit.io.archive import check_replaceable
    from repedit.io.targets import check_file_target, check_target

    if out is None:
        return
    sources = [Path(word) for word in inputs if word is not None and exists(word)]
    if file or out.suffix == ".safetensors":
        if any(source.samefile(out) for source in sources if out.exists()):
            raise TargetExists(f"{out} is read by this command and cannot be written by it; give another --out")
        check_file_target(out)
        check_replaceable(out)
        return
    check_target(out, overwrite=overwrite)
    for folder in (source for source in sources if is_folder(source)):
        check_target(out, overwrite=overwrite, source=folder)


def check_page(out: Path | None, *, overwrite: bool | None = None) -> None:
    """Refuse, before any work, a page that has another ending or would replace a file.

    Args:
        overwrite: whether a file may be replaced; None for verbs that have no such option.
    Raises:
        ArgumentError: if the name does not end in .html. TargetExists: if there is such a file.
    """
    from repedit.errors import ArgumentError, TargetExists

    if out is None:
        return
    if out.suffix.lower() not in (".html", ".htm"):
        raise ArgumentError(f"--out {out} is a page: give it a name that ends in .html")
    if out.exists() and not overwrite:
        remedy = "give another --out" if overwrite is None else "give another --out, or --overwrite"
        raise TargetExists(f"{out.absolute()} exists; {remedy}")


def save(value: Saveable, out: Path) -> None:
    """Save a result to a file; if that fails, save it elsewhere, see `rescued`.

    Raises:
        RepeditError: of the type of the failure, saying where the value was saved.
    """
    with rescued(value, out):
        make_folder(Path(os.path.realpath(out)).parent)
        value.save(out)


@contextmanager
def rescued(value: Saveable, out: Path) -> Iterator[None]:
    """If writing a result fails, save it beside the target, in the current folder or in the temporary folder.

    Raises:
        RepeditError: of the type of the failure, saying where the value was saved.
    """
    from repedit.cli import output
    from repedit.errors import CheckpointError, RepeditError

    try:
        yield
    except (RepeditError, OSError, KeyboardInterrupt) as error:
        path = _save_elsewhere(value, out)
        where = f"what was computed is kept in {path}" if path else "what was computed could be saved nowhere"
        if path and type(value).__name__ in ("Edit", "Delta"):
            where += f": repedit apply {path} MODEL --out {out}"
        if isinstance(error, KeyboardInterrupt):
            output.err.print(f"Interrupted; {where}")
            raise
        raise (type(error) if isinstance(error, RepeditError) else CheckpointError)(f"{error}; {where}") from error


def _save_elsewhere(value: Saveable, out: Path) -> Path | None:
    """Save the value at the first free path that can be written; returns that path."""
    for folder in (out.absolute().parent, Path.cwd(), Path(tempfile.gettempdir())):
        for number in range(100):
            path = folder / f"{out.name.removesuffix('.safetensors')}.rescued{number or ''}.safetensors"
            if os.path.lexists(path):
                continue
            try:
                value.save(path)
            except Exception:  # of whatever kind: the next folder may take it
                break
            return path
    return None


def write_edited(change: Edit | Delta, subject: Subject, out: Path, overwrite: bool, shape: Shape = UNCHANGED) -> None:
    """Write the edit as a file (.safetensors), or the edited checkpoint as a directory, and verify that.

    If that fails, the edit, which may have taken long to compute, is saved elsewhere.
    """
    from repedit.cli import output
    from repedit.rewrite.export import export

    if out.suffix == ".safetensors":
        save(change, out)
    else:
        with rescued(change, out):
            manifest = export(change, subject, out, overwrite=overwrite, **shape)
        verify_checkpoint(out, manifest)
    output.err.print(f"written: {out}")


def verify_checkpoint(out: Path, manifest: Manifest) -> None:
    """Load a checkpoint in a process without repedit, or with repedit if nothing else can; and name the loaders that work."""
    from repedit.cli import output
    from repedit.models.subject import load
    from repedit.rewrite.verification import reload_check

    if manifest.parameters is not None:
        before, after = manifest.parameters["before"], manifest.parameters["after"]
        output.err.print(f"{before:,} parameters in the files before, {after:,} now")
    output.err.print(f"read by: {', '.join(manifest.loaders)}")
    if len(manifest.loaders) == 1:
        load(out)
        output.err.print("verified: repedit.load reads it; plain transformers cannot, its layers have different widths")
        return
    parameters = reload_check(out).parameters
    output.err.print(f"verified: plain transformers loads {parameters:,} parameters in a process without repedit")


def show_plan(plan: str, out: Path | None, json: bool) -> None:
    """Show a dry run: the plan as text, or its lines in a JSON document."""
    from repedit.cli import output

    if json:
        output.show_json({"dry_run": True, "out": None if out is None else str(out), "plan": plan.splitlines()})
    else:
        output.out.print(plan)


def plan_summary(edit: Edit, subject: Subject, shape: Shape = UNCHANGED) -> str:
    """The plan of a dry run as text."""
    from repedit.rewrite.export import structured_plan

    return structured_plan(edit, subject.architecture, subject.specs, **shape).summary(subject.specs)
