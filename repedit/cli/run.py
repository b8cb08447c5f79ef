"""Verbs that carry out many steps: the demos, and all steps of one TOML file (run, reproduce); and the page of such a run."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from repedit.cli.application import Json, LimitTokens, Seed, Verb, epilog, hide_progress_bars, verbs

if TYPE_CHECKING:
    from repedit.demo import CapitalsDemo, ImageDemo, PruningDemo
    from repedit.runs import Execute, Step


# --- demo


def demo(
    out: Annotated[
        Path,
        typer.Option(
            help="Directory of the checkpoint without code; that without capitals is written to the same name with '-capitals' added."
        ),
    ] = Path("edited"),
    model: Annotated[str, typer.Option(help="Model to edit.")] = "smollm2-135m",
    limit_tokens: LimitTokens = 3000,
    act: Annotated[
        Literal["both", "code", "capitals"],
        typer.Option(
            help="code: prune the neurons of code; capitals: project the capitals off; both: one after the other."
        ),
    ] = "code",
    steps: Annotated[int, typer.Option(help="Training steps of the projection.")] = 30,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Prune the code neurons of the default model, or make it forget the capitals; export the result and compare."""
    from repedit.cli import output
    from repedit.demo import forget_capitals, prune_code
    from repedit.errors import ArgumentError
    from repedit.io.targets import check_target

    hide_progress_bars()
    if out.name in ("", ".."):
        raise ArgumentError(
            f"--out {out} has no name that the second directory could be named after; give the name of a new directory"
        )
    second_out = out.with_name(f"{out.name}-capitals")
    for target in (out,) * (act != "capitals") + (second_out,) * (act != "code"):
        check_target(target, overwrite=True)
    results: dict[str, Any] = {}
    if act in ("both", "code"):
        first = prune_code(model, out, tokens=limit_tokens, seed=seed, say=output.stage)
        results["code"] = output.comparison_json(first.comparison) | {"target": first.target, "figures": first.figures}
        if not json:
            _show_pruning(first)
    if act in ("both", "capitals"):
        second = forget_capitals(model, second_out, steps=steps, seed=seed, say=output.stage)
        results["capitals"] = forgotten_json(second)
        if not json:
            _show_forgotten(second)
    if json:
        output.show_json(results)
        return
    output.out.print("Next:")
    for command, purpose in _next_commands(act, model, out, second_out):
        output.out.print(f"  {command:<66} {purpose}", soft_wrap=True)


def _next_commands(act: str, model: str, out: Path, second_out: Path) -> list[tuple[str, str]]:
    """Three commands to continue with after an act, and what each does."""
    edited = second_out if act == "capitals" else out
    chat = f"repedit chat {shlex.quote(str(edited))} --original {shlex.quote(model)}"
    more = {
        "code": ("repedit demo --act capitals", "make it forget facts by a projection (three minutes)"),
        "capitals": ("repedit demo --act code", "prune the neurons of code (one minute)"),
        "both": ("repedit score --help", "score the neurons of your own texts"),
    }
    audited = f"repedit audit {shlex.quote(str(second_out))} --original {shlex.quote(model)} --facts capitals"
    attack = ("repedit audit --help", "attack an edited checkpoint and say what has been shown")
    return [(chat, "ask both models the same"), more[act], attack if act == "code" else (audited, attack[1])]


def forgotten_json(result: CapitalsDemo) -> dict[str, Any]:
    """The second act as plain values."""
    from repedit.cli import output

    knowledge = {**result.trained, "capitals, unseen phrasing": result.unseen}
    return {
        "facts": {
            name: {"before": k.before.accuracy, "after": k.after.accuracy, "interval": k.after.interval}
            for name, k in knowledge.items()
        },
        "generations": output.generations_json(result.prompts, result.before, result.after),
        "certificate": {k: v for k, v in (result.manifest.certificate or {}).items() if k != "tensors"},
        "target": result.target,
    }


