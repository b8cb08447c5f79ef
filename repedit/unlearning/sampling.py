"""Samplers: the rows each step sees, from the seed and the step alone, so that a resumed run sees the same; and exchanged rows."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

from repedit.data import Fact, Row
from repedit.data.fact_sets import fact_of
from repedit.errors import ArgumentError, DataError, check_positive, check_whole, given, is_finite

FORGET_SIDE, RETAIN_SIDE = ("forget", "outdated", "exchanged"), ("retain", "update")
"""Roles by the gradient they belong to.

`outdated` are the forget rows whose prompt is also in the update set, `exchanged` the forget rows with the answers of
other subjects.
"""
Topics = Mapping[str, Sequence[str]]
"""Role -> the topic of each of its rows."""


class StepRows(NamedTuple):
    """What one step sees."""

    rows: Mapping[str, tuple[int, ...]]
    """Role -> numbers of its rows."""
    lr: float | None = None
    """In place of the recipe's."""


class Order(NamedTuple):
    """The rows of all steps."""

    at: Callable[[int], StepRows]
    steps_per_epoch: int

    def steps_for(self, epochs: float) -> int:
        """Number of steps in so many epochs."""
        return max(1, math.ceil(epochs * self.steps_per_epoch))


@dataclass(frozen=True, eq=False)
class Sampler:
    """How steps draw rows."""

    name: str
    order: Callable[[Topics, int, int], Order]
    """(topics of the rows, batch size, seed) -> the rows of all steps."""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options.items())})"


@dataclass(frozen=True)
class Phase:
    """Consecutive steps that see one role only; terms of other roles are inactive in them.

    Raises:
        ArgumentError: if epochs is not positive or share is not in (0, 1].
    """

    role: str
    epochs: float = 1.0
    lr: float | None = None
    share: float = 1.0
    """Share of the rows of the role, drawn again for each chunk."""
    final: bool = False
    """Once at the end, in place of once for each chunk."""

    def __post_init__(self) -> None:
        if not (is_finite(self.epochs) and self.epochs > 0) or not 0 < self.share <= 1:
            raise ArgumentError(f"{self}: epochs must be above 0 and share in (0, 1]")
        check_positive(**given(lr=self.lr))


def paired(ratio: float = 1.0) -> Sampler:
    """A batch of every role in each step, each role shuffled and cycled; an epoch sees every forget row once.

    Args:
        ratio: retain rows per forget row.
    Raises:
        ArgumentError: if it is not above 0.
    """
    check_positive(ratio=ratio)

    def order(topics: Topics, batch_size: int, seed: int) -> Order:
        def at(step: int) -> StepRows:
            return StepRows({role: cycled(role, len(rows), size(role), step, seed) for role, rows in topics.items()})

        def size(role: str) -> int:
            return batch_size if role in FORGET_SIDE else max(1, round(ratio * batch_size))

        return Order(at, _forget_batches(topics, batch_size))

    return Sampler("paired", order, {"ratio": ratio})


def round_robin() -> Sampler:
    """As `paired`, with one topic in each step, in turn; a role without the topic gives rows of all its topics."""

    def order(topics: Topics, batch_size: int, seed: int) -> Order:
        names = list(dict.fromkeys(topics["forget"]))

        def at(step: int) -> StepRows:
            topic, turn = names[step % len(names)], step // len(names)
            step_rows = {}
            for role, row_topics in topics.items():
                rows = [i for i, t in enumerate(row_topics) if t == topic] or list(range(len(row_topics)))
                places = cycled(f"{role}:{topic}", len(rows), batch_size, turn, seed)
                step_rows[role] = tuple(rows[i] for i in places)
            return StepRows(step_rows)

        largest = max(list(topics["forget"]).count(name) for name in names)
        return Order(at, len(names) * math.ceil(largest / batch_size))

    return Sampler("round_robin", order)


