"""Next-token predictions on a corpus, and the effect of an edit on them; pruning is evaluated by these."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from repedit.activations.forward import at_least_float32, batches, inputs_of, note_batch_on_error
from repedit.arguments import checked
from repedit.data import Batch, Batches
from repedit.edit import Edit
from repedit.errors import FingerprintError, NotEnoughRows, NotFinite, check_whole, given
from repedit.hooks import evaluating
from repedit.models.subject import Subject


@dataclass(frozen=True)
class Predictions:
    """Sums over the next-token predictions of each chunk of text."""

    ids: tuple[str, ...]
    count: NDArray[np.int64]
    hits: NDArray[np.int64]
    hits10: NDArray[np.int64]
    loss: NDArray[np.float64]
    """Summed negative log-likelihood, in nats."""

    def __repr__(self) -> str:
        return (
            f"Predictions({self.count.sum():,} tokens, {self.top1:.1%} right, loss {self.mean_loss:.3f} nats a token)"
        )

    @property
    def top1(self) -> float:
        """Share of tokens predicted first."""
        return float(self.hits.sum() / self.count.sum())

    @property
    def top10(self) -> float:
        """Share of tokens among the ten most likely."""
        return float(self.hits10.sum() / self.count.sum())

    @property
    def mean_loss(self) -> float:
        """Mean negative log-likelihood a token, in nats."""
        return float(self.loss.sum() / self.count.sum())

    @property
    def perplexity(self) -> float:
        """exp(mean_loss); infinite where float64 overflows."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.mean_loss))


@checked
def predictions(
    subject: Subject,
    corpus: Batches,
    *,
    edit: Edit | None = None,
    skip: set[int] | None = None,
    length: int = 128,
    batch_size: int = 8,
    limit_tokens: int | None = None,
    progress: bool | None = None,
) -> Predictions:
    """How well the model predicts each next token of a corpus, by chunk.

    Args:
        edit: an edit that is active during the pass.
        skip: token ids that are not counted as targets, such as the most common tokens.
        limit_tokens: stop after the batch that reaches this many predictions.
    Raises:
        ArgumentError: if a number is below 1.
        NotEnoughRows: if there is nothing to predict.
        NotFinite: if the loss is not finite.
    """
    check_whole(**given(limit_tokens=limit_tokens))
    ids: list[str] = []
    rows: list[tuple[int, int, int, float]] = []
    with evaluating(subject.model), edit.hooked(subject) if edit else nullcontext(), torch.no_grad():
        for number, batch in enumerate(batches(subject, corpus, length, batch_size, progress, "predict")):
            with note_batch_on_error(number):
                logits = subject.model(**inputs_of(batch)).logits
                rows += [_chunk_sums(logits[i], batch, i, skip) for i in range(len(batch.document))]
            ids += batch.document
            if limit_tokens is not None and sum(row[0] for row in rows) >= limit_tokens:
                break
    if not sum(row[0] for row in rows):
        raise NotEnoughRows(f"corpus {corpus.name!r} holds no token with a next token to predict; give longer text")
    count, hits, hits10, loss = zip(*rows, strict=True)
    return Predictions(tuple(ids), np.array(count), np.array(hits), np.array(hits10), np.array(loss))


def _chunk_sums(
    logits: Float[Tensor, "t v"], batch: Batch, row: int, skip: set[int] | None
) -> tuple[int, int, int, float]:
    """(count, hits, hits10, loss) of one chunk."""
    mask, ids = batch.attention_mask[row], batch.input_ids[row]
    use = mask[:-1] & mask[1:]
    targets = ids[1:][use]
    scores = at_least_float32(logits[:-1][use])
    if skip:
        keep = ~torch.isin(targets, torch.tensor(sorted(skip), device=targets.device))
        targets, scores = targets[keep], scores[keep]
    if not len(targets):
        return 0, 0, 0, 0.0
    own = scores.gather(1, targets[:, None])
    loss = float((scores.logsumexp(1) - own[:, 0]).double().sum())
    if not np.isfinite(loss):
        raise NotFinite(f"the loss of document {batch.document[row]!r} is {loss}; load the model in float32?")
    # Ties count against the model: a token is a hit at k when fewer than k others score as high.
    above = (scores >= own).sum(1) - 1
    return len(targets), int((above < 1).sum()), int((above < 10).sum()), loss


@dataclass(frozen=True)
class Effect:
    """The effect of an edit on one set of texts: relative drop of top-1 accuracy, with a paired bootstrap interval."""

    drop: float
    """100 (1 - edited / original), per cent; NaN where the original predicts nothing right."""
    low: float
    high: float
    """Bounds of the 95 % interval; both NaN where the original predicts nothing right in a resample."""
    loss_rise: float
    """In nats per token."""

    def __str__(self) -> str:
        return f"drop {self.percentage}, loss {self.loss_rise:+.2f} nats a token"

    @property
    def percentage(self) -> str:
        """The drop with its interval, or the reason why one is not defined."""
        if math.isnan(self.drop):
            return "not defined: nothing was right before the edit"
        interval = "interval not defined: too little was right before the edit"
        return f"{self.drop:.1f} % ({interval if math.isnan(self.low) else f'{self.low:.1f} to {self.high:.1f}'})"

    def plain(self) -> dict[str, Any]:
        """The drop in per cent and its interval as JSON values, None where not defined."""
        values = [None if math.isnan(value) else value for value in (self.drop, self.low, self.high)]
        return {"drop_percent": values[0], "interval": None if None in values[1:] else values[1:]}


def effect(original: Predictions, edited: Predictions, *, resamples: int = 1000, seed: int = 0) -> Effect:
    """The drop of top-1 accuracy with its 95 % interval, resampling chunks and using each resample for both models.

    Raises:
        FingerprintError: if the two were not measured on the same chunks.
    """
    check_same_chunks(original, edited)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(original.ids), (resamples, len(original.ids)))
    before, after = (p.hits[draws].sum(1) / np.maximum(p.count[draws].sum(1), 1) for p in (original, edited))
    defined = bool((before > 0).all())
    low, high = np.quantile(100 * (1 - after / before), [0.025, 0.975]) if defined else (math.nan, math.nan)
    rise = edited.mean_loss - original.mean_loss
    return Effect(drop(original, edited), float(low), float(high), rise)


def drop(original: Predictions, edited: Predictions) -> float:
    """Relative drop of top-1 accuracy in per cent, 100 (1 - edited / original); NaN where the original has none right."""
    check_same_chunks(original, edited)
    return 100 * (1 - edited.top1 / original.top1) if original.top1 else math.nan


def check_same_chunks(original: Predictions, edited: Predictions) -> None:
    """Refuse to compare predictions of different texts.

    Raises:
        FingerprintError: with the first difference.
    """
    if original.ids != edited.ids or not np.array_equal(original.count, edited.count):
        raise FingerprintError(
            f"the two predictions are of different texts: {len(original.ids)} and {len(edited.ids)} chunks, "
            f"{int(original.count.sum())} and {int(edited.count.sum())} tokens; evaluate both on one corpus"
        )