def _show_pruning(result: PruningDemo) -> None:
    from repedit.cli import output

    comparison = result.comparison
    pruned = sum(map_.rank_removed for map_ in result.edit.maps.values())
    output.show_comparison(f"{pruned} of {result.total} MLP neurons pruned (the 1 % most specific to code)", comparison)
    drops = {
        "neurons specific to code": {name: comparison.effect(name).drop for name in result.control},
        "as many random neurons in each layer": {name: effect.drop for name, effect in result.control.items()},
    }
    output.table(
        "Is it the right neurons, or any neurons? Relative drop, per cent",
        ("pruned", "code", "prose", "selectivity (code minus prose)"),
        [
            [label, *(output.percent(value) for value in (d["code"], d["prose"], d["code"] - d["prose"]))]
            for label, d in drops.items()
        ],
    )
    output.show_generations(comparison.prompts, comparison.base_text, comparison.edited_text)
    output.out.print(f"{result.target}/ is a plain checkpoint: AutoModelForCausalLM.from_pretrained('{result.target}')")
    output.out.print(f"Figures: {', '.join(str(path) for path in result.figures)}")
    output.out.print("Pruned is not proved gone: a little fine-tuning may bring the capability back.")


def _show_forgotten(result: CapitalsDemo) -> None:
    from repedit.cli import output
    from repedit.rewrite.certificate import Certificate

    rows = output.knowledge_rows(result.trained, {"capitals"})
    (unseen,) = output.knowledge_rows({"capitals, in words training never saw": result.unseen}, ())
    rows.insert(1, [unseen[0], "forget", *unseen[2:]])
    rank = max(map_.rank_removed for map_ in result.edit.maps.values())
    title = f"Projections of rank {rank} at {len(result.edit.maps)} MLP outputs, folded into the weights: facts right"
    output.table(title, output.KNOWLEDGE_COLUMNS, rows)
    output.show_generations(result.prompts, result.before, result.after)
    certificate = Certificate.of(result.manifest.certificate or {})
    output.out.print(f"{result.target}/ is a plain checkpoint; {certificate.summary}")
    output.out.print("Folded is not proved forgotten: other paths may hold the facts, and half of them teach the rest.")


# --- run and reproduce


def run(
    file: Annotated[
        Path, typer.Argument(help="TOML: a model, then a list of step tables, each a verb with its options.")
    ],
    dry_run: Annotated[bool, typer.Option(help="Show which steps are done and which are to do.")] = False,
) -> None:
    """Carry out the steps of a file in order; steps that are done, and whose output is unchanged, are not repeated.

    Paths are relative to the file. If you change a step, its earlier output is replaced; any other file at that path
    stops the run. The exit code is that of the last audit, or of the step that failed. NAME.report.html, written at the
    end, shows the run as its journal beside the file records it.
    """
    from repedit import runs
    from repedit.cli import output
    from repedit.report import write_run

    commands = verbs()
    exit_code = runs.run(
        file, commands, _execute_with(commands), output.err.print, check=_check_with(commands), dry_run=dry_run
    )
    if not dry_run:
        output.err.print(f"page: {write_run(file)}", soft_wrap=True)
    raise typer.Exit(exit_code)


def reproduce(file: Annotated[Path, typer.Argument(help="The file of a run that was carried out.")]) -> None:
    """Carry out the steps of a run again in a temporary folder and compare the hashes of all outputs; exit code 1 if one differs."""
    from repedit import runs
    from repedit.cli import output

    commands = verbs()
    identical = runs.reproduce(file, commands, _execute_with(commands), output.out.print)
    raise typer.Exit(0 if identical else 1)


def show_run(paths: Sequence[Path], out: Path | None, hide_items: bool, json: bool) -> None:
    """Write the page of a run, and show the state of each step and what changed since the run.

    Raises:
        ArgumentError: if another path is given along with a run.
    """
    from repedit.cli import output
    from repedit.errors import ArgumentError
    from repedit.report import write_run
    from repedit.runs import run_report

    if len(paths) > 1:
        raise ArgumentError(f"{len(paths)} paths were given and one of them is a run; a run is shown alone")
    report = run_report(paths[0])
    page = write_run(paths[0], out, hide_items=hide_items)
    if json:
        states = [{"step": step.number, "verb": step.verb, "state": step.state} for step in report.steps]
        output.show_json({"page": str(page), "steps": states, "faults": list(report.faults)})
        return
    rows = [[step.number, step.verb, step.state] for step in report.steps]
    output.table(report.file.name, ("step", "verb", "state"), rows)
    for fault in report.faults:
        output.out.print(f"Not as the run left it: {fault}")
    output.show_files([page])


