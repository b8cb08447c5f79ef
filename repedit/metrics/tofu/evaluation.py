"""Measuring the TOFU metrics on a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from repedit.data import Batches, Row, TofuRow, tofu
from repedit.errors import ArgumentError, DataError, MetricError
from repedit.metrics.answers import answer_nll
from repedit.metrics.collapse import NOTHING, UNKNOWN, Judgement, Signs, diversity, judge
from repedit.metrics.generation import generate, rouge
from repedit.metrics.plain import plain_perplexity
from repedit.metrics.tofu.definitions import SETS, TERMS, Part, Values, forget_quality, model_utility
from repedit.metrics.tofu.logs import of_set, read_log
from repedit.models import Subject


@dataclass(frozen=True, eq=False)
class TofuScore:
    """The parts, what is made of them, and the verdict."""

    parts: Mapping[str, Part]
    """"forget", "retain", "real_authors", "world_facts"; each with a value for every question."""
    forget_quality: float | None = None
    """Against the reference; None without one."""
    signs: Signs = NOTHING
    judgement: Judgement = UNKNOWN

    @property
    def model_utility(self) -> float:
        """Harmonic mean of nine terms, in [0, 1]. Read it with the verdict."""
        return model_utility(self.parts)

    @property
    def verdict(self) -> str:
        """One of `repedit.metrics.collapse.VERDICTS`."""
        return self.judgement.verdict

    def judged(self, original: TofuScore | None) -> TofuScore:
        """The same score with the verdict beside another model's."""
        return replace(self, judgement=judge(self.signs, None if original is None else original.signs))

    def __str__(self) -> str:
        rows = [f"{'questions':14}" + "".join(f"{term:>15}" for term in TERMS)]
        for name in ("forget", *SETS):
            rows.append(f"{name:14}" + "".join(f"{value:15.4f}" for value in self.parts[name].means.values()))
        quality = "not measured, no reference" if self.forget_quality is None else f"{self.forget_quality:.3g}"
        numbers = f"model utility {self.model_utility:.4f}, forget quality {quality}"
        return "\n".join((*rows, numbers, f"verdict {self.judgement}"))


def evaluate(
    subject: Subject,
    directory: str | Path,
    reference_log: str | Path | Mapping[str, Any] | None = None,
    *,
    forget: str = "forget10",
    original: TofuScore | None = None,
    template: str = "{}",
    plain: Batches | None = None,
    max_new_tokens: int = 200,
    batch_size: int = 16,
    limit: int | None = None,
) -> TofuScore:
    """The TOFU metrics of a model, with the verdict on them.

    Args:
        directory: the data, as `repedit.data.tofu` reads it.
        reference_log: losses of a model that never saw the forget set, as `write_log` writes them; without it there is
            no forget quality.
        forget: "forget01", "forget05" or "forget10".
        original: the score of the model before the edit; without it the verdict is "unknown".
        template: what a question is put in; the one the model was trained with.
        plain: text for the perplexity; None for the built-in prose.
        limit: questions of each set, the first ones; None for all.
    Raises:
        ArgumentError: if the limit is below 1.
        MetricError: if the log holds other questions.
        NotFound, UnknownName, DataError, NotFinite, MissingDependency: as the reader and the parts do.
    Reference: Maini et al. 2024, arXiv:2401.06121.
    """
    if limit is not None and limit < 1:
        raise ArgumentError(f"limit={limit}; give at least 1 question a set, or none for all")
    reference = None if reference_log is None else read_log(reference_log).get("forget")
    if reference_log is not None and reference is None:
        raise MetricError("the reference log holds no forget set; give that of a whole evaluation")
    splits = {name: f"{forget if name == 'forget' else name}_perturbed" for name in ("forget", *SETS)}
    # All are read before anything is measured: a damaged file costs no hour.
    asked = {name: questions(directory, split, template, limit) for name, split in splits.items()}
    sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    parts = {name: part(subject, name, splits[name], rows, **sizes) for name, rows in asked.items()}
    quality = None if reference is None else compared(parts["forget"], reference)
    distinct, repeated = diversity(subject.need_tokenizer(), [text for p in parts.values() for text in p.outputs])
    signs = Signs(
        retain=parts["retain"].means["rougeL_recall"],
        forget=parts["forget"].means["rougeL_recall"],
        distinct=distinct,
        repeated=repeated,
        perplexity=plain_perplexity(subject, plain),
    )
    return TofuScore(parts, quality, signs).judged(original)


def questions(directory: str | Path, split: str, template: str, limit: int | None) -> tuple[TofuRow, ...]:
    """The questions of a split, each with as many wrong answers.

    Raises:
        DataError: if a row has none, or another number of them than the first.
    """
    rows = tofu(directory, split, template=template).items[:limit]
    found = [row for row in rows if isinstance(row, TofuRow)]
    wrong = {row.id: len(row.perturbed) for row in found}
    odd = next((row.id for row in rows if not wrong.get(row.id) or wrong[row.id] != wrong[found[0].id]), None)
    if odd is not None:
        raise DataError(f"row {odd!r}: every question of {split!r} needs wrong answers, and as many as the first")
    return tuple(found)


def part(
    subject: Subject, name: str, split: str, rows: Sequence[TofuRow], *, max_new_tokens: int, batch_size: int
) -> Part:
    """The values of one set of questions."""
    answers = [row.answer for row in rows]
    outputs = generate(subject, [row.prompt for row in rows], max_new_tokens=max_new_tokens, batch_size=batch_size)
    return Part(
        split,
        _losses(subject, rows, answers),
        rouge(answers, outputs).rougeL_recall,
        _losses(subject, rows, [row.paraphrased for row in rows]),
        np.stack([_losses(subject, rows, part) for part in zip(*(row.perturbed for row in rows), strict=True)], 1),
        outputs=outputs,
        **of_set(name),
    )


def compared(found: Part, reference: Part) -> float:
    """Forget quality against the part of a log, which must be of the same questions.

    Raises:
        MetricError: if it is not.
    """
    if len(found.answer) != len(reference.answer):
        raise MetricError(
            f"{len(found.answer)} questions, {len(reference.answer)} in the reference log: these compare different questions"
        )
    return forget_quality(found.truth_ratio, reference.truth_ratio)


def _losses(subject: Subject, rows: Sequence[TofuRow], answers: Sequence[str]) -> Values:
    """Mean loss of an answer to each question, the end token counted."""
    asked = [Row(row.prompt, answer, row.id) for row, answer in zip(rows, answers, strict=True)]
    return answer_nll(subject, asked).mean
