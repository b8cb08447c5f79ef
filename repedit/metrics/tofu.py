"""TOFU: forget quality on fictitious authors, and model utility on everything else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repedit.arguments import checked
from repedit.data import Batches, Row, TofuRow, tofu
from repedit.errors import ArgumentError, DataError, MetricError, NotFound, check_choice
from repedit.io.files import user_path, write_text
from repedit.io.text import read_json
from repedit.metrics.answers import answer_nll
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
from repedit.metrics.generation import generate, rouge
from repedit.models.subject import Subject

# --- The metrics as functions of losses
#
# A loss is the mean negative log-likelihood per token of an answer; the end token counts.

AGGREGATES = ("closer_to_one", "true_better")
"""How a truth ratio becomes a number in [0, 1]: for the forget set, and for every other set."""
SETS = ("retain", "real_authors", "world_facts")
"""The sets in model utility."""
TERMS = ("probability", "rougeL_recall", "truth_ratio")
"""The terms on each set."""
_FEWEST = 10

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
@checked
class TruthRatio:
    """Probability of the wrong answers to each question, relative to the paraphrased right answer."""

    ratios: Values
    """t = p_wrong / p_paraphrase by question; above 1 the model prefers the wrong answers."""
    items: Values
    """The values that are averaged: min(t, 1/t) or max(0, 1 - t)."""
    split: str = ""
    """Name of the questions, such as "forget10_perturbed"."""

    @property
    def mean(self) -> float:
        """The aggregate, in [0, 1]."""
        return float(self.items.mean())


@checked
def truth_ratio(
    paraphrased: ArrayLike, perturbed: ArrayLike, *, aggregate: str = "closer_to_one", split: str = ""
) -> TruthRatio:
    """Probability of the wrong answers over that of the paraphrased right answer, by question.

    t = p_wrong / p_paraphrase, where p_wrong is the geometric mean over the wrong answers: exp(-mean loss).

    Args:
        paraphrased: losses (n,) of the paraphrased answer.
        perturbed: losses (n, k) of the k wrong answers.
        aggregate: "closer_to_one", mean min(t, 1/t), for a forget set, or "true_better", mean max(0, 1 - t), for
            others.
    Raises:
        UnknownName: if there is no such aggregate.
        MetricError: if the shapes disagree, or a loss is not finite.
    Reference: Maini et al. 2024, arXiv:2401.06121, section 2.2.
    """
    check_choice(AGGREGATES, aggregate=aggregate)
    right, wrong = np.asarray(paraphrased, dtype=np.float64), np.asarray(perturbed, dtype=np.float64)
    if right.ndim != 1 or wrong.ndim != 2 or len(right) != len(wrong) or not wrong.size:
        raise MetricError(f"losses of shapes {right.shape} and {wrong.shape}; give (n,) and (n, k) for n questions")
    _check_finite_losses("loss", right, wrong)
    difference = right + log_wrong(wrong)
    # Both forms in logarithms: an answer of negligible probability has t near 1e300 and beyond.
    items = np.exp(-np.abs(difference)) if aggregate == "closer_to_one" else -np.expm1(np.minimum(difference, 0))
    with np.errstate(over="ignore"):
        return TruthRatio(np.exp(difference), items, split)


@checked
def log_wrong(perturbed: Values) -> Values:
    """Log-probability of the wrong answers of each question, the geometric mean over them."""
    return -perturbed.mean(1)


class Distance(NamedTuple):
    """A two-sample Kolmogorov-Smirnov test."""

    statistic: float
    """Largest distance of the two distribution functions."""
    p: float


@checked
def forget_quality(unlearned: TruthRatio | ArrayLike, reference: TruthRatio | ArrayLike) -> float:
    """p-value of the exact two-sample Kolmogorov-Smirnov test between the truth ratios t of two models.

    1 is perfect; below .05 the unlearned model differs from one that never saw the forget set. A collapsed model can
    score high: read the value together with the model utility and the verdict.

    Args:
        unlearned: truth ratios (n,) on the forget set.
        reference: truth ratios of the reference model on the same questions.
    Raises:
        MetricError: if a side has fewer than 10 values or a NaN, or the two are named after different questions.
    Reference: Maini et al. 2024, arXiv:2401.06121, section 2.2.
    """
    return distance(unlearned, reference).p


@checked
def distance(unlearned: TruthRatio | ArrayLike, reference: TruthRatio | ArrayLike) -> Distance:
    """The test of `forget_quality`, with its statistic.

    Raises:
        MetricError: as `forget_quality` does.
    """
    from scipy.stats import ks_2samp

    names = [side.split for side in (unlearned, reference) if isinstance(side, TruthRatio) and side.split]
    if len(set(names)) > 1:
        raise MetricError(f"truth ratios of {names[0]!r} and {names[1]!r}: these compare different questions")
    sides = [np.asarray(s.ratios if isinstance(s, TruthRatio) else s, dtype=np.float64) for s in (unlearned, reference)]
    counts = [side.size for side in sides]
    if min(counts) < _FEWEST or any(side.ndim != 1 for side in sides):
        raise MetricError(f"{counts[0]} and {counts[1]} truth ratios; give two lists of {_FEWEST} or more")
    if names and len(sides) == len(names) and counts[0] != counts[1]:
        raise MetricError(
            f"{counts[0]} and {counts[1]} truth ratios of {names[0]!r}: these compare different questions"
        )
    if any(np.isnan(side).any() for side in sides):
        raise MetricError("a truth ratio is NaN; load the model in float32?")
    # Not the asymptotic p, which is 8.50e-22 where the published and the exact one are 1.83e-21.
    test = ks_2samp(*sides, method="exact")
    return Distance(float(test.statistic), float(test.pvalue))


@dataclass(frozen=True, eq=False)
@checked
class Part:
    """The measurements of a model on one set of n questions."""

    split: str
    answer: Values
    """Losses (n,) of the right answer."""
    rougeL_recall: Values
    """Of the answer in the greedy output, (n,)."""
    paraphrased: Values
    """Losses (n,) of the paraphrased right answer; of the answer itself if there is no paraphrase."""
    perturbed: Values
    """Losses (n, k) of the wrong answers."""
    aggregate: str = "true_better"
    options: bool = False
    """Whether the probability is normalized over the answers: p / (p + sum of p_wrong)."""
    outputs: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        _check_finite_losses(
            f"value of {self.split!r}", self.answer, self.rougeL_recall, self.paraphrased, self.perturbed
        )

    @property
    def probability(self) -> Values:
        """Probability of each right answer: exp(-loss), normalized over the answers if `options`."""
        right = np.exp(-self.answer)
        if not self.options:
            return right
        # A softmax of the negative losses, so that answers of negligible probability do not give 0 / 0.
        losses = np.column_stack((self.answer, self.perturbed))
        odds = np.exp(losses.min(1, keepdims=True) - losses)
        return odds[:, 0] / odds.sum(1)

    @property
    def truth_ratio(self) -> TruthRatio:
        """The truth ratio with the aggregate of this set."""
        return truth_ratio(self.paraphrased, self.perturbed, aggregate=self.aggregate, split=self.split)

    @property
    def means(self) -> dict[str, float]:
        """The three terms of the utility."""
        values = (self.probability, self.rougeL_recall, self.truth_ratio.items)
        return {name: float(value.mean()) for name, value in zip(TERMS, values, strict=True)}


@checked
def model_utility(parts: Mapping[str, Part | Mapping[str, float]]) -> float:
    """Harmonic mean of probability, ROUGE-L recall and truth ratio on SETS; 0 if one is 0.

    Args:
        parts: by the names of `SETS` (retain, real authors, world facts); others, such as "forget", are ignored.
    Raises:
        MetricError: if a part or term is missing, or a term lies outside [0, 1].
    Reference: Maini et al. 2024, arXiv:2401.06121, section 2.2.
    """
    terms: dict[str, float | None] = {}
    for name in SETS:
        if name not in parts:
            raise MetricError(f"the part {name!r} is missing; there are {sorted(parts)}")
        part = parts[name]
        means = part.means if isinstance(part, Part) else part
        terms |= {f"{name}/{term}": means.get(term) for term in TERMS}
    return harmonic(terms)


def _check_finite_losses(what: str, *values: Values) -> None:
    for value in values:
        if not np.isfinite(value).all():
            raise MetricError(f"a {what} is {value[~np.isfinite(value)].flat[0]}; load the model in float32?")


# --- Losses as JSON in the layout of the published logs
#
# One object per set of questions ("eval_log_forget.json" and so on) maps each quantity to values by question number. A
# published log of a retrained model can therefore be the reference of a forget quality.

# Names of the parts in a published log.
FILES = {
    "forget": "eval_log_forget.json", "retain": "eval_log.json", "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}  # fmt: skip
QUANTITIES = {
    "answer": "avg_gt_loss", "rougeL_recall": "rougeL_recall", "paraphrased": "avg_paraphrased_loss",
    "perturbed": "average_perturb_loss",
}  # fmt: skip


@checked
def read_log(source: str | Path | Mapping[str, object]) -> dict[str, Part]:
    """The parts of a log, from a file or the object in it.

    Raises:
        NotFound: if there is no such file.
        MetricError: if it holds no such object, or a quantity is missing.
    """
    log = source if isinstance(source, Mapping) else _content(user_path(source))
    names = [name for name in FILES if FILES[name] in log]
    if not names:
        raise MetricError(f"a log holds {', '.join(FILES.values())}; this one has {sorted(log)[:5]}")
    return {name: _part(name, log[FILES[name]]) for name in names}


@checked
def write_log(parts: Mapping[str, Part], path: str | Path) -> None:
    """Write parts as `read_log` reads them, with the name of the split."""
    log = {}
    for name, part in parts.items():
        values = {QUANTITIES[q]: dict(enumerate(getattr(part, q).tolist())) for q in QUANTITIES}
        log[FILES[name]] = {"split": part.split} | values
    write_text(user_path(path), json.dumps(log))


def _content(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        raise NotFound(f"{path.absolute()} is not a file; give the log of a model that never saw the forget set")
    # finite=False: a published log may hold NaN for a question; the metrics refuse it later.
    log: Mapping[str, object] = read_json(path, MetricError, finite=False, remedy="give a log written by an evaluation")
    return log


def _part(name: str, log: object) -> Part:
    if not isinstance(log, Mapping):
        raise MetricError(f"the log of {name!r} is a {type(log).__name__}; an object was expected")
    missing = [quantity for quantity in QUANTITIES.values() if quantity not in log]
    if missing:
        raise MetricError(f"the log of {name!r} lacks {', '.join(missing)}; it has {sorted(log)}")
    values = {field: _values(name, quantity, log[quantity]) for field, quantity in QUANTITIES.items()}
    counts = {field: len(value) for field, value in values.items()}
    if len(set(counts.values())) > 1:
        raise MetricError(f"the log of {name!r} holds {counts} values; give one of each for every question")
    right, rouge_recall, paraphrased, perturbed = (
        values[field] for field in ("answer", "rougeL_recall", "paraphrased", "perturbed")
    )
    return Part(str(log.get("split", "")), right, rouge_recall, paraphrased, perturbed, **scoring(name))


class Scoring(TypedDict):
    """How a set of questions is scored; see `Part`."""

    aggregate: str
    options: bool


@checked
def scoring(name: str) -> Scoring:
    """The scoring of a set of questions."""
    aggregate = "closer_to_one" if name == "forget" else "true_better"
    return {"aggregate": aggregate, "options": name in ("real_authors", "world_facts")}


def _values(name: str, quantity: str, by_question: object) -> Values:
    try:
        if not isinstance(by_question, Mapping):
            raise TypeError(f"it is a {type(by_question).__name__}")
        return np.array([by_question[key] for key in sorted(by_question, key=int)], dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise MetricError(f"the log of {name!r}: {quantity} is not a table of numbers: {error}") from error


# --- Evaluation of a model


@dataclass(frozen=True, eq=False)
@checked
class TofuScore:
    """The parts, their aggregates and the verdict."""

    parts: Mapping[str, Part]
    """"forget", "retain", "real_authors", "world_facts"; each with a value for every question."""
    forget_quality: float | None = None
    """Against the reference; None without one."""
    signs: Signs = NOTHING
    judgement: Judgement = NO_ORIGINAL

    @property
    def model_utility(self) -> float:
        """Harmonic mean of nine terms, in [0, 1]. Read it with the verdict."""
        return model_utility(self.parts)

    @property
    def verdict(self) -> str:
        """One of `repedit.outcomes.OUTCOMES`."""
        return self.judgement.verdict

    @checked
    def judged(self, original: TofuScore | None) -> TofuScore:
        """The same score with its verdict, judged against the original model's score."""
        return replace(self, judgement=judge(self.signs, None if original is None else original.signs))

    def __str__(self) -> str:
        rows = [f"{'questions':14}" + "".join(f"{term:>15}" for term in TERMS)]
        for name in ("forget", *SETS):
            rows.append(f"{name:14}" + "".join(f"{value:15.4f}" for value in self.parts[name].means.values()))
        quality = "not measured, no reference" if self.forget_quality is None else f"{self.forget_quality:.3g}"
        numbers = f"model utility {self.model_utility:.4f}, forget quality {quality}"
        return "\n".join((*rows, numbers, f"verdict {self.judgement}"))


