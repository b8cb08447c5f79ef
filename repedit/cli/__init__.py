"""The command line: one function a verb; each parses, calls one public function and shows what it returns.

Exit codes: 0 done, 1 unexpected exception, 2 bad input, 3 the retain limit was exceeded at once (prune) or the model
collapsed (unlearn), 4 a loss was not finite (unlearn); those of audit are its own,
and push ends with 3 where it uploaded nothing.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from repedit.cli import (
    applying,
    audits,
    chatting,
    cut,
    harnessing,
    look,
    project,
    publishing,
    running,
    start,
    unlearning,
    vision,
)
from repedit.cli.completing import BASH, completed, in_bash
from repedit.cli.examples import epilog

app = typer.Typer(
    name="repedit",
    help="See what a capability of a language model is made of, cut it out of the weights, and test what is left.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for verb in (
    start.demo,
    start.fetch,
    look.doctor,
    look.inspect,
    cut.collect,
    cut.score,
    cut.prune,
    project.project,
    unlearning.unlearn,
    applying.apply,
    look.diff,
    look.compare,
    chatting.chat,
    audits.audit,
    audits.report,
    harnessing.tasks,
    publishing.push,
    running.run,
    running.reproduce,
):
    app.command(epilog=epilog(verb.__name__))(completed(verb))
app.add_typer(vision.app, name="vision")


def verbs() -> dict[str, Any]:
    """Every verb by name, in the order of --help; one inside a group goes by both names, such as "vision demo"."""
    import typer.main

    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {name: command} if inner is None else {f"{name} {part}": verb for part, verb in inner.items()}
    return found


def main() -> None:
    """Run the command line; bad input ends with exit code 2 and one message."""
    from repedit.errors import RepeditError

    try:
        if os.environ.get(BASH) == "complete_bash":
            in_bash(lambda: app(prog_name="repedit"))
        app(prog_name="repedit")
    except RepeditError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(2)
