"""Perplexity on plain text: the sign of life that has nothing to do with what was forgotten."""

from __future__ import annotations

from repedit.data import Batches, prose
from repedit.metrics.probability import perplexity
from repedit.models import Subject

# Tokens that are read; the built-in prose has about four times as many.
_TOKENS = 4096


def plain_perplexity(subject: Subject, plain: Batches | None) -> float:
    """Perplexity on plain text; on the built-in prose where none is given."""
    return perplexity(subject, prose() if plain is None else plain, limit_tokens=_TOKENS).perplexity
