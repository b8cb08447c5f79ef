"""The options that several verbs share, their choices, completion in the shell, and what --help ends with."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

# --- The names that options take, read from the sources of the tables that define them: importing those would load torch


ROOT = Path(__file__).parents[1]
TABLES = {
    "attacks": ("auditing/budgets.py", "_BUILDERS"),
    "budgets": ("auditing/budgets.py", "BUDGETS"),
    "combinations": ("neurons/scores.py", "COMBINATIONS"),
    "domains": ("data/fact_sets.py", "DOMAINS"),
    "fits": ("fit/closed_form.py", "FITS"),
    "importances": ("neurons/scores.py", "IMPORTANCES"),
    "metrics": ("metrics/benchmarks.py", "SUITES"),
    "recipes": ("unlearning/recipes.py", "RECIPES"),
    "texts": ("data/corpus.py", "BUILTIN"),
}
"""Table -> the file of the package that assigns it, and its name there."""


@cache
def names(table: str) -> tuple[str, ...]:
    """The names in a table of `TABLES`, in their order.

    Raises:
        LookupError: if the source assigns no such table.
    """
    file, name = TABLES[table]
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return tuple(_name(item) for item in _items(node.value))  # type: ignore[attr-defined]
    raise LookupError(f"{file} assigns no {name}")


def _items(value: ast.expr) -> list[ast.expr | None]:
    """Keys of a dictionary, or elements of a sequence, or of what a comprehension goes over."""
    if isinstance(value, ast.Dict):
        return list(value.keys)
    if isinstance(value, ast.DictComp):
        return _items(value.generators[0].iter)
    return list(value.elts) if isinstance(value, ast.Tuple | ast.List) else []


def _name(item: ast.expr | None) -> str:
    """A string, or the name of a function, whose table is by __name__."""
    return item.id if isinstance(item, ast.Name) else str(getattr(item, "value", item))


# --- What the shell completes after an option or argument: names that come with repedit; everything else is left to it


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
    from repedit.models.default_model import DEFAULT

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


# --- One working line of every verb, and its exit codes: what --help ends with, and what the pages of the documentation show


EXAMPLES: Mapping[str, str] = {
    "demo": "repedit demo --act code --out edited/",
    "fetch": "repedit fetch smollm2-135m",
    "doctor": "repedit doctor smollm2-135m",
    "inspect": "repedit inspect smollm2-135m --sites '0-3.mlp.neurons'",
    "collect": "repedit collect smollm2-135m --text code --tokens 8000 --out code.safetensors",
    "score": "repedit score smollm2-135m --forget code --retain prose --out scores.safetensors",
    "prune": "repedit prune smollm2-135m --fraction 0.01 --forget code --retain prose --out edited/",
    "project": "repedit project smollm2-135m --forget capitals --rank 8 --out edited/",
    "unlearn": "repedit unlearn smollm2-135m --recipe small:npo_klr --forget capitals --out delta.safetensors",
    "apply": "repedit apply edit.safetensors smollm2-135m --out edited/",
    "diff": "repedit diff smollm2-135m edited/",
    "compare": "repedit compare smollm2-135m edited/ --text prose --prompt 'The capital of France is'",
    "chat": "repedit chat edited/ --original smollm2-135m",
    "audit": "repedit audit edited/ --original smollm2-135m --facts capitals --out audit/",
    "report": "repedit report audit/",
    "tasks": "repedit tasks harness/ --facts capitals,symbols",
    "run": "repedit run mine.toml",
    "reproduce": "repedit reproduce mine.toml",
    "push": "repedit push edited/ me/smollm2-edited",
    "vision demo": "repedit vision demo --forget class:3 --recipe relabel --out forgotten/",
}

INTERRUPTED, CUT_OFF = 130, 141
"""Exit codes that a shell gives to what SIGINT and SIGPIPE end."""
COMMON: Mapping[int, str] = {
    0: "done",
    1: "an unexpected exception",
    2: "bad input, with one message that says what to do",
    INTERRUPTED: "interrupted by Ctrl-C",
    CUT_OFF: "done, but the reader of standard output had closed it, as `head` does",
}
"""What every verb ends with."""
OWN: Mapping[str, Mapping[int, str]] = {
    "prune": {3: "the limit on what is retained was exceeded at once; nothing is written"},
    "unlearn": {3: "the model collapsed", 4: "a loss was not finite"},
    "audit": {
        0: "no recovery found", 3: "hidden, or not forgotten", 4: "inconclusive", 5: "invalid, or destroyed",
        6: "unsound: a control fails on this machine",
    },
    "run": {3: "or another: the code of the step that failed, or else of the last audit"},
    "reproduce": {1: "something differs"},
    "push": {0: "uploaded", 3: "nothing was uploaded, since --yes was not given"},
}  # fmt: skip
"""Where a verb means something else, or more."""


def codes(verb: str) -> dict[int, str]:
    """The exit codes of a verb, in their order."""
    return dict(sorted({**COMMON, **OWN.get(verb, {})}.items()))


def epilog(verb: str) -> str:
    """What the help of a verb ends with: its example and, where they are its own, its exit codes."""
    lines = [f"Example: {EXAMPLES[verb]}"] if verb in EXAMPLES else []
    if verb in OWN:
        lines.append("Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in codes(verb).items()))
    return "\n\n".join(lines)


# --- The options that several verbs share


Model = Annotated[str, typer.Argument(help="Directory, GGUF file, 'smollm2-135m' or hub id.")]
JSON = "Print one JSON document instead of tables."
Json = Annotated[bool, typer.Option("--json", help=JSON)]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Dtype = Annotated[str, typer.Option(help="auto keeps the checkpoint's; or float32, bfloat16, float16.")]
BatchSize = Annotated[int, typer.Option(help="Chunks of text at a time.")]
Tokens = Annotated[int, typer.Option(help="Counted tokens to collect, and to evaluate, on each set.")]
Text = Annotated[str, typer.Option(help="'code', 'prose', or a .txt, .jsonl or .parquet file.")]
Side = Annotated[str, typer.Option(help="'code', 'prose', a .txt, .jsonl or .parquet file, or what collect wrote.")]
Sites = Annotated[str, typer.Option(help="Where the neurons are: '*.mlp.neurons', '4-9.attn.neurons', ...")]
Structure = Annotated[str, typer.Option(help="keep; slim cuts pruned neurons out; slice narrows an erased stream.")]
Layout = Annotated[str, typer.Option(help="Of slim: uniform widths, or ragged ones that only repedit.load reads.")]
Multiple = Annotated[int | None, typer.Option(help="What new widths are multiples of; 8 for slim, 1 for slice.")]


Given = Mapping[str, Any]
IDLE: Mapping[str, tuple[tuple[str, Callable[[Given], bool], tuple[str, ...]], ...]] = {
    "collect": (("--statistic moments", lambda o: o["statistic"] == "moments", ("gradients",)),),
    "score": (
        ("two saved collections", lambda o: _saved(o["forget"], o["retain"]), ("sites", "tokens", "batch_size")),
    ),
    "prune": (
        ("--learned", lambda o: o["learned"], ("fraction", "scores", "importance", "combine", "steps", "cap_per_layer")),
        ("--scores", lambda o: o["scores"] is not None, ("sites", "importance", "combine", "steps")),
        ("--structure keep", lambda o: o["structure"] == "keep", ("layout", "multiple")),
    ),
    "project": (("a --method that fits at once", lambda o: o["method"] != "mrp", ("steps", "resume", "batch_size")),),
    "apply": (("--structure keep", lambda o: o["structure"] == "keep", ("layout", "multiple")),),
    "audit": (
        ("--selftest", lambda o: o["selftest"], ("edited", "original", "facts", "retain", "reference", "attacks", "out", "hide_items")),
        ("an audit without --selftest", lambda o: not o["selftest"], ("seed",)),
        ("--dry-run", lambda o: o["dry_run"], ("hide_items",)),
    ),
    "compare": (
        ("--metrics", lambda o: bool(o["metrics"]), ("text", "prompt", "tokens", "batch_size")),
        ("no --metrics", lambda o: not o["metrics"], ("limit",)),
    ),
    "demo": (
        ("--act code", lambda o: o["act"] == "code", ("steps",)),
        ("--act capitals", lambda o: o["act"] == "capitals", ("tokens",)),
    ),
}  # fmt: skip
"""Verb -> (beside what, when, options that would change nothing there); one that is given nevertheless is refused.

