"""Verbs to begin with: demo and fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repedit.cli.options import Json, Seed, Tokens, quiet


def demo(
    out: Annotated[Path, typer.Option(help="Directory of the edited checkpoint.")] = Path("edited"),
    model: Annotated[str, typer.Option(help="Model to edit.")] = "smollm2-135m",
    tokens: Tokens = 3000,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Prune the code neurons of the default model, export it, and compare it with the original."""
    from repedit import console
    from repedit.walkthrough import walkthrough

    quiet()
    found = walkthrough(model, out, tokens=tokens, seed=seed, say=console.stage)
    if json:
        console.show_json(
            console.comparison_json(found.comparison) | {"target": found.target, "figures": found.figures}
        )
        return
    pruned = sum(map_.rank_removed for map_ in found.edit.maps.values())
    rows = console.comparison_rows(found.comparison)
    console.table(
        f"{pruned} of {found.total} MLP neurons pruned (the 1 % most specific to code)",
        console.COMPARISON_COLUMNS,
        rows,
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


def fetch(
    name: Annotated[str, typer.Argument(help="Built-in model.")] = "smollm2-135m",
    force: Annotated[bool, typer.Option(help="Download and convert again.")] = False,
    json: Json = False,
) -> None:
    """Download, check and convert the default model once; offline afterwards."""
    from repedit import console
    from repedit.fetching import fetch as get

    console.stage(f"{name}: about 93 MB to download, 540 MB on disk; under two minutes, at once if it is there already")
    quiet()
    path = get(name, force=force)
    console.show_json({"path": str(path)}) if json else console.out.print(str(path), soft_wrap=True)
