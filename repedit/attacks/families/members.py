"""Whether texts still look as if the model was trained on them; shown beside the verdict and never part of it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from repedit.activations.passes import at_least_float32
from repedit.attacks.attack import Attack, Outcome, skipped
from repedit.data import Corpus, Facts, Row, Rows, Splits
from repedit.errors import ArgumentError, DataError, FractionError, NotFinite
from repedit.metrics.probability import lengths
from repedit.models import Subject

SCORES = ("loss", "zlib", "min-k", "min-k++")
# Texts of one length that are read together; Min-K++ looks at every log-probability of every token.
_ROWS = 4

Values = NDArray[np.float64]


def membership(*, share: float = 0.4, length: int = 512) -> Attack:
    """How well the texts to forget are told from holdout texts, which the model never saw; no answers, details alone.

    "auc" by score: 0.5 is no sign of membership, 1 all texts to forget look more familiar than all holdout texts, and
    well below 0.5 is a sign too: of forgetting too much. "tpr_at_1_fpr": share of members found at 1 % false alarms.
    Skipped without `Splits.holdout`: facts, rows, a corpus or texts.

    Args:
        share: of the tokens of a text that Min-K and Min-K++ look at, the least likely ones.
        length: tokens of a text that are read; "cut" in the details counts longer texts.
    Raises:
        FractionError: if the share is not in (0, 1].
        ArgumentError: if the length is below 2.
        DataError: in the call, if the holdout is no such thing, or a text predicts nothing.
        NotFinite: in the call, if a score is not finite.
    Reference: Shi et al. 2024, arXiv:2407.06460; limits: Duan et al. 2024, arXiv:2402.07841.
    """
    _check(share, length)

    def run(subject: Subject, splits: Splits, seed: int) -> Outcome:
        if splits.holdout is None:
            return skipped("needs holdout text never trained on")
        members = list({fact.id: fact.text for fact in (*splits.train, *splits.test)}.values())
        others = texts_of(splits.holdout)
        mine, theirs = (scores(subject, texts, share=share, length=length) for texts in (members, others))
        cut = sum(len(subject.need_tokenizer()(text)["input_ids"]) > length for text in (*members, *others))
        return Outcome({}, details={
            "auc": {s: auc(mine[s], theirs[s]) for s in SCORES},
            "tpr_at_1_fpr": {s: tpr(mine[s], theirs[s]) for s in SCORES},
            "members": len(members), "holdout": len(others), "cut": cut,
        })  # fmt: skip

    return Attack(
        "membership", "members", "W", False, {"share": share, "length": length}, run, decides=False, draws=False
    )


def scores(subject: Subject, texts: Sequence[str], *, share: float = 0.4, length: int = 512) -> dict[str, Values]:
    """Four scores of every text; higher looks more like a text the model was trained on.

    With l the log-probabilities of a text's tokens: "loss" mean(l); "zlib" mean(l) over the bytes of the compressed
    text; "min-k" the mean of the lowest `share` of l; "min-k++" the same of (l - m) / s, where m and s are mean and
    standard deviation of the log-probability of a token drawn from the model there.

    Raises:
        DataError: if there are no texts, or one predicts nothing.
        NotFinite: if a score is not finite.
        FractionError: if the share is not in (0, 1].
        ArgumentError: if the length is below 2.
    Reference: Carlini et al. 2020, arXiv:2012.07805 (zlib); Shi et al. 2023, arXiv:2310.16789 (Min-K); Zhang et al.
    2024, arXiv:2404.02936 (Min-K++).
    """
    _check(share, length)
    if not texts:
        raise DataError("there are no texts to score; give at least one")
    tokenizer = subject.need_tokenizer()
    ids = [list(tokenizer(text)["input_ids"])[:length] for text in texts]
    short = next((text for text, tokens in zip(texts, ids, strict=True) if len(tokens) < 2), None)
    if short is not None:
        raise DataError(f"the text {short!r} has no token after its first, so nothing is predicted; leave it out")
    found = {name: np.zeros(len(texts)) for name in SCORES}
    for part in lengths(ids, _ROWS):
        for i, logs, standard in zip(part, *_logs(subject, [ids[i] for i in part]), strict=True):
            found["loss"][i] = logs.mean()
            found["zlib"][i] = logs.mean() / len(zlib.compress(texts[i].encode()))
            found["min-k"][i] = _lowest(logs, share)
            found["min-k++"][i] = _lowest(standard, share)
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise NotFinite(f"the score {name!r} of a text is not finite; load the model in float32?")
    return found


def auc(pos: Values, neg: Values) -> float:
    """Chance that a positive scores above a negative, ties counting half (Mann-Whitney), exactly.

    Raises:
        DataError: if a side is empty.
    """
    _check_sides(pos, neg)
    order = np.sort(neg)
    below, upto = (np.searchsorted(order, pos, side=side).sum() for side in ("left", "right"))
    return float((below + upto) / (2 * len(pos) * len(neg)))


def tpr(pos: Values, neg: Values, fpr: float = 0.01) -> float:
    """Share of positives above a threshold that at most the share `fpr` of negatives is above.

    Raises:
        DataError: if a side is empty.
    """
    _check_sides(pos, neg)
    threshold = np.sort(neg)[::-1][int(fpr * len(neg))]
    return float((pos > threshold).mean())


def privleak(found: float, reference: float) -> float:
    """PrivLeak in percent: (reference - found) / (1 - reference) of two AUCs, members scoring higher.

    0 is a model that leaks as much as the reference; below 0 the texts still look familiar, above 0 they look less
    familiar than texts the model never saw.

    Raises:
        ArgumentError: if the AUC of the reference is 1, or one lies outside [0, 1].
    Reference: Shi et al. 2024, arXiv:2407.06460.
    """
    if not (0 <= found <= 1 and 0 <= reference < 1):
        raise ArgumentError(f"AUCs {found} and {reference}; give the first in [0, 1], that of the reference in [0, 1)")
    return 100 * (reference - found) / (1 - reference)


def texts_of(source: Any) -> list[str]:
    """The texts of facts (those to forget), rows, a corpus, or strings.

    Raises:
        DataError: if the source is none of these, or empty.
    """
    if isinstance(source, Corpus):
        return [document.text for document in source.documents if document.text.strip()]
    items = source.forget if isinstance(source, Facts) else source.items if isinstance(source, Rows) else source
    parts = list(items) if isinstance(items, Iterable) and not isinstance(items, str) else [items]
    if parts and all(isinstance(part, Row | str) for part in parts) and not isinstance(items, str):
        return [part.text if isinstance(part, Row) else part for part in parts]
    kinds = sorted({type(part).__name__ for part in parts})
    raise DataError(f"holdout: found {', '.join(kinds) or 'nothing'}; give facts, rows, a corpus or a list of texts")


def _logs(subject: Subject, ids: Sequence[list[int]]) -> tuple[list[Values], list[Values]]:
    """Log-probabilities of the tokens of texts of one length, and the same standardised as Min-K++ does."""
    tokens = torch.tensor(ids, device=subject.device)
    with torch.no_grad():
        logs = at_least_float32(subject.model(input_ids=tokens, use_cache=False).logits[:, :-1]).log_softmax(-1)
        own = logs.gather(-1, tokens[:, 1:, None])[..., 0]
        chance = logs.exp()
        mean = (chance * logs).sum(-1)
        spread = ((chance * (logs - mean[..., None]).square()).sum(-1)).clamp(min=1e-12).sqrt()
    plain, standard = (list(x.double().cpu().numpy()) for x in (own, (own - mean) / spread))
    return plain, standard


def _lowest(values: Values, share: float) -> float:
    return float(np.sort(values)[: max(1, int(share * len(values)))].mean())


def _check(share: float, length: int) -> None:
    if not 0 < share <= 1:
        raise FractionError(f"share={share}; give a fraction above 0, at most 1")
    if length < 2:
        raise ArgumentError(f"length={length}; a text needs at least 2 tokens to predict one")


def _check_sides(pos: Values, neg: Values) -> None:
    if not len(pos) or not len(neg):
        raise DataError(f"{len(pos)} members and {len(neg)} others; give at least one of each")
