"""Other spellings of a name: in capital or small letters, or with a letter in the wrong place, twice or left out."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby


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
