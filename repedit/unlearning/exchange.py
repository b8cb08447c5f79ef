"""Forget rows with the answer of another subject, as prompts in every wording and in the reverse direction."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from repedit.data import Fact, Row
from repedit.data.fact_sets import fact_of
from repedit.errors import ArgumentError, DataError


@dataclass(frozen=True)
class Exchange:
    """Which rows an exchange of answers gives.

    Within a domain every fact gets the answer of another fact, the same in all its wordings and in the reverse form, so the
    false world has no contradiction: if France is given Rome, "Rome is the capital of" is followed by France.

    Raises:
        ArgumentError: if the template does not contain {answer}.
    """

    reverse: bool = True
    """Whether to include the reverse form, in which the answer comes first and the subject is predicted."""
    template: str | None = None
    """The prompt of the reverse form, such as "{answer} is the capital of"; None derives it from a wording of the form "The
    ... of France is"."""

    def __post_init__(self) -> None:
        if self.template is not None and "{answer}" not in self.template:
            raise ArgumentError(
                f"template={self.template!r} does not contain {{answer}}; write '{{answer}} is the capital of'"
            )


def exchanged_rows(rows: Sequence[Row], exchange: Exchange, seed: int) -> tuple[Row, ...]:
    """The rows with exchanged answers, and their reverse forms.

    Args:
        rows: facts in all their wordings, whose ids are fact, fact#1, ...
    Raises:
        DataError: if a domain has too few different answers, or a fact cannot be reversed.
    """
    answers = {fact_of(row.id): row.answer for row in rows}
    domains: dict[str, dict[str, None]] = {}
    for row in rows:
        domains.setdefault(row.domain if isinstance(row, Fact) else "", {})[fact_of(row.id)] = None
    exchanged_answers: dict[str, str] = {}
    for domain, facts in domains.items():
        exchanged_answers |= _exchange({fact: answers[fact] for fact in facts}, domain, seed)
    exchanged = [_with_answer(row, exchanged_answers[fact_of(row.id)], f"{row.id} exchanged") for row in rows]
    return (*exchanged, *(_reversed(rows, exchanged_answers, exchange.template) if exchange.reverse else ()))


def _exchange(answers: dict[str, str], domain: str, seed: int) -> dict[str, str]:
    """Fact -> the answer of another fact, which differs from its own."""
    names = sorted(answers)
    random.Random(f"{seed}:exchange:{domain}").shuffle(names)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(answers[name].strip().casefold(), []).append(name)
    largest = max(map(len, groups.values()))
    if 2 * largest > len(names):
        raise DataError(
            f"{largest} of {len(names)} facts of domain {domain!r} have the same answer, so they cannot all get another one; "
            "give facts with more different answers"
        )
    # Equal answers stand together, and none of their groups is longer than the shift.
    ordered = [name for group in groups.values() for name in group]
    return {name: answers[ordered[(i + largest) % len(ordered)]] for i, name in enumerate(ordered)}


def _reversed(rows: Sequence[Row], answers: dict[str, str], template: str | None) -> list[Row]:
    """The reverse form of each fact."""
    reverse: dict[str, Row] = {}
    for row in rows:
        if not row.entity:
            raise DataError(
                f"row {row.id!r} names no entity, which the reverse form asks for; give one, or reverse=False"
            )
        match = re.fullmatch(rf"The (.+) {re.escape(row.entity)} (?:is|was)", row.prompt)
        form = template or (f"{{answer}} is the {match[1]}" if match else None)
        if form is not None and fact_of(row.id) not in reverse:
            prompt = form.replace("{answer}", answers[fact_of(row.id)])
            reverse[fact_of(row.id)] = replace(
                _with_answer(row, row.entity, f"{fact_of(row.id)} reversed"), prompt=prompt, entity=""
            )
    missing = next((fact_of(row.id) for row in rows if fact_of(row.id) not in reverse), None)
    if missing is not None:
        raise DataError(
            f"fact {missing!r} has no wording of the form 'The capital of France is', from which the reverse form follows; give "
            "a template, such as '{answer} is the capital of', or reverse=False"
        )
    return list(reverse.values())


def _with_answer(row: Row, answer: str, name: str) -> Row:
    if isinstance(row, Fact):  # whose choices must hold the answer
        row = replace(row, choices=())
    return replace(row, answer=answer, id=name)
