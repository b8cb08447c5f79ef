"""MUSE: verbatim memorization, knowledge memorization and privacy leakage of texts to forget, and utility on the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from repedit.arguments import checked
from repedit.data import Batches, MuseData, Row
from repedit.data.encoding import text_ids
from repedit.errors import ArgumentError, DataError
from repedit.io.text import check_text
from repedit.metrics.answers import RowSource, rows_of
from repedit.metrics.collapse import NO_ORIGINAL, NOTHING, Judgement, Signs, diversity, judge, plain_perplexity
from repedit.metrics.generation import generate, rouge
from repedit.metrics.membership import auc, privleak, scores
from repedit.models.subject import Subject

# Ends an answer: examples are separated by an empty line.
_BREAK = "\n\n"
_KIND = "min_k"


@dataclass(frozen=True, eq=False)
@checked
class Memorization:
    """ROUGE-L F1 of each output with the truth, in [0, 1]; published numbers are in per cent."""

    values: NDArray[np.float64]
    references: tuple[str, ...]
    outputs: tuple[str, ...] = field(repr=False)

    @property
    def mean(self) -> float:
        """Mean over the texts or questions."""
        return float(self.values.mean())


@checked
def verbatim_memorization(
    subject: Subject, texts: Sequence[str], *, prefix: int = 200, tokens: int = 128, batch_size: int = 16
) -> Memorization:
    """ROUGE-L F1 between the greedy continuation of a prefix of each text and the text itself.

    Args:
        prefix: tokens of each text that are the prompt.
        tokens: tokens of the text after the prefix to compare with.
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
        problem = (
            "there are no texts" if short is None else f"the text {short[:40]!r} ends within prefix={prefix} tokens"
        )
        raise DataError(f"{problem}; give longer ones, or a shorter prefix")
    prompts, references = (
        tuple(tokenizer.batch_decode([own[start:stop] for own in ids], skip_special_tokens=True))
        for start, stop in ((0, prefix), (prefix, prefix + tokens))
    )
    outputs = generate(subject, prompts, max_new_tokens=tokens, batch_size=batch_size)
    return Memorization(rouge(references, outputs, stemmer=False).rougeL_f1, references, outputs)


@checked
def knowledge_memorization(
    subject: Subject, rows: RowSource, *, examples: Sequence[Row] = (), tokens: int = 32, batch_size: int = 16
) -> Memorization:
    """ROUGE-L F1 between the greedy answer to each question, up to an empty line, and the true answer.

    Args:
        rows: the questions are prompts.
        examples: questions with answers that precede each question in the prompt.
    Raises:
        DataError: if there are no questions, or an example is among them.
        MissingDependency: without the package rouge-score.
    Reference: Shi et al. 2024, arXiv:2407.06460, section 3.1.
    """
    items = rows_of(rows, what="questions")
    repeated = next((row.id for row in items if row.prompt in {example.prompt for example in examples}), None)
    if repeated is not None:
        raise DataError(f"row {repeated!r} is answered in the examples; remove it from one of them")
    before = "".join(f"{_question(row)} {row.answer}{_BREAK}" for row in examples)
    texts = generate(subject, [before + _question(row) for row in items], max_new_tokens=tokens, batch_size=batch_size)
    outputs = tuple(text.split(_BREAK)[0].strip() for text in texts)
    references = tuple(row.answer for row in items)
    return Memorization(rouge(references, outputs, stemmer=False).rougeL_f1, references, outputs)


