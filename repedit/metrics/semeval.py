"""SemEval-2025 Task 4: twelve parts, a membership test and MMLU, aggregated with a verdict.

The published final score rewards collapse: a model that repeats one token scores (0 + 1 + .25) / 3 = .417, more than
most systems that took part. So a score prints its parts and its verdict, and refuses to be a single number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from repedit.arguments import checked
from repedit.data import Batches, Corpus, Fact, Tasks, by_domain, semeval
from repedit.data.benchmarks import TASKS, TaskRow
from repedit.errors import ArgumentError, DataError, MetricError
from repedit.metrics.collapse import (
    NO_ORIGINAL,
    NOTHING,
    Judgement,
    Signs,
    diversity,
    harmonic,
    judge,
    plain_perplexity,
)
from repedit.metrics.facts import choice_scores
from repedit.metrics.generation import exact_match, generate, rouge
from repedit.metrics.membership import auc, scores
from repedit.models.subject import Subject

_ROWS = 16
SIDES = ("forget", "retain")
MEASURES = ("regurgitation", "knowledge")
_MEASURES = {"sc": "regurgitation", "qa": "knowledge"}
PARTS = tuple(f"{side}/{task}/{measure}" for side in SIDES for task in TASKS for measure in MEASURES)
"""The twelve parts of the score: side, task and measure."""
AWARD = 0.371
"""MMLU accuracy below which a 7B model could not win an award."""

# --- Accuracy on MMLU by subject


@dataclass(frozen=True, eq=False)
@checked
class Mmlu:
    """Credit for each question, by subject: 1 if right, 0 if wrong, 1/k if the right answer ties with k - 1 others."""

    credit: Mapping[str, NDArray[np.float64]]

    @property
    def by_subject(self) -> dict[str, float]:
        """Accuracy of each subject."""
        return {name: float(values.mean()) for name, values in self.credit.items()}

    @property
    def mean(self) -> float:
        """Mean over subjects, with equal weight."""
        return float(np.mean(list(self.by_subject.values())))

    @property
    def questions(self) -> int:
        """Number of questions."""
        return sum(len(values) for values in self.credit.values())


@checked
def mmlu_accuracy(subject: Subject, facts: Sequence[Fact]) -> Mmlu:
    """Accuracy by subject: the letter with the highest log-probability after each prompt.

    A tie gives the credit of guessing among the tied letters, so a model without a preference is at chance for any
    order of the letters.

    Raises:
        DataError: if there are no questions.
        NotFinite: if a log-probability is not finite.
    """
    if not facts:
        raise DataError("there are no questions; read some with repedit.data.mmlu(directory)")
    return Mmlu({name: _credit(subject, part) for name, part in by_domain(facts).items()})


def _credit(subject: Subject, facts: Sequence[Fact]) -> NDArray[np.float64]:
    choices = choice_scores(subject, facts, [fact.choices for fact in facts], _ROWS)
    best = [scores == scores.max() for scores, _ in choices]
    return np.array(
        [b[f.choices.index(f.answer)] / b.sum() for b, f in zip(best, facts, strict=True)], dtype=np.float64
    )


# --- The score


@dataclass(frozen=True, eq=False)
@checked
class SemEvalScore:
    """The parts, their aggregates and the verdict."""

    parts: Mapping[str, float]
    """Measured values by the names of `PARTS`; on the forget side lower is better."""
    membership_auc: float
    """Forget against holdout; 1 means member."""
    mmlu: float
    """Mean accuracy over subjects."""
    signs: Signs = NOTHING
    judgement: Judgement = NO_ORIGINAL
    items: Mapping[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)
    """Value of each row, by part; membership scores as "member" and "nonmember"."""
    outputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    """The output for each row, by part."""

    @property
    def task_aggregate(self) -> float:
        """Harmonic mean of the 12 parts, with 1 - x for the forget side; 0 if one is 0."""
        return harmonic({name: 1 - x if name.startswith("forget") else x for name, x in self.parts.items()})

    @property
    def membership(self) -> float:
        """1 - 2 |AUC - .5|: 1 if members are not separated from others."""
        return 1 - 2 * abs(self.membership_auc - 0.5)

    @property
    def final(self) -> float:
        """The published score: mean of task aggregate, membership and MMLU. Read it with the verdict."""
        return final(self.task_aggregate, self.membership, self.mmlu)

    @property
    def verdict(self) -> str:
        """One of `repedit.outcomes.OUTCOMES`."""
        return self.judgement.verdict

    @checked
    def judged(self, original: SemEvalScore | None, *, auc_reference: float = 0.5) -> SemEvalScore:
        """The same score with its verdict, judged against the original model's score.

        Raises:
            ArgumentError: if the AUC of the reference lies outside [0, 1].
        """
        other = None if original is None else original.signs
        return replace(self, judgement=judge(self.signs, other, auc_reference=auc_reference))

    def __float__(self) -> NoReturn:
        raise MetricError("a SemEval score is not a single number: report the parts; score.final is available")

    def __str__(self) -> str:
        rows = [f"{'part':24}" + "".join(f"{task:>8}" for task in TASKS)]
        for side in SIDES:
            for measure in MEASURES:
                values = "".join(f"{self.parts[f'{side}/{task}/{measure}']:8.3f}" for task in TASKS)
                rows.append(f"{side + ' ' + measure:24}{values}")
        numbers = (
            f"task aggregate {self.task_aggregate:.3f}, membership {self.membership:.3f} (AUC {self.membership_auc:.3f}), "
            f"MMLU {self.mmlu:.3f}{' (below ' + str(AWARD) + ')' if self.mmlu < AWARD else ''}"
        )
        return "\n".join((*rows, numbers, f"final {self.final:.3f}", f"verdict {self.judgement}"))


@checked
def aggregate(
    parts: Mapping[str, float],
    membership_auc: float,
    mmlu: float,
    *,
    signs: Signs = NOTHING,
    judgement: Judgement = NO_ORIGINAL,
    items: Mapping[str, NDArray[np.float64]] | None = None,
    outputs: Mapping[str, tuple[str, ...]] | None = None,
) -> SemEvalScore:
    """The score from 12 parts, the AUC of the membership test and the accuracy on MMLU, all in [0, 1].

    Args:
        parts: by the names of `PARTS`; regurgitation is the mean ROUGE-L recall of completions, knowledge the mean
            exact match of answers.
        signs, judgement, items, outputs: as in `SemEvalScore`.
    Raises:
        MetricError: if a part is missing, has another name, or a value lies outside [0, 1].
    Reference: Ramakrishna et al. 2025, arXiv:2502.15097.
    """
    missing, other = [name for name in PARTS if name not in parts], sorted(set(parts) - set(PARTS))
    if missing or other:
        raise MetricError(f"missing parts {missing}, unknown parts {other}; a part is called like {PARTS[0]!r}")
    for name, value in {**parts, "membership_auc": membership_auc, "mmlu": mmlu}.items():
        if not 0 <= value <= 1:
            raise MetricError(f"{name} is {value}; give a fraction in [0, 1], not a percentage")
    ordered = {name: float(parts[name]) for name in PARTS}
    return SemEvalScore(ordered, float(membership_auc), float(mmlu), signs, judgement, items or {}, outputs or {})


@checked
def final(task_aggregate: float, membership: float, mmlu: float) -> float:
    """Mean of the three, as published."""
    return (task_aggregate + membership + mmlu) / 3


# --- Evaluation of a model


@checked
def evaluate(
    subject: Subject,
    directory: str | Path,
    mmlu: Sequence[Fact] | float,
    *,
    split: str = "validation",
    original: SemEvalScore | None = None,
    auc_reference: float = 0.5,
    plain: Batches | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    limit: int | None = None,
    chat: bool = False,
) -> SemEvalScore:
    """The SemEval-2025 Task 4 score of a model on a public split, with its verdict.

    Args:
        directory: the data, as `repedit.data.semeval` reads it.
        mmlu: questions from `repedit.data.mmlu`, or an accuracy measured elsewhere, which the verdict ignores.
        original: the score of the model before the edit; without it the verdict is INCONCLUSIVE.
        auc_reference: AUC of a model that never saw the forget set.
        plain: text for the perplexity; None for the built-in prose.
        limit: rows of each of the 12 parts, the first ones; None for all, as published.
        chat: use the tokenizer's chat template; the published scores do not.
    Raises:
        ArgumentError: if the limit is below 1.
        MetricError: if a given accuracy lies outside [0, 1].
        NotFound, UnknownName, DataError, NotFinite, MissingDependency: as the readers and the parts do.
    Reference: Ramakrishna et al. 2025, arXiv:2502.15097.
    """
    if limit is not None and limit < 1:
        raise ArgumentError(f"limit={limit}; give at least 1 row a part, or none for all")
    data = semeval(directory, split)
    by_part = part_rows(data, limit)
    rows = [row for part in by_part.values() for row in part]
    outputs = generate(
        subject, [row.prompt for row in rows], max_new_tokens=max_new_tokens, batch_size=batch_size, chat=chat
    )
    remaining = iter(outputs)
    outputs_by_part = {name: tuple(islice(remaining, len(part))) for name, part in by_part.items()}
    items = {name: row_scores(part, outputs_by_part[name]) for name, part in by_part.items()}
    items |= membership_scores(subject, data)
    measured = mmlu if isinstance(mmlu, float) else mmlu_accuracy(subject, mmlu)
    accuracy = measured if isinstance(measured, float) else measured.mean
    parts = {name: float(items[name].mean()) for name in by_part}
    membership_auc = auc(items["member"], items["nonmember"])
    distinct, repeated = diversity(subject.need_tokenizer(), outputs)
    signs = Signs(
        retain=mean_of(parts, "retain"), forget=mean_of(parts, "forget"), auc=membership_auc, mmlu=accuracy,
        questions=0 if isinstance(measured, float) else measured.questions, distinct=distinct, repeated=repeated,
        perplexity=plain_perplexity(subject, plain),
    )  # fmt: skip
    score = aggregate(parts, membership_auc, accuracy, signs=signs, items=items, outputs=outputs_by_part)
    return score.judged(original, auc_reference=auc_reference)


@checked
def part_rows(data: Tasks, limit: int | None) -> dict[str, list[TaskRow]]:
    """The rows of each part, at most `limit`."""
    by_part: dict[str, list[TaskRow]] = {}
    for side, rows in (("forget", data.forget), ("retain", data.retain)):
        for task in TASKS:
            for kind, measure in _MEASURES.items():
                part = [row for row in rows.items if isinstance(row, TaskRow) and (row.task, row.kind) == (task, kind)]
                by_part[f"{side}/{task}/{measure}"] = part[:limit]
    return by_part


@checked
def row_scores(rows: Sequence[TaskRow], outputs: Sequence[str]) -> NDArray[np.float64]:
    """ROUGE-L recall of completions, or exact match of answers; the rows are of one kind."""
    references = [row.answer for row in rows]
    if rows and rows[0].kind == "sc":
        return rouge(references, outputs).rougeL_recall
    return exact_match(references, outputs).astype(np.float64)


@checked
def membership_scores(subject: Subject, data: Tasks) -> dict[str, NDArray[np.float64]]:
    """Mean log-probability of every text of the membership test, by side."""
    return {
        name: scores(subject, _texts(corpus), ("loss",))["loss"]
        for name, corpus in (("member", data.members), ("nonmember", data.holdout))
    }


@checked
def mean_of(parts: Mapping[str, float], side: str) -> float:
    """Mean regurgitation of a side over the tasks."""
    return float(np.mean([parts[f"{side}/{task}/regurgitation"] for task in TASKS]))


def _texts(corpus: Corpus | None) -> list[str]:
    if corpus is None:
        raise DataError("this data has no texts for a membership test; read it with repedit.data.semeval")
    return [document.text for document in corpus.documents]
