"""Verbs that find, show and remove neurons: collect, score, explore, prune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from repedit.cli.application import (
    BatchSize,
    Combine,
    Dequantize,
    Device,
    DryRun,
    Dtype,
    EditOut,
    Importance,
    Json,
    Layout,
    LimitTokens,
    Model,
    Multiple,
    Overwrite,
    Seed,
    Sites,
    Structure,
    Text,
    TextOrCollection,
    load_model,
)
from repedit.cli.apply import check_out, check_page, plan_summary, save, shape_options, write_edited

if TYPE_CHECKING:
    from repedit.data import Corpus, Tokens
    from repedit.models.subject import Subject
    from repedit.neurons.pruning import PruningResult
    from repedit.neurons.scores import Scores


def collect(
    model: Model,
    out: Annotated[Path, typer.Option(help="Where to write the statistics (.safetensors).")],
    text: Text = "code",
    sites: Sites = "*.mlp.neurons",
    statistic: Annotated[
        Literal["activity", "moments"],
        typer.Option(help="activity, of neurons; moments (mean and covariance), of any site."),
    ] = "activity",
    gradients: Annotated[bool, typer.Option("--gradients", help="Also sum activation times gradient.")] = False,
    limit_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens that are read, without padding and first positions; the whole text by default."),
    ] = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dequantize: Dequantize = False,
    json: Json = False,
) -> None:
    """Sum statistics of the activations on a text, in one pass, for `repedit score` and for your own analyses.

    Several processes share the text under torchrun --nproc-per-node N -m repedit collect ...
    """
    from repedit import data
    from repedit.activations.collection import collect as collect_statistics
    from repedit.cli import output
    from repedit.distributed import leave_process_group, local_device
    from repedit.stats import Activity, Moments

    check_out(out, text, file=True)
    corpus = data.read(text)
    collection = collect_statistics(
        load_model(model, local_device(device), dtype, dequantize), corpus, sites, gradients=gradients,
        statistic=Moments if statistic == "moments" else Activity, limit_tokens=limit_tokens, batch_size=batch_size,
    )  # fmt: skip
    if not leave_process_group():
        return
    save(collection, out)
    if json:
        names = [str(site) for site in collection]
        output.show_json({"out": str(out), "sites": names, "counted": collection.counted})
    else:
        counts = f"{collection.counted} of {collection.seen} tokens counted"
        output.out.print(f"{len(collection)} sites, {counts}; written to {out}")


def score(
    model: Model,
    out: Annotated[Path, typer.Option(help="Where to write the scores (.safetensors).")],
    forget: TextOrCollection = "code",
    retain: TextOrCollection = "prose",
    sites: Sites = "*.mlp.neurons",
    importance: Importance = "abs",
    combine: Combine = "difference",
    limit_tokens: LimitTokens = 8000,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dequantize: Dequantize = False,
    json: Json = False,
) -> None:
    """Score every neuron by how specific it is to the forget set."""
    from repedit.cli import output

    check_out(out, forget, retain, file=True)
    texts = _texts(forget, retain)
    subject = load_model(model, device, dtype, dequantize)
    scores = _scores(subject, forget, retain, texts, sites, importance, combine, limit_tokens, batch_size)
    save(scores, out)
    counts = {role: row["tokens"] for role, row in scores.provenance["data"].items()}
    if json:
        sinks = sum(len(s.sinks) for s in scores.values())
        output.show_json({"out": str(out), "tokens": counts, "agreement": scores.agreement, "sinks": sinks})
        return
    best = sorted(
        ((float(v), str(site), int(i)) for site, s in scores.items() for v, i in zip(*s.values.topk(3), strict=True)),
        reverse=True,
    )
    output.table("Most specific neurons", ("site", "neuron", "score"), [[site, i, v] for v, site, i in best[:10]])
    output.out.print(
        f"{counts['forget']} forget and {counts['retain']} retain tokens; median rank correlation {scores.agreement:.2f}; written to {out}"
    )


def explore(
    scores: Annotated[Path, typer.Argument(help="A file of `repedit score`.")],
    out: Annotated[Path, typer.Option(help="The page to write (.html).")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The model that was scored; with it, the page shows the texts that activate each neuron most."
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Where to look for those texts; repeat for several. [default: code and prose]"),
    ] = None,
    at_most: Annotated[
        int | None, typer.Option(help="Show only this many neurons, with the most extreme scores.")
    ] = None,
    limit_tokens: LimitTokens = 8000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing page.")] = False,
    json: Json = False,
) -> None:
    """Write an interactive page of all neurons: scores, ranks, activating texts, and what each fraction would prune."""
    from repedit.cli import output
    from repedit.data import read
    from repedit.explore import neurons
    from repedit.neurons.scores import Scores

    check_page(out, overwrite=overwrite)
    saved, examples = Scores.load(scores), []
    if model is not None:
        from repedit.activations.examples import max_activating

        corpora = [read(name) for name in text or ["code", "prose"]]
        subject = load_model(model)
        for corpus in corpora:
            examples.append(max_activating(subject, corpus, list(saved), limit_tokens=limit_tokens))
    page = neurons(saved, examples, at_most=at_most).write_html(out, overwrite=overwrite)
    if json:
        output.show_json(
            {
                "out": str(page),
                "neurons": sum(len(s.values) for s in saved.values()),
                "texts": [e.corpus for e in examples],
            }
        )
    else:
        output.show_files([page])


def _texts(forget: str, retain: str) -> tuple[Corpus | Tokens, Corpus | Tokens] | None:
    """Two texts; None for two saved collections."""
    from repedit import data
    from repedit.errors import ArgumentError

    saved = [name.endswith(".safetensors") for name in (forget, retain)]
    if any(saved) and not all(saved):
        raise ArgumentError(f"--forget {forget} and --retain {retain}: give two collections, or two texts")
    return None if all(saved) else (data.read(forget), data.read(retain))


def _scores(
    subject: Subject,
    forget: str,
    retain: str,
    texts: tuple[Corpus | Tokens, Corpus | Tokens] | None,
    sites: str,
    importance: str,
    combine: str,
    limit_tokens: int,
    batch_size: int,
) -> Scores:
    """Scores from two texts, or from two saved collections."""
    from repedit.neurons.pruning import collect_pair, load_collection
    from repedit.neurons.scores import score as score_neurons

    if texts is None:
        sides = load_collection(forget, subject), load_collection(retain, subject)
    else:
        sides = collect_pair(subject, *texts, sites, importance, combine, tokens=limit_tokens, batch_size=batch_size)
    return score_neurons(*sides, importance=importance, combine=combine)


def prune(
    model: Model,
    out: EditOut,
    fraction: Annotated[float | None, typer.Option(help="Fraction of all scored neurons to prune, in [0, 1].")] = None,
    learned: Annotated[
        bool, typer.Option("--learned", help="Learn the mask by gradient: far more selective, 15 minutes on two cores.")
    ] = False,
    scores: Annotated[
        Path | None, typer.Option(help="A file of `repedit score`, instead of --forget and --retain.")
    ] = None,
    forget: Text = "code",
    retain: Text = "prose",
    sites: Annotated[
        str | None, typer.Option(help="Which neurons; MLP by default, attention too if --learned.")
    ] = None,
    importance: Importance = "abs",
    combine: Combine = "difference",
    steps: Annotated[int, typer.Option(help="Prune in this many steps, collecting again before each.")] = 1,
    max_retain_drop: Annotated[
        float | None,
        typer.Option(
            help="Largest drop on the retain set, per cent; with --steps the best step within it is kept. Exit 3 if none is."
        ),
    ] = None,
    cap_per_layer: Annotated[float | None, typer.Option(help="Largest fraction of a layer to prune.")] = None,
    control: Annotated[int, typer.Option(help="Number of random controls to measure.")] = 0,
    limit_tokens: LimitTokens = 8000,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dequantize: Dequantize = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    structure: Structure = "keep",
    layout: Layout = "uniform",
    multiple: Multiple = None,
    json: Json = False,
) -> None:
    """Prune the neurons most specific to the forget set, measure both sets, and write an edit or a checkpoint."""
    from repedit.cli import output
    from repedit.neurons.pruning import PruningOptions, run_pruning
    from repedit.neurons.scores import Scores

    shape = shape_options(out, structure, layout, multiple)
    options = PruningOptions(
        fraction=fraction, learned=learned, sites=sites, importance=importance, combine=combine, steps=steps, max_retain_drop=max_retain_drop,
        cap_per_layer=cap_per_layer, control=control, tokens=limit_tokens, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    if not dry_run:
        check_out(out, model, scores, forget, retain, overwrite=overwrite)
    saved = None if scores is None else Scores.load(scores)
    subject = load_model(model, device, dtype, dequantize)
    result = run_pruning(subject, forget, retain, options, scores=saved, on_stage=output.stage)
    plan = plan_summary(result.edit, subject, shape) if dry_run and not result.exceeded else ""
    _show(result, out, dry_run, plan, json)
    if result.exceeded:
        output.err.print(f"Nothing written: the retain drop exceeds {max_retain_drop} % at once; lower --fraction")
        raise typer.Exit(3)
    if not dry_run:
        write_edited(result.edit, subject, out, overwrite, shape)


def _show(result: PruningResult, out: Path, dry_run: bool, plan: str, json: bool) -> None:
    from repedit.cli import output

    if json:
        drops = {
            label: {"forget": f.plain()["drop_percent"], "retain": r.plain()["drop_percent"]}
            for label, (f, r) in result.effects.items()
        }
        values = {"drops": drops, "pruned": result.count, "out": str(out), "dry_run": dry_run}
        output.show_json(values | ({"plan": plan.splitlines()} if plan else {}))
    else:
        title = f"{result.count} neurons pruned; drops in per cent of the original top-1 accuracy (95 % interval)"
        output.table(title, ("", "forget", "retain", "selectivity"), output.effect_rows(result.effects))
        output.record_effects({label: {"forget": f, "retain": r} for label, (f, r) in result.effects.items()})
        if plan:
            output.out.print(plan)
