"""Questions out of a text: which word comes next? They let a skill be asked like facts, such as writing code."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

from repedit.data.corpus import Corpus, Document
from repedit.data.domains import Fact, Facts, drawn
from repedit.data.grading import normalized
from repedit.errors import ArgumentError, NotEnoughRows

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
