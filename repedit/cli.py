"""The command line: one function a verb; each parses, calls one public function and shows what it returns.

Exit codes: 0 done, 1 unexpected exception, 2 bad input, 3 the retain limit was exceeded at once (prune).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="repedit",
    help="See what a capability of a language model is made of, cut it out of the weights, and test what is left.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Directory, GGUF file, 'smollm2-135m' or hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Dtype = Annotated[str, typer.Option(help="auto keeps the checkpoint's; or float32, bfloat16, float16.")]
BatchSize = Annotated[int, typer.Option(help="Chunks of text at a time.")]
Tokens = Annotated[int, typer.Option(help="Counted tokens to collect, and to evaluate, on each set.")]
Text = Annotated[str, typer.Option(help="'code', 'prose', or a .txt, .jsonl or .parquet file.")]
Sites = Annotated[str, typer.Option(help="Where the neurons are: '*.mlp.neurons', '4-9.attn.neurons', ...")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory of the edited checkpoint.")] = Path("edited"),
    model: Annotated[str, typer.Option(help="Model to edit.")] = "smollm2-135m",
    tokens: Tokens = 4000,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Prune the code neurons of the default model, export it, and compare it with the original."""
    from repedit import console
    from repedit.walkthrough import walkthrough

    _quiet()
    found = walkthrough(model, out, tokens=tokens, seed=seed, say=console.stage)
    if json:
        console.show_json(
            console.comparison_json(found.comparison) | {"target": found.target, "figures": found.figures}
        )
        return
    pruned = sum(map_.rank_removed for map_ in found.edit.maps.values())
    total = sum(map_.width for map_ in found.edit.maps.values())
    rows = console.comparison_rows(found.comparison)
    console.table(
        f"{pruned} of {total} MLP neurons pruned (the 1 % most specific to code)", console.COMPARISON_COLUMNS, rows
    )
    drops = {name: (found.comparison.effect(name).drop, change.drop) for name, change in found.control.items()}
    console.table(
        "Is it the right neurons, or any neurons? Relative drop, per cent",
        ("pruned", "code", "prose", "selectivity (code minus prose)"),
        [
            [
                label,
                *(f"{drops[name][i]:.1f}" for name in ("code", "prose")),
                f"{drops['code'][i] - drops['prose'][i]:.1f}",
            ]
            for i, label in enumerate(("neurons specific to code", "as many random neurons in each layer"))
        ],
    )
    console.show_generations(found.comparison)
    console.out.print(
        f"[bold]{found.target}/[/bold] is a plain checkpoint: AutoModelForCausalLM.from_pretrained('{found.target}')"
    )
    console.out.print(f"Figures: {', '.join(str(path) for path in found.figures)}")
    console.out.print("Pruned is not proved gone: a little fine-tuning may bring the capability back.")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Built-in model.")] = "smollm2-135m",
    force: Annotated[bool, typer.Option(help="Download and convert again.")] = False,
    json: Json = False,
) -> None:
    """Download, check and convert the default model once; offline afterwards."""
    from repedit import console
    from repedit.fetching import fetch as get

    console.stage(f"{name}: about 93 MB to download, 540 MB on disk; under two minutes, at once if it is there already")
    _quiet()
    path = get(name, force=force)
    console.show_json({"path": str(path)}) if json else console.out.print(str(path), soft_wrap=True)


@app.command()
def doctor(model: Model, device: Device = "auto", dtype: Dtype = "auto", json: Json = False) -> None:
    """Prove on a real forward pass that repedit edits this model where it says it does."""
    from repedit import console
    from repedit.arch.check import check_architecture

    subject = _load(model, device, dtype)
    report = check_architecture(subject.model)
    rows = [[str(p.site), p.site.hook_name, p.moved, p.error, p.note.strip("; ")] for p in report.proofs]
    if json:
        console.show_json({"model_type": report.model_type, "passed": report.passed, "proofs": rows})
        return
    columns = ("site", "TransformerLens name", "logits moved", "hook against weights", "note")
    console.table(
        f"{report.model_type}: every tap edited by hook and in the weights (shares of the logits' spread)",
        columns,
        rows,
    )
    console.out.print(
        f"{len(rows)} taps passed; dtype {subject.model.dtype}, device {subject.device}, quantiser {subject.quantizer}"
    )


