"""How a model predicts given texts token by token: log-probabilities of answers, memorization and extraction strength.

All other modules read log-probabilities through `sequence_logits` and `reading`; only the choices of facts, which share
a prompt, are read from a cache (`repedit.metrics.facts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from repedit.activations.forward import at_least_float32, check_ids, inputs_of
from repedit.arguments import checked
from repedit.data import Batch, Facts, Row, Rows
from repedit.data.corpus import padded
from repedit.data.encoding import encoded
from repedit.errors import ArgumentError, DataError, NotFinite
from repedit.hooks import evaluating
from repedit.models.subject import Subject

# A forward pass holds the logits of the whole vocabulary for every token.
_ROWS = 8

RowSource = Rows | Facts | Iterable[Row]
"""Rows, facts (those to forget), or an iterable of rows."""


@dataclass(frozen=True, eq=False)
@checked
class Reading:
    """How each token of an answer is predicted from the true tokens before it."""

    logs: NDArray[np.float64]
    """Log-probability of each token, in nats."""
    hits: NDArray[np.bool_]
    """Whether each token is the only most likely one."""


@dataclass(frozen=True, eq=False)
@checked
class AnswerNll:
    """Negative log-likelihood of each answer, in nats."""

    sum: NDArray[np.float64]
    count: NDArray[np.int64]
    """Tokens of each answer."""
    ids: tuple[str, ...]

    @property
    def mean(self) -> NDArray[np.float64]:
        """Nats per token, by row."""
        return self.sum / self.count


@dataclass(frozen=True, eq=False)
@checked
class ByRow:
    """One number per row."""

    values: NDArray[np.float64]
    ids: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Over the rows."""
        return float(self.values.mean())

    def __repr__(self) -> str:
        return f"ByRow(mean {self.mean:.4f} of {len(self.ids)} rows)"


@checked
def answer_nll(subject: Subject, rows: RowSource, *, count_end: bool = True, batch_size: int = _ROWS) -> AnswerNll:
    """Negative log-likelihood of each answer after its prompt.

    Args:
        count_end: whether the end-of-sequence token after the answer counts; it does in the published metrics.
    Raises:
        DataError: if there are no rows, a prompt or answer has no token, or a row is too long for the model.
        ArgumentError: without a tokenizer, without an end token that should count, or for a batch_size below 1.
        NotFinite: if a log-probability is not finite.
    """
    items = rows_of(rows)
    answers = readings(subject, items, count_end=count_end, batch_size=batch_size)
    sums, counts = np.array([-r.logs.sum() for r in answers]), np.array([len(r.logs) for r in answers])
    return AnswerNll(sums, counts, tuple(row.id for row in items))


@checked
def answer_probability(nll: AnswerNll) -> ByRow:
    """exp(-sum/count): the geometric mean of the token probabilities of each answer."""
    return ByRow(np.exp(-nll.mean), nll.ids)


@checked
def exact_memorization(subject: Subject, rows: RowSource, *, count_end: bool = False, batch_size: int = _ROWS) -> ByRow:
    """Share of the tokens of each answer that are the model's most likely ones, given all tokens before them.

    Raises:
        DataError, ArgumentError, NotFinite: as `answer_nll` does.
    Reference: Tirumala et al. 2022, arXiv:2205.10770.
    """
    return _by_row(subject, rows, share, count_end, batch_size)


@checked
def extraction_strength(
    subject: Subject, rows: RowSource, *, count_end: bool = False, batch_size: int = _ROWS
) -> ByRow:
    """1 - k/n for each answer of n tokens, where every token from k on is predicted correctly: how little must be given.

    Raises:
        DataError, ArgumentError, NotFinite: as `answer_nll` does.
    Reference: Carlini et al. 2020, arXiv:2012.07805.
    """
    return _by_row(subject, rows, strength, count_end, batch_size)


@checked
def share(hits: NDArray[np.bool_]) -> float:
    """Share of the tokens that are predicted correctly."""
    return float(hits.mean())


@checked
def strength(hits: NDArray[np.bool_]) -> float:
    """1 - k/n with k the first of n tokens after the last wrong one."""
    wrong = np.flatnonzero(~hits)
    return 1.0 - (int(wrong[-1]) + 1 if len(wrong) else 0) / len(hits)


