"""What the logits of a classifier say of each example, and how far the margins of two families of models lie apart.

Everything is computed in float64 from logits, so a probability that rounds to 0 or 1 leaves every value finite.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from repedit.errors import MetricError, NotEnoughRows, ShapeError

LEAST_MODELS = 5
CLIP, BINS, FLOOR = 100.0, 20, 1e-5
"""Margins are clipped there; bins between the least and largest of both families; added to the share of each bin."""


def confidence(logits: Float[Tensor, "b C"]) -> Float[Tensor, " b"]:
    """The largest probability, (b,) in [1 / C, 1].

    Raises:
        MetricError: if a logit is not finite, or there is one class.
    """
    return _logs(logits).amax(-1).exp()


def entropy(logits: Float[Tensor, "b C"]) -> Float[Tensor, " b"]:
    """-sum p log p in nats, (b,) in [0, log C].

    Raises:
        MetricError: if a logit is not finite, or there is one class.
    """
    logs = _logs(logits)
    return -(logs.exp() * logs).sum(-1)


def modified_entropy(logits: Float[Tensor, "b C"], y: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """-(1 - p_y) log p_y - sum_{i != y} p_i log(1 - p_i) in nats, (b,); 0 where the label is certain, low for members.

    Entropy alone is as low for a certain mistake as for a certain hit; this is high for the mistake.

    Raises:
        MetricError: if a logit is not finite, a label is no class, or there is one class.
        ShapeError: if there is not one label a row.
    Reference: Song and Mittal 2021, arXiv:2003.10595, equation 8.
    """
    _check_labels(logits, y)
    logs = _logs(logits)
    # log(1 - p): only the largest p of a row can exceed 1/2, where 1 - p has lost its digits; the others are added up.
    top = logs.argmax(-1, keepdim=True)
    rest = logs.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    other = torch.log1p(-logs.exp().clamp(max=0.5)).scatter(-1, top, rest)
    own = torch.nn.functional.one_hot(y, logits.shape[-1]).bool()
    weight = logs.exp()
    return -((1 - weight) * logs).where(own, weight * other).sum(-1)


def margin(logits: Float[Tensor, "b C"], y: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """z_y - log sum_{i != y} exp z_i, the logit log(p_y / (1 - p_y)) of the label, (b,); 0 where p_y = 1/2.

    Raises:
        MetricError: if a logit is not finite, a label is no class, or there is one class.
        ShapeError: if there is not one label a row.
    Reference: Carlini et al. 2022, arXiv:2112.03570, section IV-C.
    """
    _check_labels(logits, y)
    logs = _logs(logits)
    own = logs.gather(-1, y[:, None])
    return (own - logs.scatter(-1, y[:, None], -torch.inf).logsumexp(-1, keepdim=True))[:, 0]


def klom(edited: Float[ndarray, "N n"], reference: Float[ndarray, "M points"]) -> Float[ndarray, " n"]:
    """KL divergence in nats of the margins of N edited models from those of M retrained ones, by example, (n,); 0 is alike.

    Margins are clipped to +-100 and counted in 20 bins between the least and the largest of both families; 1e-5 is added
    to the share of every bin, so the largest value there can be is log(1e5) or so.

    Raises:
        NotEnoughRows: if a family has fewer than 5 models.
        ShapeError: if the families have different examples.
        MetricError: if a margin is not a number.
    Reference: Rinberg et al. 2025, EasyDUB; Georgiev et al. 2024, arXiv:2410.23232, appendix.
    """
    if edited.shape[1] != reference.shape[1]:
        raise ShapeError(f"{edited.shape[1]} and {reference.shape[1]} examples; give margins of the same examples")
    fewest = min(len(edited), len(reference))
    if fewest < LEAST_MODELS:
        raise NotEnoughRows(
            f"{len(edited)} edited and {len(reference)} retrained models; a histogram of margins needs {LEAST_MODELS} of each"
        )
    if np.isnan(edited).any() or np.isnan(reference).any():
        raise MetricError("a margin is NaN; was a model trained until its loss overflowed?")
    sides = [np.clip(side, -CLIP, CLIP) for side in (edited, reference)]
    both = np.concatenate(sides)
    found = np.empty(edited.shape[1])
    for i in range(edited.shape[1]):
        edges = np.histogram_bin_edges(both[:, i], BINS)
        p, q = (np.histogram(side[:, i], edges)[0] / len(side) + FLOOR for side in sides)
        p, q = p / p.sum(), q / q.sum()
        found[i] = (p * np.log(p / q)).sum()
    return found


def _logs(logits: Float[Tensor, "b C"]) -> Float[Tensor, "b C"]:
    if logits.shape[-1] < 2:
        raise MetricError(f"logits of {logits.shape[-1]} class; there must be at least two to be told apart")
    bad = (~torch.isfinite(logits)).any(-1).nonzero().flatten().tolist()
    if bad:
        raise MetricError(
            f"logits of {len(bad)} examples are not finite, rows {', '.join(map(str, bad[:5]))}; did the training diverge?"
        )
    return logits.double().log_softmax(-1)


def _check_labels(logits: Float[Tensor, "b C"], y: Int[Tensor, "*n"]) -> None:
    if len(y) != len(logits):
        raise ShapeError(f"{len(logits)} rows of logits and {len(y)} labels; give one label a row")
    bad = ((y < 0) | (y >= logits.shape[-1])).nonzero().flatten().tolist()
    if bad:
        raise MetricError(
            f"label {int(y[bad[0]])} in row {bad[0]}; the logits have classes 0 to {logits.shape[-1] - 1}"
        )
