"""MUSE: does a model still continue the texts it should forget, still know what is in them, and still give them away?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from repedit.data import Batches, Facts, Row, Rows
from repedit.data.encoding import text_ids
from repedit.errors import ArgumentError, DataError
from repedit.io.text import check_text
from repedit.metrics.collapse import NOTHING, UNKNOWN, Judgement, Signs, diversity, judge, plain_perplexity
from repedit.metrics.generation import generate, rouge
from repedit.metrics.membership import auc, privleak, scores
from repedit.models.subject import Subject

# What ends an answer: the examples before a question are set apart by an empty line.
_BREAK = "\n\n"
_KIND = "min_k"


@dataclass(frozen=True, eq=False)
class Memorization:
    """ROUGE-L F1 of each output with the truth, in [0, 1]; published numbers are 100 times as large."""

    values: NDArray[np.float64]
    references: tuple[str, ...]
    outputs: tuple[str, ...] = field(repr=False)

    @property
    def mean(self) -> float:
        """Over the texts or questions."""
        return float(self.values.mean())


def verbatim_memorization(
    subject: Subject, texts: Sequence[str], *, prefix: int = 200, tokens: int = 128, batch_size: int = 16
) -> Memorization:
    """How well the model continues the beginning of each text as the text does: ROUGE-L F1 of words, greedy.

    Args:
        prefix: tokens of each text that the model is given.
        tokens: tokens of the text after them that it should write.
    Raises:
        ArgumentError: if a number is below 1.
        DataError: if there are no texts, or one has no token after its prefix.
        MissingDependency: without the package rouge-score.
    Reference: Shi et al. 2024, arXiv:2407.06460, section 3.1.
    """
    if prefix < 1 or tokens < 1:
        raise ArgumentError(f"prefix={prefix}, tokens={tokens}; give at least 1 token of each")
    tokenizer = subject.need_tokenizer()
    for i, text in enumerate(texts):
        check_text(text, f"text {i}")
    ids = [text_ids(tokenizer, text) for text in texts]
    short = next((text for text, own in zip(texts, ids, strict=True) if len(own) <= prefix), None)
    if not texts or short is not None:
        found = "there are no texts" if short is None else f"the text {short[:40]!r} ends within prefix={prefix} tokens"
        raise DataError(f"{found}; give longer ones, or a shorter prefix")
    prompts, references = (
        tuple(tokenizer.batch_decode([own[start:stop] for own in ids], skip_special_tokens=True))
        for start, stop in ((0, prefix), (prefix, prefix + tokens))
    )
    outputs = generate(subject, prompts, max_new_tokens=tokens, batch_size=batch_size)
    return Memorization(rouge(references, outputs, stemmer=False).rougeL_f1, references, outputs)


def knowledge_memorization(
    subject: Subject,
    rows: Rows | Facts | Iterable[Row],
    *,
    examples: Sequence[Row] = (),
    tokens: int = 32,
    batch_size: int = 16,
) -> Memorization:
    """How well the model answers questions: ROUGE-L F1 of words of the greedy answer, up to an empty line.

    Args:
        rows: the questions are prompts.
        examples: questions that are answered before each one.
    Raises:
        DataError: if there are no questions, or an example is among them.
        MissingDependency: without the package rouge-score.
    Reference: Shi et al. 2024, arXiv:2407.06460, section 3.1.
    """
    items = rows.forget if isinstance(rows, Facts) else rows.items if isinstance(rows, Rows) else tuple(rows)
    if not items:
        raise DataError("there are no questions; give at least one")
    shown = next((row.id for row in items if row.prompt in {example.prompt for example in examples}), None)
    if shown is not None:
        raise DataError(f"row {shown!r} is answered in the examples; take it out of one of them")
    before = "".join(f"{_asked(row)} {row.answer}{_BREAK}" for row in examples)
    written = generate(subject, [before + _asked(row) for row in items], max_new_tokens=tokens, batch_size=batch_size)
    outputs = tuple(text.split(_BREAK)[0].strip() for text in written)
    references = tuple(row.answer for row in items)
    return Memorization(rouge(references, outputs, stemmer=False).rougeL_f1, references, outputs)


@dataclass(frozen=True, eq=False)
class MuseScore:
    """The four numbers of MUSE, and the verdict on them."""

    verbatim: Memorization
    """Of texts to forget; lower is better."""
    knowledge_forget: Memorization
    """Lower is better."""
    knowledge_retain: Memorization
    """Higher is better."""
    membership_auc: float
    """Of Min-K, forget against holdout; 1 means member."""
    auc_reference: float
    scores: Mapping[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)
    """Of each text, "member" and "nonmember"."""
    signs: Signs = NOTHING
    judgement: Judgement = UNKNOWN

    @property
    def privleak(self) -> float:
        """In percent; 0 leaks as much as the reference, far from it either way tells the texts apart."""
        return privleak(self.membership_auc, self.auc_reference)

    @property
    def verdict(self) -> str:
        """One of `repedit.metrics.collapse.VERDICTS`."""
        return self.judgement.verdict

    def judged(self, original: MuseScore | None) -> MuseScore:
        """The same score with the verdict beside another model's."""
        other = None if original is None else original.signs
        return replace(self, judgement=judge(self.signs, other, auc_reference=self.auc_reference))

    def __str__(self) -> str:
        return (
            f"verbatim memorization {self.verbatim.mean:.3f}, knowledge of forget {self.knowledge_forget.mean:.3f}, of retain "
            f"{self.knowledge_retain.mean:.3f}, PrivLeak {self.privleak:+.1f} (AUC {self.membership_auc:.3f})\n"
            f"verdict {self.judgement}"
        )


