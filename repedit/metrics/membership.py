"""Membership inference: scores of texts and of classifier outputs, LiRA with shadow models, AUC and TPR of a score.

A higher score looks more like a member of the training set. An AUC of 1 separates all members from all others, .5 none;
an AUC well below .5 separates them too: texts that were forgotten too much look less familiar than texts never seen.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from numpy.typing import NDArray
from torch import Tensor

from repedit.activations.forward import at_least_float32, check_ids, lengths
from repedit.arguments import checked
from repedit.data.encoding import prompt_ids
from repedit.errors import (
    ArgumentError,
    DataError,
    FractionError,
    MetricError,
    NotEnoughRows,
    NotFinite,
    ShapeError,
    UnknownName,
    nearest,
)
from repedit.io.text import check_text
from repedit.metrics.answers import reading, sequence_logits
from repedit.models.subject import Subject

Values = NDArray[np.float64]
"""Scores of examples, (n,); higher is more like a member."""
SCORES = ("loss", "zlib", "min_k", "min_k++")
"""Membership scores of a text; higher is more like a member."""
# Pairs of rows that are compared at once.
_PAIRS = 1_000_000
# Texts in a forward pass; Min-K++ needs every log-probability at every token.
_ROWS = 4

# --- How well a score separates members from others


@checked
def auc(member: Values, nonmember: Values) -> float:
    """Probability that a member scores above a non-member, ties counting half (Mann-Whitney), exactly; 1 means member.

    Raises:
        MetricError: if a side is empty, or a score is not finite; with the rows.
    """
    _check_sides(member, nonmember)
    order = np.sort(nonmember)
    below, upto = (np.searchsorted(order, member, side=side).sum() for side in ("left", "right"))
    return float((below + upto) / (2 * len(member) * len(nonmember)))


@checked
def tpr(member: Values, nonmember: Values, fpr: float = 0.01) -> float:
    """Share of members above the threshold that at most the share `fpr` of the others exceeds; 1 means member.

    With fewer than 1 / fpr others no false positive is allowed; `tpr_at` refuses that case.

    Raises:
        MetricError: if a side is empty, or a score is not finite; with the rows.
    """
    _check_sides(member, nonmember)
    threshold = np.sort(nonmember)[::-1][int(fpr * len(nonmember))]
    return float((member > threshold).mean())


@checked
def tpr_at(member: Values, nonmember: Values, fpr: float) -> float:
    """`tpr` with enough others to resolve the rate: n of them resolve 1 / n.

    Raises:
        MetricError: if the rate is not in [1 / n, 1), a side is empty, or a score is not finite.
    """
    _check_sides(member, nonmember)
    if not 1 / len(nonmember) <= fpr < 1:
        raise MetricError(
            f"fpr={fpr}; {len(nonmember)} non-members resolve fpr >= {1 / len(nonmember):.3g}, below 1; give more "
            "non-members or a larger fpr"
        )
    return tpr(member, nonmember, fpr)


@checked
def loss_attack(member: Values, nonmember: Values, *, splits: int = 10, seed: int = 0) -> float:
    """Accuracy of a logistic regression that predicts membership from one score, as a fraction; .5 is no separation.

    The longer side is reduced to the length of the shorter one by a seeded draw; the accuracy is the mean over `splits`
    stratified test sets, each a tenth of the rows. It is two-sided: members that score lower are separated too.

    Raises:
        MetricError: if a side has fewer than ten scores, or one is not finite.
        ArgumentError: if splits < 1.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    _check_sides(member, nonmember)
    if splits < 1:
        raise ArgumentError(f"splits={splits}; give at least 1")
    count = min(len(member), len(nonmember))
    if count < 10:
        raise MetricError(
            f"{len(member)} members and {len(nonmember)} non-members; a tenth of the rows is tested, so give at least ten of each"
        )
    rng = np.random.default_rng(seed)
    sides = [side if len(side) == count else rng.choice(side, count, replace=False) for side in (member, nonmember)]
    folds = StratifiedShuffleSplit(splits, random_state=seed)
    rows, member_of = np.concatenate(sides)[:, None], np.repeat([1, 0], count)
    return float(cross_val_score(LogisticRegression(), rows, member_of, cv=folds).mean())


