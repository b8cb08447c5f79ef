"""The command line: one function for each verb, which parses, calls one public function and shows what it returns.

`repedit.cli.application` lists the exit codes.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
import warnings
from typing import Any

import typer

from repedit.cli import apply, audit, hub, inspect, neurons, run, unlearn
from repedit.cli.application import CUT_OFF, INTERRUPTED, Verb, app, epilog, verbs
from repedit.cli.completion import BASH, complete_in_bash, with_completion
from repedit.escaping import for_terminal

for verb in (
    run.demo,
    hub.fetch,
    inspect.doctor,
    inspect.inspect,
    neurons.collect,
    neurons.score,
    neurons.explore,
    neurons.prune,
    unlearn.project,
    unlearn.unlearn,
    apply.apply,
    inspect.diff,
    inspect.compare,
    inspect.chat,
    audit.audit,
    audit.report,
    hub.tasks,
    hub.push,
    run.run,
    run.reproduce,
):
    app.command(epilog=epilog(verb.__name__), cls=Verb)(with_completion(verb))
app.add_typer(run.vision, name="vision")

__all__ = ["app", "main", "verbs"]


def main() -> None:
    """Run the command line; bad input ends with exit code 2 and one message."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the shell closed it: `repedit ... >&-`
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a character that the terminal cannot show becomes its number
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *args, **options: for_terminal(format_warning(*args, **options), lines=True)
    logging.setLogRecordFactory(_LogRecord)
    code, message = _run_verb()
    if message:
        sys.stderr.write(for_terminal(message, lines=True).rstrip("\n") + "\n")
    output = sys.modules.get("repedit.cli.output")
    try:
        sys.stdout.flush()
        cut_off = output is not None and output.out.cut_off
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        cut_off = True
    sys.exit(code or (CUT_OFF if cut_off else 0))


class _LogRecord(logging.LogRecord):
    """A log message, of repedit or of transformers, that a terminal shows and does not obey."""

    def getMessage(self) -> str:
        return for_terminal(super().getMessage(), lines=True)


def _run_verb() -> tuple[int, str]:
    """The exit code of the command line, and the message for standard error."""
    from repedit.errors import RepeditError

    # ClickException of the click inside typer, which typer does not export.
    usage_error: type[Exception] = typer.BadParameter.__mro__[2]
    try:
        if os.environ.get(BASH) == "complete_bash":
            complete_in_bash(lambda: app(prog_name="repedit"))
        code = app(prog_name="repedit", standalone_mode=False)
    except RepeditError as error:
        return 2, f"{type(error).__name__}: {error}"
    except usage_error as error:
        return 2, _usage(error)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        return CUT_OFF, ""
    except typer.Abort:
        return 1, "Aborted."
    except Exception:
        return 1, traceback.format_exc()
    return code or 0, "Interrupted." if code == INTERRUPTED else ""


def _usage(error: Any) -> str:
    """What is wrong with a command line, and where to read what is right."""
    context, message = getattr(error, "ctx", None), error.format_message()
    if context is None or not message:
        return str(message)
    return f"{context.get_usage()}\nTry '{context.command_path} --help' for help.\nError: {message}"
