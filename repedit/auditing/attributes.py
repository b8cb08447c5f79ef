"""Other facts about the entities of an audit, the facts asked the other way round, and the check that neither gives V away."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from repedit.data import DOMAINS, Fact, Facts
from repedit.data.fact_sets import builtin_domain, entity_of, seeded_order
from repedit.data.grading import contains_answer, normalized
from repedit.errors import DataError, OverlapError

# --- Attributes: facts of other domains about the same entities, which an attacker may know


class Attributes(NamedTuple):
    """Facts about the entities that are forgotten, none of which states a forgotten fact."""

    facts: tuple[Fact, ...]
    left_out: int
    """Built-in facts, and facts of the retain side, that state a forgotten fact."""


def attributes_of(forget: Sequence[Fact], own: Iterable[Fact] = ()) -> Attributes:
    """Attributes of the entities among `own` facts and the built-in domains, found by the name of the entity.

    A domain of which facts are forgotten gives no attributes.
    """
    entities, domains = {entity_of(fact) for fact in forget}, {fact.domain for fact in forget}
    builtin = (fact for name in DOMAINS for fact in builtin_domain(name))
    others = {
        fact.id: fact for fact in (*own, *builtin) if fact.domain not in domains and normalized(fact.entity) in entities
    }
    leaking = {row.id for row, _ in leaks(tuple(others.values()), forget)}
    return Attributes(tuple(fact for name, fact in others.items() if name not in leaking), len(leaking))


def given_attributes(forget: Sequence[Fact], attributes: Facts | Iterable[object]) -> Attributes:
    """The attributes that a user gives as facts or Facts, each about an entity of `forget`.

    Raises:
        DataError: if something else than facts is given, or a fact is about no such entity.
        OverlapError: if one states a forgotten fact, or is of a domain of which facts are forgotten.
    """
    items: tuple[Any, ...] = tuple(attributes.forget if isinstance(attributes, Facts) else attributes)
    wrong = next((item for item in items if not isinstance(item, Fact)), None)
    if wrong is not None:
        raise DataError(f"attributes hold {wrong!r}; give facts about the entities of the facts to forget")
    entities, domains = {entity_of(fact) for fact in forget}, {fact.domain for fact in forget}
    strangers = [fact.id for fact in items if normalized(fact.entity) not in entities]
    if strangers:
        raise DataError(
            f"{len(strangers)} attributes are about no entity of the facts to forget, such as {strangers[:5]}; leave them out"
        )
    same = [fact.id for fact in items if fact.domain in domains]
    if same:
        raise OverlapError(
            f"{len(same)} attributes are of a domain of which facts are forgotten, such as {same[:5]}; give facts of other "
            "domains"
        )
    check_no_leak(items, forget)
    return Attributes(items, 0)


def spread(items: Sequence[Fact], most: int, seed: int) -> tuple[Fact, ...]:
    """At most `most` of the facts: one of every entity, then a second one of every entity, and so on."""
    by_entity: dict[str, list[Fact]] = {}
    by_id = {fact.id: fact for fact in items}
    for name in seeded_order(by_id, f"{seed}:attributes"):
        by_entity.setdefault(entity_of(by_id[name]), []).append(by_id[name])
    rounds = chain.from_iterable(zip_longest(*by_entity.values()))
    return tuple([fact for fact in rounds if fact is not None][:most])


# --- Reverse questions: the answer is given and the entity is asked for


REVERSED: Mapping[str, str] = {
    "capitals": "{} is the capital of",
    "symbols": "{} is the chemical symbol of the element",
    "opposites": "{} is the opposite of",
    "languages": "{} is the official language of",
    "past_tenses": "{} is the past tense of the verb",
    "cities": "A well-known city in {} is",
    "us_cities": "A well-known city in the state of {} is",
    "nouns": "{} is the noun formed from the verb",
}
"""Reverse questions of the built-in domains; {} is the answer of the fact."""
_BLANK = "{} {}. The blank stands for"


def reversed_facts(items: Sequence[Fact], seed: int = 0) -> tuple[Fact, ...]:
    """The facts asked the other way round: "Paris is the capital of" -> "France".

    A built-in domain has its own wording. Any other fact becomes its own prompt with a blank in place of the entity:
    "The river through ___ is the Seine. The blank stands for" -> "Paris"; a fact whose prompt does not name its entity
    has no reverse question. The wrong choices are entities with other answers.
    """
    asked = [(fact, pair) for fact in items if (pair := _reverse(fact)) is not None]
    reverse = []
    for fact, (prompt, entity) in asked:
        pool = {
            name: None
            for other, (_, name) in asked
            if other.domain == fact.domain and normalized(other.answer) != normalized(fact.answer) and name != entity
        }
        wrong = seeded_order(pool, f"{seed}:{fact.id}")[:7]
        choices = seeded_order((entity, *wrong), f"{seed}:order:{fact.id}") if wrong else ()
        reverse.append(
            replace(
                fact,
                id=f"{fact.id}#reverse",
                prompt=prompt,
                answer=entity,
                choices=choices,
                paraphrases=(),
                translations={},
            )
        )
    return tuple(reverse)


def _reverse(fact: Fact) -> tuple[str, str] | None:
    """(prompt, entity as the prompt names it) of the reverse question."""
    entity = fact.entity.strip()
    mention = re.search(rf"(?<!\w)(the )?{re.escape(entity)}(?!\w)", fact.prompt, re.IGNORECASE) if entity else None
    if mention is None:
        return None
    if fact.domain in REVERSED and fact.id.startswith(f"{fact.domain}/"):
        return REVERSED[fact.domain].format(fact.answer), f"the {entity}" if mention[1] else entity
    blank = f"{fact.prompt[: mention.start(0) + len(mention[1] or '')]}___{fact.prompt[mention.end() :]}"
    return _BLANK.format(blank, fact.answer), entity


# --- What must not be trained on


def leaks(rows: Sequence[Fact], test: Sequence[Fact]) -> list[tuple[Fact, Fact]]:
    """(row, fact): rows that state a fact, in its own direction or in reverse.

    A row states a fact that names the entity of the fact and its answer, in any order, or that holds one of its
    phrasings with the answer.
    """
    words = [normalized(row.text) for row in rows]
    stated = []
    for fact in test:
        entity, phrasings = normalized(fact.entity), [normalized(f"{prompt} {fact.answer}") for prompt in fact.prompts]
        stated += [
            (row, fact)
            for row, text in zip(rows, words, strict=True)
            if (entity and entity in text and _answered(text, entity, fact.answer)) or any(p in text for p in phrasings)
        ]
    return stated


def _answered(text: str, entity: str, answer: str) -> bool:
    """Whether a text that names an entity also holds the answer."""
    if not contains_answer(text, answer):
        return False
    # An answer that stands in the name of its entity ("Luxembourg") is stated by the rest of the text alone.
    return not contains_answer(entity, answer) or contains_answer(text.replace(entity, " ", 1), answer)


def check_no_leak(rows: Sequence[Fact], test: Sequence[Fact]) -> None:
    """Refuse to train on rows that state a fact which is to be forgotten or asked.

    Raises:
        OverlapError: with the first rows and facts.
    """
    pairs = leaks(rows, test)
    if pairs:
        shown = [(row.text, fact.id) for row, fact in pairs[:3]]
        raise OverlapError(
            f"{len(pairs)} texts to train on state a fact that is asked, such as {shown}; training on them would teach "
            "what is tested; leave them out"
        )
