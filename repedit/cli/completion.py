"""What the shell completes: the names that come with repedit. Everything else, such as paths, is left to the shell."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import sys
from collections.abc import Callable, Iterable
from copy import copy
from functools import cache
from pathlib import Path
from typing import Annotated, Any

Completer = Callable[[str], list[str]]
"""Takes the incomplete word and returns the words that it may become."""
BASH = "_REPEDIT_COMPLETE"
"""The environment variable with which a shell asks for completion."""


def with_completion(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb, with a completer for each parameter that takes names."""
    signature = inspect.signature(verb, eval_str=True)
    parameters = [_completed(verb.__name__, parameter) for parameter in signature.parameters.values()]
    verb.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return verb


def _completed(verb: str, parameter: inspect.Parameter) -> inspect.Parameter:
    completer = _VERB_COMPLETERS.get((verb, parameter.name), _COMPLETERS.get(parameter.name))
    info = next(iter(getattr(parameter.annotation, "__metadata__", ())), None)
    if completer is None or info is None:
        return parameter
    info = copy(info)  # several verbs share one
    info.autocompletion = lambda incomplete: completer(incomplete)
    return parameter.replace(annotation=Annotated[parameter.annotation.__origin__, info])


# --- Completers


def one_of(table: str, *others: str) -> Completer:
    """One name of a registry, or one of some others."""
    return lambda incomplete: _matching(incomplete, (*others, *names(table)))


def several(table: str, separator: str) -> Completer:
    """Names of a registry with a separator between them; the last one is completed, and no name is offered twice."""

    def complete(incomplete: str) -> list[str]:
        before, joint, last = incomplete.rpartition(separator)
        return [before + joint + n for n in _matching(last, names(table)) if n not in before.split(separator)]

    return complete


def model(incomplete: str) -> list[str]:
    """The built-in model; the shell itself completes directories."""
    from repedit.models.default_model import DEFAULT

    return _matching(incomplete, (DEFAULT,))


def recipe(incomplete: str) -> list[str]:
    """A recipe, or one applied to another: small:npo_klr, sure:npo_gdr, sam:npo_gdr."""
    over = [f"{outer}:{name}" for outer in ("small", "sure", "sam") for name in names("recipes")]
    return _matching(incomplete, (*names("recipes"), *(over if incomplete else ())))


def site(incomplete: str) -> list[str]:
    """A point at the given layers, or at all of them: '*.mlp.neurons', '4-9.mlp.out'."""
    from repedit.sites import Point

    layers, joint, last = incomplete.partition(".")
    return [(layers if joint else "*") + "." + point for point in _matching(last if joint else "", Point)]


_FACTS, _TEXT = several("domains", "+"), one_of("texts")
_COMPLETERS: dict[str, Completer] = {
    **dict.fromkeys(("model", "base", "edited", "original", "reference", "name"), model),
    **dict.fromkeys(("text", "forget", "retain", "unrelated", "holdout"), _TEXT),
    "attacks": several("attacks", ","),
    "combine": one_of("combinations"),
    "facts": _FACTS,
    "importance": one_of("importances"),
    "method": one_of("fits", "mrp"),
    "metrics": several("metrics", ","),
    "recipe": recipe,
    "sites": site,
    "update": _FACTS,
}
"""By the name of a parameter, whatever the verb; parameters with a fixed set of choices are completed by typer."""
_VERB_COMPLETERS: dict[tuple[str, str], Completer] = {
    **{(verb, side): _FACTS for verb in ("project", "unlearn") for side in ("forget", "retain")},
    ("project", "method"): one_of("fits", "mrp", "overwrite", "merge"),
    ("project", "contexts"): several("contexts", ","),
    ("audit", "retain"): _FACTS,
    ("tasks", "facts"): several("domains", ","),
}
"""By verb and parameter, where a parameter means something else."""


def takes_data(verb: str, parameter: str) -> bool:
    """Whether a parameter takes names of built-in facts or texts, or files with such."""
    return _VERB_COMPLETERS.get((verb, parameter), _COMPLETERS.get(parameter)) in (_FACTS, _TEXT)


