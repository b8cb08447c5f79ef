"""Verbs that carry out all steps of one TOML file: run, reproduce; and the page of such a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repedit.cli.application import verbs

if TYPE_CHECKING:
    from repedit.runs import Execute, Step


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