@checked
def standard_error(value: float, members: int, others: int) -> float:
    """Standard error of an AUC for these numbers of rows, by the approximation for exponential scores.

    sqrt((A (1 - A) + (m - 1)(Q1 - A^2) + (n - 1)(Q2 - A^2)) / (m n)) with Q1 = A / (2 - A), Q2 = 2 A^2 / (1 + A).

    Raises:
        MetricError: if the AUC lies outside [0, 1], or a side is empty.
    Reference: Hanley and McNeil 1982, Radiology 143, equation 2.
    """
    if not (0 <= value <= 1 and members >= 1 and others >= 1):
        raise MetricError(
            f"AUC {value} of {members} members and {others} others; give one in [0, 1] and rows on both sides"
        )
    square = value**2
    spread = (members - 1) * (value / (2 - value) - square) + (others - 1) * (2 * square / (1 + value) - square)
    return float(np.sqrt(max(value * (1 - value) + spread, 0.0) / (members * others)))


@checked
def auc_draws(
    member: Float[ndarray, "models m"], nonmember: Float[ndarray, "models n"], *, draws: int = 1000, seed: int = 0
) -> Float[ndarray, "models draws"]:
    """The AUC of every model in bootstrap draws of the rows; all models share the draws, so common noise cancels.

    Raises:
        MetricError: if a side is empty, or a score is not finite.
        ArgumentError: if draws < 1.
    """
    if draws < 1:
        raise ArgumentError(f"draws={draws}; give at least 1")
    for sides in zip(member, nonmember, strict=True):
        _check_sides(*sides)
    rng = np.random.default_rng(seed)
    # With the count of each row in a draw, the AUC of the draw is a sum over pairs, and no draw is sorted.
    counts = [
        rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(float) for n in (member.shape[1], nonmember.shape[1])
    ]
    return np.stack([_bootstrap_auc(m, n, *counts) for m, n in zip(member, nonmember, strict=True)])


