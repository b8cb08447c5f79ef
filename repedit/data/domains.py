"""Facts: questions with one right answer, several phrasings and wrong answers to choose from."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from repedit.data.corpus import Batch
from repedit.data.grading import holds as holds
from repedit.data.grading import normalized, spelled
from repedit.data.rows import Row, Rows, check_ids, row_hash
from repedit.errors import ArgumentError, DataError, NotEnoughRows, OverlapError
from repedit.io.text import check_text


@dataclass(frozen=True, kw_only=True)
class Fact(Row):
    """A row about one entity, that can be asked in several ways.

    White space around the answer and the choices is taken off: they follow the prompt as `joined` says.

    Raises:
        DataError: if prompt or answer is blank, the answer is not among the choices, there is one choice, or a choice
            is blank or appears twice.
    """

    choices: tuple[str, ...] = ()
    """The right answer and wrong ones; empty where the answer is free text."""
    domain: str = ""
    paraphrases: tuple[str, ...] = ()
    """The same question in other words, each a whole prompt."""
    translations: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Language to prompt."""
    split: str | None = None
    """"T" or "V" where the file fixes the half: attack-train or attack-test."""

    def __post_init__(self) -> None:
        super().__post_init__()
        what = f"fact {self.id!r}"
        for name in ("choices", "paraphrases"):
            texts = getattr(self, name)
            if isinstance(texts, str) or not isinstance(texts, Sequence):
                raise DataError(f"{what}: the field {name!r} is {texts!r}; give a sequence of texts")
            for number, text in enumerate(texts):
                check_text(text, f"{what}: text {number} of the {name}")
            object.__setattr__(self, name, tuple(texts))
        for name, value in (("prompt", self.prompt), ("answer", self.answer), ("id", self.id)):
            if not value.strip():
                raise DataError(f"{what}: the field {name!r} is {value!r}; give a text")
        choices = {spelled(choice): choice.strip() for choice in self.choices}
        if "" in choices:
            raise DataError(f"{what}: a choice of {list(self.choices)} is blank; give a text or leave it out")
        if len(choices) < len(self.choices):
            names = [spelled(choice) for choice in self.choices]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{what}: the choice {twice!r} appears twice in {list(self.choices)}")
        if len(choices) == 1:
            raise DataError(f"{what}: one choice, {list(self.choices)}; give at least 2, or none")
        if choices and spelled(self.answer) not in choices:
            raise DataError(f"{what}: the answer {self.answer!r} is not among the choices {list(self.choices)}")
        if self.split not in (None, "T", "V"):
            raise DataError(f"{what}: the field 'split' is {self.split!r}; give 'T', 'V' or nothing")
        object.__setattr__(self, "choices", tuple(choices.values()))
        object.__setattr__(self, "answer", choices.get(spelled(self.answer), self.answer.strip()))

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every phrasing, the fact's own prompt first."""
        return (self.prompt, *self.paraphrases)


@dataclass(frozen=True, eq=False)
class Facts:
    """Facts to forget and facts to retain. Used as a corpus, it is the facts to forget in their own prompts.

    Raises:
        NotEnoughRows: if there are fewer than two facts to forget.
        DataError: if an id appears twice on one side, or a prompt with two answers.
        OverlapError: if the sides share an id, or a prompt with its answer.
    """

    forget: tuple[Fact, ...]
    retain: tuple[Fact, ...] = ()
    name: str = "facts"

    def __post_init__(self) -> None:
        if len(self.forget) < 2:
            raise NotEnoughRows(f"facts {self.name!r}: {len(self.forget)} to forget; give at least 2")
        check_ids(self.forget, f"facts {self.name!r}, forget")
        check_ids(self.retain, f"facts {self.name!r}, retain")
        seen: dict[str, str] = {}
        for fact in self.forget:
            other = seen.setdefault(normalized(fact.text), fact.id)
            if other != fact.id:
                raise DataError(f"facts {self.name!r}: {other!r} and {fact.id!r} have one prompt and answer; drop one")
        _check_one_answer((*self.forget, *self.retain), f"facts {self.name!r}")
        for what, key in (("ids", lambda f: f.id), ("prompts with answers", lambda f: normalized(f.text))):
            both = sorted({key(f) for f in self.forget} & {key(f) for f in self.retain})
            if both:
                raise OverlapError(
                    f"facts {self.name!r}: forget and retain share {len(both)} {what}, such as {both[:5]}; "
                    "take them out of one side"
                )

    def __len__(self) -> int:
        return len(self.forget)

    def __repr__(self) -> str:
        return f"Facts({self.name!r}, {len(self.forget)} to forget, {len(self.retain)} to retain)"

    @cached_property
    def hash(self) -> str:
        """sha256 over every field of every fact of both sides, in order."""
        return hashlib.sha256(f"{row_hash(self.forget)} {row_hash(self.retain)}".encode()).hexdigest()

    def batches(self, tokenizer: Any, *, length: int = 128, batch_size: int = 8) -> Iterator[Batch]:
        """The facts to forget as rows; see `Rows.batches`."""
        yield from Rows(self.forget, self.name).batches(tokenizer, length=length, batch_size=batch_size)


