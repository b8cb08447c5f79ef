"""Signs of a collapsed model, and the verdict that is reported with every aggregate.

Aggregates reward collapse: a model that repeats one token has forgotten everything, leaks nothing and answers at
chance. So a score is read together with signs of life, each compared with the same sign of the original model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import harmonic_mean

from repedit.activations.prediction import Predictions, predictions
from repedit.arguments import checked
from repedit.data import Batches, as_batches, prose
from repedit.data.encoding import Tokenizer, text_ids
from repedit.errors import ArgumentError, MetricError
from repedit.models.subject import Subject
from repedit.outcomes import BELOW_THRESHOLD, CONSISTENT, DESTROYED, INCONCLUSIVE, NOT_FORGOTTEN, OVER_FORGOTTEN

CHANCE = 0.25
"""Of four choices, as in MMLU."""
# Tokens of plain text; the built-in prose has about four times as many.
_TOKENS = 4096
# Shorter answers repeat a token often without being a sign of collapse.
_LONG = 8

# --- Perplexity on plain text, which is unrelated to the forget set


@checked
def perplexity(
    subject: Subject,
    texts: Batches | Iterable[str],
    *,
    window: int = 512,
    batch_size: int = 8,
    limit_tokens: int | None = None,
) -> Predictions:
    """How well the model predicts plain text in windows of `window` tokens; see the `perplexity` of the result.

    Args:
        texts: a corpus, or texts.
        limit_tokens: stop after the batch that reaches this number of tokens.
    Raises:
        NotEnoughRows: if there is nothing to predict.
        NotFinite: if the loss is not finite.
    """
    corpus = texts if isinstance(texts, Batches) else as_batches(list(texts), name="texts")
    return predictions(subject, corpus, length=window, batch_size=batch_size, limit_tokens=limit_tokens)


@checked
def plain_perplexity(subject: Subject, plain: Batches | None) -> float:
    """Perplexity on plain text; on the built-in prose when None."""
    return perplexity(subject, prose() if plain is None else plain, limit_tokens=_TOKENS).perplexity


@checked
def harmonic(terms: Mapping[str, float | None]) -> float:
    """Harmonic mean of named terms in [0, 1]; 0 if a term is 0.

    Raises:
        MetricError: if a term is missing or outside [0, 1].
    """
    for name, value in terms.items():
        if value is None or not 0 <= value <= 1:
            raise MetricError(f"the term {name!r} is {value}; give a fraction in [0, 1], not a percentage")
    return float(harmonic_mean([value for value in terms.values() if value is not None]))


# --- The verdict


@dataclass(frozen=True)
@checked
class Signs:
    """The measurements on which a verdict is based; None where not measured."""

    retain: float | None = None
    """Mean score on the retain set, in [0, 1]: ROUGE-L recall, otherwise exact memorization."""
    forget: float | None = None
    """The same on the forget set."""
    auc: float | None = None
    """AUC of membership, forget against holdout; 1 means member."""
    mmlu: float | None = None
    """Accuracy on questions with four choices."""
    questions: int = 0
    """Number of these questions."""
    distinct: float | None = None
    """Number of distinct outputs over number of prompts."""
    repeated: float | None = None
    """Mean share of the most frequent token of an output."""
    perplexity: float | None = None
    """On plain text."""


@dataclass(frozen=True)
@checked
class Judgement:
    """A verdict on a table of metrics; it is not the verdict of an audit."""

    verdict: str
    """One of `repedit.outcomes.OUTCOMES`, without those that only an audit gives."""
    reasons: tuple[str, ...]
    """The reasons, with the numbers."""

    def __str__(self) -> str:
        return f"{self.verdict}: {'; '.join(self.reasons)}"


NOTHING = Signs()
"""Nothing was measured."""
NO_ORIGINAL = Judgement(INCONCLUSIVE, ("no original model to compare with",))
"""The original was not measured."""


@checked
def judge(signs: Signs, original: Signs | None, *, auc_reference: float = 0.5) -> Judgement:
    """The first of these verdicts whose condition holds.

    DESTROYED, by collapse: two or more of: retain < .25 x the original's; MMLU above chance + 2 standard errors in the
    original and not in the edited model; distinct outputs < .2 of the prompts, or the most frequent token > .5 of an
    output; perplexity > 10 x the original's. NOT FORGOTTEN: forget > .5 x the original's. OVER-FORGOTTEN: AUC
    < auc_reference - .25. BELOW THRESHOLD: MMLU < .75 x the original's. CONSISTENT WITH FORGETTING otherwise.
    INCONCLUSIVE: without an original, or if the forget set was not measured on both models, unless DESTROYED holds.
    A sign that was not measured does not count.

    Args:
        auc_reference: AUC of a model that never saw the forget set.
    Raises:
        ArgumentError: if that AUC lies outside [0, 1].
    """
    if not 0 <= auc_reference <= 1:
        raise ArgumentError(f"auc_reference={auc_reference}; give an AUC in [0, 1]")
    if original is None:
        return NO_ORIGINAL
    broken = [reason for reason in _collapse(signs, original) if reason]
    if len(broken) > 1:
        return Judgement(DESTROYED, tuple(broken))
    if signs.forget is None or original.forget is None:
        return Judgement(INCONCLUSIVE, ("the forget set was not measured on both models", *broken))
    lasting = _grew("forget", signs.forget, original.forget, 0.5)
    if lasting:
        return Judgement(NOT_FORGOTTEN, (lasting, *broken))
    if signs.auc is not None and signs.auc < auc_reference - 0.25:
        reason = f"AUC {signs.auc:.3f} < {auc_reference:.3f} - .25: the texts look less familiar than unseen ones"
        return Judgement(OVER_FORGOTTEN, (reason, *broken))
    low = _fell("MMLU", signs.mmlu, original.mmlu, 0.75)
    if low:
        return Judgement(BELOW_THRESHOLD, (low, *broken))
    return Judgement(CONSISTENT, (f"forget {signs.forget:.3f}, original {original.forget:.3f}", *broken))


@checked
def diversity(tokenizer: Tokenizer, outputs: Sequence[str]) -> tuple[float | None, float | None]:
    """(distinct outputs over all outputs, mean share of the most frequent token in outputs of 8 tokens or more).

    None where the divisor would be 0.
    """
    if not outputs:
        return None, None
    ids = [text_ids(tokenizer, text) for text in outputs]
    shares = [Counter(part).most_common(1)[0][1] / len(part) for part in map(list, ids) if len(part) >= _LONG]
    return len(set(outputs)) / len(outputs), sum(shares) / len(shares) if shares else None


def _collapse(signs: Signs, original: Signs) -> list[str]:
    """The reasons to consider the model collapsed; empty for each that does not hold."""
    return [
        _fell("retain", signs.retain, original.retain, 0.25), _guesses(signs, original), _repeats(signs),
        _grew("perplexity", signs.perplexity, original.perplexity, 10.0),
    ]  # fmt: skip


def _fell(name: str, value: float | None, before: float | None, factor: float) -> str:
    if value is None or before is None or value >= factor * before:
        return ""
    return f"{name} {value:.3f} < {factor:g} x the original's {before:.3f}"


def _grew(name: str, value: float | None, before: float | None, factor: float) -> str:
    if value is None or before is None or value <= factor * before:
        return ""
    return f"{name} {value:.3f} > {factor:g} x the original's {before:.3f}"


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
