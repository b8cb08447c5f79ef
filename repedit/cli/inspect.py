"""Verbs that look and change nothing: doctor, inspect, diff, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from repedit.cli.options import BatchSize, Device, Dtype, Json, Model, Tokens, opened


def doctor(model: Model, device: Device = "auto", dtype: Dtype = "auto", json: Json = False) -> None:
    """Prove on a real forward pass that repedit edits this model where it says it does."""
    from repedit.arch.check import check_architecture
    from repedit.cli import output
    from repedit.kernels.dispatch import choose

    subject = opened(model, device, dtype)
    report = check_architecture(subject.model)
    rows = [[str(p.site), p.moved, p.error, p.note.strip("; ")] for p in report.proofs]
    widths = sorted({row["width"] for row in subject.sites()})
    kernels = {width: choose(subject.device, subject.model.dtype, (width, 16)) for width in widths}
    if json:
        output.show_json({"model_type": report.model_type, "passed": report.passed, "proofs": rows, "kernels": kernels})
        return
    columns = ("site", "moved", "hook against weights", "note")
    output.table(
        f"{report.model_type}: every tap edited by hook and in the weights (shares of the spread of what the layer adds)",
        columns,
        rows,
    )
    output.out.print(
        f"{len(rows)} taps passed; dtype {subject.model.dtype}, device {subject.device}, quantiser {subject.quantizer}"
    )
    for width, (name, reason) in kernels.items():
        output.out.print(f"projection of rank 16 at width {width}: {name} ({reason})")


def inspect(
    model: Model,
    sites: Annotated[
        str, typer.Option(help="Which sites to list.")
    ] = "0.mlp.neurons,0.attn.neurons,0.mlp.out,0.attn.out,0.resid.pre",
    json: Json = False,
) -> None:
    """Show where this model can be cut: sites, module paths, tensors, widths and exactness."""
    from repedit.cli import output
    from repedit.edit import exactness

    subject = opened(model, "auto", "auto")
    chosen = {str(site): site for site in subject.select(sites)}
    rows = [
        row | {"exactness": exactness(chosen[row["site"]], subject.layout)}
        for row in subject.sites()
        if row["site"] in chosen
    ]
    if json:
        output.show_json(
            {"model_type": subject.architecture.model_type, "fingerprint": subject.fingerprint(), "sites": rows}
        )
        return
    columns = ("site", "hook", "tensor", "width", "experts", "exactness")
    plan = subject.layout
    output.table(
        f"{subject.architecture.model_type}: {len(plan.layers)} layers of width {plan.width}, {subject.architecture.n_heads} heads, "
        f"tied {subject.architecture.tied}", columns, [[row[c] for c in columns] for row in rows],
    )  # fmt: skip


def diff(base: Model, edited: Annotated[str, typer.Argument(help="The other checkpoint.")], json: Json = False) -> None:
    """List every tensor that differs between two checkpoints."""
    from dataclasses import asdict

    from repedit.cli import output
    from repedit.rewrite.diff import diff as differences

    found = differences(base, edited)
    if json:
        output.show_json([asdict(d) for d in found])
        return
    columns = ("tensor", "norm", "relative", "rank", "rows", "columns")
    output.table(
        f"{len(found)} tensors differ",
        columns,
        [[getattr(d, c) if getattr(d, c) is not None else "" for c in columns] for d in found],
    )


def compare(
    base: Model,
    edited: Annotated[str, typer.Argument(help="The other checkpoint.")],
    text: Annotated[list[str] | None, typer.Option(help="A corpus to measure; repeat for several.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to continue; repeat for several.")] = None,
    metrics: Annotated[
        str,
        typer.Option(help="Benchmarks instead: tofu, semeval, muse, membership; several with commas. Needs --data."),
    ] = "",
    folder: Annotated[
        Path | None,
        typer.Option("--data", help="Holds the data of --metrics, or the folders tofu, semeval, muse, mmlu."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each part of --metrics; all by default.")] = None,
    tokens: Tokens = 4000,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Perplexity, top-1 accuracy and generations of two checkpoints, side by side; or published benchmarks."""
    from repedit import data
    from repedit.cli import output
    from repedit.demo import PRUNING_PROMPTS
    from repedit.errors import ArgumentError
    from repedit.metrics.benchmarks import compare as compared

    if bool(metrics) != (folder is not None):
        raise ArgumentError(f"--metrics {metrics!r} with --data {folder}; give both, or neither")
    subjects = [opened(name, device, dtype) for name in (base, edited)]
    if folder is not None:
        _benchmarks(subjects, metrics.split(","), folder, limit, json)
        return
    corpora: list[Any] = [data.read(name) for name in text or ["code", "prose"]]
    prompts = tuple(prompt or PRUNING_PROMPTS)
    streamed = output.out.is_terminal and not json  # the same texts, seen as they are written
    found = compared(
        subjects[0],
        subjects[1],
        corpora,
        prompts=() if streamed else prompts,
        limit_tokens=tokens,
        batch_size=batch_size,
    )
    if json:
        output.show_json(output.comparison_json(found))
        return
    output.table(f"{base} against {edited}", output.COMPARISON_COLUMNS, output.comparison_rows(found))
    if streamed:
        _stream(subjects, (base, edited), prompts)
    else:
        output.show_generations(found.prompts, found.base_text, found.edited_text)


def _stream(subjects: list[Any], names: tuple[str, str], prompts: tuple[str, ...]) -> None:
    """What both models write after each prompt, side by side as it comes."""
    from repedit.cli import output
    from repedit.metrics.generation import side_by_side

    for prompt in prompts:
        output.out.print(f"> {prompt}")
        output.show_beside(names, side_by_side(subjects, [prompt, prompt], max_new_tokens=40))


def _benchmarks(subjects: list[Any], names: list[str], folder: Path, limit: int | None, json: bool) -> None:
    """Every part of each benchmark before and after, with the verdict."""
    from repedit.cli import output
    from repedit.metrics.benchmarks import compare_benchmarks

    found = compare_benchmarks(subjects[0], subjects[1], names, folder, limit=limit)
    if json:
        output.show_json({name: {"values": dict(b.values), "verdict": b.verdict} for name, b in found.items()})
        return
    for name, beside in found.items():
        rows = [[part, f"{before:.3f}", f"{after:.3f}"] for part, (before, after) in beside.values.items()]
        output.table(name, ("part", "base", "edited"), rows)
        output.out.print(beside.verdict)
