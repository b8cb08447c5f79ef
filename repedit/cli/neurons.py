"""Verbs that find and remove: collect, score, prune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from repedit.cli.options import (
    BatchSize,
    Device,
    Dtype,
    Json,
    Layout,
    Model,
    Multiple,
    Seed,
    Side,
    Sites,
    Structure,
    Text,
    Tokens,
    opened,
)
from repedit.cli.saving import check_out, plan_of, save, shaped, write


def collect(
    model: Model,
    out: Annotated[Path, typer.Option(help="Where to write the statistics (.safetensors).")],
    text: Text = "code",
    sites: Sites = "*.mlp.neurons",
    statistic: Annotated[
        str, typer.Option(help="activity, of neurons; moments (mean and covariance), of any site.")
    ] = "activity",
    gradients: Annotated[bool, typer.Option("--gradients", help="Also sum activation times gradient.")] = False,
    tokens: Annotated[int | None, typer.Option(help="Counted tokens; the whole text by default.")] = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Sum the statistics of a text at the sites, in one pass, for score and for your own analyses.

    Several processes share the text under torchrun --nproc-per-node N -m repedit collect ...
    """
    from repedit import data
    from repedit.activations.collection import collect as collected
    from repedit.cli import output
    from repedit.distributed import leave_process_group, local_device
    from repedit.errors import UnknownName, nearest
    from repedit.stats import Activity, Moments

    check_out(out, text, file=True)
    kinds: dict[str, Any] = {"activity": Activity, "moments": Moments}
    if statistic not in kinds:
        raise UnknownName(f"--statistic {statistic!r}; {nearest(statistic, kinds)}")
    found = collected(
        opened(model, local_device(device), dtype), data.read(text), sites, statistic=kinds[statistic], gradients=gradients,
        limit_tokens=tokens, batch_size=batch_size,
    )  # fmt: skip
    if not leave_process_group():
        return
    save(found, out)
    if json:
        output.show_json({"out": str(out), "sites": [str(site) for site in found], "counted": found.counted})
    else:
        output.out.print(f"{len(found)} sites, {found.counted} of {found.seen} tokens counted; written to {out}")


