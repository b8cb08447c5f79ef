"""Facts by name: the domains that come with repedit, or a file of yours.

A built-in domain is a small table: its phrasings, and groups of entities with their answers. Wrong choices are drawn
from the same group first, so they are answers of the same kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from repedit.data.domains import Fact, Facts, drawn, with_choices
from repedit.data.grading import normalized
from repedit.data.records import recorded
from repedit.errors import NotFound, UnknownName, nearest
from repedit.io.files import is_file, user_path
from repedit.io.text import parse_toml

DOMAINS = ("capitals", "symbols", "opposites", "languages", "past_tenses", "cities", "us_cities", "nouns")
"""The fact domains that come with repedit."""
CHOICES = 8


def facts(name: str | Path, *, retain: str | Path | Facts | Iterable[Fact] | None = None, seed: int = 0) -> Facts:
    """The facts of a built-in domain, of several joined by "+", or of a .jsonl file.

    Built-in names retain the facts of every other built-in domain; a file retains its rows with `"role": "retain"`.

    Args:
        retain: other facts to retain: a name or file (its facts to forget), Facts (likewise), or facts.
        seed: draws the order of the choices, and wrong choices where a fact has none.
    Raises:
        UnknownName: if no domain has the name.
        NotFound: if the file does not exist.
        DataError: if a row is malformed, with its number.
        OverlapError: if forget and retain share a fact.
    """
    forget, others = _items(name)
    kept = others if retain is None else _retained(retain)
    both = with_choices((*forget, *kept), seed=seed)
    label = name if isinstance(name, str) and not _is_file(name) else Path(name).stem
    return Facts(both[: len(forget)], both[len(forget) :], str(label))


def _items(name: str | Path) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    if _is_file(name):
        path = user_path(name)
        if not is_file(path):
            raise NotFound(f"{path.absolute()} is not a file; {nearest(str(name), DOMAINS)}")
        return recorded(path)
    chosen = str(name).split("+")
    for part in chosen:
        if part not in DOMAINS:
            raise UnknownName(f"no built-in facts are called {part!r}; {nearest(part, DOMAINS)} A file ends in .jsonl")
    forget, rest = ([fact for d in DOMAINS if (d in chosen) == side for fact in domain(d)] for side in (True, False))
    return tuple(forget), tuple(rest)


def _is_file(name: str | Path) -> bool:
    return isinstance(name, Path) or name.endswith(".jsonl")


def _retained(source: str | Path | Facts | Iterable[Fact]) -> tuple[Fact, ...]:
    if isinstance(source, Facts):
        return source.forget
    return _items(source)[0] if isinstance(source, str | Path) else tuple(source)


@cache
def domain(name: str) -> tuple[Fact, ...]:
    """The facts of one built-in domain, the right answer first among the choices."""
    text = resources.files("repedit.data").joinpath(f"builtin/{name}.toml").read_text(encoding="utf-8")
    table = parse_toml(text, f"{name}.toml")
    groups = [value for value in table.values() if isinstance(value, dict)]
    every = set().union(*map(_answers, groups))
    return tuple(
        _fact(name, table, entity, answers, (_answers(group), every))
        for group in groups
        for entity, answers in group.items()
    )


def _fact(
    name: str, table: Mapping[str, Any], entity: str, answers: str | list[str], pools: Iterable[set[str]]
) -> Fact:
    # A list holds the answer, then words that would be right too and are therefore no wrong choices.
    right = [answers] if isinstance(answers, str) else answers
    identity = f"{name}/{normalized(entity).replace(' ', '-')}"
    wrong = [answer for pool in pools for answer in drawn(pool - set(right), identity)]
    written = f"the {entity}" if entity in table.get("the", ()) else entity
    prompt, *paraphrases = (_phrased(template, written) for template in (table["prompt"], *table["paraphrases"]))
    return Fact(
        id=identity,
        entity=entity,
        prompt=prompt,
        answer=right[0],
        choices=tuple(dict.fromkeys([right[0], *wrong]))[:CHOICES],
        domain=name,
        paraphrases=tuple(paraphrases),
    )


def _answers(group: Mapping[str, str | list[str]]) -> set[str]:
    return {answer if isinstance(answer, str) else answer[0] for answer in group.values()}


def _phrased(template: str, entity: str) -> str:
    text = template.replace("{}", entity)
    return text[:1].upper() + text[1:]
