"""What the shell completes after an option or argument: names that come with repedit; everything else is left to it."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import sys
from collections.abc import Callable, Iterable
from copy import copy
from typing import Annotated, Any

from repedit.cli.names import names

Completer = Callable[[str], list[str]]
BASH = "_REPEDIT_COMPLETE"
"""The variable with which a shell asks."""


def one_of(*values: str, table: str | None = None) -> Completer:
    """One of some names, and of a table."""
    return lambda incomplete: _matching(incomplete, (*values, *(names(table) if table else ())))


def several(table: str, by: str) -> Completer:
    """Names of a table, joined; the last one is completed, and no name is offered twice."""

    def complete(incomplete: str) -> list[str]:
        before, joint, last = incomplete.rpartition(by)
        given = before.split(by)
        return [before + joint + name for name in _matching(last, names(table)) if name not in given]

    return complete


def model(incomplete: str) -> list[str]:
    """The built-in model; the shell itself completes directories where nothing of that name is meant."""
    from repedit.fetching import DEFAULT

    return _matching(incomplete, (DEFAULT,))


def recipe(incomplete: str) -> list[str]:
    """A recipe, or one over another: small:npo_klr, sure:npo_gdr."""
    over = [f"{outer}:{name}" for outer in ("small", "sure") for name in names("recipes")]
    return _matching(incomplete, (*names("recipes"), *(over if incomplete else ())))


def site(incomplete: str) -> list[str]:
    """A point at the layers that are given, or at all: '*.mlp.neurons', '4-9.mlp.out'."""
    from repedit.sites import Point

    layers, joint, last = incomplete.partition(".")
    return [(layers if joint else "*") + "." + point for point in _matching(last if joint else "", Point)]


_FACTS, _TEXT = several("domains", "+"), one_of(table="texts")
_COMPLETERS: dict[str, Completer] = {
    **dict.fromkeys(("model", "base", "edited", "original", "reference"), model),
    **dict.fromkeys(("text", "forget", "retain", "unrelated", "holdout"), _TEXT),
    "act": one_of("both", "code", "capitals"),
    "attacks": several("attacks", ","),
    "budget": one_of(table="budgets"),
    "combine": one_of(table="combinations"),
    "device": one_of("auto", "cpu", "cuda"),
    "dtype": one_of("auto", "float32", "bfloat16", "float16"),
    "facts": _FACTS,
    "importance": one_of(table="importances"),
    "layout": one_of("uniform", "ragged"),
    "method": one_of("mrp", table="fits"),
    "metrics": several("metrics", ","),
    "name": model,
    "recipe": recipe,
    "sites": site,
    "statistic": one_of("activity", "moments"),
    "structure": one_of("keep", "slim", "slice"),
    "update": _FACTS,
}
"""By the name of a parameter, whatever the verb; what a verb means otherwise is below."""
_OWN: dict[tuple[str, str], Completer] = {
    **{(verb, side): _FACTS for verb in ("project", "unlearn") for side in ("forget", "retain")},
    ("audit", "retain"): _FACTS,
    ("apply", "structure"): one_of("keep", "slim", "slice", "adapter"),
    ("tasks", "facts"): several("domains", ","),
}


def in_bash(run: Callable[[], Any]) -> None:
    """Complete for bash, which takes a colon for the end of a word: join the words, and give what follows the colon."""
    words, place = joined(os.environ.get("COMP_WORDS", "").split("\n"), int(os.environ.get("COMP_CWORD", "0")))
    os.environ.update({"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(place)})
    start = (words[place] if place < len(words) else "").rfind(":") + 1
    with io.StringIO() as shown:
        try:
            with contextlib.redirect_stdout(shown):
                run()
        finally:
            sys.stdout.write("".join(line[start:] + "\n" for line in shown.getvalue().splitlines()))


def joined(words: list[str], at: int) -> tuple[list[str], int]:
    """The words of a line with those that meet at a colon as one, and where the word is that was number `at`."""
    found: list[str] = []
    place = 0
    for number, word in enumerate(words):
        if found and (word == ":" or words[number - 1] == ":"):
            found[-1] += word
        else:
            found.append(word)
        place = len(found) - 1 if number <= at else place
    return found, place if at < len(words) else len(found)


def completed(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb, with the completers of its parameters."""
    signature = inspect.signature(verb, eval_str=True)
    parameters = [_completed(verb.__name__, parameter) for parameter in signature.parameters.values()]
    verb.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return verb


def _completed(verb: str, parameter: inspect.Parameter) -> inspect.Parameter:
    complete = _OWN.get((verb, parameter.name), _COMPLETERS.get(parameter.name))
    info = next(iter(getattr(parameter.annotation, "__metadata__", ())), None)
    if complete is None or info is None:
        return parameter
    info = copy(info)  # several verbs share one
    info.autocompletion = lambda incomplete: complete(incomplete)
    return parameter.replace(annotation=Annotated[parameter.annotation.__origin__, info])


def _matching(incomplete: str, values: Iterable[str]) -> list[str]:
    return [str(value) for value in values if value.startswith(incomplete)]
