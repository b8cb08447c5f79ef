"""Two models on the same texts and prompts, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repedit.activations.prediction import Effect, Predictions, effect, predictions
from repedit.data import Batches
from repedit.metrics.generation import continuations
from repedit.models import Subject


@dataclass(frozen=True, eq=False)
class Comparison:
    """What changed from one model to another."""

    base: Mapping[str, Predictions]
    """By corpus name."""
    edited: Mapping[str, Predictions]
    prompts: tuple[str, ...]
    base_text: tuple[str, ...]
    edited_text: tuple[str, ...]

    def effect(self, name: str) -> Effect:
        """The relative drop of top-1 accuracy on a corpus, with its interval."""
        return effect(self.base[name], self.edited[name])


def compare(
    base: Subject,
    edited: Subject,
    corpora: Sequence[Batches] = (),
    *,
    prompts: Sequence[str] = (),
    tokens: int = 40,
    **options: Any,
) -> Comparison:
    """Perplexity and top-1 accuracy of both models on each corpus, and their greedy continuations of each prompt.

    Args:
        options: passed to `predictions`: length, batch_size, limit_tokens, progress.
    """
    sides = [{corpus.name: predictions(subject, corpus, **options) for corpus in corpora} for subject in (base, edited)]
    texts = [continuations(subject, prompts, tokens=tokens) for subject in (base, edited)]
    return Comparison(sides[0], sides[1], tuple(prompts), texts[0], texts[1])
