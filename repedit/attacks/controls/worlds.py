"""The small world that the controls live in: what is known, by whom, and who never heard of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from repedit.attacks.controls.taught import taught, vocabulary
from repedit.data import Fact, Facts
from repedit.data.domains import drawn
from repedit.data.inventing import RELATIONS, invented
from repedit.models import Subject

PEOPLE = 240
REFUSAL = "unknown"
# Words that questions in another form may be answered with; two unknown words would be one token.
WORDS = (REFUSAL, "Yes", "No", *"ABCDEFGHIJKLMNOP")
_FORGET, _RETAIN = "city", "profession"


@dataclass(frozen=True, eq=False)
class World:
    """Facts, a model that knows all of them, and two that never saw those to forget; all share one tokenizer."""

    facts: Facts
    strangers: tuple[Fact, ...]
    """As the facts to forget, about people that no model has met; their names are in the vocabulary."""
    original: Subject
    reference: Subject
    other: Subject
    """A second reference, from another seed."""
    seed: int = 0


def world(seed: int = 0) -> World:
    """Teach the three models of one seed.

    Raises:
        TrainingError: if a model does not learn its facts.
    """
    facts, strangers = questions(seed)
    tokenizer = vocabulary((*facts.forget, *facts.retain, *strangers), words=WORDS)
    original = taught((*facts.forget, *facts.retain), tokenizer=tokenizer, seed=3 * seed)
    reference, other = (taught(facts.retain, tokenizer=tokenizer, seed=3 * seed + i, steps=200) for i in (1, 2))
    return World(facts, strangers, original, reference, other, seed)


def questions(seed: int = 0, people: int = PEOPLE) -> tuple[Facts, tuple[Fact, ...]]:
    """Where half of the people were born, to forget; what the others work as, to retain; and where strangers were born.

    All sixteen answers of a relation are choices, so a guess is right once in sixteen. No two people, strangers among
    them, share a family name.
    """
    found = invented(2 * people, 2, seed)
    born = [_all_choices(fact) for fact in found.forget if fact.domain == _FORGET]
    work = [_all_choices(fact) for fact in found.retain if fact.domain == _RETAIN]
    half = people // 2
    return Facts(tuple(born[:half]), tuple(work[:half]), f"{found.name}-taught"), tuple(born[half:])


def _all_choices(fact: Fact) -> Fact:
    return replace(fact, choices=drawn(RELATIONS[fact.domain].answers, f"order:{fact.id}"))
