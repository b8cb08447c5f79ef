"""Whether something looks as if a model had been trained on it: scores of texts, and how well scores tell two sets apart.

A higher score looks more like a member of the training set, so an AUC of 1 means that members are told from the others
without an error, and .5 that they are not told at all. Scores of images, from logits, are in `margins`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from repedit.activations.passes import at_least_float32, check_ids
from repedit.data.encoding import prompt_ids
from repedit.errors import ArgumentError, DataError, FractionError, MetricError, NotFinite, UnknownName, nearest
from repedit.hooks import evaluating
from repedit.io.text import check_text
from repedit.metrics.margins import modified_entropy
from repedit.metrics.probability import lengths
from repedit.metrics.separation import Values, auc, loss_attack, standard_error, tpr, tpr_at
from repedit.models import Subject

SCORES = ("loss", "zlib", "min_k", "min_k++")
"""What a text is scored by; higher is more like a member."""
# Texts of one length that are read together; Min-K++ looks at every log-probability of every token.
_ROWS = 4

__all__ = [
    "SCORES",
    "Values",
    "auc",
    "check_reading",
    "loss_attack",
    "modified_entropy",
    "privleak",
    "scores",
    "standard_error",
    "tpr",
    "tpr_at",
]


def scores(
    subject: Subject,
    texts: Sequence[str],
    kinds: Sequence[str] = SCORES,
    reference: Subject | None = None,
    *,
    share: float = 0.4,
    length: int = 512,
) -> dict[str, Values]:
    """Scores of every text, (n,) by kind; higher looks more like a text the model was trained on.

    With l the log-probabilities of a text's tokens: "loss" mean(l); "zlib" sum(l) over the bytes of the compressed
    text; "min_k" the mean of the lowest `share` of l; "min_k++" the same of (l - m) / s, where m and s are mean and
    standard deviation of the log-probability of a token drawn from the model there; "reference", beside the kinds
    where a reference is given, mean(l) less that of the reference.

    Args:
        reference: a model of the same kind that never saw the texts.
        share: of the tokens of a text that Min-K and Min-K++ look at, the least likely ones.
        length: tokens of a text that are read.
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
    found = {kind: np.zeros(len(texts)) for kind in kinds}
    for part, rows in _read(subject, texts, length):
        for i, logs, standard in zip(part, *rows, strict=True):
            for kind in kinds:
                found[kind][i] = _score(kind, logs, standard, texts[i], share)
    if reference is not None:
        own = found["loss"] if "loss" in kinds else scores(subject, texts, ("loss",), length=length)["loss"]
        found["reference"] = own - scores(reference, texts, ("loss",), length=length)["loss"]
    for name, values in found.items():
        if not np.isfinite(values).all():
            first = int(np.flatnonzero(~np.isfinite(values))[0])
            raise NotFinite(f"the score {name!r} of text {first} is {values[first]}; load the model in float32?")
    return found


def privleak(auc: float, auc_reference: float = 0.5) -> float:
    """PrivLeak in percent: (reference - auc) / (1 - reference) of two AUCs, where 1 means member.

    0 is a model that leaks as much as the reference, -100 one that memorised; above 0 the texts look less familiar
    than texts the model never saw, which tells them apart as well.

    Raises:
        MetricError: if the AUC of the reference is 1, or one lies outside [0, 1].
    Reference: Shi et al. 2024, arXiv:2407.06460.
    """
    if not (0 <= auc <= 1 and 0 <= auc_reference < 1):
        raise MetricError(
            f"AUCs {auc} and {auc_reference}; give the first in [0, 1], that of the reference in [0, 1), where 1 means member"
        )
    return 100 * (auc_reference - auc) / (1 - auc_reference)


def check_reading(share: float, length: int) -> None:
    """Refuse a share or length that leaves nothing to score.

    Raises:
        FractionError, ArgumentError: with the value.
    """
    if not 0 < share <= 1:
        raise FractionError(f"share={share}; give a fraction above 0, at most 1")
    if length < 2:
        raise ArgumentError(f"length={length}; a text needs at least 2 tokens to predict one")


def _read(
    subject: Subject, texts: Sequence[str], length: int
) -> Iterator[tuple[list[int], tuple[list[Values], list[Values]]]]:
    """Indices of texts of one length, and their log-probabilities."""
    tokenizer = subject.need_tokenizer()
    for i, text in enumerate(texts):
        check_text(text, f"text {i}")
    ids = [prompt_ids(tokenizer, text)[:length] for text in texts]
    for i, tokens in enumerate(ids):
        check_ids(subject, tokens, f"text {i}")
    short = next((text for text, tokens in zip(texts, ids, strict=True) if len(tokens) < 2), None)
    if short is not None:
        raise DataError(f"the text {short!r} has no token after its first, so nothing is predicted; leave it out")
    for part in lengths(ids, _ROWS):
        yield part, _logs(subject, [ids[i] for i in part])


def _score(kind: str, logs: Values, standard: Values, text: str, share: float) -> float:
    if kind == "zlib":
        return float(logs.sum() / len(zlib.compress(text.encode())))
    return float(logs.mean()) if kind == "loss" else _lowest(logs if kind == "min_k" else standard, share)


def _logs(subject: Subject, ids: Sequence[list[int]]) -> tuple[list[Values], list[Values]]:
    """Log-probabilities of the tokens of texts of one length, and the same standardised as Min-K++ does."""
    tokens = torch.tensor(ids, device=subject.device)
    with torch.no_grad(), evaluating(subject.model):
        logs = at_least_float32(subject.model(input_ids=tokens, use_cache=False).logits[:, :-1]).log_softmax(-1)
        own = logs.gather(-1, tokens[:, 1:, None])[..., 0]
        chance = logs.exp()
        mean = (chance * logs).sum(-1)
        spread = ((chance * (logs - mean[..., None]).square()).sum(-1)).clamp(min=1e-12).sqrt()
    plain, standard = (list(x.double().cpu().numpy()) for x in (own, (own - mean) / spread))
    return plain, standard


def _lowest(values: Values, share: float) -> float:
    return float(np.sort(values)[: max(1, int(share * len(values)))].mean())