def _check_one_answer(items: Iterable[Fact], where: str) -> None:
    """Refuse facts of which two have one prompt and different answers: they cannot both be right."""
    first: dict[str, Fact] = {}
    for fact in items:
        other = first.setdefault(" ".join(fact.prompt.split()), fact)
        if spelled(other.answer) != spelled(fact.answer):
            raise DataError(
                f"{where}: {other.id!r} and {fact.id!r} ask {fact.prompt[:80]!r} and have two answers, {other.answer!r} and "
                f"{fact.answer!r}; keep one, or say in the prompts what differs"
            )


def by_domain(items: Iterable[Fact]) -> dict[str, tuple[Fact, ...]]:
    """The facts of each domain, domains and facts in the order they come."""
    found: dict[str, list[Fact]] = {}
    for fact in items:
        found.setdefault(fact.domain, []).append(fact)
    return {domain: tuple(part) for domain, part in found.items()}


def with_paraphrases(items: Iterable[Fact], *, only: Sequence[int] | None = None) -> tuple[Fact, ...]:
    """One fact a phrasing: the fact itself, then its paraphrases under the ids "capitals/france#1", "#2" and so on.

    Args:
        only: numbers of the phrasings to give, 0 being the fact's own prompt; None for all.
    Raises:
        ArgumentError: if a fact has no phrasing of such a number.
    """
    found = []
    for fact in items:
        for number in range(len(fact.prompts)) if only is None else only:
            if not 0 <= number < len(fact.prompts):
                raise ArgumentError(f"fact {fact.id!r} has phrasings 0 to {len(fact.paraphrases)}, not {number}")
            name = f"{fact.id}#{number}" if number else fact.id
            found.append(replace(fact, id=name, prompt=fact.prompts[number], paraphrases=()))
    return tuple(found)


def with_choices(items: Sequence[Fact], *, seed: int = 0, count: int = 8) -> tuple[Fact, ...]:
    """The facts with their choices in an order drawn by the seed.

    A fact without choices gets up to `count` - 1 wrong ones, drawn from the other answers of its domain.
    """
    pools = {
        domain: sorted({normalized(fact.answer): fact.answer for fact in part}.items())
        for domain, part in by_domain(items).items()
    }
    found = []
    for fact in items:
        choices = fact.choices
        if not choices:
            pool = pools[fact.domain]
            others = random.Random(f"{seed}:{fact.id}").sample(pool, min(len(pool), count))
            wrong = [answer for key, answer in others if key != normalized(fact.answer)][: count - 1]
            choices = (fact.answer, *wrong) if wrong else ()
        found.append(replace(fact, choices=drawn(choices, f"{seed}:order:{fact.id}")))
    return tuple(found)


def drawn(items: Iterable[str], key: str) -> tuple[str, ...]:
    """The items in an order that depends on the key and on themselves alone, not on the order given."""
    return tuple(sorted(items, key=lambda item: hashlib.sha256(f"{key}\0{item}".encode()).digest()))
