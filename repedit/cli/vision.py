"""The verbs of image classifiers, under `repedit vision`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from repedit.cli.options import Json, Seed, Verb, epilog

app = typer.Typer(help="Make an image classifier forget, and compare it with one that never saw the images.", no_args_is_help=True)  # fmt: skip


@app.callback()
def group() -> None:
    """Make an image classifier forget, and compare it with one that never saw the images."""


@app.command(epilog=epilog("vision demo"), cls=Verb)
def demo(
    data: Annotated[
        str, typer.Option(help="digits (in scikit-learn), or mnist5k and cifar6k where they are.")
    ] = "digits",
    forget: Annotated[
        list[str] | None, typer.Option(help="class:3 or mislabelled:0.1; can be given twice. Both by default.")
    ] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="A recipe; can be given again. All by default.")] = None,
    references: Annotated[int, typer.Option(help="Models retrained for comparison.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Where pages, JSON and figures go.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Forget a class, and wrong labels, by every recipe; the gap of each to models retrained without the images."""
    from repedit.cli import output
    from repedit.demo import forget_images
    from repedit.io.targets import check_folder

    check_folder(out)
    found = [
        forget_images(request, data, recipes=recipe, references=references, seed=seed, say=output.stage)
        for request in forget or ("class:3", "mislabelled:0.1")
    ]
    written = [path for one in found for path in ([] if out is None else _written(one, out))]
    if json:
        output.show_json({one.request: _plain(one) for one in found})
        return
    for one in found:
        _show(one)
    for path in written:
        output.out.print(f"wrote {path}", soft_wrap=True)


def _show(found: Any) -> None:
    from repedit.cli import output
    from repedit.demo import COLUMNS

    counts = f"{len(found.splits.forget)} forget and {len(found.splits.holdout)} holdout images"
    output.table(
        f"{found.request}, {counts}: gap to {len(found.references)} retrained models (edited - retrained)",
        COLUMNS,
        found.rows(),
    )
    for name, reason in found.refused.items():
        output.out.print(f"{name} was not run: {reason}")
    output.out.print(
        "0 is a model that never saw the images; a gap below 0 is no better than one above. No recovery found is no proof of deletion.",
    )


def _written(found: Any, out: Path) -> list[Path]:
    """One report a recipe, and the figure of all."""
    from repedit.plot import gap
    from repedit.report import write

    folder = out / found.request.replace(":", "-")
    paths = [path for name, report in found.reports.items() for path in write(report, folder / name.replace(" ", "-"))]
    gap(found.reports).savefig(folder / "gap.png", dpi=150)
    return [*paths, folder / "gap.png"]


def _plain(found: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "recipes": {
            name: {
                "verdict": report.verdict.word, "rule": report.verdict.rule, "seconds": dict(found.seconds[name]),
                "gaps": {gap.measure: asdict(gap) for gap in report.gaps},
            }
            for name, report in found.reports.items()
        },
        "retraining_seconds": found.retraining, "refused": dict(found.refused), "references": len(found.references),
        "sets": {name: len(images) for name, images in found.splits.sets.items()},
    }  # fmt: skip
