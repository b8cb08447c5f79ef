"""How a model predicts given answers, token by token: their probability, and how much of them it knows by heart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from repedit.activations.forward import at_least_float32, check_ids, inputs_of
from repedit.data import Batch, Facts, Row, Rows
from repedit.data.encoding import encoded
from repedit.errors import ArgumentError, DataError, NotFinite
from repedit.hooks import evaluating
from repedit.models.subject import Subject

# A pass keeps the log-probabilities of a whole vocabulary for every token.
_ROWS = 8


@dataclass(frozen=True, eq=False)
class Reading:
    """The tokens of one answer, each predicted after the true ones before it."""

    logs: NDArray[np.float64]
    """Log-probability of each token, in nats."""
    hits: NDArray[np.bool_]
    """Whether each token was the most likely one; a tie is none."""


@dataclass(frozen=True, eq=False)
class AnswerNll:
    """Negative log-likelihood of each answer, in nats."""

    sum: NDArray[np.float64]
    count: NDArray[np.int64]
    """Tokens of each answer."""
    ids: tuple[str, ...]

    @property
    def mean(self) -> NDArray[np.float64]:
        """Nats a token, by row."""
        return self.sum / self.count


@dataclass(frozen=True, eq=False)
class ByRow:
    """One number a row."""

    values: NDArray[np.float64]
    ids: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Over the rows."""
        return float(self.values.mean())

    def __repr__(self) -> str:
        return f"ByRow(mean {self.mean:.4f} of {len(self.ids)} rows)"


def answer_nll(
    subject: Subject, rows: Rows | Facts | Iterable[Row], *, count_end: bool = True, batch_size: int = _ROWS
) -> AnswerNll:
    """Negative log-likelihood of each answer after its prompt.

    Args:
        rows: rows, facts (those to forget), or what holds rows.
        count_end: whether the end-of-sequence token after the answer counts; the published metrics count it.
    Raises:
        DataError: if there are no rows, an answer has no token before or in it, or a row is too long for the model.
        ArgumentError: without a tokenizer, or one with an end token where it counts, or with a batch below 1.
        NotFinite: if a log-probability is not finite.
    """
    items = _items(rows)
    found = readings(subject, items, count_end=count_end, batch_size=batch_size)
    sums, counts = np.array([-r.logs.sum() for r in found]), np.array([len(r.logs) for r in found])
    return AnswerNll(sums, counts, tuple(row.id for row in items))


def answer_probability(nll: AnswerNll) -> ByRow:
    """exp(-sum/count): the geometric mean probability of a token of each answer."""
    return ByRow(np.exp(-nll.mean), nll.ids)


def exact_memorization(
    subject: Subject, rows: Rows | Facts | Iterable[Row], *, count_end: bool = False, batch_size: int = _ROWS
) -> ByRow:
    """Share of the tokens of each answer that the model predicts first, given all tokens before.

    Raises:
        DataError, ArgumentError, NotFinite: as `answer_nll` does.
    Reference: Tirumala et al. 2022, arXiv:2205.10770.
    """
    return _by_row(subject, rows, share, count_end, batch_size)


def extraction_strength(
    subject: Subject, rows: Rows | Facts | Iterable[Row], *, count_end: bool = False, batch_size: int = _ROWS
) -> ByRow:
    """How early in each answer the model needs no more help: 1 - k/n, from token k of n on every prediction is right.

    Raises:
        DataError, ArgumentError, NotFinite: as `answer_nll` does.
    Reference: Carlini et al. 2020, arXiv:2012.07805.
    """
    return _by_row(subject, rows, strength, count_end, batch_size)


def share(hits: NDArray[np.bool_]) -> float:
    """Share of the tokens that are right."""
    return float(hits.mean())


def strength(hits: NDArray[np.bool_]) -> float:
    """1 - k/n with k the first token after the last wrong one, of n."""
    wrong = np.flatnonzero(~hits)
    return 1.0 - (int(wrong[-1]) + 1 if len(wrong) else 0) / len(hits)


