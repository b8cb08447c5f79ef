"""The retain check: accuracy on the retain facts and perplexity of the retain text, which the edit should have preserved."""

from __future__ import annotations

import torch

from repedit.activations.forward import at_least_float32, batches, inputs_of
from repedit.auditing.attack import Attack, AttackRecord, AttackResult, Work, ask
from repedit.auditing.report import RETAIN_CHECK
from repedit.data import Batches, Splits
from repedit.errors import NotEnoughRows
from repedit.hooks import evaluating
from repedit.models.subject import Subject

RETAIN = AttackRecord(RETAIN_CHECK, draws=False, decides=False)


def retain_check(text: Batches | None, *, tokens: int = 4000, length: int = 128, batch_size: int = 8) -> Attack:
    """Ask the facts of V, which are those to retain here, and read a text; not an attack; its result is stored as a finding.

    details: "perplexity" and "tokens" of the text, where there is one.
    """

    def run(subject: Subject, splits: Splits, _: int) -> AttackResult:
        answers = {"prompt": ask(subject, splits.test)} if splits.test else {}
        details = {}
        if text is not None:
            value, count = perplexity(subject, text, tokens=tokens, length=length, batch_size=batch_size)
            details = {"perplexity": value, "tokens": count}
        return AttackResult(answers, details=details)

    options = {"text": text.hash if text is not None else None, "tokens": tokens, "length": length}
    return Attack(RETAIN, options, run, Work(1.0))


def perplexity(
    subject: Subject, text: Batches, *, tokens: int, length: int = 128, batch_size: int = 8
) -> tuple[float, int]:
    """(exp of the mean negative log-likelihood, tokens it is the mean of) on the first rows of a text.

    Infinite where the model is so broken that its loss is not finite.

    Raises:
        NotEnoughRows: if the text has no token to predict.
    """
    total, count = 0.0, 0
    for batch in batches(subject, text, length, batch_size, False, "perplexity"):
        if count >= tokens:
            break
        use = batch.attention_mask[:, 1:] & batch.attention_mask[:, :-1]
        with torch.no_grad(), evaluating(subject.model):
            logits = at_least_float32(subject.model(**inputs_of(batch)).logits[:, :-1][use])
        target = batch.input_ids[:, 1:][use]
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        count += len(target)
    if not count:
        raise NotEnoughRows(f"the text {text.name!r} has no token to predict; give a longer one")
    mean = torch.tensor(total / count, dtype=torch.float64)
    return (float(mean.exp()) if torch.isfinite(mean) else float("inf")), count
