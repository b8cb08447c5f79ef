"""Questions out of a text: the word that really stands there, wrong words that do not, no document on both sides."""

from __future__ import annotations

import re

import pytest

import repedit as rp
from repedit.data import Corpus, Document, Splits
from repedit.data.generated import PYTHON, cloze
from repedit.errors import ArgumentError, NotEnoughRows


def corpus() -> Corpus:
    return rp.data.prose()


def by_source(text: Corpus) -> dict[str, str]:
    return {d.origin or d.id: d.text for d in text.documents}


def check(found, text: Corpus) -> None:
    texts = by_source(text)
    right: dict[str, set[str]] = {}
    for fact in found.forget:
        assert f"{fact.prompt} {fact.answer}" in texts[fact.entity]
        assert fact.prompt == fact.prompt.rstrip() and re.fullmatch(r"[A-Za-z_]{4,}", fact.answer)
        right.setdefault(fact.entity, set()).add(fact.answer.lower())
    for fact in found.forget:
        assert not {c.lower() for c in fact.choices} & (right[fact.entity] - {fact.answer.lower()})


def test_the_answer_is_the_word_that_comes_next():
    found = cloze(corpus(), 60)
    check(found, corpus())
    assert len(found.forget) == 60 and all(
        len(f.choices) == 8 and 100 <= len(f.prompt) + 1 <= 200 for f in found.forget
    )
    assert len({f.choices.index(f.answer) for f in found.forget}) > 4  # the place tells nothing
    assert rp.data.cloze is cloze


def test_the_check_would_see_another_word():
    found = cloze(corpus(), 60)
    broken = rp.data.Facts(tuple(_other(f) for f in found.forget), name="broken")
    with pytest.raises(AssertionError):
        check(broken, corpus())


def _other(fact):
    from dataclasses import replace

    return replace(fact, answer=next(c for c in fact.choices if c != fact.answer))


def test_halves_share_no_document():
    halves = Splits.of(cloze(corpus(), 60))
    assert not {f.entity for f in halves.train} & {f.entity for f in halves.test}
    excerpts = rp.data.code()
    origins = {d.origin for d in excerpts.documents}
    assert {f.entity for f in cloze(excerpts, 24).forget} <= origins


def test_it_depends_on_the_seed_and_the_text_alone():
    backwards = Corpus(corpus().documents[::-1], "prose")
    one, two = cloze(corpus(), 24), cloze(corpus(), 24)
    assert one.forget == two.forget != cloze(corpus(), 24, seed=1).forget
    assert {f.entity for f in cloze(backwards, 120, characters=20).forget} == set(by_source(corpus()))


def test_lines_can_be_chosen():
    found = cloze(rp.data.code(), 24, lines=PYTHON)
    for fact in found.forget:
        line = fact.prompt.splitlines()[-1].lstrip()
        assert not line.startswith("#") and (line.split()[0].isidentifier() or "=" in line)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 1}, ArgumentError, "count=1, choices=8, characters=100; give at least 2, 2 and 1"),
        ({"count": 10**6}, NotEnoughRows, r"corpus 'prose' has \d+ positions for a question, 1000000 were asked for"),
        (
            {"count": 4, "choices": 40},
            NotEnoughRows,
            r"\d different words are answers in other documents, 39 are needed",
        ),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        cloze(corpus(), **options)


def test_a_short_text_has_no_place_to_ask_at():
    with pytest.raises(NotEnoughRows, match="has 0 positions"):
        cloze(Corpus((Document("a", "Too short a text."),)), 2)