@dataclass(frozen=True, eq=False)
@checked
class MuseScore:
    """The four numbers of MUSE, and the verdict on them."""

    verbatim: Memorization
    """On the texts to forget; lower is better."""
    knowledge_forget: Memorization
    """Lower is better."""
    knowledge_retain: Memorization
    """Higher is better."""
    membership_auc: float
    """Of Min-K, forget against holdout; 1 means member."""
    auc_reference: float
    scores: Mapping[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)
    """Membership scores of the texts, under "member" and "nonmember"."""
    signs: Signs = NOTHING
    judgement: Judgement = NO_ORIGINAL

    @property
    def privleak(self) -> float:
        """In per cent; 0 leaks as much as the reference, and values far from 0 on either side reveal the texts."""
        return privleak(self.membership_auc, self.auc_reference)

    @property
    def verdict(self) -> str:
        """One of `repedit.outcomes.OUTCOMES`."""
        return self.judgement.verdict

    @checked
    def judged(self, original: MuseScore | None) -> MuseScore:
        """The same score with its verdict, judged against the original model's score."""
        other = None if original is None else original.signs
        return replace(self, judgement=judge(self.signs, other, auc_reference=self.auc_reference))

    def __str__(self) -> str:
        return (
            f"verbatim memorization {self.verbatim.mean:.3f}, knowledge of forget {self.knowledge_forget.mean:.3f}, of retain "
            f"{self.knowledge_retain.mean:.3f}, PrivLeak {self.privleak:+.1f} (AUC {self.membership_auc:.3f})\n"
            f"verdict {self.judgement}"
        )


@checked
def evaluate(
    subject: Subject,
    *,
    texts: Sequence[str],
    holdout: Sequence[str],
    forget: RowSource,
    retain: RowSource,
    members: Sequence[str] | None = None,
    original: MuseScore | None = None,
    auc_reference: float = 0.5,
    examples: Sequence[Row] = (),
    retain_examples: Sequence[Row] | None = None,
    prefix: int = 200,
    tokens: int = 128,
    plain: Batches | None = None,
    batch_size: int = 16,
) -> MuseScore:
    """The metrics of MUSE with their verdict; `repedit.data.muse` reads the published data.

    Args:
        texts: texts to forget, for verbatim memorization.
        holdout: similar texts that the model never saw.
        forget: questions about the texts.
        retain: questions about what should be retained.
        members: texts to forget, for the membership test; `texts` when None.
        original: the score of the model before the edit; without it the verdict is INCONCLUSIVE.
        examples: questions with answers that precede each question in the prompt.
        retain_examples: the same for the questions of `retain`; `examples` when None.
        auc_reference: AUC of a model that never saw the texts.
        plain: text for the perplexity; None for the built-in prose.
    Raises:
        DataError, ArgumentError, NotFinite, MissingDependency: as the parts do.
        MetricError: if PrivLeak is not defined for this auc_reference.
    Reference: Shi et al. 2024, arXiv:2407.06460.
    """
    privleak(0.5, auc_reference)
    verbatim = verbatim_memorization(subject, texts, prefix=prefix, tokens=tokens, batch_size=batch_size)
    knowledge_forget = knowledge_memorization(subject, forget, examples=examples, batch_size=batch_size)
    examples = examples if retain_examples is None else retain_examples
    knowledge_retain = knowledge_memorization(subject, retain, examples=examples, batch_size=batch_size)
    sides = {"member": texts if members is None else members, "nonmember": holdout}
    by_side = {name: scores(subject, side, (_KIND,))[_KIND] for name, side in sides.items()}
    outputs = [*verbatim.outputs, *knowledge_forget.outputs, *knowledge_retain.outputs]
    distinct, repeated = diversity(subject.need_tokenizer(), outputs)
    membership_auc = auc(by_side["member"], by_side["nonmember"])
    signs = Signs(
        retain=knowledge_retain.mean, forget=verbatim.mean, auc=membership_auc, distinct=distinct, repeated=repeated,
        perplexity=plain_perplexity(subject, plain),
    )  # fmt: skip
    score = MuseScore(verbatim, knowledge_forget, knowledge_retain, membership_auc, auc_reference, by_side, signs)
    return score.judged(original)


@checked
def evaluate_data(subject: Subject, data: MuseData, *, original: MuseScore | None = None) -> MuseScore:
    """The metrics of MUSE on its published data, with their verdict; see `evaluate`."""
    return evaluate(
        subject, texts=data.texts, holdout=data.holdout, members=data.members, forget=data.forget, retain=data.retain,
        examples=data.forget_examples, retain_examples=data.retain_examples, original=original,
    )  # fmt: skip


def _question(row: Row) -> str:
    return f"Question: {row.prompt}\nAnswer:"