@checked
def reading(logits: Float[Tensor, "n v"], labels: Int[Tensor, " n"]) -> Reading:
    """The reading of tokens from the logits at the position before each of them."""
    wide = at_least_float32(logits)
    own = wide.gather(1, labels[:, None])
    logs = (own[:, 0] - wide.logsumexp(1)).double().cpu().numpy()
    return Reading(logs, ((wide >= own).sum(1) == 1).cpu().numpy())


@checked
def readings(
    subject: Subject, rows: Sequence[Row], *, count_end: bool = True, batch_size: int = _ROWS
) -> tuple[Reading, ...]:
    """The readings of the answers, in the order of the rows.

    Raises:
        DataError, ArgumentError, NotFinite: as `answer_nll` does.
    """
    if batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size}; give at least 1 row")
    tokens = _tokens(subject, rows, count_end)
    by_row: dict[int, Reading] = {}
    # Rows of similar length together, to reduce padding.
    order = sorted(range(len(rows)), key=lambda i: len(tokens[i][0]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        for i, logits in zip(part, sequence_logits(subject, [tokens[i][0] for i in part]), strict=True):
            ids, begin = tokens[i]
            labels = torch.tensor(ids[begin:], device=logits.device)
            by_row[i] = reading(logits[begin - 1 : -1], labels)
    for i, row in enumerate(rows):
        if not np.isfinite(by_row[i].logs).all():
            raise NotFinite(f"row {row.id!r}: a log-probability is not finite; load the model in float32?")
    return tuple(by_row[i] for i in range(len(rows)))


@checked
def rows_of(source: RowSource, *, what: str = "rows to score") -> tuple[Row, ...]:
    """The rows of a source.

    Raises:
        DataError: if there are none.
    """
    items = source.forget if isinstance(source, Facts) else source.items if isinstance(source, Rows) else tuple(source)
    if not items:
        raise DataError(f"there are no {what}; give at least one")
    return items


def _by_row(
    subject: Subject, rows: RowSource, measure: Callable[[NDArray[np.bool_]], float], count_end: bool, batch_size: int
) -> ByRow:
    items = rows_of(rows)
    answers = readings(subject, items, count_end=count_end, batch_size=batch_size)
    return ByRow(np.array([measure(r.hits) for r in answers], dtype=np.float64), tuple(row.id for row in items))


def _tokens(subject: Subject, rows: Sequence[Row], count_end: bool) -> list[tuple[list[int], int]]:
    """(ids, index of the first token of the answer) of every row."""
    tokenizer, limit = subject.need_tokenizer(), getattr(subject.model.config, "max_position_embeddings", None)
    if count_end and tokenizer.eos_token_id is None:
        raise ArgumentError("the tokenizer has no end-of-sequence token to count; pass count_end=False")
    tokens = []
    for row in rows:
        ids, start = encoded(tokenizer, row.prompt, row.answer)
        if not start or len(ids) == start:
            where = "after" if start else "before"
            raise DataError(f"row {row.id!r}: no token {where} the prompt's end; give a longer prompt and answer")
        # An answer may contain its own end token.
        ids = ids + [tokenizer.eos_token_id] * (count_end and ids[-1] != tokenizer.eos_token_id)
        check_ids(subject, ids, f"row {row.id!r}")
        if limit is not None and len(ids) > limit:
            raise DataError(f"row {row.id!r} has {len(ids)} tokens, the model reads {limit}; shorten it")
        tokens.append((ids, start))
    return tokens


@checked
def sequence_logits(subject: Subject, sequences: Sequence[Sequence[int]]) -> list[Float[Tensor, "t v"]]:
    """The logits at every position of some token sequences, from one forward pass with padding on the right."""
    ids, mask = (x.to(subject.device) for x in padded(sequences))
    batch = Batch(ids, mask, ("",) * len(sequences))
    with torch.no_grad(), evaluating(subject.model):
        logits = subject.model(**inputs_of(batch)).logits
    return [rows[: len(ids)] for rows, ids in zip(logits, sequences, strict=True)]