def chunked(chunk: int = 32, retain_per_forget: int = 7, epochs_per_chunk: int = 7) -> Sampler:
    """One forget chunk at a time, each forget row followed by its retain rows, in order and not shuffled.

    Retain rows are taken cyclically; a chunk is repeated `epochs_per_chunk` times before the next one begins.
    """
    check_whole(chunk=chunk, epochs_per_chunk=epochs_per_chunk)
    check_whole(0, retain_per_forget=retain_per_forget)

    def order(topics: Topics, batch_size: int, seed: int) -> Order:
        forget, retain = len(topics["forget"]), len(topics.get("retain", ()))
        per_row = retain_per_forget if retain else 0
        batches: list[list[tuple[str, int]]] = []
        for first in range(0, forget, chunk):
            items: list[tuple[str, int]] = []
            for i in range(first, min(first + chunk, forget)):
                items.append(("forget", i))
                items += [("retain", (i * retain_per_forget + k) % retain) for k in range(per_row)]
            batches += [items[i : i + batch_size] for i in range(0, len(items), batch_size)] * epochs_per_chunk

        def at(step: int) -> StepRows:
            step_rows: dict[str, tuple[int, ...]] = {}
            for role, i in batches[step % len(batches)]:
                step_rows[role] = (*step_rows.get(role, ()), i)
            return StepRows(step_rows)

        return Order(at, len(batches))

    options = {"chunk": chunk, "retain_per_forget": retain_per_forget, "epochs_per_chunk": epochs_per_chunk}
    return Sampler("chunked", order, options)


def alternate(*phases: Phase, chunk: int | None = None) -> Sampler:
    """Phases one after the other; an epoch is one pass over them.

    Args:
        chunk: forget rows in a chunk; the phases are run for each chunk in turn. None for all rows at once.
    """
    check_whole(phases=len(phases), **given(chunk=chunk))

    def order(topics: Topics, batch_size: int, seed: int) -> Order:
        for phase in phases:
            if not topics.get(phase.role):
                raise ArgumentError(f"a phase needs {phase.role!r} rows and there are none; give {phase.role}=...")
        forget = range(len(topics["forget"]))
        size = chunk or len(forget)
        chunks = [forget[i : i + size] for i in range(0, len(forget), size)]
        turns = [(phase, n, rows) for n, rows in enumerate(chunks) for phase in phases if not phase.final]
        turns += [(phase, len(chunks), forget) for phase in phases if phase.final]
        steps: list[StepRows] = []
        for phase, number, chunk_rows in turns:
            rows = chunk_rows if phase.role == "forget" else range(len(topics[phase.role]))
            drawn = _shuffled(f"{seed}:share:{number}", len(rows))[: max(1, round(phase.share * len(rows)))]
            n = min(batch_size, len(drawn))
            for step in range(math.ceil(phase.epochs * len(drawn) / n)):
                places = cycled(f"{phase.role}:{number}", len(drawn), n, step, seed)
                steps.append(StepRows({phase.role: tuple(rows[drawn[i]] for i in places)}, phase.lr))
        return Order(lambda step: steps[step % len(steps)], len(steps))

    return Sampler("alternate", order, {"phases": [vars(phase) for phase in phases], "chunk": chunk})


def in_turn(*roles: str) -> Sampler:
    """One role in each step, roles in turn; an epoch sees every forget row once."""
    check_whole(roles=len(roles))

    def order(topics: Topics, batch_size: int, seed: int) -> Order:
        def at(step: int) -> StepRows:
            role = roles[step % len(roles)]
            return StepRows({role: cycled(role, len(topics[role]), batch_size, step // len(roles), seed)})

        return Order(at, len(roles) * _forget_batches(topics, batch_size))

    return Sampler("in_turn", order, {"roles": list(roles)})


SAMPLERS = (paired, round_robin, chunked)
"""Samplers that recipe files can name."""


def _forget_batches(topics: Topics, batch_size: int) -> int:
    """Number of batches that the larger role of the forget side gives; of any role where that side is empty."""
    rows = max((len(topics[role]) for role in FORGET_SIDE if role in topics), default=max(map(len, topics.values())))
    return math.ceil(rows / min(batch_size, rows))


def cycled(role: str, count: int, size: int, step: int, seed: int) -> tuple[int, ...]:
    """The rows of a step, at most all of them; each epoch has its own order and epochs follow without a break."""
    size = min(size, count)
    places = range(step * size, (step + 1) * size)
    return tuple(_shuffled(f"{seed}:{role}:{place // count}", count)[place % count] for place in places)


@lru_cache(maxsize=256)
def _shuffled(key: str, count: int) -> tuple[int, ...]:
    return tuple(random.Random(key).sample(range(count), count))


# --- Forget rows with the answer of another subject, as prompts in every wording and in the reverse direction


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
