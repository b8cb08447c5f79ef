"""The verb that projects hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from repedit.cli.application import (
    BatchSize,
    Dequantize,
    Device,
    Dtype,
    EditOut,
    Json,
    Model,
    Overwrite,
    Seed,
    load_model,
)
from repedit.cli.apply import check_out, plan_summary, show_plan, write_edited

if TYPE_CHECKING:
    from repedit.data import Fact, Facts
    from repedit.delta import Delta
    from repedit.edit import Edit
    from repedit.models.subject import Subject

Forget = Annotated[
    str, typer.Option(help="A built-in domain (capitals, symbols, ...; several with +), or a .jsonl of facts.")
]
Retain = Annotated[str | None, typer.Option(help="Facts to keep; by default those of the file, or the other domains.")]
Where = Annotated[
    str | None, typer.Option(help="Where to project: '0-11.mlp.out', 'stream'; by default mlp.out of the early layers.")
]
Method = Annotated[
    str,
    typer.Option(
        help="mrp trains; cpca, residual_pca, leace, oblique, ... fit in closed form; overwrite replaces what early MLPs write at the names that facts are about."
    ),
]
DryRun = Annotated[bool, typer.Option(help="Show the plan of a random projection of this rank; train nothing.")]

# Of --method overwrite
Layers = Annotated[str, typer.Option(help="Of overwrite: whose MLPs, such as '0-1' or '2-11'.")]
Target = Annotated[
    Literal["mean", "exchange", "selective"],
    typer.Option(
        help="Of overwrite: the mean value of all entities of a domain, the value of another one, or the mean but for what facts to keep about the same entities use."
    ),
]
UseRegression = Annotated[
    bool, typer.Option("--regression", help="Of overwrite: train the MLPs on their inputs, instead of a closed form.")
]
Lam = Annotated[
    float | None,
    typer.Option(help="Of overwrite: weight of what is retained; by default 0.3, or what the budget asks for."),
]
RetainBudget = Annotated[
    float | None,
    typer.Option(help="Of overwrite: largest relative change of the outputs of a layer on --text, such as 0.02."),
]
KeepRank = Annotated[
    int, typer.Option(help="Of overwrite with --target selective: directions of the values that stay.")
]
Contexts = Annotated[
    str, typer.Option(help="Of overwrite: texts that name the entities; of templates, wordings, prose, written.")
]
RetainText = Annotated[str, typer.Option(help="Of overwrite: running text to retain; 'prose', 'code' or a file.")]


def project(
    model: Model,
    out: EditOut,
    forget: Forget = "capitals",
    retain: Retain = None,
    sites: Where = None,
    rank: Annotated[int, typer.Option(help="Directions removed at each site.")] = 8,
    method: Method = "mrp",
    steps: Annotated[int, typer.Option(help="Training steps of mrp.")] = 150,
    previous: Annotated[Path | None, typer.Option(help="The edit of earlier tasks, which stay removed.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder to save the training in, and to resume it from.")] = None,
    layers: Layers = "0-1",
    target: Target = "mean",
    regression: UseRegression = False,
    lam: Lam = None,
    retain_budget: RetainBudget = None,
    keep_rank: KeepRank = 32,
    contexts: Contexts = "templates,wordings",
    text: RetainText = "prose",
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dequantize: Dequantize = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Remove the directions that hold a set of facts, keep the other facts, and write an edit or a checkpoint."""
    from repedit import data
    from repedit.edit import Edit
    from repedit.fit.mrp import mrp
    from repedit.fit.overwrite import OverwriteCertificate
    from repedit.fit.overwrite import overwrite as overwrite_values

    if not dry_run:
        check_out(out, model, forget, retain, previous, resume, overwrite=overwrite)
    facts = data.facts(forget) if retain is None else data.facts(forget, retain=data.facts(retain).forget)
    subject = load_model(model, device, dtype, dequantize)
    if method == "overwrite":
        near, others = _about(facts)
        change = overwrite_values(
            subject, facts.forget, layers=layers, target=target, method="regression" if regression else "linear", lam=lam,
            retain_budget=retain_budget, retain=data.read(text), keep=near if target == "selective" else (), others=others,
            keep_rank=keep_rank, contexts=contexts.split(","), seed=seed,
        )  # fmt: skip
        certificate = OverwriteCertificate.of(change)
        _show(subject, facts, change, certificate.plain(), certificate.describe(), json, out)
        write_edited(change, subject, out, overwrite)
        return
    edit = mrp(
        subject, forget=facts.forget, retain=facts.retain, sites=sites, rank=rank, method="random" if dry_run else method,
        config={"steps": steps, "batch_size": batch_size, "seed": seed}, resume=resume,
        previous=None if previous is None else Edit.load(previous),
    )  # fmt: skip
    if dry_run:
        show_plan(plan_summary(edit, subject), out, json)
        return
    ranks = {str(site): map_.rank_removed for site, map_ in edit.maps.items()}
    _show(subject, facts, edit, {"rank": ranks}, f"{sum(ranks.values())} directions over {len(ranks)} sites", json, out)
    write_edited(edit, subject, out, overwrite)


def _about(facts: Facts) -> tuple[list[Fact], list[Fact]]:
    """The facts to retain about entities of facts to forget, and those about other entities."""
    from repedit.data import entity_of

    names = {entity_of(fact) for fact in facts.forget}
    near = [fact for fact in facts.retain if entity_of(fact) in names]
    return near, [fact for fact in facts.retain if fact.entity and entity_of(fact) not in names]


def _show(
    subject: Subject, facts: Facts, change: Edit | Delta, values: Mapping[str, Any], note: str, json: bool, out: Path
) -> None:
    """Show the accuracy on each domain before and after, and what was done: as values in JSON, else as a note."""
    from repedit.cli import output
    from repedit.metrics.facts import knowledge
    from repedit.rewrite.apply import apply

    measured = knowledge(subject, apply(change, subject), (*facts.forget, *facts.retain))
    forget = {fact.domain for fact in facts.forget}
    if not json:
        output.table("Facts right, multiple choice", output.KNOWLEDGE_COLUMNS, output.knowledge_rows(measured, forget))
        output.out.print(note)
        return
    domains = {
        name: {"before": k.before.accuracy, "after": k.after.accuracy, "interval": k.after.interval,
               "chance": k.chance, "role": "forget" if name in forget else "retain"}
        for name, k in measured.items()
    }  # fmt: skip
    output.show_json({"domains": domains, **values, "out": str(out)})
