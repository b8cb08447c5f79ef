"""Measuring the parts of a SemEval-2025 Task 4 score on a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from repedit.data import Batches, Corpus, Fact, Tasks, semeval
from repedit.data.tasks import TASKS, TaskRow
from repedit.errors import ArgumentError, DataError
from repedit.metrics.collapse import Signs, diversity
from repedit.metrics.generation import exact_match, generate, rouge
from repedit.metrics.membership import auc, scores
from repedit.metrics.plain import plain_perplexity
from repedit.metrics.semeval.mmlu import mmlu_accuracy
from repedit.metrics.semeval.score import SemEvalScore, aggregate
from repedit.models import Subject

_MEASURES = {"sc": "regurgitation", "qa": "knowledge"}


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
        mmlu: questions from `repedit.data.mmlu`, or an accuracy measured elsewhere, which then supports no verdict.
        original: the score of the model before the edit; without it the verdict is "unknown".
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
    chosen = chosen_rows(data, limit)
    rows = [row for part in chosen.values() for row in part]
    outputs = generate(
        subject, [row.prompt for row in rows], max_new_tokens=max_new_tokens, batch_size=batch_size, chat=chat
    )
    written, place = {}, 0
    for name, part in chosen.items():
        written[name] = outputs[place : place + len(part)]
        place += len(part)
    items = {name: compared(part, written[name]) for name, part in chosen.items()}
    items |= membership_scores(subject, data)
    known = mmlu if isinstance(mmlu, float) else mmlu_accuracy(subject, mmlu)
    accuracy = known if isinstance(known, float) else known.mean
    parts = {name: float(items[name].mean()) for name in chosen}
    found = auc(items["member"], items["nonmember"])
    distinct, repeated = diversity(subject.need_tokenizer(), outputs)
    signs = Signs(
        retain=mean_of(parts, "retain"),
        forget=mean_of(parts, "forget"),
        auc=found,
        mmlu=accuracy,
        questions=0 if isinstance(known, float) else known.questions,
        distinct=distinct,
        repeated=repeated,
        perplexity=plain_perplexity(subject, plain),
    )
    score = aggregate(parts, found, accuracy, signs=signs, items=items, outputs=written)
    return score.judged(original, auc_reference=auc_reference)


def chosen_rows(data: Tasks, limit: int | None) -> dict[str, list[TaskRow]]:
    """The rows of each part."""
    found: dict[str, list[TaskRow]] = {}
    for side, rows in (("forget", data.forget), ("retain", data.retain)):
        for task in TASKS:
            for kind, measure in _MEASURES.items():
                part = [row for row in rows.items if isinstance(row, TaskRow) and (row.task, row.kind) == (task, kind)]
                found[f"{side}/{task}/{measure}"] = part[:limit]
    return found


def compared(rows: Sequence[TaskRow], outputs: Sequence[str]) -> NDArray[np.float64]:
    """ROUGE-L recall of completions, exact match of answers; rows are of one kind."""
    references = [row.answer for row in rows]
    if rows and rows[0].kind == "sc":
        return rouge(references, outputs).rougeL_recall
    return exact_match(references, outputs).astype(np.float64)


def membership_scores(subject: Subject, data: Tasks) -> dict[str, NDArray[np.float64]]:
    """Mean log-probability of every text of the membership test, by side."""
    return {
        name: scores(subject, _texts(corpus), ("loss",))["loss"]
        for name, corpus in (("member", data.members), ("nonmember", data.holdout))
    }


def mean_of(parts: dict[str, float], side: str) -> float:
    """Mean regurgitation of a side over the tasks."""
    return float(np.mean([parts[f"{side}/{task}/regurgitation"] for task in TASKS]))


def _texts(corpus: Corpus | None) -> list[str]:
    if corpus is None:
        raise DataError("this data has no texts for a membership test; read it with repedit.data.semeval")
    return [document.text for document in corpus.documents]
