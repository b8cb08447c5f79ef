"""The verbs of image classifiers, under `repedit vision`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repedit.cli.application import Json, Seed, Verb, epilog

if TYPE_CHECKING:
    from repedit.demo import ImageDemo

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
    results = [
        forget_images(request, data, recipes=recipe, references=references, seed=seed, say=output.stage)
        for request in forget or ("class:3", "mislabelled:0.1")
    ]
    files = [path for result in results for path in ([] if out is None else _written(result, out))]
    if json:
        output.show_json({result.request: _demo_values(result) for result in results})
        return
    for result in results:
        _show(result)
    output.show_files(files)


def _show(result: ImageDemo) -> None:
    from repedit.cli import output
    from repedit.demo import COLUMNS

    counts = f"{len(result.splits.forget)} forget and {len(result.splits.holdout)} holdout images"
    output.table(
        f"{result.request}, {counts}: gap to {len(result.references)} retrained models (edited - retrained)",
        COLUMNS,
        result.rows(),
    )
    for name, reason in result.refused.items():
        output.out.print(f"{name} was not run: {reason}")
    output.out.print(
        "0 is a model that never saw the images; a gap below 0 is no better than one above. No recovery found is no proof of deletion."
    )


def _written(result: ImageDemo, out: Path) -> list[Path]:
    """Write one report for each recipe, and the figure of all; returns their paths."""
    from repedit.plot import gap
    from repedit.report import write

    folder = out / result.request.replace(":", "-")
    reports = result.reports.items()
    paths = [path for name, report in reports for path in write(report, folder / name.replace(" ", "-"))]
    gap(result.reports).savefig(folder / "gap.png", dpi=150)
    return [*paths, folder / "gap.png"]


def _demo_values(result: ImageDemo) -> dict[str, Any]:
    """The result as plain values."""
    from dataclasses import asdict

    return {
        "recipes": {
            name: {
                "verdict": report.verdict.word, "rule": report.verdict.rule, "seconds": dict(result.seconds[name]),
                "gaps": {gap.measure: asdict(gap) for gap in report.gaps},
            }
            for name, report in result.reports.items()
        },
        "retraining_seconds": result.retraining, "refused": dict(result.refused), "references": len(result.references),
        "sets": {name: len(images) for name, images in result.splits.sets.items()},
    }  # fmt: skip
