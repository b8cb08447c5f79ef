"""Accuracy on MMLU, subject by subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from repedit.data import Fact, by_domain
from repedit.errors import DataError
from repedit.metrics.probability import choice_scores
from repedit.models import Subject

_ROWS = 16


@dataclass(frozen=True, eq=False)
class Mmlu:
    """Credit for each question, by subject: 1 right, 0 wrong, 1/k where the right answer ties with k - 1 others."""

    credit: Mapping[str, NDArray[np.float64]]

    @property
    def by_subject(self) -> dict[str, float]:
        """Accuracy of each subject."""
        return {name: float(values.mean()) for name, values in self.credit.items()}

    @property
    def mean(self) -> float:
        """Over subjects, each counting the same."""
        return float(np.mean(list(self.by_subject.values())))

    @property
    def questions(self) -> int:
        """How many were asked."""
        return sum(len(values) for values in self.credit.values())


def mmlu_accuracy(subject: Subject, facts: Sequence[Fact]) -> Mmlu:
    """Accuracy by subject: the letter with the highest log-probability after each prompt.

    A tie is worth what guessing among the letters that tie is worth, so a model without any preference is at chance
    whatever the order of the letters.

    Raises:
        DataError: if there are no questions.
        NotFinite: if a log-probability is not finite.
    """
    if not facts:
        raise DataError("there are no questions; read some with repedit.data.mmlu(directory)")
    return Mmlu({name: _credit(subject, part) for name, part in by_domain(facts).items()})


def _credit(subject: Subject, facts: Sequence[Fact]) -> NDArray[np.float64]:
    found = choice_scores(subject, facts, [fact.choices for fact in facts], _ROWS)
    best = [scores == scores.max() for scores, _ in found]
    return np.array(
        [b[f.choices.index(f.answer)] / b.sum() for b, f in zip(best, facts, strict=True)], dtype=np.float64
    )