@checked
def percentiles(drawn: Values) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of draws.

    Raises:
        MetricError: if there is no draw.
    """
    if not len(drawn):
        raise MetricError("there are no draws to take quantiles of; give at least one")
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _bootstrap_auc(
    member: Values, nonmember: Values, times: Float[ndarray, "draws m"], others: Float[ndarray, "draws n"]
) -> Values:
    wins = np.zeros(len(times))
    size = max(1, _PAIRS // len(nonmember))
    for start in range(0, len(member), size):
        part = member[start : start + size, None]
        pairs = (part > nonmember) + 0.5 * (part == nonmember)
        wins += ((times[:, start : start + size] @ pairs) * others).sum(1)
    return wins / (len(member) * len(nonmember))


def _check_sides(member: Values, nonmember: Values) -> None:
    if not len(member) or not len(nonmember):
        raise MetricError(f"{len(member)} members and {len(nonmember)} others; give at least one of each")
    for name, side in (("members", member), ("others", nonmember)):
        bad = cast(Sequence[int], np.flatnonzero(~np.isfinite(side)).tolist())
        if bad:
            raise MetricError(
                f"{len(bad)} scores of the {name} are not finite, rows {', '.join(map(str, bad[:5]))}; "
                "was the model trained until its loss overflowed?"
            )


# --- Scores from the logits of a classifier, and KLoM, the distance between margins of two families of models
#
# Everything is computed in float64 from logits, so values stay finite when a probability rounds to 0 or 1.

MIN_MODELS = 5
CLIP, BINS, FLOOR = 100.0, 20, 1e-5
"""KLoM: margins are clipped to +-CLIP; number of bins; constant added to the share of each bin."""


@checked
def confidence(logits: Float[Tensor, "b C"]) -> Float[Tensor, " b"]:
    """The largest probability, (b,) in [1 / C, 1].

    Raises:
        MetricError: if a logit is not finite, or there is one class.
    """
    return _log_softmax(logits).amax(-1).exp()


@checked
def entropy(logits: Float[Tensor, "b C"]) -> Float[Tensor, " b"]:
    """-sum p log p in nats, (b,) in [0, log C].

    Raises:
        MetricError: if a logit is not finite, or there is one class.
    """
    logs = _log_softmax(logits)
    return -(logs.exp() * logs).sum(-1)


@checked
def modified_entropy(logits: Float[Tensor, "b C"], y: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """-(1 - p_y) log p_y - sum_{i != y} p_i log(1 - p_i) in nats, (b,); 0 if the label is certain, low for members.

    Entropy is low for confident mistakes as well as for confident hits; the modified entropy is high for the mistakes.

    Raises:
        MetricError: if a logit is not finite, a label is not a class, or there is one class.
        ShapeError: if there is not one label per row.
    Reference: Song and Mittal 2021, arXiv:2003.10595, equation 8.
    """
    _check_labels(logits, y)
    logs = _log_softmax(logits)
    # log(1 - p): only the largest p of a row can exceed 1/2, where 1 - p loses digits; there the other p are summed.
    top = logs.argmax(-1, keepdim=True)
    rest = logs.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    other = torch.log1p(-logs.exp().clamp(max=0.5)).scatter(-1, top, rest)
    own = torch.nn.functional.one_hot(y, logits.shape[-1]).bool()
    weight = logs.exp()
    return -((1 - weight) * logs).where(own, weight * other).sum(-1)


@checked
def margin(logits: Float[Tensor, "b C"], y: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """z_y - log sum_{i != y} exp z_i, the logit log(p_y / (1 - p_y)) of the label, (b,); 0 where p_y = 1/2.

    Raises:
        MetricError: if a logit is not finite, a label is not a class, or there is one class.
        ShapeError: if there is not one label per row.
    Reference: Carlini et al. 2022, arXiv:2112.03570, section IV-C.
    """
    _check_labels(logits, y)
    logs = _log_softmax(logits)
    own = logs.gather(-1, y[:, None])
    return (own - logs.scatter(-1, y[:, None], -torch.inf).logsumexp(-1, keepdim=True))[:, 0]


@checked
def klom(edited: Float[ndarray, "N n"], reference: Float[ndarray, "M points"]) -> Float[ndarray, " n"]:
    """KL divergence in nats of the margins of N edited models from those of M retrained ones, by example, (n,); 0 if equal.

    Margins are clipped to +-100 and counted in 20 bins between the smallest and the largest of both families; 1e-5 is
    added to the share of every bin, which bounds the value at about log(1e5).

    Raises:
        NotEnoughRows: if a family has fewer than 5 models.
        ShapeError: if the families have different examples.
        MetricError: if a margin is not a number.
    Reference: Rinberg et al. 2025, EasyDUB; Georgiev et al. 2024, arXiv:2410.23232, appendix.
    """
    if edited.shape[1] != reference.shape[1]:
        raise ShapeError(f"{edited.shape[1]} and {reference.shape[1]} examples; give margins of the same examples")
    if min(len(edited), len(reference)) < MIN_MODELS:
        raise NotEnoughRows(
            f"{len(edited)} edited and {len(reference)} retrained models; a histogram of margins needs {MIN_MODELS} of each"
        )
    if np.isnan(edited).any() or np.isnan(reference).any():
        raise MetricError("a margin is NaN; was a model trained until its loss overflowed?")
    sides = [np.clip(side, -CLIP, CLIP) for side in (edited, reference)]
    both = np.concatenate(sides)
    divergences = np.empty(edited.shape[1])
    for i in range(edited.shape[1]):
        edges = np.histogram_bin_edges(both[:, i], BINS)
        p, q = (np.histogram(side[:, i], edges)[0] / len(side) + FLOOR for side in sides)
        p, q = p / p.sum(), q / q.sum()
        divergences[i] = (p * np.log(p / q)).sum()
    return divergences


def _log_softmax(logits: Float[Tensor, "b C"]) -> Float[Tensor, "b C"]:
    if logits.shape[-1] < 2:
        raise MetricError(f"logits of {logits.shape[-1]} class; there must be at least two")
    bad = (~torch.isfinite(logits)).any(-1).nonzero().flatten().tolist()
    if bad:
        raise MetricError(
            f"logits of {len(bad)} examples are not finite, rows {', '.join(map(str, bad[:5]))}; did the training diverge?"
        )
    return logits.double().log_softmax(-1)


def _check_labels(logits: Float[Tensor, "b C"], y: Int[Tensor, "*n"]) -> None:
    if len(y) != len(logits):
        raise ShapeError(f"{len(logits)} rows of logits and {len(y)} labels; give one label per row")
    bad = ((y < 0) | (y >= logits.shape[-1])).nonzero().flatten().tolist()
    if bad:
        raise MetricError(
            f"label {int(y[bad[0]])} in row {bad[0]}; the logits have classes 0 to {logits.shape[-1] - 1}"
        )


# --- LiRA: membership by the likelihood ratio over shadow models that were and were not trained on an example
#
# It needs models trained like the one under test, half of them on each text, so it suits models that are cheap to
# train.

MIN_STD = 1e-6
"""Smallest standard deviation."""


@checked
def lira(
    target: Values, shadows: Float[ndarray, "models n"], seen: Bool[ndarray, "models n"], *, pooled: bool | None = None
) -> Values:
    """log N(s; m_in, d_in) - log N(s; m_out, d_out) of every text (n,); higher is more like a member.

    s is the score of the text on the model under test; m and d are mean and standard deviation of its scores on the
    shadow models that were trained on it (in) and on those that were not (out). Any score that grows with membership
    can be used, such as the mean log-probability of a text, or the logit log(p / (1 - p)) of an answer.

    Args:
        shadows: the scores on each shadow model.
        seen: whether each shadow model was trained on each text.
        pooled: use one standard deviation for all texts; when None, only if a text has fewer than 16 shadow models on a
            side.
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
    inside, outside = (_log_density(target, shadows, side, pooled) for side in (seen, ~seen))
    return inside - outside