Everywhere else the rule is: an option of the command line wins over --set, --set over the settings of `small`, these over
the defaults of a recipe; --steps wins over a number of epochs, and steps and epochs in two --set are refused.
"""


class Verb(TyperCommand):
    """A verb: an option that is given changes the result, or is refused."""

    def invoke(self, ctx: Any) -> Any:
        """Carry the verb out.

        Raises:
            ArgumentError: if an option is empty, or changes nothing beside another one.
        """
        from repedit.errors import ArgumentError

        asked = {p.name: p for p in self.params if _is_asked(ctx, p.name)}
        for name, parameter in asked.items():
            values = ctx.params[name] if isinstance(ctx.params[name], list | tuple) else [ctx.params[name]]
            if any(isinstance(value, str) and not value.strip() for value in values):
                raise ArgumentError(f"{_shown(parameter)} is empty; leave it out, or give it a value")
        for beside, applies, names in IDLE.get(str(self.name), ()):
            for name in names:
                if name in asked and applies(ctx.params):
                    raise ArgumentError(f"{_shown(asked[name])} changes nothing beside {beside}; leave one of them out")
        return super().invoke(ctx)


def _is_asked(ctx: Any, name: str) -> bool:
    return getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"


def _shown(parameter: Any) -> str:
    return parameter.opts[0] if parameter.param_type_name == "option" else str(parameter.name).upper()


def _saved(*names: str) -> bool:
    return all(name.endswith(".safetensors") for name in names)


def quiet() -> None:
    """Hide the loading bars of transformers: they say nothing a user of these commands needs."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def opened(model: str, device: str, dtype: str) -> Any:
    """The model a verb works on."""
    from repedit.models.subject import load

    quiet()

    return load(model, device=device, dtype=dtype)
