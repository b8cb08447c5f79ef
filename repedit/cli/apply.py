"""The verb that applies a saved edit or delta to the files of a model, or copies the model without one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from repedit.cli.options import Dequantize, DryRun, Json, Layout, Model, Multiple, Overwrite, load_model
from repedit.cli.saving import check_out, shape_options, show_plan
from repedit.cli.saving import verify as verify_checkpoint
from repedit.io.files import is_folder

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
    dtype: Annotated[str | None, typer.Option(help="Convert every tensor, to bfloat16 say.")] = None,
    dequantize: Dequantize = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    verify: Annotated[bool, typer.Option(help="Load the result in a process without repedit.")] = True,
    structure: Annotated[
        Literal["keep", "slim", "slice", "adapter"],
        typer.Option(
            help="slim removes pruned neurons from the tensors; slice narrows an erased stream; adapter, a LoRA for PEFT."
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
