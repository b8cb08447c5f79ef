"""Perplexity on plain text: the sign of life that has nothing to do with what was forgotten."""

from __future__ import annotations

from collections.abc import Iterable

from repedit.activations.prediction import Predictions, predictions
from repedit.data import Batches, as_batches, prose
from repedit.models import Subject

# Tokens that are read; the built-in prose has about four times as many.
_TOKENS = 4096


def perplexity(
    subject: Subject,
    texts: Batches | Iterable[str],
    *,
    window: int = 512,
    batch_size: int = 8,
    limit_tokens: int | None = None,
) -> Predictions:
    """How well the model predicts plain text, in windows of so many tokens; its `perplexity` is the number.

    Args:
        texts: a corpus, or texts.
        limit_tokens: stop after the batch that reaches this many.
    Raises:
        NotEnoughRows: if there is nothing to predict.
        NotFinite: if the loss is not finite.
    """
    corpus = texts if isinstance(texts, Batches) else as_batches(list(texts), name="texts")
    return predictions(subject, corpus, length=window, batch_size=batch_size, limit_tokens=limit_tokens)


def plain_perplexity(subject: Subject, plain: Batches | None) -> float:
    """Perplexity on plain text; on the built-in prose where none is given."""
    return perplexity(subject, prose() if plain is None else plain, limit_tokens=_TOKENS).perplexity