@checked
def offline_lira(target: Values, outside: Float[ndarray, "models n"], *, pooled: bool | None = None) -> Values:
    """(s - m_out) / d_out of every text (n,): standard deviations above models not trained on it.

    For settings where shadow models can be trained without the texts only; it is monotonic in the one-sided test of the
    source.

    Args:
        outside: the scores on shadow models, none of which saw any of the texts.
        pooled: use one standard deviation for all texts; when None, only with fewer than 16 shadow models.
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
    return (target - outside.mean(0)) / np.maximum(spread, MIN_STD)


def _log_density(
    target: Values, shadows: Float[ndarray, "models n"], side: Bool[ndarray, "models n"], pooled: bool
) -> Values:
    """Log density of every score under the shadow models of one side, up to a constant that cancels."""
    count = side.sum(0)
    mean = np.where(side, shadows, 0.0).sum(0) / count
    squares = np.where(side, (shadows - mean) ** 2, 0.0).sum(0)
    # One degree of freedom per text is lost to its mean.
    variance = np.full(len(target), squares.sum() / (count - 1).sum()) if pooled else squares / (count - 1)
    spread = np.maximum(np.sqrt(variance), MIN_STD)
    return -np.log(spread) - 0.5 * ((target - mean) / spread) ** 2


# --- Scores of texts


@checked
def scores(
    subject: Subject,
    texts: Sequence[str],
    kinds: Sequence[str] = SCORES,
    reference: Subject | None = None,
    *,
    share: float = 0.4,
    length: int = 512,
) -> dict[str, Values]:
    """Scores of every text, (n,) by kind; higher is more like a member.

    With l the log-probabilities of a text's tokens: "loss" is mean(l); "zlib" is sum(l) over the number of bytes of the
    compressed text; "min_k" is the mean of the lowest `share` of l; "min_k++" is the same of (l - m) / s, where m and s
    are mean and standard deviation of the log-probability of a token sampled from the model at that position. With a
    reference model, "reference" is added: mean(l) minus that of the reference.

    Args:
        reference: a model of the same kind that never saw the texts.
        share: of the tokens of a text that Min-K and Min-K++ use, the least likely ones.
        length: maximum tokens of a text; the rest is ignored.
    Raises:
        DataError: if there are no texts, or one predicts nothing.
        UnknownName: if there is no such kind.
        NotFinite: if a score is not finite.
        FractionError: if the share is not in (0, 1].
        ArgumentError: if the length is below 2.
    Reference: Carlini et al. 2020, arXiv:2012.07805 (zlib); Shi et al. 2023, arXiv:2310.16789 (Min-K); Zhang et al.
    2024, arXiv:2404.02936 (Min-K++).
    """
    check_reading(share, length)
    unknown = next((kind for kind in kinds if kind not in SCORES), None)
    if unknown is not None:
        raise UnknownName(f"no membership score is called {unknown!r}; {nearest(unknown, SCORES)}")
    if not texts:
        raise DataError("there are no texts to score; give at least one")
    by_kind = {kind: np.zeros(len(texts)) for kind in kinds}
    for i, logs, standard in _token_logs(subject, texts, length):
        for kind in kinds:
            by_kind[kind][i] = _score(kind, logs, standard, texts[i], share)
    if reference is not None:
        own = by_kind["loss"] if "loss" in kinds else scores(subject, texts, ("loss",), length=length)["loss"]
        by_kind["reference"] = own - scores(reference, texts, ("loss",), length=length)["loss"]
    for name, values in by_kind.items():
        if not np.isfinite(values).all():
            first = int(np.flatnonzero(~np.isfinite(values))[0])
            raise NotFinite(f"the score {name!r} of text {first} is {values[first]}; load the model in float32?")
    return by_kind


@checked
def privleak(auc: float, auc_reference: float = 0.5) -> float:
    """PrivLeak in percent: (reference - auc) / (1 - reference) of two AUCs, where 1 means member.

    0 means that the model leaks as much as the reference, -100 full leakage; above 0 the texts look less familiar than
    texts that the model never saw, which separates them as well.

    Raises:
        MetricError: if the AUC of the reference is 1, or one lies outside [0, 1].
    Reference: Shi et al. 2024, arXiv:2407.06460.
    """
    if not (0 <= auc <= 1 and 0 <= auc_reference < 1):
        raise MetricError(
            f"AUCs {auc} and {auc_reference}; give the first in [0, 1], that of the reference in [0, 1), where 1 means member"
        )
    return 100 * (auc_reference - auc) / (1 - auc_reference)


@checked
def check_reading(share: float, length: int) -> None:
    """Refuse a share or length that leaves nothing to score.

    Raises:
        FractionError, ArgumentError: with the value.
    """
    if not 0 < share <= 1:
        raise FractionError(f"share={share}; give a fraction above 0 and at most 1")
    if length < 2:
        raise ArgumentError(f"length={length}; a text needs at least 2 tokens to predict one")


def _token_logs(subject: Subject, texts: Sequence[str], length: int) -> Iterator[tuple[int, Values, Values]]:
    """(index, log-probabilities of the tokens, the same standardized as in Min-K++) of every text."""
    tokenizer = subject.need_tokenizer()
    for i, text in enumerate(texts):
        check_text(text, f"text {i}")
    ids = [prompt_ids(tokenizer, text)[:length] for text in texts]
    for i, tokens in enumerate(ids):
        check_ids(subject, tokens, f"text {i}")
    short = next((text for text, tokens in zip(texts, ids, strict=True) if len(tokens) < 2), None)
    if short is not None:
        raise DataError(f"the text {short!r} has no token after its first, so nothing is predicted; remove it")
    for part in lengths(ids, _ROWS):
        for i, logits in zip(part, sequence_logits(subject, [ids[i] for i in part]), strict=True):
            yield i, *_standardized(logits[:-1], torch.tensor(ids[i][1:], device=logits.device))


def _standardized(logits: Float[Tensor, "n v"], tokens: Int[Tensor, " n"]) -> tuple[Values, Values]:
    """(log-probabilities l of the tokens, (l - m) / s with the mean and deviation of l under the model)."""
    own = reading(logits, tokens).logs
    logs = at_least_float32(logits).log_softmax(-1)
    probability = logs.exp()
    mean = (probability * logs).sum(-1)
    variance = (probability * (logs - mean[:, None]).square()).sum(-1).clamp(min=1e-12)
    return own, (own - mean.double().cpu().numpy()) / variance.sqrt().double().cpu().numpy()


def _score(kind: str, logs: Values, standard: Values, text: str, share: float) -> float:
    if kind == "zlib":
        return float(logs.sum() / len(zlib.compress(text.encode())))
    return float(logs.mean()) if kind == "loss" else _lowest(logs if kind == "min_k" else standard, share)


def _lowest(values: Values, share: float) -> float:
    return float(np.sort(values)[: max(1, int(share * len(values)))].mean())