@app.command()
def inspect(
    model: Model,
    sites: Annotated[
        str, typer.Option(help="Which sites to list.")
    ] = "0.mlp.neurons,0.attn.neurons,0.mlp.out,0.attn.out,0.resid.pre",
    json: Json = False,
) -> None:
    """Show where this model can be cut: sites, module paths, tensors, widths and exactness."""
    from repedit import console
    from repedit.edit import exactness

    subject = _load(model, "auto", "auto")
    chosen = {str(site): site for site in subject.select(sites)}
    rows = [
        row | {"exactness": exactness(chosen[row["site"]], subject.anatomy)}
        for row in subject.sites()
        if row["site"] in chosen
    ]
    if json:
        console.show_json(
            {"model_type": subject.architecture.model_type, "fingerprint": subject.fingerprint(), "sites": rows}
        )
        return
    columns = ("site", "hook", "module", "tensor", "width", "experts", "exactness")
    plan = subject.anatomy
    console.table(
        f"{subject.architecture.model_type}: {len(plan.layers)} layers of width {plan.width}, {subject.architecture.n_heads} heads, "
        f"tied {subject.architecture.tied}", columns, [[row[c] for c in columns] for row in rows],
    )  # fmt: skip


@app.command()
def score(
    model: Model,
    out: Annotated[Path, typer.Option(help="Where to write the scores (.safetensors).")],
    forget: Text = "code",
    retain: Text = "prose",
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
    from repedit import console

    subject = _load(model, device, dtype)
    scores = _scored(subject, forget, retain, sites, importance, combine, tokens, batch_size)
    scores.save(out)
    counts = {role: row["tokens"] for role, row in scores.provenance["data"].items()}
    found = {
        "out": str(out),
        "tokens": counts,
        "agreement": scores.agreement,
        "sinks": sum(len(s.sinks) for s in scores.values()),
    }
    if json:
        console.show_json(found)
        return
    best = sorted(
        ((float(v), str(site), i) for site, s in scores.items() for v, i in zip(*s.values.topk(3), strict=True)),
        reverse=True,
    )
    console.table("Most specific neurons", ("site", "neuron", "score"), [[site, int(i), v] for v, site, i in best[:10]])
    console.out.print(
        f"{counts['forget']} forget and {counts['retain']} retain tokens; median rank correlation {scores.agreement:.2f}; written to {out}"
    )


@app.command()
def prune(
    model: Model,
    fraction: Annotated[float, typer.Option(help="Share of all scored neurons to prune, in [0, 1].")],
    out: Annotated[Path, typer.Option(help="x.safetensors writes the edit, a directory the edited checkpoint.")],
    scores: Annotated[
        Path | None, typer.Option(help="Scores written by `repedit score`; else --forget and --retain.")
    ] = None,
    forget: Text = "code",
    retain: Text = "prose",
    sites: Sites = "*.mlp.neurons",
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
    json: Json = False,
) -> None:
    """Prune the neurons most specific to the forget set, measure both sets, and write an edit or a checkpoint."""
    from repedit import console
    from repedit.pruning import PruneOptions, pruned

    subject = _load(model, device, dtype)
    options = PruneOptions(
        fraction=fraction, sites=sites, importance=importance, combine=combine, steps=steps, max_retain_drop=max_retain_drop,
        cap_per_layer=cap_per_layer, control=control, tokens=tokens, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    found = pruned(subject, forget, retain, options, scores=scores, say=console.stage)
    rows = [
        [
            label,
            f"{f.drop:.1f} ({f.low:.1f} to {f.high:.1f})",
            f"{r.drop:.1f} ({r.low:.1f} to {r.high:.1f})",
            f"{f.drop - r.drop:.1f}",
        ]
        for label, (f, r) in found.effects.items()
    ]
    if json:
        console.show_json(
            {
                "drops": {k: {"forget": f.drop, "retain": r.drop} for k, (f, r) in found.effects.items()},
                "pruned": found.count,
                "out": str(out),
                "dry_run": dry_run,
            }
        )
    else:
        console.table(
            f"{found.count} neurons pruned; drops in per cent of the original top-1 accuracy (95 % interval)",
            ("", "forget", "retain", "selectivity"),
            rows,
        )
    if found.exceeded:
        console.err.print(
            f"[bold]Nothing written[/bold]: the retain drop exceeds {max_retain_drop} % at once; lower --fraction"
        )
        raise typer.Exit(3)
    if not dry_run:
        _write(found.edit, subject, out, overwrite)
    elif not json:
        console.out.print(_plan(found.edit, subject), highlight=False)


@app.command()
def apply(
    edit: Annotated[Path, typer.Argument(help="A saved edit (.safetensors).")],
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Directory of the edited checkpoint.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Convert every tensor, to bfloat16 say.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Show the plan and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing directory.")] = False,
    verify: Annotated[bool, typer.Option(help="Load the result in a process without repedit.")] = True,
    json: Json = False,
) -> None:
    """Write the checkpoint of a saved edit, streamed from the files of the model."""
    from repedit import console
    from repedit.edit import Edit
    from repedit.errors import ArgumentError
    from repedit.rewrite.checkpoint import export

    loaded = Edit.load(edit)
    if dry_run:
        console.out.print(_plan(loaded, _load(model, "auto", "auto")), highlight=False)
        return
    if out is None:
        raise ArgumentError("--out is needed: the directory to write (or --dry-run)")
    source: Any = model if Path(model).is_dir() or model == "smollm2-135m" else _load(model, "auto", "auto")
    record = export(loaded, source, out, dtype=dtype, overwrite=overwrite)
    if verify:
        _verify(out)
    if json:
        console.show_json(
            {"out": str(out), "tensors": len(record.plan), "largest_relative_change": record.relative_change}
        )
    else:
        console.out.print(
            f"{out}: {len(record.plan)} tensors changed, largest relative change {record.relative_change:.3g}"
        )


@app.command()
def diff(base: Model, edited: Annotated[str, typer.Argument(help="The other checkpoint.")], json: Json = False) -> None:
    """List every tensor that differs between two checkpoints."""
    from dataclasses import asdict

    from repedit import console
    from repedit.rewrite.difference import diff as differences

    found = differences(base, edited)
    if json:
        console.show_json([asdict(d) for d in found])
        return
    columns = ("tensor", "norm", "relative", "rank", "rows", "columns")
    console.table(
        f"{len(found)} tensors differ",
        columns,
        [[getattr(d, c) if getattr(d, c) is not None else "" for c in columns] for d in found],
    )


@app.command()
def compare(
    base: Model,
    edited: Annotated[str, typer.Argument(help="The other checkpoint.")],
    text: Annotated[list[str] | None, typer.Option(help="A corpus to measure; repeat for several.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to continue; repeat for several.")] = None,
    tokens: Tokens = 4000,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Perplexity, top-1 accuracy and generations of two checkpoints, side by side."""
    from repedit import console, data
    from repedit.metrics.comparison import compare as compared
    from repedit.walkthrough import PROMPTS

    subjects = [_load(name, device, dtype) for name in (base, edited)]
    corpora: list[Any] = [data.read(name) for name in text or ["code", "prose"]]
    found = compared(
        subjects[0], subjects[1], corpora, prompts=prompt or PROMPTS, limit_tokens=tokens, batch_size=batch_size
    )
    if json:
        console.show_json(console.comparison_json(found))
        return
    console.table(f"{base} against {edited}", console.COMPARISON_COLUMNS, console.comparison_rows(found))
    console.show_generations(found)


def main() -> None:
    """Run the command line; bad input ends with exit code 2 and one message."""
    from repedit.errors import RepeditError

    try:
        app()
    except RepeditError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(2)


def _quiet() -> None:
    """Hide the loading bars of transformers: they say nothing a user of these commands needs."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _load(model: str, device: str, dtype: str) -> Any:
    from repedit.models import load

    _quiet()

    return load(model, device=device, dtype=dtype)


def _scored(
    subject: Any, forget: str, retain: str, sites: str, importance: str, combine: str, tokens: int, batch_size: int
) -> Any:
    from repedit import data
    from repedit.importance import score as scored
    from repedit.pruning import collected

    sides = collected(
        subject, data.read(forget), data.read(retain), sites, importance, combine, tokens=tokens, batch_size=batch_size
    )
    return scored(*sides, importance=importance, combine=combine)


def _write(edit: Any, subject: Any, out: Path, overwrite: bool) -> None:
    from repedit import console
    from repedit.rewrite.checkpoint import export

    if out.suffix == ".safetensors":
        edit.save(out)
    else:
        export(edit, subject, out, overwrite=overwrite)
        _verify(out)
    console.err.print(f"written: {out}")


def _verify(out: Path) -> None:
    from repedit import console
    from repedit.rewrite.reloading import reload_check

    found = reload_check(out)
    console.err.print(
        f"verified: plain transformers loads {found.parameters:,} parameters in a process without repedit"
    )


def _plan(edit: Any, subject: Any) -> str:
    from repedit.lower import lower

    return lower(edit, subject.architecture, subject.specs).summary(subject.specs)
