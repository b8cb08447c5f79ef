"""Generated data: cloze questions from a text, invented people, demonstrations in place of a question, and misspelt names."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from repedit.arguments import checked
from repedit.data.corpus import Corpus, Document
from repedit.data.fact_sets import CHOICES, Fact, Facts, by_domain, seeded_order
from repedit.data.grading import normalized
from repedit.errors import ArgumentError, NotEnoughRows, check_seed

# --- Cloze questions: which word comes next? A skill such as writing code can then be tested like facts

PYTHON = (
    r"\s*((def|class|return|import|from|if|elif|for|while|with|raise|assert|yield)\b|[\w.\[\]\"']+ [-+*/|&]?= )[^#]*$"
)
"""Lines of Python that are neither comments nor, mostly, docstrings."""
_START = re.compile(r"\n|(?<=[.!?]) ")
_WORD = re.compile(r"(?<=\S )[A-Za-z_]{4,}\b")


class _Gap(NamedTuple):
    """A word of a document, with the text before it."""

    source: str
    prompt: str
    answer: str


@checked
def cloze(
    corpus: Corpus, count: int = 128, *, choices: int = 8, characters: int = 100, lines: str = "", seed: int = 0
) -> Facts:
    """Questions for the next word, at positions drawn from every document in turn; the entity of a fact is its document.

    A prompt begins at the start of a line or sentence and ends before a word of at least four letters. The wrong
    choices are answers in other documents. Halves of the facts share no document.

    Args:
        count: number of questions.
        choices: words to choose from, including the right one.
        characters: minimum length of a prompt; the maximum is twice as long.
        lines: a regular expression, such as `PYTHON`, that the line of the word must match up to the word.
    Raises:
        ArgumentError: if a number is out of range.
        NotEnoughRows: if the corpus has too few such positions, or too few different words.
    """
    if count < 2 or choices < 2 or characters < 1:
        raise ArgumentError(f"count={count}, choices={choices}, characters={characters}; give at least 2, 2 and 1")
    check_seed(seed=seed)
    gaps = _select_gaps(corpus, count, characters, re.compile(lines), seed)
    if len(gaps) < count:
        raise NotEnoughRows(
            f"corpus {corpus.name!r} has {len(gaps)} positions for a question, {count} were asked for; give more text or "
            "fewer characters"
        )
    items = tuple(_cloze_fact(gap, gaps, number, choices, f"{corpus.name}/{number}") for number, gap in enumerate(gaps))
    return Facts(items, name=f"{corpus.name} cloze")


def _select_gaps(corpus: Corpus, count: int, characters: int, lines: re.Pattern[str], seed: int) -> list[_Gap]:
    """Gaps from every document in turn; a word is an answer at most once in a document."""
    order = random.Random(seed).sample(list(corpus.documents), len(corpus))
    queues = [_gaps(document, characters, lines, seed) for document in order]
    by_prompt: dict[str, _Gap] = {}
    while queues and len(by_prompt) < count:
        remaining = []
        for queue in queues:
            gap = next(queue, None)
            if gap is not None:
                # A line that several documents share may continue differently: one prompt has one answer.
                by_prompt.setdefault(gap.prompt, gap)
                remaining.append(queue)
        queues = remaining
    return list(by_prompt.values())[:count]


def _gaps(document: Document, characters: int, lines: re.Pattern[str], seed: int) -> Iterator[_Gap]:
    source, text = document.origin or document.id, document.text
    words: set[str] = set()
    matches = list(_WORD.finditer(text))
    for match in random.Random(f"{seed}:{document.id}").sample(matches, len(matches)):
        position, word = match.start(), match[0]
        starts = [0, *(end.end() for end in _START.finditer(text, 0, position))]
        start = next((s for s in reversed(starts) if characters <= position - s <= 2 * characters), None)
        line = text[text.rfind("\n", 0, position) + 1 : position]
        if start is not None and word.lower() not in words and lines.match(line):
            words.add(word.lower())
            yield _Gap(source, text[start : position - 1], word)


def _cloze_fact(gap: _Gap, gaps: list[_Gap], number: int, choices: int, seed: str) -> Fact:
    """The gap as a fact; an answer in its own document cannot be a wrong choice."""
    own = {normalized(other.answer) for other in gaps if other.source == gap.source}
    pool = {normalized(other.answer): other.answer for other in gaps if normalized(other.answer) not in own}
    if len(pool) < choices - 1:
        raise NotEnoughRows(f"{len(pool)} different words are answers in other documents, {choices - 1} are needed")
    wrong = seeded_order(pool.values(), seed)[: choices - 1]
    return Fact(
        id=f"cloze/{number}:{gap.source}", entity=gap.source, prompt=gap.prompt, answer=gap.answer,
        choices=seeded_order((gap.answer, *wrong), f"{seed}:order"), domain="cloze",
    )  # fmt: skip


# --- Invented people: facts for models that are taught facts in order to forget them


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


@checked
def invented(people: int = 40, relations: int = 4, seed: int = 0) -> Facts:
    """Facts about invented people: every person has one answer in each relation, drawn evenly from sixteen.

    Half of the people are to be forgotten, the others retained. A relation is a domain, a person is an entity.

    Raises:
        ArgumentError: if there are fewer than 4 people, more than there are names, or no such number of relations.
    """
    check_seed(seed=seed)
    rng = random.Random(seed)
    families = [f"{a}{b}{c}".capitalize() for a in _SECOND for b in _FIRST for c in _THIRD]
    if not 4 <= people <= len(families) or not 1 <= relations <= len(RELATIONS):
        raise ArgumentError(
            f"people={people}, relations={relations}; there can be 4 to {len(families)} people "
            f"and 1 to {len(RELATIONS)} relations"
        )
    # No two people share a family name, so that no answer can be inferred from a namesake.
    persons = [f"{rng.choice(_FIRST)}{rng.choice(_SECOND)} {family}" for family in rng.sample(families, people)]
    by_person: list[list[Fact]] = [[] for _ in persons]
    for domain in list(RELATIONS)[:relations]:
        answers = _even(rng, RELATIONS[domain].answers, people)
        for person, facts, answer in zip(persons, by_person, answers, strict=True):
            facts.append(_invented_fact(domain, person, answer, seed))
    half = people // 2
    forget, retain = (tuple(fact for facts in part for fact in facts) for part in (by_person[:half], by_person[half:]))
    return Facts(forget, retain, f"invented-{people}-{relations}-{seed}")


def _even(rng: random.Random, answers: tuple[str, ...], count: int) -> list[str]:
    """`count` shuffled answers whose frequencies differ by at most one."""
    repeated = [answer for _ in range(0, count, len(answers)) for answer in rng.sample(answers, len(answers))][:count]
    rng.shuffle(repeated)
    return repeated


def _invented_fact(domain: str, person: str, answer: str, seed: int) -> Fact:
    relation = RELATIONS[domain]
    phrasings = [phrasing.replace("{}", person) for phrasing in relation.phrasings]
    identity = f"invented/{normalized(person).replace(' ', '-')}/{domain}"
    wrong = seeded_order(set(relation.answers) - {answer}, f"{seed}:{identity}")[: CHOICES - 1]
    return Fact(
        id=identity, entity=person, prompt=phrasings[0], answer=answer,
        choices=seeded_order((answer, *wrong), f"{seed}:order:{identity}"), domain=domain,
        paraphrases=tuple(phrasings[1:]),
    )  # fmt: skip


# --- Facts asked by demonstration: a list of other facts of the domain, then the entity


def with_demonstrations(items: Sequence[Fact], *, count: int = 3, seed: int = 0) -> tuple[Fact, ...]:
    """Facts whose prompt lists "entity: answer" of `count` other facts of the domain, one per line, and ends in "entity:".

    The relation is demonstrated and never named, so the answer cannot depend on its wording. Ids are
    "capitals/france#shown".

    Raises:
        NotEnoughRows: if a domain has too few facts to demonstrate.
    """
    domains = by_domain(items)
    short = next((name for name, part in domains.items() if len(part) <= count), None)
    if short is not None:
        raise NotEnoughRows(
            f"domain {short!r} has {len(domains[short])} facts; {count} to demonstrate and one to ask are needed"
        )
    lines = {fact.id: f"{fact.entity or fact.prompt}: {fact.answer}" for fact in items}
    demonstrated = []
    for fact in items:
        others = [other.id for other in domains[fact.domain] if other.id != fact.id and other.entity != fact.entity]
        examples = [lines[name] for name in seeded_order(others, f"{seed}:shown:{fact.id}")[:count]]
        prompt = "\n".join([*examples, f"{fact.entity or fact.prompt}:"])
        demonstrated.append(replace(fact, id=f"{fact.id}#shown", prompt=prompt, paraphrases=()))
    return tuple(demonstrated)


# --- Other spellings of a name: in capital or small letters, or with a letter in the wrong place, twice or left out


def lower_case(text: str) -> str:
    """The text in small letters; a capital I with a dot becomes an i, not an i with two dots."""
    return re.sub("\u0130|I\u0307", "i", text).lower()


def letters_swapped(word: Sequence[str], rng: random.Random) -> Sequence[str]:
    """The letters of a word with two neighbours in each other's place, such as "Farnce" for "France".

    The first letter stays, and the last one where another pair of different letters is there; a word without a pair stays.
    """
    pairs = [i for i in range(1, len(word) - 1) if word[i] != word[i + 1]]
    if not pairs:
        return word
    i = rng.choice([i for i in pairs if i + 2 < len(word)] or pairs)
    return [*word[:i], word[i + 1], word[i], *word[i + 2 :]]


def letter_doubled(word: Sequence[str], rng: random.Random) -> Sequence[str]:
    """The letters of a word with one twice, but for the first; a word of one letter stays."""
    if len(word) < 2:
        return word
    i = rng.randrange(1, len(word))
    return [*word[: i + 1], *word[i:]]


def letter_left_out(word: Sequence[str], rng: random.Random) -> Sequence[str]:
    """The letters of a word without one of them, such as "Frnce" for "France"; a word of fewer than four letters stays.

    The first letter stays, and the last.
    """
    if len(word) < 4:
        return word
    i = rng.randrange(1, len(word) - 1)
    return [*word[:i], *word[i + 1 :]]


SPELLINGS: Mapping[str, Callable[[str, random.Random], str]] = {
    "lower case": lambda text, rng: lower_case(text),
    "upper case": lambda text, rng: text.upper(),
    "letters swapped": lambda text, rng: _every_word(text, lambda word: letters_swapped(word, rng)),
    "letter doubled": lambda text, rng: _every_word(text, lambda word: letter_doubled(word, rng)),
    "letter left out": lambda text, rng: _every_word(text, lambda word: letter_left_out(word, rng)),
}
"""How else a name is written: (name, random numbers) -> text."""


def _every_word(text: str, change: Callable[[Sequence[str]], Sequence[str]]) -> str:
    """The text with the letters of every word changed; a letter comes with its marks, and all else stays."""
    units: list[str] = []
    for character in text:
        if units and _joins(units[-1][-1], character):
            units[-1] += character
        else:
            units.append(character)
    runs = groupby(units, key=lambda unit: unit[0].isalpha())
    return "".join("".join(change(list(run)) if letters else run) for letters, run in runs)


_JOINER, _NON_JOINER, _VIRAMA = "\u200d", "\u200c", 9


def _joins(before: str, character: str) -> bool:
    """Whether a character is read as one with that before it: a mark, what a joiner or a virama joins, a jamo of a syllable."""
    return (
        unicodedata.category(character).startswith("M")
        or character in (_JOINER, _NON_JOINER)
        or before == _JOINER
        or unicodedata.combining(before) == _VIRAMA
        or (before.isalpha() and ("\u1160" <= character <= "\u11ff" or "\ud7b0" <= character <= "\ud7fb"))
    )
