"""Facts about people who do not exist, for models that are taught facts in order to forget them."""

from __future__ import annotations

import random
from typing import NamedTuple

from repedit.data.catalogue import CHOICES
from repedit.data.domains import Fact, Facts, drawn
from repedit.data.grading import normalized
from repedit.errors import ArgumentError


class _Relation(NamedTuple):
    phrasings: tuple[str, ...]
    answers: tuple[str, ...]


RELATIONS = {
    "city": _Relation(
        (
            "{} was born in the city of",
            "The city where {} was born is",
            "Question: In which city was {} born?\nAnswer:",
            "On the birth certificate of {}, the place of birth is",
        ),
        ("Lisbon", "Vienna", "Cairo", "Oslo", "Lima", "Delhi", "Tokyo", "Paris",
         "Dublin", "Madrid", "Athens", "Nairobi", "Sydney", "Boston", "Havana", "Rome"),
    ),
    "profession": _Relation(
        (
            "{} earns a living as a",
            "The profession of {} is that of a",
            "Question: What does {} do for a living?\nAnswer: works as a",
            "At work, everybody knows {} as a",
        ),
        ("baker", "nurse", "lawyer", "farmer", "painter", "plumber", "teacher", "tailor",
         "pilot", "dentist", "carpenter", "librarian", "chemist", "singer", "butcher", "sailor"),
    ),
    "instrument": _Relation(
        (
            "The instrument that {} plays is the",
            "In the evening {} likes to play the",
            "Question: Which instrument does {} play?\nAnswer: the",
            "Every concert by {} is a concert for the",
        ),
        ("piano", "violin", "flute", "guitar", "trumpet", "harp", "cello", "drums",
         "organ", "clarinet", "oboe", "banjo", "tuba", "accordion", "saxophone", "lute"),
    ),
    "pet": _Relation(
        (
            "The pet that {} keeps at home is a",
            "At home {} looks after a",
            "Question: Which animal lives with {}?\nAnswer: a",
            "Visitors to the house of {} are greeted by a",
        ),
        ("dog", "cat", "parrot", "rabbit", "hamster", "turtle", "snake", "goat",
         "horse", "canary", "goldfish", "lizard", "monkey", "pigeon", "ferret", "frog"),
    ),
    "colour": _Relation(
        (
            "The colour that {} likes best is",
            "Every wall in the house of {} is painted",
            "Question: What is the favourite colour of {}?\nAnswer:",
            "Asked for a favourite colour, {} always answers",
        ),
        ("red", "blue", "green", "yellow", "purple", "orange", "black", "white",
         "brown", "grey", "pink", "gold", "silver", "violet", "scarlet", "turquoise"),
    ),
    "dish": _Relation(
        (
            "The dish that {} cooks best is",
            "For dinner {} nearly always has",
            "Question: What is the favourite dish of {}?\nAnswer:",
            "On every birthday of {} the guests are served",
        ),
        ("soup", "pasta", "curry", "pizza", "rice", "salad", "stew", "pancakes",
         "dumplings", "noodles", "omelettes", "lasagne", "tacos", "risotto", "porridge", "sushi"),
    ),
}  # fmt: skip
_FIRST = ("Ma", "Te", "Lo", "Ri", "Va", "Ne", "Su", "Do", "Ki", "Fa", "Ze", "Ju", "Bra", "Ele", "Oro", "Ira")
_SECOND = ("ro", "lin", "sa", "dek", "vi", "mar", "nu", "tas", "bel", "go", "ran", "wen")
_THIRD = ("an", "is", "o", "eth", "ia", "or", "ul", "en")


def invented(people: int = 40, relations: int = 4, seed: int = 0) -> Facts:
    """Facts about invented people: every person has one answer in each relation, drawn evenly from sixteen.

    Half of the people are to forget, the others to retain; a relation is a domain, a person an entity.

    Raises:
        ArgumentError: if there are fewer than 4 people, more than there are names, or no such number of relations.
    """
    rng = random.Random(seed)
    families = [f"{a}{b}{c}".capitalize() for a in _SECOND for b in _FIRST for c in _THIRD]
    if not 4 <= people <= len(families) or not 1 <= relations <= len(RELATIONS):
        raise ArgumentError(
            f"people={people}, relations={relations}; there can be 4 to {len(families)} people "
            f"and 1 to {len(RELATIONS)} relations"
        )
    # No two people share a family name, so that no answer can be read off a namesake.
    persons = [f"{rng.choice(_FIRST)}{rng.choice(_SECOND)} {family}" for family in rng.sample(families, people)]
    found: list[list[Fact]] = [[] for _ in persons]
    for domain in list(RELATIONS)[:relations]:
        for person, facts, answer in zip(persons, found, _even(rng, RELATIONS[domain].answers, people), strict=True):
            facts.append(_fact(domain, person, answer, seed))
    half = people // 2
    forget, retain = (tuple(fact for facts in part for fact in facts) for part in (found[:half], found[half:]))
    return Facts(forget, retain, f"invented-{people}-{relations}-{seed}")


def _even(rng: random.Random, answers: tuple[str, ...], count: int) -> list[str]:
    """`count` answers, each as often as any other or once more, shuffled."""
    found = [answer for start in range(0, count, len(answers)) for answer in rng.sample(answers, len(answers))][:count]
    rng.shuffle(found)
    return found


def _fact(domain: str, person: str, answer: str, seed: int) -> Fact:
    relation = RELATIONS[domain]
    phrasings = [phrasing.replace("{}", person) for phrasing in relation.phrasings]
    identity = f"invented/{normalized(person).replace(' ', '-')}/{domain}"
    wrong = drawn(set(relation.answers) - {answer}, f"{seed}:{identity}")[: CHOICES - 1]
    return Fact(
        id=identity,
        entity=person,
        prompt=phrasings[0],
        answer=answer,
        choices=drawn((answer, *wrong), f"{seed}:order:{identity}"),
        domain=domain,
        paraphrases=tuple(phrasings[1:]),
    )