@checked
def evaluate(
    subject: Subject,
    directory: str | Path,
    reference_log: str | Path | Mapping[str, object] | None = None,
    *,
    forget: str = "forget10",
    original: TofuScore | None = None,
    template: str = "{}",
    plain: Batches | None = None,
    max_new_tokens: int = 200,
    batch_size: int = 16,
    limit: int | None = None,
) -> TofuScore:
    """The TOFU metrics of a model with their verdict.

    Args:
        directory: the data, as `repedit.data.tofu` reads it.
        reference_log: losses of a model that never saw the forget set, as `write_log` writes them; without it there is
            no forget quality.
        forget: "forget01", "forget05" or "forget10".
        original: the score of the model before the edit; without it the verdict is INCONCLUSIVE.
        template: makes a prompt from a question; use the one the model was trained with.
        plain: text for the perplexity; None for the built-in prose.
        limit: questions per set, the first ones; None for all.
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
    # All files are read before anything is measured: a damaged file is found at once.
    rows_by_set = {name: questions(directory, split, template, limit) for name, split in splits.items()}
    sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    parts = {name: part(subject, name, splits[name], rows, **sizes) for name, rows in rows_by_set.items()}
    quality = None if reference is None else quality_against_log(parts["forget"], reference)
    distinct, repeated = diversity(subject.need_tokenizer(), [text for p in parts.values() for text in p.outputs])
    signs = Signs(
        retain=parts["retain"].means["rougeL_recall"], forget=parts["forget"].means["rougeL_recall"], distinct=distinct,
        repeated=repeated, perplexity=plain_perplexity(subject, plain),
    )  # fmt: skip
    return TofuScore(parts, quality, signs).judged(original)


@checked
def questions(directory: str | Path, split: str, template: str, limit: int | None) -> tuple[TofuRow, ...]:
    """The questions of a split, each with the same number of wrong answers.

    Raises:
        DataError: if a row has no wrong answers, or another number of them than the first.
    """
    rows = tofu(directory, split, template=template).items[:limit]
    complete = [row for row in rows if isinstance(row, TofuRow)]
    wrong = {row.id: len(row.perturbed) for row in complete}
    odd = next((row.id for row in rows if not wrong.get(row.id) or wrong[row.id] != wrong[complete[0].id]), None)
    if odd is not None:
        raise DataError(
            f"row {odd!r}: every question of {split!r} needs wrong answers, and the same number as the first"
        )
    return tuple(complete)


@checked
def part(
    subject: Subject, name: str, split: str, rows: Sequence[TofuRow], *, max_new_tokens: int, batch_size: int
) -> Part:
    """The measurements on one set of questions."""
    answers = [row.answer for row in rows]
    outputs = generate(subject, [row.prompt for row in rows], max_new_tokens=max_new_tokens, batch_size=batch_size)
    return Part(
        split, _losses(subject, rows, answers), rouge(answers, outputs).rougeL_recall,
        _losses(subject, rows, [row.paraphrased for row in rows]),
        np.stack([_losses(subject, rows, wrong) for wrong in zip(*(row.perturbed for row in rows), strict=True)], 1),
        outputs=outputs, **scoring(name),
    )  # fmt: skip


@checked
def quality_against_log(edited: Part, reference: Part) -> float:
    """Forget quality against the same questions in a log.

    Raises:
        MetricError: if the log has another number of questions.
    """
    if len(edited.answer) != len(reference.answer):
        raise MetricError(
            f"{len(edited.answer)} questions, {len(reference.answer)} in the reference log: these compare different questions"
        )
    return forget_quality(edited.truth_ratio, reference.truth_ratio)


def _losses(subject: Subject, rows: Sequence[TofuRow], answers: Sequence[str]) -> Values:
    """Mean loss per token of an answer to each question; the end token counts."""
    answered = [Row(row.prompt, answer, row.id) for row, answer in zip(rows, answers, strict=True)]
    return answer_nll(subject, answered).mean