def score(
    model: Model,
    out: Annotated[Path, typer.Option(help="Where to write the scores (.safetensors).")],
    forget: Side = "code",
    retain: Side = "prose",
    sites: Sites = "*.mlp.neurons",
    importance: Annotated[str, typer.Option(help="abs, rms, std, gxa, fisher, ...")] = "abs",
    combine: Annotated[str, typer.Option(help="difference, ratio, logratio, rank, setdiff.")] = "difference",
    tokens: Tokens = 8000,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Score every neuron by how specific it is to the forget set."""
    from repedit.cli import output

    check_out(out, forget, retain, file=True)
    subject = opened(model, device, dtype)
    scores = _scored(subject, forget, retain, sites, importance, combine, tokens, batch_size)
    save(scores, out)
    counts = {role: row["tokens"] for role, row in scores.provenance["data"].items()}
    found = {
        "out": str(out),
        "tokens": counts,
        "agreement": scores.agreement,
        "sinks": sum(len(s.sinks) for s in scores.values()),
    }
    if json:
        output.show_json(found)
        return
    best = sorted(
        ((float(v), str(site), i) for site, s in scores.items() for v, i in zip(*s.values.topk(3), strict=True)),
        reverse=True,
    )
    output.table("Most specific neurons", ("site", "neuron", "score"), [[site, int(i), v] for v, site, i in best[:10]])
    output.out.print(
        f"{counts['forget']} forget and {counts['retain']} retain tokens; median rank correlation {scores.agreement:.2f}; written to {out}"
    )


def prune(
    model: Model,
    out: Annotated[Path, typer.Option(help="x.safetensors writes the edit, a directory the edited checkpoint.")],
    fraction: Annotated[float | None, typer.Option(help="Share of all scored neurons to prune, in [0, 1].")] = None,
    learned: Annotated[
        bool, typer.Option("--learned", help="Learn the mask by gradient: far more selective, 15 minutes on two cores.")
    ] = False,
    scores: Annotated[Path | None, typer.Option(help="A file of `repedit score`; else --forget and --retain.")] = None,
    forget: Text = "code",
    retain: Text = "prose",
    sites: Annotated[
        str | None, typer.Option(help="Which neurons; MLP by default, attention too if --learned.")
    ] = None,
    importance: Annotated[str, typer.Option(help="abs, rms, std, gxa, fisher, ...")] = "abs",
    combine: Annotated[str, typer.Option(help="difference, ratio, logratio, rank, setdiff.")] = "difference",
    steps: Annotated[int, typer.Option(help="Prune in this many steps, collecting again before each.")] = 1,
    max_retain_drop: Annotated[
        float | None, typer.Option(help="Largest drop on the retain set, per cent; exit 3 if exceeded at once.")
    ] = None,
    cap_per_layer: Annotated[float | None, typer.Option(help="Largest share of a layer that may go.")] = None,
    control: Annotated[int, typer.Option(help="Random controls to measure beside the edit.")] = 0,
    tokens: Tokens = 8000,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dry_run: Annotated[bool, typer.Option(help="Show the plan and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing directory.")] = False,
    structure: Structure = "keep",
    layout: Layout = "uniform",
    multiple: Multiple = None,
    json: Json = False,
) -> None:
    """Prune the neurons most specific to the forget set, measure both sets, and write an edit or a checkpoint."""
    from repedit.cli import output
    from repedit.neurons.pruning import PruningOptions, run_pruning

    shape = shaped(out, structure, layout, multiple)
    options = PruningOptions(
        fraction=fraction, learned=learned, sites=sites, importance=importance, combine=combine, steps=steps, max_retain_drop=max_retain_drop,
        cap_per_layer=cap_per_layer, control=control, tokens=tokens, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    if not dry_run:
        check_out(out, model, scores, forget, retain, overwrite=overwrite)
    subject = opened(model, device, dtype)
    found = run_pruning(subject, forget, retain, options, scores=scores, on_stage=output.stage)
    plan = plan_of(found.edit, subject, shape) if dry_run and not found.exceeded else ""
    _show(found, out, dry_run, plan, json)
    if found.exceeded:
        output.err.print(f"Nothing written: the retain drop exceeds {max_retain_drop} % at once; lower --fraction")
        raise typer.Exit(3)
    if not dry_run:
        write(found.edit, subject, out, overwrite, shape)


def _show(found: Any, out: Path, dry_run: bool, plan: str, json: bool) -> None:
    from repedit.cli import output

    if json:
        drops = {
            label: {"forget": f.plain()["drop_percent"], "retain": r.plain()["drop_percent"]}
            for label, (f, r) in found.effects.items()
        }
        held = {"drops": drops, "pruned": found.count, "out": str(out), "dry_run": dry_run}
        output.show_json(held | ({"plan": plan.splitlines()} if plan else {}))
    else:
        title = f"{found.count} neurons pruned; drops in per cent of the original top-1 accuracy (95 % interval)"
        output.table(title, ("", "forget", "retain", "selectivity"), output.effect_rows(found.effects))
        if plan:
            output.out.print(plan)


def _scored(
    subject: Any, forget: str, retain: str, sites: str, importance: str, combine: str, tokens: int, batch_size: int
) -> Any:
    from repedit import data
    from repedit.errors import ArgumentError
    from repedit.neurons.pruning import collect_pair, load_collection
    from repedit.neurons.scores import score as scored

    saved = [name.endswith(".safetensors") for name in (forget, retain)]
    if any(saved) and not all(saved):
        raise ArgumentError(f"--forget {forget} and --retain {retain}: give two collections, or two texts")
    if all(saved):
        sides = load_collection(forget, subject), load_collection(retain, subject)
    else:
        texts = data.read(forget), data.read(retain)
        sides = collect_pair(subject, *texts, sites, importance, combine, tokens=tokens, batch_size=batch_size)
    return scored(*sides, importance=importance, combine=combine)
