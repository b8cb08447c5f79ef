"""Facts made from other material: cloze questions out of a text, invented people, and demonstrations in place of words."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from repedit.data.corpus import Corpus, Document
from repedit.data.fact_sets import CHOICES, Fact, Facts, by_domain, drawn
from repedit.data.grading import normalized
from repedit.errors import ArgumentError, NotEnoughRows

# --- Questions out of a text: which word comes next? They let a skill be asked like facts, such as writing code


PYTHON = (
    r"\s*((def|class|return|import|from|if|elif|for|while|with|raise|assert|yield)\b|[\w.\[\]\"']+ [-+*/|&]?= )[^#]*$"
)
"""Lines of Python that are neither comments nor, mostly, docstrings."""
_START = re.compile(r"\n|(?<=[.!?]) ")
_WORD = re.compile(r"(?<=\S )[A-Za-z_]{4,}\b")


class _Gap(NamedTuple):
    """A word of a document, and what stands before it."""

    source: str
    prompt: str
    answer: str


def cloze(
    corpus: Corpus, count: int = 128, *, choices: int = 8, characters: int = 100, lines: str = "", seed: int = 0
) -> Facts:
    """Which word comes next, at places drawn from every document in turn; facts about no entity but their document.

    A prompt begins at the start of a line or sentence and ends before a word of at least four letters; the wrong choices are words
    that are answers in other documents. Halves of the facts share no document.

    Args:
        count: questions to draw.
        choices: words to choose from, the right one among them.
        characters: least and about half the most that is shown before the word.
        lines: a regular expression that the line of the word, up to the word, matches; such as `PYTHON`.
    Raises:
        ArgumentError: if a number is out of range.
        NotEnoughRows: if the corpus has too few such places, or too few different words.
    """
    if count < 2 or choices < 2 or characters < 1:
        raise ArgumentError(f"count={count}, choices={choices}, characters={characters}; give at least 2, 2 and 1")
    gaps = _taken(corpus, count, characters, re.compile(lines), seed)
    if len(gaps) < count:
        raise NotEnoughRows(
            f"corpus {corpus.name!r} has {len(gaps)} places to ask at, {count} were asked for; give more text or "
            "fewer characters"
        )
    items = tuple(_fact(gap, gaps, number, choices, f"{corpus.name}/{number}") for number, gap in enumerate(gaps))
    return Facts(items, name=f"{corpus.name} cloze")


def _taken(corpus: Corpus, count: int, characters: int, lines: re.Pattern[str], seed: int) -> list[_Gap]:
    """Gaps from every document in turn; no word is an answer twice in one document."""
    order = random.Random(seed).sample(list(corpus.documents), len(corpus))
    queues = [_gaps(document, characters, lines, seed) for document in order]
    found: dict[str, _Gap] = {}
    while queues and len(found) < count:
        left = []
        for queue in queues:
            gap = next(queue, None)
            if gap is not None:
                # A line of many documents goes on in several ways: one prompt has one answer.
                found.setdefault(gap.prompt, gap)
                left.append(queue)
        queues = left
    return list(found.values())[:count]


def _gaps(document: Document, characters: int, lines: re.Pattern[str], seed: int) -> Iterator[_Gap]:
    source, text = document.origin or document.id, document.text
    seen: set[str] = set()
    matches = list(_WORD.finditer(text))
    for match in random.Random(f"{seed}:{document.id}").sample(matches, len(matches)):
        place, word = match.start(), match[0]
        starts = [0, *(end.end() for end in _START.finditer(text, 0, place))]
        start = next((s for s in reversed(starts) if characters <= place - s <= 2 * characters), None)
        line = text[text.rfind("\n", 0, place) + 1 : place]
        if start is not None and word.lower() not in seen and lines.match(line):
            seen.add(word.lower())
            yield _Gap(source, text[start : place - 1], word)


def _fact(gap: _Gap, gaps: list[_Gap], number: int, choices: int, seed: str) -> Fact:
    """The gap as a fact; a word that is right in its own document is no wrong choice."""
    own = {normalized(other.answer) for other in gaps if other.source == gap.source}
    pool = {normalized(other.answer): other.answer for other in gaps if normalized(other.answer) not in own}
    if len(pool) < choices - 1:
        raise NotEnoughRows(f"{len(pool)} different words are answers in other documents, {choices - 1} are needed")
    wrong = drawn(pool.values(), seed)[: choices - 1]
    return Fact(
        id=f"cloze/{number}:{gap.source}", entity=gap.source, prompt=gap.prompt, answer=gap.answer,
        choices=drawn((gap.answer, *wrong), f"{seed}:order"), domain="cloze",
    )  # fmt: skip


# --- Facts about people who do not exist, for models that are taught facts in order to forget them


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
            facts.append(_inventing_fact(domain, person, answer, seed))
    half = people // 2
    forget, retain = (tuple(fact for facts in part for fact in facts) for part in (found[:half], found[half:]))
    return Facts(forget, retain, f"invented-{people}-{relations}-{seed}")


def _even(rng: random.Random, answers: tuple[str, ...], count: int) -> list[str]:
    """`count` answers, each as often as any other or once more, shuffled."""
    found = [answer for start in range(0, count, len(answers)) for answer in rng.sample(answers, len(answers))][:count]
    rng.shuffle(found)
    return found


def _inventing_fact(domain: str, person: str, answer: str, seed: int) -> Fact:
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


# --- Facts asked without words: a few others of the domain as a list, and the entity to go on with


def with_demonstrations(items: Sequence[Fact], *, count: int = 3, seed: int = 0) -> tuple[Fact, ...]:
    """One fact an item whose prompt is "entity: answer" of `count` others of its domain, a line each, then "entity:".

    The relation is shown, never named, so what answers it cannot be the wording. Ids are "capitals/france#shown".

    Raises:
        NotEnoughRows: if a domain has too few facts to show.
    """
    domains = by_domain(items)
    short = next((name for name, part in domains.items() if len(part) <= count), None)
    if short is not None:
        raise NotEnoughRows(
            f"domain {short!r} has {len(domains[short])} facts; {count} to show and one to ask are needed"
        )
    lines = {fact.id: f"{fact.entity or fact.prompt}: {fact.answer}" for fact in items}
    found = []
    for fact in items:
        others = [other.id for other in domains[fact.domain] if other.id != fact.id and other.entity != fact.entity]
        shown = [lines[name] for name in drawn(others, f"{seed}:shown:{fact.id}")[:count]]
        prompt = "\n".join([*shown, f"{fact.entity or fact.prompt}:"])
        found.append(replace(fact, id=f"{fact.id}#shown", prompt=prompt, paraphrases=()))
    return tuple(found)
