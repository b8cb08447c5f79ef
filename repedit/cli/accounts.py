"""What a run leaves for its reader: an account of every step while it goes on, and a page at its end."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from repedit.io.files import is_folder


def accounted(file: Path, step: Any, words: Sequence[str], carry_out: Callable[[], int]) -> int:
    """Carry a step out and enter it, with what it showed, into the account of the run; the exit code."""
    from repedit import console
    from repedit.io.text import parse_json
    from repedit.report.runs import account

    began = time.perf_counter()
    with console.kept() as shown:
        code = carry_out()
    if step.staged is not None:  # a reader knows the output by the name that it will have
        text = json.dumps(shown).replace(json.dumps(str(step.staged))[1:-1], json.dumps(str(step.out))[1:-1])
        shown = parse_json(text, "what a step showed", finite=False)
    seconds = time.perf_counter() - began
    account.enter(file, step.number, [step.verb, *words], code, seconds, step.out, shown, there=step.staged)
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
    from repedit import console
    from repedit.errors import ArgumentError
    from repedit.report.runs import gather, write_run

    if len(paths) > 1:
        raise ArgumentError(f"{len(paths)} paths were given and one of them is a run; a run is shown alone")
    found = gather(paths[0])
    written = write_run(paths[0], out, hide_items=hide_items)
    if json:
        states = [{"step": s.number, "verb": s.verb, "state": s.state} for s in found.stages]
        console.show_json({"page": str(written), "steps": states, "faults": list(found.faults)})
        return
    console.table(f"{found.file.name}", ("step", "verb", "state"), [[s.number, s.verb, s.state] for s in found.stages])
    for fault in found.faults:
        console.out.print(f"Not as the run left it: {fault}")
    console.out.print(f"wrote {written}", soft_wrap=True)


def _write(file: Path) -> None:
    from repedit import console
    from repedit.report.runs import write_run

    console.err.print(f"page: {write_run(file)}")