def reading(logits: Float[Tensor, "n v"], labels: Int[Tensor, " n"]) -> Reading:
    """Logits before each token of an answer, and the tokens, as a reading."""
    wide = at_least_float32(logits)
    own = wide.gather(1, labels[:, None])
    logs = (own[:, 0] - wide.logsumexp(1)).double().cpu().numpy()
    return Reading(logs, ((wide >= own).sum(1) == 1).cpu().numpy())


def readings(
    subject: Subject, rows: Sequence[Row], *, count_end: bool = True, batch_size: int = _ROWS
) -> tuple[Reading, ...]:
    """The readings of the answers, in the order of the rows; what all metrics of this file are made of.

    Raises:
        DataError, ArgumentError, NotFinite: as `answer_nll` does.
    """
    if batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size}; give at least 1 row")
    tokens = _tokens(subject, rows, count_end)
    found: dict[int, Reading] = {}
    # Rows of like length together, so that little is padded.
    order = sorted(range(len(rows)), key=lambda i: len(tokens[i][0]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        found |= zip(part, _read(subject, [tokens[i] for i in part]), strict=True)
    for i, row in enumerate(rows):
        if not np.isfinite(found[i].logs).all():
            raise NotFinite(f"row {row.id!r}: a log-probability is not finite; load the model in float32?")
    return tuple(found[i] for i in range(len(rows)))


def _items(rows: Rows | Facts | Iterable[Row]) -> tuple[Row, ...]:
    items = rows.forget if isinstance(rows, Facts) else rows.items if isinstance(rows, Rows) else tuple(rows)
    if not items:
        raise DataError("there are no rows to score; give at least one")
    return items


def _by_row(subject: Subject, rows: Any, measure: Any, count_end: bool, batch_size: int) -> ByRow:
    items = _items(rows)
    found = readings(subject, items, count_end=count_end, batch_size=batch_size)
    return ByRow(np.array([measure(r.hits) for r in found], dtype=np.float64), tuple(row.id for row in items))


def _tokens(subject: Subject, rows: Sequence[Row], count_end: bool) -> list[tuple[list[int], int]]:
    """(ids, index of the first that counts) of every row."""
    tokenizer, limit = subject.need_tokenizer(), getattr(subject.model.config, "max_position_embeddings", None)
    if count_end and tokenizer.eos_token_id is None:
        raise ArgumentError("the tokenizer has no end-of-sequence token to count; pass count_end=False")
    found = []
    for row in rows:
        ids, start = encoded(tokenizer, row.prompt, row.answer)
        if not start or len(ids) == start:
            where = "after" if start else "before"
            raise DataError(f"row {row.id!r}: no token {where} the prompt's end; give a longer prompt and answer")
        # An answer may bring its own end token.
        ids = ids + [tokenizer.eos_token_id] * (count_end and ids[-1] != tokenizer.eos_token_id)
        check_ids(subject, ids, f"row {row.id!r}")
        if limit is not None and len(ids) > limit:
            raise DataError(f"row {row.id!r} has {len(ids)} tokens, the model reads {limit}; shorten it")
        found.append((ids, start))
    return found


def _read(subject: Subject, tokens: Sequence[tuple[list[int], int]]) -> list[Reading]:
    """The readings of some rows, padded on the right."""
    width = max(len(ids) for ids, _ in tokens)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in tokens], device=subject.device)
    sizes = torch.tensor([[len(ids)] for ids, _ in tokens], device=subject.device)
    batch = Batch(ids, torch.arange(width, device=subject.device) < sizes, ("",) * len(tokens))
    with torch.no_grad(), evaluating(subject.model):
        logits = subject.model(**inputs_of(batch)).logits
    return [
        reading(logits[i, start - 1 : len(row) - 1], ids[i, start : len(row)]) for i, (row, start) in enumerate(tokens)
    ]
