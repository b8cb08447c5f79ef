"""The verb that projects: directions of hidden states, fitted or trained, one task after another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from repedit.cli.options import BatchSize, Device, Dtype, Json, Model, Seed, opened
from repedit.cli.saving import check_out, plan_of, show_plan, write


def project(
    model: Model,
    out: Annotated[Path, typer.Option(help="x.safetensors writes the edit, a directory the edited checkpoint.")],
    forget: Annotated[
        str, typer.Option(help="A built-in domain (capitals, symbols, ...; several with +), or a .jsonl of facts.")
    ] = "capitals",
    retain: Annotated[
        str | None, typer.Option(help="Facts to keep; by default those of the file, or the other domains.")
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(help="Where to project: '0-11.mlp.out', 'stream'; by default mlp.out of the early layers."),
    ] = None,
    rank: Annotated[int, typer.Option(help="Directions removed at each site.")] = 8,
    method: Annotated[
        str, typer.Option(help="mrp trains; cpca, residual_pca, leace, oblique, ... fit at once.")
    ] = "mrp",
    steps: Annotated[int, typer.Option(help="Training steps of mrp.")] = 150,
    previous: Annotated[Path | None, typer.Option(help="The edit of earlier tasks, which stay removed.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder to save the training in, and to continue from.")] = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dry_run: Annotated[
        bool, typer.Option(help="Show the plan of a random projection of this rank; train nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing directory.")] = False,
    json: Json = False,
) -> None:
    """Remove the directions that hold a set of facts, keep the other facts, and write an edit or a checkpoint."""
    from repedit import data
    from repedit.edit import Edit
    from repedit.fit.mrp import mrp
    from repedit.metrics.facts import knowledge
    from repedit.rewrite.apply import apply

    if not dry_run:
        check_out(out, model, forget, retain, previous, resume, overwrite=overwrite)
    facts = data.facts(forget) if retain is None else data.facts(forget, retain=data.facts(retain).forget)
    subject = opened(model, device, dtype)
    earlier = None if previous is None else Edit.load(previous)
    config: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "seed": seed}
    edit = mrp(
        subject, forget=facts.forget, retain=facts.retain, sites=sites, rank=rank, method="random" if dry_run else method,
        config=config, previous=earlier, resume=resume,
    )  # fmt: skip
    if dry_run:
        show_plan(plan_of(edit, subject), out, json)
        return
    found = knowledge(subject, apply(edit, subject), (*facts.forget, *facts.retain))
    _show(found, facts, edit, json, out)
    write(edit, subject, out, overwrite)


def _show(found: Any, facts: Any, edit: Any, json: bool, out: Path) -> None:
    from repedit.cli import output

    forgotten = {fact.domain for fact in facts.forget}
    if json:
        rows = {
            name: {"before": k.before.accuracy, "after": k.after.accuracy, "interval": k.after.interval,
                   "chance": k.chance, "role": "forget" if name in forgotten else "retain"}
            for name, k in found.items()
        }  # fmt: skip
        output.show_json(
            {"domains": rows, "rank": {str(s): m.rank_removed for s, m in edit.maps.items()}, "out": str(out)}
        )
        return
    output.table("Facts right, multiple choice", output.KNOWLEDGE_COLUMNS, output.knowledge_rows(found, forgotten))
    output.out.print(f"{sum(m.rank_removed for m in edit.maps.values())} directions over {len(edit.maps)} sites")
