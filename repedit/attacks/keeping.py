"""What an audit measures beside the attacks: what should have been kept, and what the choices alone give away."""

from __future__ import annotations

import torch

from repedit.activations.passes import at_least_float32, batches, inputs_of
from repedit.attacks.asking import ask
from repedit.attacks.attack import Attack, Outcome
from repedit.attacks.judging.floors import choices_only
from repedit.data import Batches, Splits
from repedit.errors import NotEnoughRows
from repedit.hooks import evaluating
from repedit.models import Subject


def kept(text: Batches | None, *, tokens: int = 4000, length: int = 128, batch_size: int = 8) -> Attack:
    """Ask the facts of V, which are those to retain here, and read a text; no attack, but found and kept like one.

    details: "perplexity" and "tokens" of the text, where there is one.
    """

    def run(subject: Subject, splits: Splits, _: int) -> Outcome:
        answers = {"prompt": ask(subject, splits.test)} if splits.test else {}
        details = {}
        if text is not None:
            value, count = perplexity(subject, text, tokens=tokens, length=length, batch_size=batch_size)
            details = {"perplexity": value, "tokens": count}
        return Outcome(answers, details=details)

    settings = {"text": text.hash if text is not None else None, "tokens": tokens, "length": length}
    return Attack("retain", "keeping", "B", False, settings, run, decides=False, draws=False)


def blind() -> Attack:
    """Ask V without its questions: what the choices alone give away to the model that was never edited."""

    def run(subject: Subject, splits: Splits, _: int) -> Outcome:
        return Outcome({"choices": choices_only(subject, splits.test)} if any(f.choices for f in splits.test) else {})

    return Attack("choices only", "keeping", "B", False, {}, run, decides=False, draws=False)


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