def evaluate(
    subject: Subject,
    *,
    texts: Sequence[str],
    holdout: Sequence[str],
    forget: Rows | Facts | Iterable[Row],
    retain: Rows | Facts | Iterable[Row],
    original: MuseScore | None = None,
    auc_reference: float = 0.5,
    examples: Sequence[Row] = (),
    prefix: int = 200,
    tokens: int = 128,
    plain: Batches | None = None,
    batch_size: int = 16,
) -> MuseScore:
    """The metrics of MUSE, with the verdict on them.

    Args:
        texts: to be forgotten.
        holdout: like them, never seen.
        forget: questions about the texts.
        retain: questions about what should be kept.
        original: the score of the model before the edit; without it the verdict is "unknown".
        auc_reference: AUC of a model that never saw the texts.
        plain: text for the perplexity; None for the built-in prose.
    Raises:
        DataError, ArgumentError, NotFinite, MissingDependency: as the parts do.
        MetricError: if the AUC of the reference makes no PrivLeak.
    Reference: Shi et al. 2024, arXiv:2407.06460.
    """
    privleak(0.5, auc_reference)
    verbatim = verbatim_memorization(subject, texts, prefix=prefix, tokens=tokens, batch_size=batch_size)
    known, kept = (
        knowledge_memorization(subject, rows, examples=examples, batch_size=batch_size) for rows in (forget, retain)
    )
    found = {name: scores(subject, side, (_KIND,))[_KIND] for name, side in (("member", texts), ("nonmember", holdout))}
    outputs = [*verbatim.outputs, *known.outputs, *kept.outputs]
    distinct, repeated = diversity(subject.need_tokenizer(), outputs)
    told = auc(found["member"], found["nonmember"])
    signs = Signs(
        retain=kept.mean,
        forget=verbatim.mean,
        auc=told,
        distinct=distinct,
        repeated=repeated,
        perplexity=plain_perplexity(subject, plain),
    )
    score = MuseScore(verbatim, known, kept, told, auc_reference, found, signs)
    return score.judged(original)


def _asked(row: Row) -> str:
    return f"Question: {row.prompt}\nAnswer:"
