"""Whether a good-looking number belongs to a broken model: perplexity on plain text, and the verdict beside every aggregate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from repedit.activations.prediction import Predictions, predictions
from repedit.data import Batches, as_batches, prose
from repedit.data.encoding import text_ids
from repedit.errors import ArgumentError
from repedit.models.subject import Subject

# --- Perplexity on plain text: the sign of life that has nothing to do with what was forgotten


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


# --- Whether a good-looking number belongs to a broken model: the verdict that stands beside every aggregate
#
# Aggregates reward collapse: a model that writes one token for ever has forgotten everything, leaks nothing and guesses
# at chance. So a score is read together with signs of life, each compared with the same sign of the original model.


VERDICTS = (
    "collapsed", "not forgotten", "over-forgotten", "below threshold", "consistent with forgetting", "unknown",
)  # fmt: skip
# Of four choices, as in MMLU.
CHANCE = 0.25
# An answer of three words repeats one of them a third of the time and says nothing about collapse.
_LONG = 8


@dataclass(frozen=True)
class Signs:
    """What a verdict looks at; None where it was not measured."""

    retain: float | None = None
    """Mean score on what should be kept: ROUGE-L recall, else exact memorization; in [0, 1]."""
    forget: float | None = None
    """The same on what should be forgotten."""
    auc: float | None = None
    """Of membership, forget against holdout; 1 means member."""
    mmlu: float | None = None
    """Accuracy on questions with four choices."""
    questions: int = 0
    """How many of them were asked."""
    distinct: float | None = None
    """Different outputs over prompts."""
    repeated: float | None = None
    """Mean share of the most frequent token of an output."""
    perplexity: float | None = None
    """On plain text."""


@dataclass(frozen=True)
class Judgement:
    """A verdict on a table of metrics; not the verdict of an audit."""

    verdict: str
    """One of `VERDICTS`."""
    reasons: tuple[str, ...]
    """What it rests on, with the numbers."""

    def __str__(self) -> str:
        return f"{self.verdict}: {'; '.join(self.reasons)}"


NOTHING = Signs()
"""Nothing was measured."""
UNKNOWN = Judgement("unknown", ("no original model to compare with",))
"""There is nothing to judge by."""


def judge(signs: Signs, original: Signs | None, *, auc_reference: float = 0.5) -> Judgement:
    """The first verdict whose condition holds, of those in `VERDICTS`.

    "collapsed": two or more of retain < .25 x the original's; MMLU of the original above chance + 2 standard errors
    and not that of the edited model; distinct outputs < .2 of the prompts, or the most frequent token > .5 of an
    output; perplexity > 10 x the original's. "not forgotten": forget > .5 x the original's. "over-forgotten": AUC
    < auc_reference - .25. "below threshold": MMLU < .75 x the original's. "unknown" without an original, or where
    the forget set was not measured on both models. A sign that was not measured does not count.

    Args:
        auc_reference: AUC of a model that never saw the forget set.
    Raises:
        ArgumentError: if that AUC lies outside [0, 1].
    """
    if not 0 <= auc_reference <= 1:
        raise ArgumentError(f"auc_reference={auc_reference}; give an AUC in [0, 1]")
    if original is None:
        return UNKNOWN
    broken = [reason for reason in _collapse(signs, original) if reason]
    if len(broken) > 1:
        return Judgement("collapsed", tuple(broken))
    if signs.forget is None or original.forget is None:
        return Judgement("unknown", ("the forget set was not measured on both models", *broken))
    lasting = _grew("forget", signs.forget, original.forget, 0.5)
    if lasting:
        return Judgement("not forgotten", (lasting, *broken))
    if signs.auc is not None and signs.auc < auc_reference - 0.25:
        found = f"AUC {signs.auc:.3f} < {auc_reference:.3f} - .25: the texts look stranger than unseen ones"
        return Judgement("over-forgotten", (found, *broken))
    low = _fell("MMLU", signs.mmlu, original.mmlu, 0.75)
    if low:
        return Judgement("below threshold", (low, *broken))
    return Judgement(
        "consistent with forgetting", (f"forget {signs.forget:.3f}, original {original.forget:.3f}", *broken)
    )


def diversity(tokenizer: Any, outputs: Sequence[str]) -> tuple[float | None, float | None]:
    """(different outputs over all, mean share of the most frequent token among outputs of 8 tokens or more).

    None where there is nothing to divide by.
    """
    if not outputs:
        return None, None
    ids = [text_ids(tokenizer, text) for text in outputs]
    shares = [Counter(part).most_common(1)[0][1] / len(part) for part in map(list, ids) if len(part) >= _LONG]
    return len(set(outputs)) / len(outputs), sum(shares) / len(shares) if shares else None


def _collapse(signs: Signs, original: Signs) -> list[str]:
    """The reasons for which the model looks broken, empty where one does not hold."""
    return [
        _fell("retain", signs.retain, original.retain, 0.25),
        _guesses(signs, original),
        _repeats(signs),
        _grew("perplexity", signs.perplexity, original.perplexity, 10.0),
    ]


def _fell(name: str, found: float | None, before: float | None, factor: float) -> str:
    if found is None or before is None or found >= factor * before:
        return ""
    return f"{name} {found:.3f} < {factor:g} x the original's {before:.3f}"


def _grew(name: str, found: float | None, before: float | None, factor: float) -> str:
    if found is None or before is None or found <= factor * before:
        return ""
    return f"{name} {found:.3f} > {factor:g} x the original's {before:.3f}"


def _guesses(signs: Signs, original: Signs) -> str:
    if signs.mmlu is None or original.mmlu is None or not (signs.questions and original.questions):
        return ""
    bars = [CHANCE + 2 * sqrt(CHANCE * (1 - CHANCE) / side.questions) for side in (signs, original)]
    if signs.mmlu > bars[0] or original.mmlu <= bars[1]:
        return ""
    return f"MMLU {signs.mmlu:.3f} is at chance, the original's {original.mmlu:.3f} is not"


def _repeats(signs: Signs) -> str:
    if signs.distinct is not None and signs.distinct < 0.2:
        return f"{signs.distinct:.3f} of the outputs differ"
    if signs.repeated is not None and signs.repeated > 0.5:
        return f"the most frequent token is {signs.repeated:.3f} of an output"
    return ""