def _matching(incomplete: str, words: Iterable[str]) -> list[str]:
    return [str(word) for word in words if word.startswith(incomplete)]


# --- The names in the registries, read from their source files: importing them would load torch at every key press


ROOT = Path(__file__).parents[1]
REGISTRIES = {
    "combinations": ("neurons/scores.py", "COMBINATIONS"), "contexts": ("fit/contexts.py", "KINDS"),
    "domains": ("data/fact_sets.py", "DOMAINS"), "fits": ("fit/closed_form.py", "FITS"),
    "importances": ("neurons/scores.py", "IMPORTANCES"), "metrics": ("metrics/benchmarks.py", "SUITES"),
    "recipes": ("unlearning/recipes.py", "@register_recipe"), "texts": ("data/corpus.py", "BUILTIN"),
}  # fmt: skip
"""Registry -> the file of the package that fills it, and its variable there, or the decorator that enters functions.

A test compares the names with the registries.
"""


@cache
def names(table: str) -> tuple[str, ...]:
    """The names of the attacks, or in a registry, in their order.

    Raises:
        LookupError: if the file has no such variable or decorator.
    """
    if table == "attacks":
        return _attack_names()
    file, source = REGISTRIES[table]
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    if source.startswith("@"):
        functions = (node for node in body if isinstance(node, ast.FunctionDef))
        entered = [node.name for node in functions if source[1:] in map(ast.unparse, node.decorator_list)]
    else:
        values = [
            node.value for node in body if isinstance(node, ast.Assign | ast.AnnAssign) and source in _targets(node)
        ]
        entered = [_name(item) for value in values for item in _items(value)]
    if not entered:
        raise LookupError(f"{file} assigns no {source}")
    return tuple(entered)


def _attack_names() -> tuple[str, ...]:
    """The names of the attacks, the cheapest first: each is the first argument of a record that a file registers."""
    costs: dict[str, float] = {}
    for path in (ROOT / "auditing" / "attacks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Name("register"),
                    args=[ast.Call(func=ast.Name("AttackRecord"), args=[ast.Constant(str(name))], keywords=keywords)],
                ):
                    cost = (ast.literal_eval(keyword.value) for keyword in keywords if keyword.arg == "cost")
                    costs[name] = next(cost, 0)
    return tuple(sorted(costs, key=lambda name: (costs[name], name)))


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """The names that an assignment assigns."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _items(value: ast.expr | None) -> list[ast.expr | None]:
    """Keys of a dictionary, or elements of a sequence, or of the sequence of a comprehension."""
    if isinstance(value, ast.Dict):
        return list(value.keys)
    if isinstance(value, ast.DictComp):
        return _items(value.generators[0].iter)
    return list(value.elts) if isinstance(value, ast.Tuple | ast.List) else []


def _name(item: ast.expr | None) -> str:
    """A string, or the name of a function that is registered by its __name__."""
    return item.id if isinstance(item, ast.Name) else str(getattr(item, "value", item))


# --- Bash, which ends a word at a colon


def complete_in_bash(complete: Callable[[], object]) -> None:
    """Complete for bash: join the words that it split at colons, and print only what follows the last colon."""
    words, index = joined(os.environ.get("COMP_WORDS", "").split("\n"), int(os.environ.get("COMP_CWORD", "0")))
    os.environ.update({"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(index)})
    start = (words[index] if index < len(words) else "").rfind(":") + 1
    with io.StringIO() as text:
        try:
            with contextlib.redirect_stdout(text):
                complete()
        finally:
            sys.stdout.write("".join(line[start:] + "\n" for line in text.getvalue().splitlines()))


def joined(words: list[str], index: int) -> tuple[list[str], int]:
    """The words with those that meet at a colon joined, and the new index of the word that had the given index."""
    result: list[str] = []
    place = 0
    for number, word in enumerate(words):
        if result and (word == ":" or words[number - 1] == ":"):
            result[-1] += word
        else:
            result.append(word)
        place = len(result) - 1 if number <= index else place
    return result, place if index < len(words) else len(result)
