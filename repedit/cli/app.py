"""The typer application, which every verb is registered with, and its verbs by name."""

from __future__ import annotations

from typing import Any

import typer
import typer.main

app = typer.Typer(
    name="repedit",
    help="See what a capability of a language model is made of, cut it out of the weights, and test what is left.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def verbs() -> dict[str, Any]:
    """The click command of every verb, in the order of --help; a verb of a group has both names: "vision demo"."""
    commands: dict[str, Any] = {}
    for name, command in getattr(typer.main.get_command(app), "commands", {}).items():
        group = getattr(command, "commands", None)
        commands |= {name: command} if group is None else {f"{name} {part}": verb for part, verb in group.items()}
    return commands