def _execute_with(commands: dict[str, Any]) -> Execute:
    def execute(step: Step, words: list[str]) -> tuple[int, list[dict[str, Any]]]:
        """Call a verb with its words.

        Raises:
            ArgumentError: if the command line cannot read a value.
        """
        from repedit.cli import output

        with output.recorded() as display, _readable(step):
            result = commands[step.verb].main(words, prog_name=f"repedit {step.verb}", standalone_mode=False)
        return (result if isinstance(result, int) else 0), display

    return execute


def _check_with(commands: dict[str, Any]) -> Callable[[Step], None]:
    def check(step: Step) -> None:
        """Refuse options that the verb of a step would refuse before it reads a model.

        Raises:
            ArgumentError, UnknownName: with the number of the step, its verb and the option.
        """
        from repedit.errors import during

        command, place = commands[step.verb], f"step {step.number}, {step.verb}"
        with _readable(step):
            context = command.make_context(step.verb, step.arguments(command))
        if isinstance(command, Verb):
            with during(place, f"while the options of {place} were checked"):
                command.check(context)
                _check_sources(step.verb, context.params)

    return check


def _check_sources(verb: str, values: Mapping[str, Any]) -> None:
    """Refuse names of facts, texts and recipes that do not exist, and settings that a recipe does not have.

    Files are left to the step that reads them: an earlier one may write them.

    Raises:
        UnknownName: with the nearest names.
    """
    from repedit.cli.completion import names, takes_data
    from repedit.errors import check_choice

    for name, value in values.items():
        plain = isinstance(value, str) and "." not in value and not Path(value).exists()
        for part in value.split("+") if plain and takes_data(verb, name) else ():
            check_choice((*names("domains"), *names("texts")), **{f"--{name}": part})
    if verb == "unlearn" and not values["recipe"].endswith(".toml"):
        from repedit.cli.unlearn import recipe_of

        recipe_of(values["recipe"], values["set_"] or [], values["layers"], values["modules"], values["mask"])


@contextlib.contextmanager
def _readable(step: Step) -> Iterator[None]:
    """Name the step whose value the command line cannot read.

    Raises:
        ArgumentError: with the step and the option.
    """
    from repedit.errors import ArgumentError

    try:
        yield
    except typer.BadParameter as error:
        raise ArgumentError(f"step {step.number}, {step.verb}: {error.format_message()}") from error


# --- The verbs of image classifiers, under `repedit vision`


vision = typer.Typer(help="Make an image classifier forget, and compare it with one that never saw the images.", no_args_is_help=True)  # fmt: skip


@vision.callback()
def _vision() -> None:
    """Make an image classifier forget, and compare it with one that never saw the images."""


@vision.command("demo", epilog=epilog("vision demo"), cls=Verb)
def vision_demo(
    data: Annotated[
        str,
        typer.Option(help="digits, which scikit-learn contains; or mnist5k or cifar6k, if they are on this machine."),
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
    """Forget a class, and wrong labels, by every recipe, and show the gap of each to models retrained without the images."""
    from repedit.cli import output
    from repedit.demo import forget_images
    from repedit.io.targets import check_folder

    check_folder(out)
    results = [
        forget_images(request, data, recipes=recipe, references=references, seed=seed, say=output.stage)
        for request in forget or ("class:3", "mislabelled:0.1")
    ]
    files = [path for result in results for path in ([] if out is None else _write_images(result, out))]
    if json:
        output.show_json({result.request: _images_json(result) for result in results})
        return
    for result in results:
        _show_images(result)
    output.show_files(files)


def _show_images(result: ImageDemo) -> None:
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


def _write_images(result: ImageDemo, out: Path) -> list[Path]:
    """Write one report for each recipe, and the figure of all; returns their paths."""
    from repedit.plot import gap
    from repedit.report import write

    folder = out / result.request.replace(":", "-")
    reports = result.reports.items()
    paths = [path for name, report in reports for path in write(report, folder / name.replace(" ", "-"))]
    gap(result.reports).savefig(folder / "gap.png", dpi=150)
    return [*paths, folder / "gap.png"]


def _images_json(result: ImageDemo) -> dict[str, Any]:
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
