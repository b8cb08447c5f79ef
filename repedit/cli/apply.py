"""The verb that carries a saved edit or delta out on the files of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from repedit.cli.options import Json, Layout, Model, Multiple, opened
from repedit.cli.saving import check_out, shaped, show_plan
from repedit.cli.saving import verify as verified
from repedit.io.files import is_folder

Shape = Annotated[
    str,
    typer.Option(help="keep; slim cuts pruned neurons out; slice narrows an erased stream; adapter, a LoRA for PEFT."),
]


def apply(
    edit: Annotated[Path, typer.Argument(help="A saved edit or delta (.safetensors).")],
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Directory of the edited checkpoint.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Convert every tensor, to bfloat16 say.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Show the plan and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing directory.")] = False,
    verify: Annotated[bool, typer.Option(help="Load the result in a process without repedit.")] = True,
    structure: Shape = "keep",
    layout: Layout = "uniform",
    multiple: Multiple = None,
    json: Json = False,
) -> None:
    """Write the checkpoint of a saved edit or delta, streamed from the files of the model; or a LoRA adapter of it."""
    from repedit.cli import output
    from repedit.delta import Delta
    from repedit.edit import Edit
    from repedit.errors import ArgumentError
    from repedit.io import archive
    from repedit.models.default_model import DEFAULT
    from repedit.rewrite import export

    if not dry_run:
        check_out(out, edit, model, overwrite=overwrite)
    loaded = Delta.load(edit) if archive.kind_of(edit) == "delta" else Edit.load(edit)
    adapter = structure == "adapter"
    if adapter and (dtype, layout, multiple) != (None, "uniform", None):
        raise ArgumentError("--structure adapter takes no --dtype, --layout or --multiple: it is stored in float32")
    shape = shaped(out, "keep" if adapter else structure, layout, multiple)
    local = is_folder(model) or model == DEFAULT
    source: Any = model if local and not adapter else opened(model, "auto", "auto")
    if dry_run:
        show_plan(export.dry_run(loaded, source, **shape), out, json)
        return
    if out is None:
        raise ArgumentError("--out is needed: the directory to write (or --dry-run)")
    if adapter:
        _adapter(loaded, source, out, overwrite, json)
        return
    record = export.export(loaded, source, out, dtype=dtype, overwrite=overwrite, **shape)
    if verify:
        verified(out, record)
    if json:
        output.show_json(
            {
                "out": str(out),
                "tensors": len(record.plan),
                "largest_relative_change": record.relative_change,
                "structure": record.structure,
                "loaders": record.loaders,
                "left_out": record.left_out,
            }
        )
    else:
        output.out.print(
            f"{out}: {len(record.plan)} tensors changed, largest relative change {record.relative_change:.3g}"
        )


def _adapter(change: Any, source: Any, out: Path, overwrite: bool, json: bool) -> None:
    from repedit.cli import output
    from repedit.rewrite.adapter import export_adapter

    record = export_adapter(change, source, out, overwrite=overwrite)
    found = {"out": str(out), "modules": len(record.ranks), "largest_rank": max(record.ranks.values())}
    if json:
        output.show_json(found | {"parameters": record.parameters, "residual": record.residual})
        return
    output.out.print(
        f"{out}: adapter of {found['modules']} modules, rank at most {found['largest_rank']}, {record.parameters:,} numbers; it and "
        "the base hold both models"
    )
