"""The verbs that carry out a whole run from one file, and what it leaves for its reader."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from repedit.io.files import is_folder

# --- What a run leaves for its reader: an account of every step while it goes on, and a page at its end


def accounted(file: Path, step: Any, words: Sequence[str], carry_out: Callable[[], int]) -> int:
    """Carry a step out and enter it, with what it showed, into the account of the run; the exit code."""
    from repedit.cli import output
    from repedit.io.text import parse_json
    from repedit.report import run_journal

    began = time.perf_counter()
    with output.kept() as shown:
        code = carry_out()
    if step.staged is not None:  # a reader knows the output by the name that it will have
        text = json.dumps(shown).replace(json.dumps(str(step.staged))[1:-1], json.dumps(str(step.out))[1:-1])
        shown = parse_json(text, "what a step showed", finite=False)
    seconds = time.perf_counter() - began
    run_journal.enter(file, step.number, [step.verb, *words], code, seconds, step.out, shown, there=step.staged)
    return code


@contextlib.contextmanager
def paged(file: Path, dry_run: bool) -> Iterator[None]:
    """Write the page of a run when it ends, also where a step failed; a dry run leaves nothing."""
    try:
        yield
    except typer.Exit:
        _write(file)
        raise
    if not dry_run:
        _write(file)


def is_run(path: Path) -> bool:
    """Whether a path given to `report` means a run: a TOML file, or a folder with the account of one and no audit."""
    if is_folder(path):
        return not (path / "audit.json").exists() and any(path.glob("*.account.jsonl"))
    return path.suffix == ".toml"


def show_run(paths: Sequence[Path], out: Path | None, hide_items: bool, json: bool) -> None:
    """Write the page of a run and say what became of each step, and whether all of it is still as the run left it.

    Raises:
        ArgumentError: if a run is given along with something else.
    """
    from repedit.cli import output
    from repedit.errors import ArgumentError
    from repedit.report.run_page import gather, write_run

    if len(paths) > 1:
        raise ArgumentError(f"{len(paths)} paths were given and one of them is a run; a run is shown alone")
    found = gather(paths[0])
    written = write_run(paths[0], out, hide_items=hide_items)
    if json:
        states = [{"step": s.number, "verb": s.verb, "state": s.state} for s in found.stages]
        output.show_json({"page": str(written), "steps": states, "faults": list(found.faults)})
        return
    output.table(f"{found.file.name}", ("step", "verb", "state"), [[s.number, s.verb, s.state] for s in found.stages])
    for fault in found.faults:
        output.out.print(f"Not as the run left it: {fault}")
    output.out.print(f"wrote {written}", soft_wrap=True)


def _write(file: Path) -> None:
    from repedit.cli import output
    from repedit.report.run_page import write_run

    output.err.print(f"page: {write_run(file)}")


# --- The verb that carries out a whole run from one file


def run(
    file: Annotated[
        Path, typer.Argument(help="TOML: a model, then a list of step tables, each a verb with its options.")
    ],
    dry_run: Annotated[bool, typer.Option(help="Show which steps are done and which are to do.")] = False,
) -> None:
    """Carry out the steps of a file in order; those that are done, with what they wrote as they left it, are not repeated.

    Paths are relative to the file. Where you change a step, what it wrote before is replaced; anything else in its place
    stops the run. The exit code is that of the last audit, or of the step that failed. At the end NAME.report.html tells all
    of it, from the account that the run keeps beside the file.
    """
    from repedit import cli
    from repedit.cli import output, steps

    commands = cli.verbs()
    found, code, changed = steps.read(file, commands), 0, False
    with contextlib.chdir(file.absolute().parent), _alone(Path(file.name), dry_run), paged(Path(file.name), dry_run):
        log, since = steps.Log(Path(file.name)), -1
        for step in found:
            known = None if changed else log.code(step, since)
            since, changed = log.line(step), changed or known is None
            state = "to do" if known is None else "done"
            output.err.print(
                f"{step.number} of {len(found)}, {step.verb}: {state}" + (f" -> {step.out}" if step.out else "")
            )
            if known is not None and not dry_run:
                log.settle(step)
            if dry_run or known is not None:
                code = known if step.verb == "audit" and known is not None else code
                continue
            verb, begun = commands[step.verb], log.begin(step)
            carry_out = partial(_ended, verb, step, begun.arguments(verb))
            ended = accounted(Path(file.name), step, step.arguments(verb), carry_out)
            if ended and step.verb != "audit":
                output.err.print(
                    f"step {step.number}, {step.verb}, ended with {ended}; what is done stays, run again to go on"
                )
                raise typer.Exit(ended)
            log.enter(step, ended)
            log.settle(step)
            since, code = log.line(step), ended if step.verb == "audit" else code
    raise typer.Exit(code)


@contextlib.contextmanager
def _alone(file: Path, dry_run: bool) -> Iterator[None]:
    """No other process carries out the same file at the same time; the system takes the lock back from one that dies.

    Raises:
        TargetExists: if another process does.
    """
    from filelock import FileLock, Timeout

    from repedit.errors import TargetExists

    if dry_run:
        yield
        return
    try:
        with FileLock(file.with_name(f".{file.name}.lock"), blocking=False):
            yield
    except Timeout as error:
        raise TargetExists(f"{file} is being carried out by another process; wait until it has ended") from error


UNREPEATED = ("audit", "report")
"""Verbs whose files hold durations."""


def reproduce(
    file: Annotated[Path, typer.Argument(help="The file of a run that was carried out.")],
) -> None:
    """Carry out the steps of a run again, in another place, and compare the hash of everything written; exit code 1 where one differs."""
    from repedit import cli
    from repedit.cli import output, steps

    commands = cli.verbs()
    found, same = steps.read(file, commands), True
    with contextlib.chdir(file.absolute().parent), tempfile.TemporaryDirectory() as folder:
        log, place = steps.Log(Path(file.name)), Path(folder)
        expected = {step.number: log.output(step) for step in found}
        outs = [out for step in found for out in step.written]
        for step in found:
            if step.out is None or step.verb in UNREPEATED:
                output.out.print(f"{step.number}, {step.verb}: not compared")
                continue
            _ended(commands[step.verb], step, step.moved(place, outs).arguments(commands[step.verb]))
            equal = steps.tree_hash(place / step.out) == expected[step.number]
            same = same and equal
            output.out.print(f"{step.number}, {step.verb}: {step.out} {'is the same' if equal else 'differs'}")
    raise typer.Exit(0 if same else 1)


def _ended(verb: Any, step: Any, words: list[str]) -> int:
    """The exit code of a step.

    Raises:
        ArgumentError: if the command line cannot read a value.
    """
    from repedit.errors import ArgumentError

    try:
        result = verb.main(words, prog_name=f"repedit {step.verb}", standalone_mode=False)
    except typer.BadParameter as error:
        raise ArgumentError(f"step {step.number}, {step.verb}: {error.format_message()}") from error
    return result if isinstance(result, int) else 0
