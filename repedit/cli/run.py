"""Verbs that carry out many steps: the demo, and all steps of one TOML file (run, reproduce); and the page of such a run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from repedit.cli.application import Json, LimitTokens, Seed, hide_progress_bars, verbs

if TYPE_CHECKING:
    from repedit.demo import CapitalsDemo, PruningDemo
    from repedit.runs import Execute, Step


# --- demo


def demo(
    out: Annotated[
        Path, typer.Option(help="Directory of the first edited checkpoint; the second gets '-capitals'.")
    ] = Path("edited"),
    model: Annotated[str, typer.Option(help="Model to edit.")] = "smollm2-135m",
    limit_tokens: LimitTokens = 3000,
    act: Annotated[
        Literal["both", "code", "capitals"], typer.Option(help="code prunes neurons, capitals projects hidden states.")
    ] = "code",
    steps: Annotated[int, typer.Option(help="Training steps of the second act.")] = 30,
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
    exit_code = runs.run(file, commands, _execute_with(commands), output.err.print, dry_run=dry_run)
    if not dry_run:
        output.err.print(f"page: {write_run(file)}", soft_wrap=True)
    raise typer.Exit(exit_code)


def reproduce(
    file: Annotated[Path, typer.Argument(help="The file of a run that was carried out.")],
) -> None:
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
        from repedit.errors import ArgumentError

        with output.recorded() as display:
            try:
                result = commands[step.verb].main(words, prog_name=f"repedit {step.verb}", standalone_mode=False)
            except typer.BadParameter as error:
                raise ArgumentError(f"step {step.number}, {step.verb}: {error.format_message()}") from error
        return (result if isinstance(result, int) else 0), display

    return execute
