"""The texts benchmarks measure on: CPython's standard library and WikiText-2, split by document."""

from __future__ import annotations

import re
from pathlib import Path

import repedit as rp
from repedit.data import Corpus

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CHARACTERS = 700
"""Of an excerpt: enough for one chunk of 128 tokens of code or prose."""


def wikitext() -> Corpus:
    """WikiText-2 raw test, one document an article."""
    path = DATA / "wikitext2" / "wiki.test.raw"
    if not path.exists():
        raise SystemExit(f"{path} is absent; put the WikiText-2 raw test split there")
    parts = re.split(r"(?m)^(?= = [^=].* = $)", path.read_text(encoding="utf-8"))
    return Corpus(rp.data.read([part for part in parts if part.strip()], name="wikitext").documents, "wikitext")


def splits() -> dict[str, tuple[Corpus, Corpus]]:
    """(development, test) parts of both sets; methods are chosen on the first and reported on the second.

    Documents are ordered by their hash: the first half is development, the last 40 % is test. The gap between them
    keeps a document from changing sides when the library reads a few files more or less.
    """
    return {"code": _parted(rp.data.code(characters=None)), "prose": _parted(wikitext())}


def _parted(corpus: Corpus) -> tuple[Corpus, Corpus]:
    development, rest = corpus.halves(0)
    return development, Corpus(rest.documents[len(rest) // 5 :], corpus.name)


def chunks(corpus: Corpus, count: int, seed: int) -> Corpus:
    """`count` excerpts of as many documents as there are, each long enough for one chunk of 128 tokens."""
    return Corpus(corpus.excerpts(count, characters=CHARACTERS, seed=seed).documents, corpus.name)
