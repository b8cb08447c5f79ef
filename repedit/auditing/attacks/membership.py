"""Whether texts still look as if the model was trained on them; shown beside the verdict and never part of it."""

from __future__ import annotations

from collections.abc import Iterable

from repedit.auditing.attack import Attack, AttackRecord, AttackResult, Work, register, skipped
from repedit.data import Corpus, Facts, Row, Rows, Splits
from repedit.data.encoding import prompt_ids
from repedit.errors import DataError
from repedit.metrics.membership import SCORES, auc, check_reading, scores, tpr
from repedit.models.subject import Subject


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
    check_reading(share, length)

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        if splits.holdout is None:
            return skipped("needs holdout text never trained on")
        members = list({fact.id: fact.text for fact in (*splits.train, *splits.test)}.values())
        others = texts_of(splits.holdout)
        member_scores, other_scores = (
            scores(subject, texts, share=share, length=length) for texts in (members, others)
        )
        cut = sum(len(prompt_ids(subject.need_tokenizer(), text)) > length for text in (*members, *others))
        return AttackResult({}, details={
            "auc": {s: auc(member_scores[s], other_scores[s]) for s in SCORES},
            "tpr_at_1_fpr": {s: tpr(member_scores[s], other_scores[s]) for s in SCORES},
            "members": len(members), "holdout": len(others), "cut": cut,
        })  # fmt: skip

    return Attack(MEMBERSHIP, {"share": share, "length": length}, run, Work(1.0))


MEMBERSHIP = register(
    AttackRecord(
        "membership", cost=190, budget="standard", build=lambda setup: [membership()], level="W", draws=False,
        decides=False,
    )
)  # fmt: skip


def texts_of(source: object) -> list[str]:
    """The texts of facts (those to forget), rows, a corpus, or strings.

    Raises:
        DataError: if the source is none of these, or empty.
    """
    if isinstance(source, Corpus):
        return [document.text for document in source.documents if document.text.strip()]
    items = source.forget if isinstance(source, Facts) else source.items if isinstance(source, Rows) else source
    parts = list(items) if isinstance(items, Iterable) and not isinstance(items, str) else [items]
    texts = [part.text if isinstance(part, Row) else part for part in parts if isinstance(part, Row | str)]
    if parts and len(texts) == len(parts) and not isinstance(items, str):
        return texts
    kinds = sorted({type(part).__name__ for part in parts})
    raise DataError(f"holdout: found {', '.join(kinds) or 'nothing'}; give facts, rows, a corpus or a list of texts")
