"""LiRA: membership of a text or image by the likelihood ratio over shadow models that did and did not see it.

It needs models trained like the one under test, half of them on each text, so it is for models that are cheap to train.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from repedit.errors import ArgumentError, NotEnoughRows, NotFinite, ShapeError
from repedit.metrics.membership import Values

LEAST = 1e-6
"""Smallest standard deviation."""


def lira(
    target: Values, shadows: Float[ndarray, "models n"], seen: Bool[ndarray, "models n"], *, pooled: bool | None = None
) -> Values:
    """log N(s; m_in, d_in) - log N(s; m_out, d_out) of every text (n,); higher looks more like a text that was seen.

    s is the score of the text on the model under test; m and d are mean and standard deviation of its scores on the
    shadow models that saw it (in) and that did not (out). Any score that grows with membership will do, such as the
    mean log-probability of a text, or of an answer its logit log(p / (1 - p)).

    Args:
        shadows: the scores on each shadow model.
        seen: whether each shadow model was trained on each text.
        pooled: one standard deviation for all texts; None where a text has fewer than 16 shadow models on a side.
    Raises:
        ShapeError: if the arrays do not match.
        NotFinite: if a score is not finite.
        NotEnoughRows: if a text has fewer than two shadow models on a side.
        ArgumentError: if there is no text.
    Reference: Carlini et al. 2022, arXiv:2112.03570, algorithm 1 and section VI-C.
    """
    if shadows.shape != seen.shape or shadows.shape[1:] != target.shape:
        raise ShapeError(
            f"scores of {target.shape} texts, shadow scores {shadows.shape}, seen {seen.shape}; give (n,), (models, n) twice"
        )
    if not target.size:
        raise ArgumentError("there is no text; give at least one")
    if not (np.isfinite(target).all() and np.isfinite(shadows).all()):
        raise NotFinite("a score is not finite; load the models in float32?")
    fewest = int(min(seen.sum(0).min(), (~seen).sum(0).min()))
    if fewest < 2:
        raise NotEnoughRows(
            f"a text has {fewest} shadow models on one side; train at least 2 with and 2 without each text"
        )
    pooled = fewest < 16 if pooled is None else pooled
    inside, outside = (_logs(target, shadows, side, pooled) for side in (seen, ~seen))
    return inside - outside


def offline_lira(target: Values, outside: Float[ndarray, "models n"], *, pooled: bool | None = None) -> Values:
    """(s - m_out) / d_out of every text (n,): deviations above models that never saw it; higher looks more like one seen.

    For who can train models without the texts but none with them; it grows as the one-sided test of the source does.

    Args:
        outside: the scores on shadow models, none of which saw any of the texts.
        pooled: one standard deviation for all texts; None with fewer than 16 shadow models.
    Raises:
        ShapeError: if the arrays do not match.
        NotFinite: if a score is not finite.
        NotEnoughRows: if there are fewer than two shadow models.
        ArgumentError: if there is no text.
    Reference: Carlini et al. 2022, arXiv:2112.03570, section VI-B.
    """
    if outside.shape[1:] != target.shape:
        raise ShapeError(f"scores of {target.shape} texts, shadow scores {outside.shape}; give (n,) and (models, n)")
    if not target.size:
        raise ArgumentError("there is no text; give at least one")
    if not (np.isfinite(target).all() and np.isfinite(outside).all()):
        raise NotFinite("a score is not finite; load the models in float32?")
    if len(outside) < 2:
        raise NotEnoughRows(f"{len(outside)} shadow models; train at least 2 without the texts")
    spread = outside.std(0, ddof=1)
    if len(outside) < 16 if pooled is None else pooled:
        spread = np.full(len(target), np.sqrt((spread**2).mean()))
    return (target - outside.mean(0)) / np.maximum(spread, LEAST)


def _logs(target: Values, shadows: Float[ndarray, "models n"], side: Bool[ndarray, "models n"], pooled: bool) -> Values:
    """log N of every score under the shadow models of one side; the constant that cancels is left out."""
    count = side.sum(0)
    mean = np.where(side, shadows, 0.0).sum(0) / count
    squares = np.where(side, (shadows - mean) ** 2, 0.0).sum(0)
    # Each text has lost one degree of freedom to its mean.
    variance = np.full(len(target), squares.sum() / (count - 1).sum()) if pooled else squares / (count - 1)
    spread = np.maximum(np.sqrt(variance), LEAST)
    return -np.log(spread) - 0.5 * ((target - mean) / spread) ** 2
