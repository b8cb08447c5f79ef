"""Verbs to begin with: demo and fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from repedit.cli.options import Json, Seed, Tokens, quiet


def demo(
    out: Annotated[
        Path, typer.Option(help="Directory of the first edited checkpoint; the second gets '-capitals'.")
    ] = Path("edited"),
    model: Annotated[str, typer.Option(help="Model to edit.")] = "smollm2-135m",
    tokens: Tokens = 3000,
    act: Annotated[str, typer.Option(help="code (pruning), capitals (projection), or both.")] = "both",
    steps: Annotated[int, typer.Option(help="Training steps of the second act.")] = 30,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Prune the code neurons of the default model; make it forget the capitals; export both and compare."""
    from repedit.cli import output
    from repedit.demo import forget_capitals, walkthrough
    from repedit.errors import ArgumentError, UnknownName, nearest
    from repedit.io.targets import check_target

    quiet()
    if act not in ("both", "code", "capitals"):
        raise UnknownName(f"act={act!r}; {nearest(act, ('both', 'code', 'capitals'))}")
    if out.name in ("", ".."):
        raise ArgumentError(
            f"--out {out} has no name that the second directory could go by; give the name of a new directory"
        )
    place = out.with_name(f"{out.name}-capitals")
    for target in (out,) * (act != "capitals") + (place,) * (act != "code"):
        check_target(target, overwrite=True)
    found: dict[str, Any] = {}
    if act in ("both", "code"):
        first = walkthrough(model, out, tokens=tokens, seed=seed, say=output.stage)
        found["code"] = output.comparison_json(first.comparison) | {"target": first.target, "figures": first.figures}
        if not json:
            _show_pruning(first)
    if act in ("both", "capitals"):
        second = forget_capitals(model, place, steps=steps, seed=seed, say=output.stage)
        found["capitals"] = output.forgotten_json(second)
        if not json:
            _show_forgotten(second)
    if json:
        output.show_json(found)


def _show_pruning(found: Any) -> None:
    from repedit.cli import output

    pruned = sum(map_.rank_removed for map_ in found.edit.maps.values())
    rows = output.comparison_rows(found.comparison)
    output.table(
        f"{pruned} of {found.total} MLP neurons pruned (the 1 % most specific to code)",
        output.COMPARISON_COLUMNS,
        rows,
    )
    drops = {name: (found.comparison.effect(name).drop, change.drop) for name, change in found.control.items()}
    output.table(
        "Is it the right neurons, or any neurons? Relative drop, per cent",
        ("pruned", "code", "prose", "selectivity (code minus prose)"),
        [
            [
                label,
                *(output.percent(drops[name][i]) for name in ("code", "prose")),
                output.percent(drops["code"][i] - drops["prose"][i]),
            ]
            for i, label in enumerate(("neurons specific to code", "as many random neurons in each layer"))
        ],
    )
    comparison = found.comparison
    output.show_generations(comparison.prompts, comparison.base_text, comparison.edited_text)
    output.out.print(f"{found.target}/ is a plain checkpoint: AutoModelForCausalLM.from_pretrained('{found.target}')")
    output.out.print(f"Figures: {', '.join(str(path) for path in found.figures)}")
    output.out.print("Pruned is not proved gone: a little fine-tuning may bring the capability back.")


def _show_forgotten(found: Any) -> None:
    from repedit.cli import output

    rows = output.knowledge_rows(found.trained, {"capitals"})
    (unseen,) = output.knowledge_rows({"capitals, in words training never saw": found.unseen}, {*()})
    rows.insert(1, [unseen[0], "forget", *unseen[2:]])
    ranks = {map_.rank_removed for map_ in found.edit.maps.values()}
    title = (
        f"Projections of rank {max(ranks)} at {len(found.edit.maps)} MLP outputs, folded into the weights: facts right"
    )
    output.table(title, output.KNOWLEDGE_COLUMNS, rows)
    output.show_generations(found.prompts, found.before, found.after)
    leak = found.manifest.certificate["worst_leak"]
    output.out.print(f"{found.target}/ is a plain checkpoint; the largest leak along a removed direction is {leak:.0e}")
    output.out.print("Folded is not proved forgotten: other paths may hold the facts, and half of them teach the rest.")


def fetch(
    name: Annotated[str, typer.Argument(help="Built-in model.")] = "smollm2-135m",
    force: Annotated[bool, typer.Option(help="Download and convert again.")] = False,
    json: Json = False,
) -> None:
    """Download, check and convert the default model once; offline afterwards."""
    from repedit.cli import output
    from repedit.models.default_model import fetch as get

    output.stage(f"{name}: about 93 MB to download, 540 MB on disk; under two minutes, at once if it is there already")
    quiet()
    path = get(name, force=force)
    output.show_json({"path": str(path)}) if json else output.out.print(str(path), soft_wrap=True)
